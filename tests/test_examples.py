"""The trainers of the shipped model, for a few steps."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

import jaxprune
from jaxprune.data import scenes
from jaxprune.evaluate.data import read_items
from tests.data.third_party import write_easy_vqa, write_fashion

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def train(out, *arguments):
    sizes = ("--vision-batch", "4", "--batch", "2")
    sizes += ("--vision-steps", "2", "--look-up-steps", "2", "--polish-steps", "2")
    run("train_small_llava.py", "--out", out, *sizes, *arguments)


def lines(out, stage):
    """What a stage's log says."""
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_trains_goes_on_and_exports_what_loads(tmp_path):
    train(tmp_path / "run", "--steps", "2")
    stages = sorted(path.parent.name for path in (tmp_path / "run").glob("*/checkpoints"))
    assert stages == ["answers", "look-up", "polish", "vision"]
    again = ("--export", str(tmp_path / "model"))
    train(tmp_path / "run", "--steps", "2", *again)
    assert len(lines(tmp_path / "run", "vision")) == 1  # the second run found that stage done
    model = jaxprune.load(tmp_path / "model")
    scene, question = scenes.sample("held-out", 0, 0)
    jaxprune.generate(model, scenes.draw(scene), question.question, max_new_tokens=2)


@pytest.mark.slow
def test_the_shipped_model_is_continued_with_its_old_tokens(tmp_path):
    folders = ("--easy-vqa", write_easy_vqa(tmp_path / "easy"))
    folders += ("--fashion", write_fashion(tmp_path / "fashion"))
    stages = ("heads", "tower", "look-up", "compare")
    steps = ("--steps", "1", *(x for stage in stages for x in (f"--{stage}-steps", "1")))
    out = ("--out", tmp_path / "run", "--export", tmp_path / "model")
    run("continue_small_llava.py", *folders, *steps, *out)
    logs = {stage: lines(tmp_path / "run", stage) for stage in (*stages, "answers")}
    assert [x for x, log in logs.items() if "held-out" in log[-1]] == [*stages[2:], "answers"]
    # The second run finds all stages done.
    run("continue_small_llava.py", *folders, *steps, "--out", tmp_path / "run")
    assert {stage: lines(tmp_path / "run", stage) for stage in logs} == logs

    old, new = jaxprune.load(), jaxprune.load(tmp_path / "model")
    tokenizers = [one.processor.tokenizer for one in (old, new)]
    for index in range(60):
        _, question = scenes.sample("held-out", 0, index)
        a, b = (one.encode(question.question) for one in tokenizers)
        assert a == b
    words = [one.tokenize("a pullover") for one in tokenizers]
    assert len(words[1]) == 2 < len(words[0])


@pytest.mark.parametrize("data", ["easy-vqa", "fashion", "scenes"])
def test_questions_are_written_for_evaluation(tmp_path, data, monkeypatch, capsys):
    write = {"easy-vqa": write_easy_vqa, "fashion": write_fashion, "scenes": pathlib.Path}[data]
    source, out = write(tmp_path / "source"), tmp_path / "data"
    options = ["--data", data, "--source", source, "--out", out, "--samples", 5]
    monkeypatch.setattr("sys.argv", ["write_questions.py", *map(str, options)])
    runpy.run_path(str(EXAMPLES / "write_questions.py"), run_name="__main__")
    assert len(read_items(capsys.readouterr().out.strip())) == 5
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        runpy.run_path(str(EXAMPLES / "write_questions.py"), run_name="__main__")
