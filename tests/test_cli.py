"""The command line as a process would meet it: stdout, stderr and exit codes."""

import json
import subprocess
import sys

import pytest
from PIL import Image

import jaxprune
from jaxprune.data import scenes
from tests import builders


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "jaxprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "scene.png"
    scene, _ = scenes.sample("held-out", 0, 0)
    scenes.draw(scene).save(path)
    return path


def test_the_answer_alone_is_on_stdout(image, small_model):
    asked = ("generate", "--image", image, "--prompt", "Where is the red circle?")
    done = run(*asked)
    assert done.returncode == 0
    assert done.stdout.strip() == jaxprune.generate(small_model, image, asked[-1])
    assert done.stderr == ""
    detailed = run(*asked, "--method", "prumerge_plus", "--keep", 20, "--json")
    fields = json.loads(detailed.stdout)
    assert fields["visual_tokens"] == [21]
    assert len(fields["kept_indices"][0]) == 21


def test_methods_are_listed():
    table = run("methods")
    listed = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in listed] == list(jaxprune.METHODS)
    assert all(row["name"] in table.stdout for row in listed)


def test_convert(tmp_path):
    builders.write_directory(tmp_path / "in", builders.tiny_config())
    done = run("convert", tmp_path / "in", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0
    assert "read back and equal" in done.stdout
    again = run("convert", tmp_path / "in", tmp_path / "out")
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert not list(tmp_path.glob(".*"))


MISTAKES = [
    (["generate", "--prompt", "a", "--image", "none.png"], "none.png does not exist"),
    (["generate", "--prompt", " "], "The prompt is empty"),
    (["generate", "--prompt", "a", "--method", "fitprun"], "Unknown method 'fitprun'"),
    (["generate", "--prompt", "a", "--model", "nowhere"], "nowhere does not exist"),
    (["generate", "--prompt", "a", "--dtype", "int8"], "dtype is 'int8'"),
    (["generate"], "Missing option"),
    (["convert", "nowhere", "out"], "nowhere does not exist"),
    (["convert", "nowhere", "out", "--format", "h5"], "format is 'h5'"),
    (["dance"], "No such command"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_end_with_code_2_and_no_traceback(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_calibrate_show_and_use(tmp_path):
    demo = jaxprune.DEMO_IMAGE
    recipe, plot, picture = (tmp_path / name for name in ("r.json", "r.png", "kept.png"))
    data = tmp_path / "data.jsonl"
    line = {"image": str(demo), "question": "What color is the star?", "answer": "red"}
    data.write_text("\n".join([json.dumps(line)] * 3))
    fit = ["calibrate", "--method", "fitprune", "--save", "0.5", "--data", str(data)]
    done = run(*fit, "--out", recipe, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert "save_in_fit" in done.stdout
    assert plot.stat().st_size > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "r.json", "r.png"]

    again = run(*fit, "--out", recipe)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr

    ask = ["--image", demo, "--prompt", "What color is the star?", "--method"]
    shown = run("show", *ask, recipe, "--out", picture)
    assert shown.returncode == 0, shown.stderr
    with Image.open(picture) as image:
        assert image.width > 2 * image.height
    answer = run("generate", *ask, f"uniform,{recipe}", "--keep", "72", "--json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["cost"]["saved"]["macs"] > 0.4
    assert len(found["kept_by_layer"]) >= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["calibrate", "--method", "fitprune", "--out", "x.json"], "needs save"),
        (["calibrate", "--method", "gsearch", "--out", "no/x.json"], "is no directory"),
        (["cost", "--method", "fitprune", "--save", "0.6"], "make one with `jaxprune calibrate`"),
        (["cost", "--method", "prumerge,uniform", "--keep", "3"], "are vision-side"),
        (["cost", "--visual-tokens", "99999999999999999999"], "from 0 to 1,000,000"),
        (["cost", "--image-size", "big"], "expected pixels"),
        (["cost", "--method", "fastv", "--option", "prompt=1"], "prompt is none"),
    ],
)
def test_decoder_side_mistakes(arguments, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
