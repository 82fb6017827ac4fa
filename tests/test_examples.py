"""The trainer of the shipped model, for a few steps."""

import pathlib
import subprocess
import sys

import pytest

import jaxprune
from jaxprune.data import scenes

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "train_small_llava.py"


def train(out, *arguments):
    sizes = ("--vision-batch", "4", "--batch", "2")
    sizes += ("--vision-steps", "2", "--look-up-steps", "2", "--polish-steps", "2")
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *sizes, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_it_trains_goes_on_and_exports_what_loads(tmp_path):
    train(tmp_path / "run", "--steps", "2")
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("*.npz"))
    assert checkpoints == ["answers.npz", "look-up.npz", "polish.npz", "vision.npz"]
    train(tmp_path / "run", "--steps", "3", "--export", str(tmp_path / "model"))
    steps = (tmp_path / "run" / "log.jsonl").read_text()
    assert steps.count('"stage": "vision"') == 1  # the second run found that stage done
    assert '"step": 3' in steps
    model = jaxprune.load(tmp_path / "model")
    scene, question = scenes.sample("held-out", 0, 0)
    jaxprune.generate(model, scenes.draw(scene), question.question, max_new_tokens=2)
