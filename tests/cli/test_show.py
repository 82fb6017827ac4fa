"""`jaxprune show`: the file, patch by patch."""

import numpy as np
import pytest
from PIL import Image

import jaxprune
from jaxprune.reports.kept_patches import views
from tests.reports.pixels import brightness, expected, panels

SIDE = 288


def test_the_file_shows_what_is_kept(tiny_directory, tiny_model, white_image, run, tmp_path):
    out = tmp_path / "kept.png"
    asked = ["--model", tiny_directory, "--image", white_image, "--prompt", "What?"]
    asked += ["--method", "uniform,fastv", "--keep", 8, "--keep-rate", 0.25, "--option", "layer=1"]
    done = run("show", *asked, "--layers", "0,2", "--out", out)
    assert done.code == 0 and done.out == ""
    with Image.open(out) as file:
        sheet = file.convert("RGB")
    size = f"{sheet.width} x {sheet.height} pixels."
    assert done.err.split() == f"{out}: {size}".split()
    answer = jaxprune.generate(
        tiny_model,
        white_image,
        "What?",
        method=("uniform", "fastv"),
        keep=8,
        keep_rate=0.25,
        layer=1,
        return_details=True,
    )
    before, after = answer.kept_indices[0], answer.kept_by_layer[0][0]
    assert (len(before), len(after)) == (8, 2)
    (view,) = views(tiny_model, Image.open(white_image))
    shown = [brightness(picture, view.boxes) for (picture,) in panels(sheet, SIDE, [SIDE])]
    wanted = [expected(view, kept) for kept in (before, after, after)]
    np.testing.assert_array_equal(shown, wanted)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layers", "two"], "--layers is 'two'; expected numbers"),
        (["--layers", "3"], "layer 3 is asked for; the decoder has 0 to 2"),
        (["--out", "no/kept.png"], "is no directory; make it first"),
        (["--out", "kept.unknown"], "expected a picture's name, e.g. kept.png"),
        (["--option", "side=3"], "side is none"),
    ],
)
def test_mistakes(arguments, message, tiny_directory, white_image, refused):
    asked = ["--model", tiny_directory, "--image", white_image, "--prompt", "What?"]
    asked += ["--method", "none", "--out", "kept.png", *arguments]
    assert message in refused("show", *asked)


def test_nothing_is_overwritten(white_image, refused, tmp_path):
    (tmp_path / "kept.png").write_text("mine")
    asked = ["--image", white_image, "--prompt", "What?", "--method", "none", "--out", "kept.png"]
    assert "kept.png exists; name another" in refused("show", *asked)
    assert (tmp_path / "kept.png").read_text() == "mine"
