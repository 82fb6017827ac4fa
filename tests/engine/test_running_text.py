"""Text of answers while they grow, through the tokenizers that ship and that tests build."""

import pytest

from jaxprune.engine.running_text import RunningText

STOPS = ("b!", "ab?")


def running(model, stop=()):
    return RunningText(model.processor, stop)


def ids_of(model, text):
    return model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_join_to_the_whole(small_model, size):
    ids = ids_of(small_model, "There is a red star, and a blue circle.")
    text = running(small_model)
    pieces = []
    for begin in range(0, len(ids), size):
        text.add(ids[begin : begin + size], last=begin + size >= len(ids))
        pieces.append(text.take())
    whole = small_model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "".join(pieces) == text.text == whole
    assert len([piece for piece in pieces if piece]) > 1


def test_the_longest_possible_stop_string_is_held_back(small_model, monkeypatch):
    text = running(small_model, STOPS)
    monkeypatch.setattr(text, "_decoded", lambda last: "xab")
    text.add([1], last=False)
    assert text.take() == "x"
    monkeypatch.setattr(text, "_decoded", lambda last: "c")
    text.add([1], last=False)
    assert text.take() == "abc" and not text.stopped


def test_of_two_stop_strings_the_first_to_be_complete_ends(small_model, monkeypatch):
    text = running(small_model, STOPS)
    monkeypatch.setattr(text, "_decoded", lambda last: "xab!ab?")
    text.add([1], last=False)
    assert text.stopped and text.text == "xa"
    text.add([1], last=True)
    assert text.text == "xa"


def test_a_piece_decodes_no_more_the_longer_the_answer(small_model, monkeypatch):
    text = running(small_model)
    decode, decoded = text._decode, []
    monkeypatch.setattr(
        text, "_decode", lambda begin, end: decoded.append(end - begin) or decode(begin, end)
    )
    for token in ids_of(small_model, "a red star and " * 200):
        text.add([token], last=False)
    assert max(decoded[-100:]) == max(decoded[:100]) < 10
