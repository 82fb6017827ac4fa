"""`jaxprune generate` against the function."""

import io
import json
import pathlib
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
    assert found.pop("compiled") >= 0 == answer.compiled
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
        "batch": 1,
    }
    assert len(found["kept_indices"][0]) == 21


def test_options_reach_the_function(run, monkeypatch, scene, white_image):
    asked: dict[str, Any] = {}

    def load(directory, **fields):
        asked["load"] = (str(directory), fields)
        return "the model"

    def generate(*arguments, **fields):
        asked["generate"] = (arguments, fields)
        raise jaxprune.UserError("enough")

    monkeypatch.setattr(jaxprune, "load", load)
    monkeypatch.setattr(jaxprune, "generate", generate)
    options = f"--model m --dtype float32 --image {scene} --image {white_image} --prompt What?"
    options += " --stop x --stop y --max-new-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9"
    options += " --text-tower c --seed 7 --raw --method iti --option c=2"
    options += " --min-new-tokens 2 --repetition-penalty 1.2 --logprobs 1 --json"
    assert "enough" in run("generate", *options.split()).err
    loading = {"dtype": "float32", "vision_tower": None, "adapter": None, "download": False}
    loading["text_tower"] = pathlib.Path("c")
    assert asked["load"] == ("m", loading)
    (model, images, prompts), fields = asked["generate"]
    assert (model, prompts) == ("the model", ["What?"])
    assert [[image.size for image in row] for row in images] == [[(96, 96), (32, 32)]]
    assert fields == {
        "method": "iti",
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_new_tokens": 2,
        "repetition_penalty": 1.2,
        "logprobs": 1,
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
        (["--prompt", "a", "--dtype", "int4"], "dtype is 'int4'"),
        (["--prompt", "a", "--option", "seed=1"], "seed is none"),
    ],
)
def test_mistakes(arguments, message, refused):
    assert message in refused("generate", *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "a", "--method", "fitprun"], "Unknown method"),
        (["--prompt", "a", "--method", "uniform"], "needs the option keep"),
        (["--prompt", "a", "--keep", "3"], "need a method"),
        (["--prompt", "a", "--method", "no.json"], "no.json does not exist"),
        (["--prompt", "a", "--image", "none.png"], "does not exist"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--top-k", "5"], "give a --temperature above 0"),
        (["--prompt", "a", "--logprobs", "2"], "ask for them with --json"),
        (["--prompt", "a", "--logprobs", "21", "--json"], "expected 0 to 20"),
        (["--prompt", "a", "--min-new-tokens", "-1"], "min_new_tokens is -1"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--prompt", "a", "--images", "nowhere"], "is no directory"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (["--image", "a.png"], "There is no --prompt"),
        (["--prompt", "a", "--out", "x.jsonl"], "--out is for --images and --data"),
        (["--prompt", " "], "The prompt is empty"),
        (["--prompt", "a", "--images", "b", "--data", "c"], "--images and --data came together"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(arguments, message, refused, monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(jaxprune, "load", load)
    assert message in refused("generate", *arguments)


# ---- many requests


@pytest.fixture
def folder(tmp_path, held_out):
    (tmp_path / "images").mkdir()
    for i, (image, _) in enumerate(held_out[:5]):
        image.save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


ASK = "What color is the circle?"


def test_a_folder_of_images(folder, tmp_path, run, small_model, held_out):
    out = tmp_path / "answers.jsonl"
    asked = ["generate", "--images", folder, "--prompt", ASK, "--out", out, "--batch-size", 4]
    done = run(*asked)
    assert done.code == 0 and done.out == "" and "5 answers" in done.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line.pop("settings") for line in lines}) == 1
    expected = [
        {"image": str(folder / f"{i}.png"), "prompt": ASK,
         "text": jaxprune.generate(small_model, image, ASK)}
        for i, (image, _) in enumerate(held_out[:5])
    ]  # fmt: skip
    assert lines == expected
    whole = out.read_text()
    # Ended in the middle of the fourth line, the same command goes on.
    kept = "".join(whole.splitlines(keepends=True)[:3])
    out.write_text(kept + whole.splitlines()[3][:20])
    assert "3 of 5 answers are there already" in run(*asked).err
    assert out.read_text() == whole
    assert run(*asked).code == 0 and out.read_text() == whole
    # Answers of another method are not taken for this one's.
    assert "another model or method" in run(*asked, "--method", "uniform", "--keep", 9).err
    assert out.read_text() == whole


def test_what_failed_is_tried_again(folder, tmp_path, run):
    missing, away = folder / "1.png", tmp_path / "away.png"
    missing.rename(away)
    lines = [{"image": str(folder / f"{i % 3}.png"), "prompt": ASK} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path / "answers.jsonl"
    asked = ["generate", "--data", tmp_path / "data.jsonl", "--out", out, "--max-new-tokens", 4]
    assert run(*asked).code == 1
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in line for line in first] == [False, True, False, False]
    assert run(*asked).code == 1  # it is not there yet
    assert [json.loads(line) for line in out.read_text().splitlines()] == first
    away.rename(missing)
    done = run(*asked)
    assert done.code == 0 and "3 of 4 answers are there already; 1 with an error" in done.err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{x: line[x] for x in ("image", "prompt")} for line in found] == lines
    assert [found[i] for i in (0, 2, 3)] == [first[i] for i in (0, 2, 3)]


def test_lines_of_requests(folder, tmp_path, run, small_model, monkeypatch):
    lines = [
        {"image": "images/0.png", "question": ASK},
        {"image": ["images/1.png"], "prompt": ASK},
        {"image": "images/none.png", "prompt": ASK},
        {"prompt": "Hello"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "data.jsonl").write_text(text)
    done = run("generate", "--data", tmp_path / "data.jsonl", "--max-new-tokens", 4)
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [("text" in line, "error" in line) for line in found] == [
        (True, False), (True, False), (False, True), (True, False),
    ]  # fmt: skip
    assert found[0]["text"] == jaxprune.generate(
        small_model, folder / "0.png", ASK, max_new_tokens=4
    )
    assert done.code == 1 and "1 of 4 requests could not be answered" in done.err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    piped = run("generate", "--data", "-", "--max-new-tokens", 4)
    assert [json.loads(line).get("text") for line in piped.out.splitlines()] == [
        line.get("text") for line in found
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON (nested too deeply)"),
        ("[1]", "line 2 is no request"),
        ('{"image": "a.png"}', "line 2 is no request"),
        ('{"image": 5, "prompt": "a"}', "has the image 5"),
    ],
)
def test_lines_that_are_none(line, message, refused, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    assert message in refused("generate", "--data", "d.jsonl")


def test_answers_of_other_requests_are_kept(folder, refused, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "mine"}\n')
    said = refused("generate", "--images", folder, "--prompt", "a", "--out", "mine.jsonl")
    assert "line 1 is no answer to a request of these; name another file" in said
    assert (tmp_path / "mine.jsonl").read_text() == '{"text": "mine"}\n'


@pytest.mark.parametrize("content", ["my notes", '{"a": 1}\nmy notes', '{"image": "x"}\n'])
def test_a_file_of_ones_own_is_kept(content, folder, refused, tmp_path):
    (tmp_path / "notes").write_text(content)
    said = refused("generate", "--images", folder, "--prompt", "a", "--out", "notes")
    assert "notes is there already" in said
    assert (tmp_path / "notes").read_text() == content
