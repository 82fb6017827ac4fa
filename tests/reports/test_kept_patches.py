"""Pictures of kept patches, checked pixel by pixel: white images, so that kept is white."""

import numpy as np
import pytest
from PIL import Image

import jaxprune
from jaxprune.reports.kept_patches import (
    View,
    kept_over_depth,
    kept_patches,
    views,
    what_the_model_sees,
)
from tests import builders
from tests.reports.pixels import BRIGHT, DARK, brightness, expected, panels, white

SIDE = 120


def grid_view(picture, rows, columns):
    row, column = (x.ravel() for x in np.mgrid[:rows, :columns])
    sides = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
    return View("", picture, np.arange(rows * columns), np.stack(sides, axis=-1))


@pytest.mark.parametrize("kept", [[], [0], [3, 5, -1], range(8)])
def test_kept_is_bright_and_dropped_is_dark(kept):
    view = grid_view(white(40, 20), 2, 4)
    picture = kept_patches(view, np.array([*kept], int), side=100)
    assert picture.size == (100, 50)
    levels = np.asarray(picture)[..., 0]
    for place in range(8):
        top, left = place // 4 * 25, place % 4 * 25
        # A kept patch's last row and column stay dark, so that neighbours can be told apart.
        inside = levels[top : top + 24, left : left + 24]
        assert (inside == (BRIGHT if place in kept else DARK)).all()
    # Nothing else is bright.
    assert (levels == BRIGHT).sum() == 24 * 24 * len([place for place in kept if place >= 0])


def test_colors_stay_and_darken():
    picture = kept_patches(
        grid_view(Image.new("RGB", (2, 1), (200, 100, 40)), 1, 2), np.array([1]), side=20
    )
    assert picture.getpixel((2, 2)) == (50, 25, 10)
    assert picture.getpixel((12, 2)) == (200, 100, 40)


def test_what_the_model_sees_is_the_middle_in_its_colors(tiny_model):
    striped = Image.new("RGB", (64, 32), (10, 20, 30))
    striped.paste((240, 130, 20), (16, 0, 48, 32))
    seen = what_the_model_sees(tiny_model, striped)
    assert seen.size == (32, 32)
    middle = np.asarray(seen)[4:-4, 4:-4].astype(int)
    assert abs(middle - (240, 130, 20)).max() <= 1


# ---- sheets


@pytest.mark.parametrize("layers", [None, [0, 1, 2]])
def test_one_tile_over_depth(layers, tiny_model):
    options = {"method": ("uniform", "fastv"), "keep": 8, "keep_rate": 0.5, "layer": 1}
    image = white(32, 32)
    sheet = kept_over_depth(tiny_model, image, "What?", layers=layers, side=SIDE, **options)
    answer = jaxprune.generate(
        tiny_model, image, "What?", max_new_tokens=1, return_details=True, **options
    )
    before, after = answer.kept_indices[0], answer.kept_by_layer[0][0]
    assert (len(before), len(after)) == (8, 4)
    (view,) = views(tiny_model, image)
    shown = [brightness(picture, view.boxes) for (picture,) in panels(sheet, SIDE, [SIDE])]
    wanted = [before, after] if layers is None else [before, after, after, after]
    np.testing.assert_array_equal(shown, [expected(view, kept) for kept in wanted])


def test_layers_before_the_first_cut_show_what_entered(tiny_model):
    options = {"method": "fastv", "keep_rate": 0.25, "layer": 2}
    sheet = kept_over_depth(tiny_model, white(32, 32), "What?", layers=[0, 1], side=SIDE, **options)
    (view,) = views(tiny_model, white(32, 32))
    shown = [brightness(picture, view.boxes) for (picture,) in panels(sheet, SIDE, [SIDE])]
    assert [int((levels == BRIGHT).sum()) for levels in shown] == [16, 16, 4]


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_that_are_not_there(layer, tiny_model):
    with pytest.raises(jaxprune.UserError, match=f"layer {layer} is asked for; .* has 0 to 2"):
        kept_over_depth(tiny_model, white(32, 32), "What?", method="none", layers=[layer])


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiles") / "m"
    builders.write_directory(directory, builders.tiny_next_config())
    return jaxprune.load(directory)


def test_patches_of_tiles_lie_where_the_tiles_do(tiled):
    whole, tiles = views(tiled, white(96, 32))
    assert whole.patches.tolist() == list(range(16))
    boxes = {patch: tuple(box) for patch, box in zip(tiles.patches, tiles.boxes, strict=True)}
    assert len(boxes) == 48
    for tile, row, column in ((1, 0, 0), (2, 1, 3), (3, 3, 2)):
        left, top = (4 * (tile - 1) + column) / 12, row / 4
        box = boxes[16 * tile + 4 * row + column]
        assert box == pytest.approx((left, top, left + 1 / 12, top + 1 / 4))


@pytest.mark.parametrize("method", ["prumerge", "fastv", "none"])
def test_the_whole_and_the_tiles_below_it(method, tiled):
    image = white(96, 32)
    options = {"method": method, **({"layer": 1} if method == "fastv" else {})}
    sheet = kept_over_depth(tiled, image, "What?", side=SIDE, **options)
    answer = jaxprune.generate(
        tiled, image, "What?", max_new_tokens=1, return_details=True, **options
    )
    kept = [answer.kept_indices[0], *(images[0] for images in answer.kept_by_layer.values())]
    columns = panels(sheet, SIDE, [SIDE // 3] * 2)
    assert len(columns) == len(kept) == (2 if method == "fastv" else 1)
    for pictures, patches in zip(columns, kept, strict=True):
        for view, picture in zip(views(tiled, image), pictures, strict=True):
            shown = brightness(picture, view.boxes)
            np.testing.assert_array_equal(shown, expected(view, patches))
