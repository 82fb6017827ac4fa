"""The model of lmms-eval: how requests are read, and the class where lmms-eval is a stand-in."""

import dataclasses
import importlib
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

import jaxprune
from jaxprune.evaluate.plugin import MAX_NEW_TOKENS, manifest, method_of, request_of
from tests import builders
from tests.cases import picture

IMAGE = {"type": "image", "url": "a picture"}


def user(*parts):
    return [{"role": "user", "content": [*parts]}]


def text(said):
    return {"type": "text", "text": said}


def test_a_conversation_keeps_its_order():
    messages = [
        {"role": "system", "content": [text("Be brief.")]},
        *user(text("Is"), IMAGE, text("like"), {"type": "image", "url": {"bytes": b"x"}}),
    ]
    assert request_of(messages, {})["prompt"] == [
        {"role": "system", "content": [text("Be brief.")]},
        {
            "role": "user",
            "content": [
                text("Is"),
                {"type": "image", "image": "a picture"},
                text("like"),
                {"type": "image", "image": b"x"},
            ],
        },
    ]


GREEDY = {"stop": [], "temperature": 0.0, "max_new_tokens": MAX_NEW_TOKENS}


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({}, GREEDY),
        ({"until": ["\n\n", ""], "max_new_tokens": 16}, {"stop": ["\n\n"], "max_new_tokens": 16}),
        ({"until": "ASSISTANT:"}, {"stop": ["ASSISTANT:"]}),
        ({"max_new_tokens": 49152}, {"max_new_tokens": 4096}),
        # What tasks write where nothing is drawn.
        ({"temperature": 0, "top_p": 0, "do_sample": False, "num_beams": 1}, GREEDY),
        ({"temperature": 0.0, "top_p": 1.0, "image_aspect_ratio": "original"}, GREEDY),
        ({"temperature": None, "top_p": None, "num_beams": None}, GREEDY),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"temperature": 1, "top_p": 0.9, "top_k": 5, "seed": 3},
            {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 3},
        ),
        ({"temperature": 0.5, "top_p": 0, "top_k": 0}, {"temperature": 0.5}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_generation_options(asked, expected):
    found = request_of(user(IMAGE, text("What?")), asked)
    del found["prompt"]
    assert found == {**GREEDY, **expected}


@pytest.mark.parametrize(
    "part, asked, message",
    [
        ({"type": "video", "url": "no.mp4"}, {}, "The video no.mp4 does not exist"),
        ({"type": "audio", "url": "a.wav"}, {}, "There is audio in the question"),
        (IMAGE, {"num_beams": 3}, "num_beams is 3; jaxprune searches no beams"),
    ],
)
def test_what_is_not_supported(part, asked, message):
    with pytest.raises(jaxprune.UserError, match=message):
        request_of(user(part, text("What?")), asked)


def test_methods_of_model_args():
    assert method_of("vtw") == "vtw"
    assert method_of("uniform+fastv") == ("uniform", "fastv")
    assert method_of("my/recipe.json") == "my/recipe.json"


@pytest.fixture
def stand_in(monkeypatch):
    """The class, on as much of lmms-eval as it needs; and what it reported."""
    reported = []

    @dataclasses.dataclass
    class TokenCounts:
        input_tokens: int
        output_tokens: int

    @dataclasses.dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts

    class Base:
        def __init__(self):
            self.task_dict: dict[str, Any] = {}

    @dataclasses.dataclass
    class ModelManifest:
        model_id: str
        chat_class_path: str

    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "TokenCounts": TokenCounts,
            "GenerationResult": GenerationResult,
        },
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {
            "log_metrics": lambda **fields: reported.append(fields)
        },
    }
    for name, fields in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(fields)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "jaxprune.evaluate.lmms", raising=False)
    yield importlib.import_module("jaxprune.evaluate.lmms").JaxPrune, reported
    del sys.modules["jaxprune.evaluate.lmms"]


def requests_of(docs, task="toy"):
    def messages(doc):
        return user({"type": "image", "url": doc["image"]}, text(doc["question"]))

    asked = {"max_new_tokens": 3, "until": [], "temperature": 0}
    return [
        types.SimpleNamespace(args=("", messages, dict(asked), i, task, "test"))
        for i in range(len(docs))
    ]


def test_answers_are_those_of_generate(stand_in, tiny_directory, tiny_model):
    cls, reported = stand_in
    docs = [{"image": picture(i), "question": f"What {i}?"} for i in range(3)]
    model = cls(
        pretrained=str(tiny_directory), method="uniform+vtw", keep=4, batch_size="2", device=None
    )
    assert not cls.is_simple
    model.task_dict["toy"] = {"test": docs}
    found = model.generate_until(requests_of(docs))
    options: dict[str, Any] = {"method": ("uniform", "vtw"), "keep": 4, "max_new_tokens": 3}
    alone = [
        jaxprune.generate(tiny_model, doc["image"], doc["question"], return_details=True, **options)
        for doc in docs
    ]
    assert [result.text for result in found] == [answer.text for answer in alone]
    assert [result.token_counts.input_tokens for result in found] == [
        answer.prompt_tokens for answer in alone
    ]
    (fields,) = reported
    assert fields["total_gen_tokens"] == sum(len(answer.token_ids) for answer in alone)
    costs = fields["additional_metrics"]
    cost = alone[0].cost
    mean = sum(layer.visual_in for layer in cost.layers) / len(cost.layers)
    assert costs["visual_tokens"] == pytest.approx(mean)
    assert costs["gflops"] == pytest.approx(2e-9 * sum(a.cost.macs for a in alone) / 3)
    assert 0.3 < costs["flops_saved"] < 1 and costs["first_token_seconds_of_a_batch"] > 0


@pytest.fixture
def film(tmp_path):
    """A video file and its frames."""
    frames = [picture(i) for i in range(4)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    return tmp_path / "film.gif"


def about_a_film(film):
    asked = {"max_new_tokens": 3, "until": [], "temperature": 0}
    messages = user({"type": "video", "url": str(film)}, text("What happens?"))
    return types.SimpleNamespace(args=("", lambda doc: messages, asked, 0, "films", "test"))


@pytest.mark.slow
def test_a_video_goes_to_a_model_that_sees_videos(stand_in, film, tmp_path):
    cls, _ = stand_in
    builders.write_directory(tmp_path / "seeing", builders.tiny_video_config(temporal=True))
    model = cls(pretrained=str(tmp_path / "seeing"))
    model.task_dict["films"] = {"test": [{}]}
    (found,) = model.generate_until([about_a_film(film)])
    alone = jaxprune.generate(
        model.params, jaxprune.Video(film), "What happens?", max_new_tokens=3, return_details=True
    )
    assert found.text == alone.text
    assert found.token_counts.input_tokens == alone.prompt_tokens


def test_a_video_for_a_model_without_is_an_error(stand_in, film, tiny_directory):
    cls, _ = stand_in
    model = cls(pretrained=str(tiny_directory))
    model.task_dict["films"] = {"test": [{}]}
    with pytest.raises(jaxprune.UserError, match="Task films, document 0: The model takes no vid"):
        model.generate_until([about_a_film(film)])


def test_an_error_is_no_empty_answer(stand_in, tiny_directory):
    cls, _ = stand_in
    docs = [{"image": picture(0), "question": "What?"}, {"image": "no.png", "question": "What?"}]
    model = cls(pretrained=str(tiny_directory))
    model.task_dict["toy"] = {"test": docs}
    with pytest.raises(jaxprune.UserError, match=r"Task toy, document 1: .*no\.png"):
        model.generate_until(requests_of(docs))
    (request,) = requests_of(docs[:1])
    request.args[2]["num_beams"] = 2
    with pytest.raises(jaxprune.UserError, match="Task toy, document 0: num_beams is 2"):
        model.generate_until([request])
    assert model.generate_until([]) == []
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="jaxprune"):
            getattr(model, name)([])


def test_mistakes_in_model_args(stand_in, monkeypatch):
    cls, _ = stand_in
    monkeypatch.setattr(sys.modules["jaxprune.evaluate.lmms"], "load", None)
    with pytest.raises(jaxprune.UserError, match="Unknown method 'vwt'"):
        cls(method="vwt")
    with pytest.raises(jaxprune.UserError, match="There is no option kepe"):
        cls(method="uniform", kepe=4)


def test_the_entry_point(stand_in):
    cls, _ = stand_in
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["lmms_eval.models"].values()
    module, name = entry.split(":")
    assert getattr(importlib.import_module(module), name) is manifest
    found = manifest()
    path, name = found.chat_class_path.rsplit(".", 1)
    assert found.model_id == "jaxprune"
    assert getattr(importlib.import_module(path), name) is cls
