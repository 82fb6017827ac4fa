"""`jaxprune calibrate`: recipe, plot, and what Ctrl-C leaves."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

import jaxprune
from jaxprune.methods.recipes import published_recipes
from jaxprune.reports.recipe_plot import plot_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    line = {"image": str(jaxprune.DEMO_IMAGE), "question": "What is it?", "answer": "red"}
    path.write_text("\n".join([json.dumps(line)] * 3))
    return path


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_recipe_and_its_plot_and_its_use(tiny_directory, tiny_model, data, run, tmp_path):
    recipe, plot = tmp_path / "r.json", tmp_path / "r.png"
    fit = ["calibrate", "--model", tiny_directory, "--method", "fitprune", "--save", 0.5]
    done = run(*fit, "--data", data, "--out", recipe, "--plot", plot)
    assert done.code == 0 and done.err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]

    made = jaxprune.load_recipe(recipe)
    expected = jaxprune.calibrate(tiny_model, data, method="fitprune", save=0.5)
    assert made.options == json.loads(json.dumps(expected.options))
    assert made.reached == expected.reached
    reached = ", ".join(f"{name} {value:.4g}" for name, value in made.reached.items())
    assert done.out.startswith(f"{recipe}: fitprune, 3 samples, ")
    assert done.out.endswith(f" s. Reached: {reached}.\n")

    plot_recipe(made, tiny_model.config, tmp_path / "again.png")
    np.testing.assert_array_equal(pixels(plot), pixels(tmp_path / "again.png"))

    asked = ["--model", tiny_directory, "--image", jaxprune.DEMO_IMAGE, "--prompt", "What is it?"]
    used = run("generate", *asked, "--method", f"uniform,{recipe}", "--keep", 12, "--json")
    answer = jaxprune.generate(
        tiny_model,
        jaxprune.DEMO_IMAGE,
        "What is it?",
        method=("uniform", made),
        keep=12,
        return_details=True,
    )
    found = json.loads(used.out)
    assert found["visual_tokens"] == [12] and found["text"] == answer.text
    assert found["cost"]["saved"]["macs"] == round(answer.cost.saved["macs"], 6)
    assert list(found["kept_by_layer"]) == [str(layer) for layer in answer.kept_by_layer]


def test_json_and_the_settings_that_arrive(tiny_directory, run, tmp_path, monkeypatch):
    asked = {}
    made = published_recipes("gsearch")[0]

    def calibrate(params, samples, *, progress_file, **settings):
        asked.update(samples=samples, progress_file=progress_file, **settings)
        return made

    monkeypatch.setattr(jaxprune, "calibrate", calibrate)
    options = "--method gsearch --tolerance 0.1 --metric logprob --search bayesian --evaluations 3"
    options += " --first-pruned-layer 1 --queries last --batch-size 4 --seed 5 --json"
    out = tmp_path / "r.json"
    done = run("calibrate", "--model", tiny_directory, "--out", out, *options.split())
    assert json.loads(done.out) == json.loads(json.dumps(dataclasses.asdict(made)))
    assert jaxprune.load_recipe(out) == made
    assert asked == {
        "samples": None,
        "progress_file": tmp_path / "r.json.progress",
        "method": "gsearch",
        "save": None,
        "keep_rate": None,
        "tolerance": 0.1,
        "metric": "logprob",
        "search": "bayesian",
        "evaluations": 3,
        "first_pruned_layer": 1,
        "queries": "last",
        "stage2": 0.5,
        "batch_size": 4,
        "seed": 5,
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "fitprune", "--out", "x.json"], "needs save"),
        (["--method", "prumerge", "--out", "x.json"], "what can be calibrated: fitprune"),
        (["--method", "gsearch", "--out", "no/x.json"], "is no directory"),
        (["--method", "gsearch", "--out", "x.json", "--plot", "no/x.png"], "is no directory"),
        (["--method", "gsearch", "--out", "x.json", "--data", "no.jsonl"], "no.jsonl does not"),
    ],
)
def test_mistakes(arguments, message, refused):
    assert message in refused("calibrate", *arguments)


def test_nothing_is_overwritten(refused, tmp_path):
    for name in ("x.json", "x.png"):
        (tmp_path / name).write_text("mine")
    fit = ["calibrate", "--method", "gsearch", "--out"]
    assert "x.json exists; name another" in refused(*fit, "x.json")
    assert "x.png exists" in refused(*fit, "y.json", "--plot", "x.png")


def test_a_plot_needs_matplotlib(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fit = ["calibrate", "--method", "gsearch", "--out", "x.json", "--plot", "x.png"]
    assert "Plots need matplotlib; install jaxprune[viz]" in refused(*fit)
