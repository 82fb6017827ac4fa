"""Where images stand, and where "<image>" is text."""

import base64
import io

import numpy as np
import pytest

import jaxprune
from jaxprune.inputs.prompts import AS_TEXT, as_messages, num_places, render
from jaxprune.inputs.request import make_request
from tests.cases import picture


def user(content):
    return {"role": "user", "content": content}


def said(text):
    return {"role": "assistant", "content": text}


ONE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "prompt, images, parts",
    [
        ("What?", "a", ["image", "What?"]),
        ("<image>\nWhat?", "a", ["image", "What?"]),
        ("<image> or <image>?", "ab", ["<image> or <image>?"]),
        (r"What does the \<image> tag do?", "a", ["image", f"What does the {AS_TEXT} tag do?"]),
        ("What does the <image> tag do?", "a", ["image", f"What does the {AS_TEXT} tag do?"]),
        ("What is this? <image>", "a", ["What is this? <image>"]),
        ("Look:\n<image>\nWhat?", "a", ["Look:\n<image>\nWhat?"]),
        ([user([WHAT, ONE, WHAT])], "a", ["What?", "image", "What?"]),
        ([user([ONE, {"type": "text", "text": "the <image> tag"}])], "a",
         ["image", f"the {AS_TEXT} tag"]),
        ([user([{"type": "image", "image": "x"}, ONE, WHAT])], "a", ["image", "image", "What?"]),
    ],
)  # fmt: skip
def test_places(prompt, images, parts):
    messages, found = as_messages(prompt, list(images))
    content = messages[-1]["content"]
    assert [part.get("text", part["type"]) for part in content] == parts
    own = ["x"] if isinstance(prompt, list) and "image" in prompt[0]["content"][0] else []
    assert found == [*own, *images]


def test_what_the_assistant_said_places_nothing():
    turns = [user("Hi"), said("Write <image> there."), user("<image>\nWhat?")]
    messages, found = as_messages(turns, ["a"])
    assert messages[1]["content"][0]["text"] == f"Write {AS_TEXT} there."
    assert messages[2]["content"][0] == ONE and found == ["a"]
    turns = [user("Hi"), said("<image>"), user("What?")]
    messages, _ = as_messages(turns, ["a"])
    assert messages[0]["content"][0] == ONE  # in front, since nobody else places it


def test_other_keys_go_to_the_template():
    turn = {**user([{**WHAT, "cache": 1}, {**ONE, "detail": "low"}]), "name": "me"}
    messages, _ = as_messages([turn], ["a"])
    assert messages[0]["name"] == "me"
    assert messages[0]["content"] == [{**WHAT, "cache": 1}, {**ONE, "detail": "low"}]


@pytest.mark.parametrize(
    "prompt, number",
    [
        ("a", 0),
        ("<image><image>", 2),
        (r"\<image> <image>", 1),
        ([user("<image>"), said("<image>"), user("<image>")], 2),
        ([user([ONE, {"type": "image", "path": "a.png"}, {"type": "text", "text": "<image>"}])], 1),
    ],
)
def test_how_many_places(prompt, number):
    assert num_places(prompt) == number


def test_the_word_is_tokenised_as_text(tiny_model):
    processor = tiny_model.processor
    text = processor.placeholder_as_text
    assert processor.image_token_id not in text
    assert processor.tokenizer.decode(text) == "<image>"
    prompts = [
        r"What does \<image> do?",
        [user([ONE, {"type": "text", "text": "What does <image> do?"}])],
    ]
    rows = [make_request(processor, picture(0), p, chat=True).rows[0] for p in prompts]
    assert rows[0] == rows[1]
    before, after = rows[0].pieces
    assert processor.image_token_id not in before + after
    assert "What does <image> do?" in processor.tokenizer.decode(after)


def test_an_earlier_turn_may_say_anything(tiny_model):
    turns = [user("{'type': 'image'} is a dict"), said("<image> and {'type'"), user("What?")]
    answer = jaxprune.generate(tiny_model, picture(0), turns, max_new_tokens=2, return_details=True)
    assert answer.visual_tokens == [16]
    text = render(tiny_model.processor, as_messages(turns, [picture(0)])[0])
    assert text.startswith("USER: <image>\n{'type': 'image'} is a dict")


def test_special_tokens_can_be_neutralised(tiny_model):
    processor, text = tiny_model.processor, "one </s> two"
    end = processor.tokenizer.eos_token_id
    plain, broken = (
        make_request(processor, None, text, chat=True, neutralise=how).rows[0].pieces[0]
        for how in (False, True)
    )
    assert end in plain and end not in broken
    assert "one <\u200b/s> two" in processor.tokenizer.decode(broken)


@pytest.mark.parametrize("first, second", [("a </", "s> b"), ("a <", "/s> b"), ("a </ ", "s>")])
def test_parts_that_make_a_special_token_together_are_neutralised(tiny_model, first, second):
    processor = tiny_model.processor
    turn = user([{"type": "text", "text": text} for text in (first, second)])
    ids = make_request(processor, None, [turn], chat=True, neutralise=True).rows[0].pieces[0]
    assert processor.tokenizer.eos_token_id not in ids
    assert "\u200b" + second in processor.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "prompt, images, message",
    [
        ("<image> <image> a", 1, "has 2 <image> placeholder"),
        ([user([ONE, WHAT])], 2, "has 1 <image> placeholder"),
        ([user([ONE])], 1, "The prompt is empty"),
        ([user([{"type": "sound"}])], 0, "A message has the content {'type': 'sound'}"),
        ([user([{"type": "text"}])], 0, "A message has the content"),
        ([{"role": "tool", "content": "a"}], 0, "role 'tool'"),
        ([user("a"), said("b")], 0, "does not end with a user message"),
        ([{"role": "user"}], 0, "expected a dict with 'role' and 'content'"),
    ],
)
def test_mistakes(prompt, images, message):
    with pytest.raises(jaxprune.UserError, match=message):
        as_messages(prompt, [None] * images)


def test_images_that_parts_bring_are_not_mixed_up(tiny_model):
    """Texts of base64 are made and forgotten one after the other."""
    written = []
    for i in range(6):
        file = io.BytesIO()
        picture(i, (8, 8)).save(file, "PNG")
        written.append(base64.b64encode(file.getvalue()).decode())
    prompts = [[user([{"type": "image", "base64": text}, WHAT])] for text in written]
    made = make_request(tiny_model.processor, None, prompts, chat=True)
    assert [row.images for row in made.rows] == [[i] for i in range(6)]
    for i, image in enumerate(made.images):
        assert (np.asarray(image) == np.asarray(picture(i, (8, 8)))).all()


def test_a_long_line_is_read_at_once():
    messages, _ = as_messages("<image>\n" + "a" * 500_000, ["a"])
    assert messages[0]["content"][0] == ONE


def test_what_neutralise_cannot_do(tiny_model):
    with pytest.raises(jaxprune.UserError, match="neutralise is for what is said in a chat"):
        make_request(tiny_model.processor, None, "a", chat=False, neutralise=True)
