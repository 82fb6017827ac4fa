"""Runs from their beginning to their end, stopped, killed and taken up again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.calibrate import Sample
from jaxprune.errors import UserNote
from jaxprune.train import Settings, published_recipes, read_recipe
from jaxprune.train.recipes import settings_of
from jaxprune.train.run import Habits, begin, prepare
from tests import builders
from tests.cases import mostly_slow, picture

SETTINGS = {
    "method": "prumerge_plus:keep=6", "rank": 4, "alpha": 8.0, "learning_rate": 1e-2,
    "projector_rate": 1e-3, "batch_size": 4, "micro_batch": 2, "steps": 5,
}  # fmt: skip
QUESTIONS = ("What?", "Where is the red circle?", "a b c", "Is it?", "Who?", "Why?")
SAMPLES = [Sample(picture(i), text, f"it is {i}") for i, text in enumerate(QUESTIONS)]


def prepared(model, out, samples=SAMPLES, **settings):
    own = Settings(**{**SETTINGS, **settings})
    return begin(model, prepare(samples, out, settings=own, habits=Habits(save_every=2)))


def lines_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run = prepared(tiny_model, out)
    run.go(lambda: False, show_progress=False)
    return run, run.finish()


def test_it_learns_and_says_what_it_did(whole):
    run, finished = whole
    lines = lines_of(run.out)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["answer_tokens"] > 0 and line["flops"] > 0 for line in lines)
    assert lines[-1]["epoch"] == pytest.approx(10 / 3)
    assert (finished.step, finished.accuracy) == (5, None)
    assert run.checkpoints.steps() == [4, 5]


def test_its_adapter_is_what_it_learned(whole, tiny_directory):
    run, finished = whole
    params = jaxprune.load(tiny_directory, adapter=finished.directory)
    chex.assert_trees_all_close(params.arrays, finished.params.arrays, atol=1e-6)
    before = jaxprune.load(tiny_directory)["language_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    after = params["language_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert np.abs(np.asarray(after - before)).max() > 1e-4
    chex.assert_trees_all_equal(params["vision_tower"], run.params["vision_tower"])


@pytest.mark.parametrize("after", mostly_slow([1, 2], [1]))
def test_one_that_was_stopped_ends_as_one_that_was_not(after, whole, tiny_model, tmp_path):
    """After a checkpoint of its own, and in the middle between two."""
    asked = iter([False] * after + [True] * 9)
    run = prepared(tiny_model, tmp_path / "run")
    run.go(lambda: next(asked), show_progress=False)
    assert not run.done and run.step == after
    with (tmp_path / "run" / "log.jsonl").open("a") as file:  # as if it had been killed later
        file.write('{"update": 4, "loss": 0.0}\n{"upda')
    again = prepared(tiny_model, tmp_path / "run")
    assert again.step == after
    again.go(lambda: False, show_progress=False)
    chex.assert_trees_all_equal(jax.device_get(again.state), jax.device_get(whole[0].state))
    assert lines_of(again.out) == lines_of(whole[0].out)


def test_what_is_finished_is_there_at_once(whole, tiny_model):
    run, finished = whole
    again = prepared(tiny_model, run.out)
    assert again.done
    again.go(lambda: False, show_progress=False)
    assert again.finish().directory == finished.directory
    assert lines_of(run.out) == lines_of(again.out)


def test_parts_in_full_are_written_as_a_model(tiny_model, tmp_path):
    finished = jaxprune.train(
        tiny_model, SAMPLES[:2], tmp_path / "run", train="projector", batch_size=2, micro_batch=2,
        steps=1, projector_rate=1e-2,
    )  # fmt: skip
    params = jaxprune.load(finished.directory)
    chex.assert_trees_all_close(params.arrays, finished.params.arrays, atol=0)
    chex.assert_trees_all_equal(params["language_model"], tiny_model["language_model"])
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), params["multi_modal_projector"],
        tiny_model["multi_modal_projector"],
    )  # fmt: skip
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.slow
def test_the_best_one_is_kept(small_model, tmp_path):
    """Of a model that was good, and is spoiled by learning: the first evaluation's."""
    image = jaxprune.DEMO_IMAGE
    right = [Sample(image, "What shape is the blue object?", "triangle")]
    asked = tmp_path / "questions.jsonl"
    said = jaxprune.generate(small_model, image, right[0].question, max_new_tokens=4)
    line = {"image": str(image), "question": right[0].question, "answer": said}
    asked.write_text(json.dumps(line))
    samples, out = [Sample(image, "What is there?", "nothing at all to be seen")], tmp_path / "run"
    own = {"rank": 2, "batch_size": 1, "micro_batch": 1, "steps": 4, "learning_rate": 0.5}
    own |= {"warmup": 0.5, "keep": 1, "save_every": 3}
    finished = jaxprune.train(small_model, samples, out, eval_data=asked, eval_every=1, **own)
    scores = [x["evaluation"]["accuracy"] for x in lines_of(tmp_path / "run") if "evaluation" in x]
    assert (scores[0], scores[-1]) == (1.0, 0.0)
    assert (finished.step, finished.accuracy) == (1, 1.0)
    without = jaxprune.train(small_model, samples, out, **own)  # it stays the best
    assert (without.step, without.accuracy) == (1, 1.0)
    assert jaxprune.generate(finished.params, image, right[0].question, max_new_tokens=4) == said


@pytest.mark.slow
def test_llavas_form_of_an_adapter(tmp_path):
    pytest.importorskip("torch")
    base, tower = builders.write_original(tmp_path / "base", tmp_path / "tower")
    params, out = jaxprune.load(base, vision_tower=tower), tmp_path / "run"
    own = {"rank": 2, "batch_size": 2, "micro_batch": 2, "steps": 1, "learning_rate": 0.1}
    finished = jaxprune.train(params, SAMPLES[:2], out, base=base, adapter_form="llava", **own)
    assert finished.directory == out / "llava-lora"
    again = jaxprune.load(base, vision_tower=tower, adapter=finished.directory)
    chex.assert_trees_all_close(again.arrays, finished.params.arrays, atol=1e-6)
    told = f"directory of a training run, which made {out / 'llava-lora'}"
    with pytest.raises(jaxprune.UserError, match=told):
        jaxprune.load(out)


def test_a_loss_that_is_no_number(tiny_model, tmp_path):
    run = prepared(tiny_model, tmp_path / "run", learning_rate=1e30, clip=0.0, warmup=0.0)
    with pytest.raises(jaxprune.UserError, match=r"The loss of update 2 is nan.* saved in .*lower"):
        run.go(lambda: False, show_progress=False)
    assert run.checkpoints.steps() == [1]


def test_an_error_loses_no_update(tiny_model, tmp_path):
    picture(5).save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    samples = [*SAMPLES[:5], Sample(tmp_path / "broken.png", "What?", "a")]
    own = Settings(**{**SETTINGS, "batch_size": 2, "steps": 50})
    run = begin(tiny_model, prepare(samples, tmp_path / "run", settings=own, habits=Habits()))
    with pytest.raises(jaxprune.UserError, match=r"Sample 6: .*broken.png"):
        run.go(lambda: False, show_progress=False)
    assert run.checkpoints.steps()[-1:] == ([run.step] if run.step else [])
    assert lines_of(run.out)[-1]["update"] == run.step > 0


def test_more_rows_than_there_are(tiny_model, tmp_path):
    with pytest.warns(UserNote, match="takes 8 rows and there are 6, so each is seen 1.3"):
        run = prepared(tiny_model, tmp_path / "run", batch_size=8)
    assert run.updates == 5


def test_other_settings_and_data_are_refused(whole, tiny_model):
    out = whole[0].out
    with pytest.raises(jaxprune.UserError, match=r"rank \(there 4, here 8\)"):
        prepared(tiny_model, out, rank=8)
    assert prepared(tiny_model, out, remat="full").done
    with pytest.raises(jaxprune.UserError, match="other data"):
        prepared(tiny_model, out, SAMPLES[:4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rnk": 3}, "There is no setting 'rnk'; expected some of method, train, rank"),
        ({"train": "tower"}, "train is 'tower'; expected one of: lora, projector, decoder, all"),
        ({"batch_size": 10, "micro_batch": 4}, "a micro_batch that divides it"),
        ({"method": "prumrge"}, "Did you mean 'prumerge'"),
        ({"recipe": "nobody"}, "no training recipe 'nobody'; expected a file, or one of: iti, "),
        ({"eval_every": 3}, "there is no eval_data"),
        ({"adapter_form": "loha"}, "adapter_form is 'loha'; expected one of: peft, llava"),
        ({"adapter_form": "llava"}, "LLaVA's own form of an adapter is"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    ],
)
def test_mistakes(options, message, tiny_model, tmp_path):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.train(tiny_model, SAMPLES, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_directories_of_something_else(tiny_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(jaxprune.UserError, match=r"holds thesis\.txt and no training run"):
        jaxprune.train(tiny_model, SAMPLES, tmp_path)
    with pytest.raises(jaxprune.UserError, match="is a file"):
        jaxprune.train(tiny_model, SAMPLES, tmp_path / "thesis.txt")


def test_recipes_of_papers():
    found = published_recipes()
    assert set(found) == {"iti", "prumerge", "prumerge_plus", "psigmoid"}
    for name, recipe in found.items():
        assert recipe == read_recipe(name)
        assert recipe.settings.method.partition(":")[0] == name
        assert (recipe.settings.rank, recipe.settings.batch_size) == (128, 160)
        assert recipe.stated and recipe.left_open and "arXiv" in recipe.source
    assert settings_of("prumerge", {"rank": 3}).rank == 3


TWO_SIGNALS = """
import os, signal, threading, time
from jaxprune.train.stopping import stopping
signal.signal(signal.SIGINT, signal.default_int_handler)  # what began this may ignore it
with stopping() as asked_to_stop:
    assert not asked_to_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked_to_stop()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        print("interrupted")
done = []
thread = threading.Thread(target=lambda: done.append(stopping().__enter__()()))
thread.start()
thread.join()
assert done == [False]
"""


def test_a_signal_asks_once():
    done = subprocess.run([sys.executable, "-c", TWO_SIGNALS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


# ---- processes


@pytest.fixture
def command(tiny_directory, tmp_path):
    """A command that trains, as a list of words, but for the run's directory."""
    lines = []
    for i, question in enumerate(QUESTIONS):
        picture(i).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": question, "answer": f"it is {i}"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = {"batch-size": 4, "micro-batch": 2, "rank": 4, "method": "prumerge_plus:keep=6"}
    options = [x for name, value in written.items() for x in (f"--{name}", str(value))]
    data = ["--data", str(tmp_path / "data.jsonl"), "--model", str(tiny_directory)]
    return [sys.executable, "-m", "jaxprune", "train", *data, *options]


def updates_told(out):
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def state_of(out, step):
    files = sorted((out / "checkpoints" / f"{step:08}" / "state").rglob("*"))
    assert files
    adapter = jaxprune.checkpoints_convert.files.open_tensors(
        out / "adapter" / "adapter_model.safetensors"
    )
    return {tensor.key: tensor.read() for tensor in adapter}


@pytest.mark.slow
def test_one_that_was_killed_ends_as_one_that_was_not(command, tmp_path):
    """JAXPRUNE_KILLS says at how many random moments; by hand 10."""
    steps, moments = 30, random.Random(0)
    options = ["--steps", str(steps), "--save-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, *options, "--out", str(whole)], check=True, capture_output=True)
    number = int(os.environ.get("JAXPRUNE_KILLS", "3"))
    for after in sorted(moments.sample(range(steps - 5), number)):
        process = subprocess.Popen(
            [*command, *options, "--out", str(killed)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not (after == 0 or updates_told(killed) >= after):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))  # an update's time, or a checkpoint's
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    last = subprocess.run(
        [*command, *options, "--out", str(killed)], capture_output=True, text=True
    )
    assert last.returncode == 0, last.stderr
    chex.assert_trees_all_equal(state_of(killed, steps), state_of(whole, steps))
    assert lines_of(killed) == lines_of(whole)
    assert sorted(x.name for x in killed.iterdir()) == ["adapter", "checkpoints", "log.jsonl"]


@pytest.mark.slow
def test_ctrl_c_saves_and_stops(command, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "--steps", "100000", "--save-every", "99999", "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = out / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, ""), told
    assert "Stopped after" in told and "the same command resumes" in told
    (step,) = (int(x.name) for x in (out / "checkpoints").iterdir() if x.name.isdecimal())
    assert step == len(lines_of(out)) and f"Stopped after {step} of" in told
    shutil.rmtree(out)
