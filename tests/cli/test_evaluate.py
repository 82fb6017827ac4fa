"""`jaxprune evaluate`: the table, JSON, the file of answers, and what is refused."""

import importlib
import json
import sys

import pytest
from PIL import Image

import jaxprune
from jaxprune.evaluate import Evaluation, Row
from jaxprune.evaluate.scoring import SCORINGS
from tests.cases import picture


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    picture(0).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"no image")
    lines = [
        {"image": name, "question": "What?", "answer": "x", "kind": kind}
        for name, kind in (("a.png", "one"), ("a.png", "[two]"), ("broken.png", "one"))
    ]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "d.jsonl"


def without_time(found):
    return [{name: x for name, x in row.items() if name != "seconds"} for row in found["rows"]]


def test_json_is_the_functions_and_a_file_resumes(tiny_directory, tiny_model, data, run, tmp_path):
    out, plot = tmp_path / "answers.jsonl", tmp_path / "plot.png"
    asked = ["evaluate", "--model", tiny_directory, "--data", data, "--method", "uniform:keep=4"]
    asked += ["--max-new-tokens", 2, "--out", out, "--json"]
    done = run(*asked, "--plot", plot)
    expected = jaxprune.evaluate(tiny_model, data, methods="uniform:keep=4", max_new_tokens=2)
    assert without_time(json.loads(done.out)) == without_time(
        json.loads(json.dumps(expected.as_dict()))
    )
    assert done.code == 1 and "2 answers, of all methods, are missing" in done.err
    assert "the first, under none: " in done.err and "broken.png" in done.err
    with Image.open(plot) as picture_of_it:
        assert picture_of_it.format == "PNG"
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:5]))
    again = run(*asked)
    assert "3 of 6 answers are there already" in again.err
    assert without_time(json.loads(again.out)) == without_time(json.loads(done.out))
    assert out.read_text().count("\n") == whole.count("\n")


ROW = {
    "errors": 0,
    "first_error": None,
    "interval": (0.85, 0.9512),
    "visual_tokens": 144.0,
    "macs": 1.5e9,
    "seconds": 0.00321,
    "figures": {"accuracy_plus": 0.5, "score": 150.0},
}
KIND = {"samples": 2, "accuracy": 0.25, "interval": (0.125, 0.5)}
FIRST = Row(
    method="none", accuracy=0.9, difference=None, difference_interval=None, significant=None,
    kinds={"[a]": {**KIND, "difference": None, "significant": None}}, **ROW,
)  # fmt: skip
SECOND = Row(
    method="uniform:keep=4", accuracy=0.8, difference=-0.1, difference_interval=(-0.15, -0.05),
    significant=True, kinds={"[a]": {**KIND, "significant": True, "difference": -0.5,
                                    "difference_interval": (-0.75, -0.25)}},
    **{**ROW, "errors": 2, "macs": None, "visual_tokens": None, "seconds": None},
)  # fmt: skip


def cells(line):
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_the_table(tiny_directory, run, monkeypatch):
    asked = []
    module = importlib.import_module("jaxprune.cli.evaluate")

    def stand_in(params, task):
        asked.append(task)
        return Evaluation([FIRST, SECOND], 12, {"mme": 12}, 5)

    monkeypatch.setattr(module, "run", stand_in)
    monkeypatch.setenv("COLUMNS", "250")  # so that no cell is wrapped
    options = ["--samples", 12, "--max-new-tokens", 5, "--batch-size", 3, "--scoring", "exact"]
    done = run("evaluate", "--model", tiny_directory, "--method", "uniform:keep=4", *options)
    (task,) = asked
    assert [method.label for method in task.methods] == ["none", "uniform:keep=4"]
    assert (len(task.items), task.max_new_tokens, task.batch_size) == (12, 5, 3)
    assert {item.scoring for item in task.items} == {"exact"}
    lines = done.out.splitlines()
    table = [cells(line) for line in lines if line.startswith("│ ")]
    assert table == [
        ["none", "90.0", "85.0 to 95.1", "", "144.0", "3", "3.2", "0"],
        ["uniform:keep=4", "80.0", "85.0 to 95.1", "-10.0 (-15.0 to -5.0) *", "-", "-", "-", "2"],
        ["none", "50.0", "150.0"],
        ["uniform:keep=4", "50.0", "150.0"],
        ["none", "25.0"],
        ["uniform:keep=4", "25.0 *"],
    ]
    heads = [cell.strip() for line in lines if "┃" in line for cell in line.split("┃")]
    assert {"accuracy plus", "score", "[a] (2)"} <= set(heads)
    assert "12 questions, scored as: 12 mme" in done.out
    assert "difference: to none," in done.out
    assert done.code == 1
    more = run("evaluate", "--model", tiny_directory, "--samples", 12, "--intervals")
    table = [cells(line) for line in more.out.splitlines() if line.startswith("│ ")]
    assert table[4:] == [
        ["[a] (2)", "none", "25.0", "12.5 to 50.0", ""],
        ["", "uniform:keep=4", "25.0", "12.5 to 50.0", "-50.0 (-75.0 to -25.0) *"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "fitprun"], "Unknown method 'fitprun'"),
        (["--method", "uniform"], "needs the option keep"),
        (["--method", "uniform:keep=4;c=1"], "There is no option c"),
        (["--method", "vtw", "--method", "vtw"], "vtw is there twice"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (["--scoring", "bleu"], f"expected one of: {', '.join(SCORINGS)}"),
        (["--scoring", "pope"], "pope needs yes or no"),
        (["--samples", "0"], "samples is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--out", "no/x.jsonl"], "is no directory"),
        (["--plot", "no/x.png"], "is no directory"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(arguments, message, refused, monkeypatch):
    monkeypatch.setattr(jaxprune, "load", None)
    assert message in refused("evaluate", *arguments)


@pytest.mark.parametrize(
    "line, message",
    [
        ({}, "is no question; expected an object with"),
        ({"answer": None}, "has the answers (None,); expected a list of texts"),
        ({"answers": []}, "has no answers; give at least one"),
        ({"answer": "x", "image": None}, "has the image None; expected a path"),
        ({"answer": "x", "image": "no.png"}, "no.png does not exist"),
        ({"answer": "maybe", "scoring": "pope"}, "['maybe']; pope needs yes or no"),
        ({"answer": "yes", "scoring": "mme"}, 'has no "pair"; mme needs what both questions'),
        ({"answer": "yes", "pair": "1"}, "1 pairs of"),
        ({"answer": "A", "scoring": "choice"}, "has 0 choices; expected 2 to 26"),
        ({"answer": "C", "choices": ["a", "b"]}, "expected the letter or the text of one of"),
        ({"answers": ["x"] * 3, "scoring": "vqa"}, "has 3 of the ten annotators' answers"),
    ],
)
def test_a_question_that_cannot_be_scored_is_named(
    line, message, refused, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr(jaxprune, "load", None)
    folder = tmp_path_factory.mktemp("data")
    picture(0).save(folder / "a.png")
    (folder / "d.jsonl").write_text(json.dumps({"image": "a.png", "question": "What?", **line}))
    said = refused("evaluate", "--data", folder / "d.jsonl")
    assert message in said and "d.jsonl" in said


def test_a_budget_that_cannot_be_met_is_named(refused, tiny_directory):
    methods = ["--method", "vtw:layer=1", "--method", "uniform:keep=99"]
    said = refused("evaluate", "--model", tiny_directory, "--samples", 2, *methods)
    assert said.startswith("Error: uniform:keep=99: keep is 99, but ")


def test_files_of_ones_own_are_kept(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxprune, "load", None)
    for name in ("x.jsonl", "x.png"):
        (tmp_path / name).write_text("mine\n")
    assert "holds no evaluation" in refused("evaluate", "--out", "x.jsonl", "--samples", 1)
    assert "x.png exists" in refused("evaluate", "--plot", "x.png")


def test_a_plot_needs_matplotlib(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "Plots need matplotlib" in refused("evaluate", "--plot", "x.png")


def test_budgets_and_towers_arrive(refused, monkeypatch):
    module, asked = importlib.import_module("jaxprune.cli.evaluate"), {}

    def prepare(data, *, methods, **fields):
        asked["methods"] = methods
        return prepared(data, methods=methods, **fields)

    def load(directory, **fields):
        asked.update(fields)
        raise jaxprune.UserError("enough")

    prepared = module.prepare
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(jaxprune, "load", load)
    methods = ["--method", "uniform:keep=9,4", "--method", "vtw", "--samples", "1"]
    assert "enough" in refused("evaluate", *methods, "--vision-tower", "v", "--text-tower", "t")
    assert asked["methods"] == ["uniform:keep=9", "uniform:keep=4", "vtw"]
    assert (str(asked["vision_tower"]), str(asked["text_tower"])) == ("v", "t")
    assert "uniform:keep=4 is there twice" in refused("evaluate", "--method", "uniform:keep=4,4")
