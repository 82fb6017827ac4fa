"""Evaluations from end to end, on the small models."""

import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxprune
from jaxprune.evaluate import Item
from jaxprune.evaluate.answers_file import Outcome
from jaxprune.evaluate.methods import name_methods
from jaxprune.evaluate.results import evaluation
from jaxprune.evaluate.scoring import exact_match
from jaxprune.evaluate.statistics import mean_interval, paired_difference
from tests.cases import picture

NO_CHANGE = dict.fromkeys(("difference", "difference_interval", "significant"))
METHODS = [{"method": "uniform", "keep": 4}, "vtw:layer=1"]


def outcome(text, **fields):
    return Outcome(**{"text": text, "error": None, "visual_tokens": 4.0, "macs": 10,
                      "seconds": 0.5, "compiled": 0, **fields})  # fmt: skip


def test_figures_are_those_of_the_answers(tiny_model):
    requests = [(picture(i), f"What {i}?") for i in range(9)]

    def answers(arguments):
        asked = {"max_new_tokens": 2, "return_details": True, **arguments}
        return list(jaxprune.generate_many(tiny_model, requests, **asked))

    truth = [answer.text for answer in answers({})]
    items = [
        Item(image, question, ["other" if i < 3 else truth[i]], kind="ab"[i % 2])
        for i, (image, question) in enumerate(requests)
    ]
    found = jaxprune.evaluate(tiny_model, items, methods=METHODS, max_new_tokens=2)
    assert [row.method for row in found.rows] == ["none", "uniform:keep=4", "vtw:layer=1"]
    first = None
    asked = [{}, METHODS[0], {"method": "vtw", "layer": 1}]
    for row, arguments in zip(found.rows, asked, strict=True):
        own = answers(arguments)
        scores = np.array([exact_match(a.text, i.answers) for a, i in zip(own, items, strict=True)])
        assert (row.accuracy, *row.interval) == mean_interval(scores)
        if first is None:
            assert row.difference is None and row.significant is None
            first = scores
        else:
            change = paired_difference(first, scores)
            assert (row.difference, row.difference_interval) == (change.mean, change[1:3])
            assert row.significant == change.significant
        assert row.macs == np.mean([answer.cost.macs for answer in own])
        for start, kind in enumerate("ab"):
            of_kind = mean_interval(scores[start::2])
            change = paired_difference(first[start::2], scores[start::2])
            expected = {"samples": 5 - start, "accuracy": of_kind.mean, "interval": of_kind[1:]}
            if row.difference is None:
                expected |= NO_CHANGE
            else:
                expected |= {"difference": change.mean, "difference_interval": change[1:3]}
                expected |= {"significant": change.significant}
            assert row.kinds[kind] == expected
        assert row.errors == 0 and row.figures == {}
    none, uniform, vtw = (row.visual_tokens for row in found.rows)
    layers = tiny_model.config.text_config.num_hidden_layers
    assert (none, uniform) == (16, 4) and vtw == 16 / layers
    assert found.samples == 9 and found.scoring == {"exact": 9}
    assert found.rows[0].accuracy == 6 / 9
    json.dumps(found.as_dict(), allow_nan=False)


def test_what_cannot_be_answered_is_counted(tiny_model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    items = [Item(picture(0), "What?", ["x"]), Item(tmp_path / "broken.png", "What?", ["x"])]
    found = jaxprune.evaluate(tiny_model, items, methods="none", max_new_tokens=1)
    (row,) = found.rows
    assert row.errors == 1 and "broken.png" in row.first_error and row.visual_tokens == 16
    none = jaxprune.evaluate(tiny_model, items[1:], methods="none").rows[0]
    assert (none.errors, none.accuracy, none.macs) == (1, 0, None)


# ---- the file of answers


def ask(model, items, out, **changed):
    asked = {"methods": ["uniform:keep=4"], "max_new_tokens": 2, "out": out, **changed}
    return jaxprune.evaluate(model, items, **asked)


@pytest.fixture(scope="module")
def tiny_items(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    picture(0).save(path)
    return [Item(str(path), f"What {i}?", ["x"], kind=str(i % 2)) for i in range(3)]


def without_time(found):
    return [dataclasses.replace(row, seconds=0) for row in found.rows]


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_items, tmp_path_factory):
    """A file of answers, and what the evaluation gave."""
    path = tmp_path_factory.mktemp("out") / "answers.jsonl"
    return path, ask(tiny_model, tiny_items, path)


@pytest.fixture
def asked(monkeypatch):
    """The questions that the model is asked."""
    module, found = importlib.import_module("jaxprune.evaluate.run"), []
    real = module.generate_many

    def counted(params, requests, **fields):
        found.extend((fields["method"], request["prompt"]) for request in requests)
        return real(params, requests, **fields)

    monkeypatch.setattr(module, "generate_many", counted)
    return found


def lines_of(path):
    """The lines after the first, without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{name: x for name, x in line.items() if name not in TIMED} for line in lines]


TIMED = ("seconds", "compiled")


def test_lines_are_what_was_answered(whole, tiny_model, tiny_items):
    path, _ = whole
    head = json.loads(path.read_text().splitlines()[0])
    assert head["jaxprune evaluation"] == 2 and head["max_new_tokens"] == 2
    lines = lines_of(path)
    assert [(line["method"], line.get("sample")) for line in lines] == [
        (label, n) for label in ("none", "uniform:keep=4") for n in (None, 1, 2, 3)
    ]
    assert set(lines[4]) == {"method", "options"} and lines[4]["options"] != lines[0]["options"]
    last = jaxprune.generate(
        tiny_model, tiny_items[2].image, "What 2?", method="uniform", keep=4, max_new_tokens=2,
        return_details=True,
    )  # fmt: skip
    assert lines[-1] == {
        "method": "uniform:keep=4", "sample": 3, "question": "What 2?", "answers": ["x"],
        "score": 0.0, "text": last.text, "visual_tokens": 4.0, "macs": last.cost.macs,
    }  # fmt: skip


@pytest.mark.parametrize(
    "lines, more, answers",
    [(0, 0, 0), (0, 9, 0), (1, 0, 0), (1, 30, 0), (2, 0, 0), (4, 1, 2), (5, 9, 3), (6, 0, 3),
     (8, 5, 5)],
)  # fmt: skip
def test_it_goes_on_where_it_ended(
    lines, more, answers, whole, tiny_model, tiny_items, tmp_path, asked
):
    path, found = whole
    parts = path.read_text().splitlines(keepends=True)
    out = tmp_path / "out.jsonl"
    out.write_text("".join(parts[:lines]) + parts[lines][:more])
    again = ask(tiny_model, tiny_items, out)
    assert without_time(again) == without_time(found)
    assert len(asked) == 6 - answers
    assert lines_of(out) == lines_of(path)


def test_a_finished_file_is_read_alone(whole, tiny_model, tiny_items):
    path, found = whole
    before = path.read_text()
    assert ask(tiny_model, tiny_items, path) == found
    assert path.read_text() == before


def test_methods_come_and_go(whole, tiny_model, tiny_items, tmp_path, asked):
    out = tmp_path / "out.jsonl"
    out.write_text(whole[0].read_text())
    several = ["vtw:layer=1", "uniform:keep=4"]
    found = ask(tiny_model, tiny_items, out, methods=several)
    assert asked == [("vtw", f"What {i}?") for i in range(3)]
    alone = jaxprune.evaluate(tiny_model, tiny_items, methods=several, max_new_tokens=2)
    assert without_time(found) == without_time(alone)
    after, asked[:] = out.read_text(), []
    assert ask(tiny_model, tiny_items, out, methods="vtw:layer=1").rows == found.rows[:2]
    assert asked == [] and out.read_text() == after


def test_one_that_was_broken_off_goes_on_behind_another(
    whole, tiny_model, tiny_items, tmp_path, asked
):
    out = tmp_path / "out.jsonl"
    out.write_text("".join(whole[0].read_text().splitlines(keepends=True)[:7]))
    ask(tiny_model, tiny_items, out, methods="vtw:layer=1")
    found = ask(tiny_model, tiny_items, out)
    assert asked[3:] == [("uniform", "What 1?"), ("uniform", "What 2?")]
    assert without_time(found) == without_time(whole[1])


@pytest.mark.parametrize(
    "other, changed",
    [
        ("data", {"items": 2}),
        ("max_new_tokens", {"max_new_tokens": 3}),
        ("data", {"answers": ["a"] * 4}),  # scored by another rule
    ],
)
def test_a_file_of_another_evaluation_is_refused(other, changed, whole, tiny_model, tiny_items):
    path, _ = whole
    before = path.read_text()
    changed = dict(changed)
    items = tiny_items[: changed.pop("items", 3)]
    if answers := changed.pop("answers", None):
        items = [dataclasses.replace(item, answers=answers) for item in items]
    with pytest.raises(jaxprune.UserError, match=f"with other {other}; name another file"):
        ask(tiny_model, items, path, **changed)
    assert path.read_text() == before


def test_other_weights_and_images_are_refused(whole, tiny_model, tiny_items, tmp_path):
    path, _ = whole
    other = jax.tree.map(lambda x: x + 1, tiny_model)
    with pytest.raises(jaxprune.UserError, match="with other weights"):
        ask(other, tiny_items, path)
    picture(1).save(tmp_path / "a.png")
    changed = [dataclasses.replace(tiny_items[0], image=str(tmp_path / "a.png")), *tiny_items[1:]]
    with pytest.raises(jaxprune.UserError, match="with other data"):
        ask(tiny_model, changed, path)
    # The same image in another place is the same data.
    picture(0).save(tmp_path / "a.png")
    assert len(ask(tiny_model, changed, path).rows) == 2


def test_other_options_under_the_same_name_are_refused(whole, tiny_model, tiny_items, tmp_path):
    """As where a recipe's file is another one by now."""
    digest = lines_of(whole[0])[4]["options"]
    (tmp_path / "o").write_text(whole[0].read_text().replace(digest, "0" * 12))
    with pytest.raises(jaxprune.UserError, match="under other options of uniform:keep=4; name"):
        ask(tiny_model, tiny_items, tmp_path / "o")
    assert len(ask(tiny_model, tiny_items, tmp_path / "o", methods="none").rows) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("my notes", "holds no evaluation"),
        ("my notes\n", "holds no evaluation"),
        ('{"a": 1}\n', "holds no evaluation"),
        ("[1]\n", "holds no evaluation"),
        ('{"jaxprune evaluation": 1}\n', "is of another version of jaxprune"),
    ],
)
def test_a_file_of_ones_own_is_kept(content, message, tiny_model, tiny_items, tmp_path):
    (tmp_path / "notes").write_text(content)
    with pytest.raises(jaxprune.UserError, match=f"{message}; name another file"):
        ask(tiny_model, tiny_items, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == content


def first_question_twice(lines):
    return [*lines[:3], lines[2]]


def no_line_of_the_method(lines):
    return [lines[0], *lines[2:4]]


def changed(**fields):
    def change(lines):
        return [*lines[:2], json.dumps({**json.loads(lines[2]), **fields}) + "\n"]

    return change


@pytest.mark.parametrize(
    "change, line",
    [
        (first_question_twice, 4),
        (no_line_of_the_method, 2),
        (changed(sample=4), 3),
        (changed(sample=True), 3),
        (changed(sample=[1]), 3),
        (changed(method=["none"]), 3),
        (changed(text=None), 3),
        (changed(error="why"), 3),
        (changed(macs="many"), 3),
        (changed(seconds=float("nan")), 3),
        (changed(compiled=None), 3),
    ],
)
def test_lines_that_no_evaluation_wrote_are_refused(
    change, line, whole, tiny_model, tiny_items, tmp_path
):
    lines = whole[0].read_text().splitlines(keepends=True)
    (tmp_path / "o").write_text("".join(change(lines)))
    with pytest.raises(jaxprune.UserError, match=f"line {line} is no answer that is due"):
        ask(tiny_model, tiny_items, tmp_path / "o")


KILLED = """
import importlib, os, signal, sys
run = importlib.import_module("jaxprune.evaluate.run")
real, left = run.append, [int(sys.argv.pop(1))]

def append(*arguments):
    real(*arguments)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

run.append = append
from jaxprune.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("answers", [1, 4])
def test_a_kill_loses_nothing(answers, tiny_model, tiny_directory, tmp_path):
    picture(0).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": f"What {i}?", "answer": "x"} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["evaluate", "--model", tiny_directory, "--data", "d.jsonl", "--out", "o.jsonl",
               "--method", "uniform:keep=4", "--max-new-tokens", "2", "--json"]  # fmt: skip
    started = [sys.executable, "-c", KILLED, str(answers), *map(str, command)]
    killed = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len([line for line in lines_of(tmp_path / "o.jsonl") if "sample" in line]) == answers
    found = jaxprune.evaluate(
        tiny_model, tmp_path / "d.jsonl", methods="uniform:keep=4", max_new_tokens=2,
        out=tmp_path / "o.jsonl",
    )  # fmt: skip
    alone = jaxprune.evaluate(
        tiny_model, tmp_path / "d.jsonl", methods="uniform:keep=4", max_new_tokens=2
    )
    assert without_time(found) == without_time(alone)


# ---- time


def test_seconds_are_without_compilation(tiny_model, tiny_items):
    """One batch of all three: their share of it, once it is compiled."""

    def seconds():
        return jaxprune.evaluate(tiny_model, tiny_items, methods="none", max_new_tokens=2).rows[0]

    jax.clear_caches()
    assert seconds().seconds is None
    began = time.perf_counter()
    assert 0 < seconds().seconds < (time.perf_counter() - began) / 3


def test_seconds_of_a_row_are_those_of_batches_that_compiled_nothing():
    items = [Item("a.png", "?", ["x"])] * 5
    said = [outcome("x", seconds=9.0, compiled=3), outcome("x", seconds=0.25),
            outcome("x", seconds=0.5), outcome("x", seconds=2.0),
            outcome(None, error="broken", seconds=None)]  # fmt: skip
    (row,) = evaluation(items, ["none"], [said], 16).rows
    assert row.seconds == 0.5  # the median


# ---- methods


def test_methods_in_every_form():
    named = name_methods(
        [
            "uniform,vtw:keep=4",
            (jaxprune.UniformPlaces(keep=4), jaxprune.VTW()),
            {"method": ("uniform", "fastv"), "keep": 4, "keep_rate": 0.25},
            jaxprune.PruMergePlus(keep=8),
            None,
        ]
    )
    assert [label for label, _ in named] == [
        "uniform,vtw:keep=4",
        "uniform:keep=4,vtw",
        "uniform,fastv:keep=4;keep_rate=0.25",
        "prumerge_plus:keep=8",
        "none",
    ]
    assert named[0].arguments == {"method": ("uniform", "vtw"), "keep": 4}
    assert [label for label, _ in name_methods("prumerge")] == ["none", "prumerge"]


@pytest.mark.parametrize(
    "methods, message",
    [
        (["vtw", "vtw"], "vtw is there twice"),
        ("vtv", "Did you mean 'vtw'"),
        ("uniform", "needs the option keep"),
        ("uniform:keep=4;c=1", "no option c"),
        ("uniform:keep", "expected name=value"),
        ("uniform:method=vtw", "names two methods"),
        ({"keep": 4}, "expected the key 'method'"),
        ({"method": "uniform", "keep": 4, "batch_size": 3}, "no option batch_size"),
        ([3], "method is a int"),
        ([jaxprune.VTW], "pass an instance"),
    ],
)
def test_methods_that_are_none(methods, message, tiny_model):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.evaluate(tiny_model, methods=methods)


@pytest.mark.parametrize(
    "method, message",
    [
        ("gsearch", "gsearch: "),
        ("uniform:keep=17", "uniform:keep=17: keep is 17, but an image of this request has 16"),
        ("vtw:layer=9", "vtw:layer=9: "),
        ("cdpruner:keep=4", "cdpruner:keep=4: "),  # which needs a text tower
    ],
)
def test_a_method_that_does_not_fit_is_refused_before_the_first_runs(
    method, message, tiny_model, monkeypatch
):
    monkeypatch.setattr(importlib.import_module("jaxprune.evaluate.run"), "generate_many", None)
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.evaluate(tiny_model, methods=method, samples=2)


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "samples"])
def test_numbers(name, tiny_model):
    with pytest.raises(jaxprune.UserError, match=f"{name} is 0"):
        jaxprune.evaluate(tiny_model, methods="none", **{name: 0})


# ---- figures


def test_figures_of_pope_and_mme_by_kind():
    pope = {"question": "Is there?", "scoring": "pope"}
    mme = {"question": "Is it?", "scoring": "mme"}
    items = [
        Item("a", answers=["Yes"], kind="popular", **pope),
        Item("a", answers=["no"], kind="random", **pope),
        Item("b", answers=["yes"], kind="code", pair="1", **mme),
        Item("b", answers=["no"], kind="code", pair="1", **mme),
        Item("c", answers=["yes"], kind="color", pair="1", **mme),
        Item("c", answers=["no"], kind="color", pair="1", **mme),
    ]
    said = [outcome(text) for text in ("Yes", "Yes", "Yes", "no", "Yes", "Yes")]
    none = outcome(None, error="broken", visual_tokens=None, macs=None, seconds=None)
    first, second = evaluation(items, ["a", "b"], [said, [none] * 6], 16).rows
    assert first.accuracy == pytest.approx(4 / 6)
    assert first.figures == {
        "precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "yes_ratio": 1,
        "accuracy_plus": 0.5, "score": 250,
    }  # fmt: skip
    # Of a single image all draws are the same.
    assert first.kinds["color"] == {
        "samples": 2, "accuracy": 0.5, "interval": (0.5, 0.5), **NO_CHANGE,
        "accuracy_plus": 0, "score": 50,
    }  # fmt: skip
    assert first.kinds["random"]["yes_ratio"] == 1 and first.seconds == 0.5
    assert (second.errors, second.accuracy, second.macs) == (6, 0, None)
    assert second.figures["yes_ratio"] == 0
    assert second.difference == pytest.approx(-4 / 6)
    assert second.significant is False  # of three images


def test_questions_about_one_image_are_drawn_together():
    items = [Item(f"{i // 4}.png", "?", ["x"]) for i in range(40)]
    said = [outcome("x" if i // 4 % 2 else "y") for i in range(40)]
    (row,) = evaluation(items, ["none"], [said], 16).rows
    scores = [i // 4 % 2 for i in range(40)]
    assert (row.accuracy, *row.interval) == mean_interval(scores, np.arange(40) // 4)
    assert row.kinds == {}
