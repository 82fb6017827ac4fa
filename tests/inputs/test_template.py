"""Chat templates of directories: what they may do, how long and how large."""

import pytest

import jaxprune
from jaxprune.inputs import template
from jaxprune.inputs.template import ChatTemplate

SAY = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def test_it_renders_as_transformers_does():
    text = "{{ bos }}{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    assert ChatTemplate(text, {"bos": "<s>"}).render(SAY) == "<s>hi"
    assert ChatTemplate(text, {"bos": "<s>"}, trusted=True).render(SAY) == "<s>hi"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{% if %}", "Expected an expression"),
        ("{{ ().__class__.__bases__ }}", "unsafe|undefined"),
        ("{{ 'a' | center(3000000000) | length }}", "too much memory"),
        ("{{ 'abcdefgh' * 2000000 }}", "over 10,000,000 letters"),
    ],
)
def test_what_it_must_not(text, message):
    with pytest.raises(jaxprune.UserError, match=message):
        ChatTemplate(text, {}).render(SAY)
    assert ChatTemplate("ok", {}).render(SAY) == "ok"  # the next one is not the worse for it


def test_one_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(jaxprune.UserError, match="over 1 s, or too much memory"):
        ChatTemplate(endless, {}).render(SAY)
    assert ChatTemplate("ok", {}).render(SAY) == "ok"


def test_a_message_that_json_cannot_say():
    with pytest.raises(jaxprune.UserError, match="holds what a chat template cannot be given"):
        ChatTemplate("x", {}).render([{"role": "user", "content": object()}])


def test_without_one():
    with pytest.raises(jaxprune.UserError, match="has no chat template, and its family none"):
        ChatTemplate(None, {}).render(SAY)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("{% for p in messages[0]['content'] %}{{ '<image>' if p['type'] == 'image' else "
         "p['text'] }}{% endfor %}", True),
        ("{{ messages[0]['content'] }}", False),
        ("{{ messages[0]['content'] | upper }}", False),
    ],
)  # fmt: skip
def test_whether_it_takes_parts(text, parts):
    assert ChatTemplate(text, {}, trusted=True).takes_parts is parts
