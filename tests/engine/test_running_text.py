"""Text of answers while they grow."""

import types

import pytest

from jaxprune.engine.running_text import RunningText

STOPS = ("b!", "ab?")


class Spelled:
    """A tokenizer whose tokens are the texts of a list; it counts what it decodes."""

    def __init__(self, *texts):
        self.texts, self.decoded = texts, []

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        self.decoded.append(len(ids))
        return "".join(self.texts[i] for i in ids)


def spelled(*texts, stop=()):
    return RunningText(types.SimpleNamespace(tokenizer=Spelled(*texts)), stop)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_join_to_the_whole(small_model, size):
    ids = small_model.processor.tokenizer(
        "There is a red star, and a blue circle.", add_special_tokens=False
    )["input_ids"]
    text = RunningText(small_model.processor, ())
    pieces = []
    for begin in range(0, len(ids), size):
        text.add(ids[begin : begin + size], last=begin + size >= len(ids))
        pieces.append(text.take())
    whole = small_model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "".join(pieces) == text.text == whole
    assert len([piece for piece in pieces if piece]) > 1


def test_the_longest_possible_stop_string_is_held_back():
    text = spelled("xab", "c", stop=STOPS)
    text.add([0], last=False)
    assert text.take() == "x"
    text.add([1], last=False)
    assert text.take() == "abc" and not text.stopped


def test_of_two_stop_strings_the_first_to_be_complete_ends():
    text = spelled("xab!ab?", stop=STOPS)
    text.add([0], last=False)
    assert text.stopped and text.text == "xa"
    text.add([0], last=True)
    assert text.text == "xa"


def test_a_piece_decodes_no_more_the_longer_the_answer():
    tokenizer = Spelled("a ", "star ")
    text = RunningText(types.SimpleNamespace(tokenizer=tokenizer), ())
    for i in range(1000):
        text.add([i % 2], last=False)
    assert max(tokenizer.decoded) < 10
    assert text.text.startswith("a star a star")
