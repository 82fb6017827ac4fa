"""`jaxprune generate` against the function."""

import json
from typing import Any

import pytest

import jaxprune


def test_json_holds_every_field_of_the_answer(scene, small_model, run):
    options = {"method": ("prumerge_plus", "fastv"), "keep": 20, "keep_rate": 0.25}
    question = "Where is the red circle?"
    arguments = ["--method", "prumerge_plus,fastv", "--keep", 20, "--keep-rate", 0.25, "--json"]
    done = run("generate", "--image", scene, "--prompt", question, *arguments)
    assert done.code == 0 and done.err == ""
    found = json.loads(done.out)
    answer = jaxprune.generate(small_model, scene, question, return_details=True, **options)
    seconds = found.pop("seconds")
    assert list(seconds) == list(answer.seconds)
    assert all(value >= 0 for value in seconds.values())
    assert found == {
        "method": "prumerge_plus,fastv",
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": [21],
        "unpruned_visual_tokens": [144],
        "kept_indices": [answer.kept_indices[0].tolist()],
        "kept_by_layer": {
            str(layer): [kept.tolist() for kept in images]
            for layer, images in answer.kept_by_layer.items()
        },
        "cost": json.loads(json.dumps(answer.cost.as_dict())),
    }
    assert len(found["kept_indices"][0]) == 21


def test_options_reach_the_function(run, monkeypatch):
    asked: dict[str, Any] = {}

    def load(directory, **fields):
        asked["load"] = (str(directory), fields)
        return "the model"

    def generate(*arguments, **fields):
        asked["generate"] = (arguments, fields)
        raise jaxprune.UserError("enough")

    monkeypatch.setattr(jaxprune, "load", load)
    monkeypatch.setattr(jaxprune, "generate", generate)
    options = "--model m --dtype float32 --image a.png --image b.png --prompt What? --stop x"
    options += " --stop y --max-new-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 7 --raw"
    assert "enough" in run("generate", *options.split(), "--option", "c=2").err
    assert asked["load"] == ("m", {"dtype": "float32", "vision_tower": None})
    (model, images, prompts), fields = asked["generate"]
    assert (model, prompts) == ("the model", ["What?"])
    assert [[path.name for path in row] for row in images] == [["a.png", "b.png"]]
    assert fields == {
        "method": "none",
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["x", "y"],
        "chat": False,
        "return_details": True,
        "keep": None,
        "save": None,
        "keep_rate": None,
        "c": 2,
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "a", "--image", "none.png"], "none.png does not exist"),
        (["--prompt", " "], "The prompt is empty"),
        (["--prompt", "a", "--method", "fitprun"], "Unknown method 'fitprun'"),
        (["--prompt", "a", "--model", "nowhere"], "nowhere does not exist"),
        (["--prompt", "a", "--dtype", "int8"], "dtype is 'int8'"),
        (["--prompt", "a", "--option", "seed=1"], "seed is none"),
    ],
)
def test_mistakes(arguments, message, refused):
    assert message in refused("generate", *arguments)
