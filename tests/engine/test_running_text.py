"""Text of answers while they grow."""

import types

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxprune.engine.running_text import RunningText
from tests.builders import llama_tokenizer

STOPS = ("b!", "ab?")


class Spelled:
    """A tokenizer whose tokens are the texts of a list; it counts what it decodes."""

    def __init__(self, *texts):
        self.texts, self.decoded = texts, []

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        self.decoded.append(len(ids))
        return "".join(self.texts[i] for i in ids)

    def convert_ids_to_tokens(self, token_id):
        return self.texts[token_id]


def reader(tokenizer):
    """What a processor is to the text of an answer."""
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        special_tokens=(),
        text_of=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )


def spelled(*texts, stop=()):
    return RunningText(reader(Spelled(*texts)), stop)


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


def byte_level():
    """A tokenizer of GPT-2's making, one token a byte, and "é" in two."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {
    name: PreTrainedTokenizerFast(tokenizer_object=made)
    for name, made in (("bytes as tokens", llama_tokenizer()), ("byte level", byte_level()))
}
E_ACUTE = {"bytes as tokens": [198, 172], "byte level": [127, 102]}  # é


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(3, 255), max_size=12), st.integers(1, 5), st.sampled_from(["", "Wh"]))
@example([198, 172, 198, 40], 1, "")  # a character and bytes that are none
@example([243, 162, 155, 131], 3, "")  # 4 bytes
def test_any_bytes_read_as_they_would_all_at_once(name, ids, size, before):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(before, add_special_tokens=False)["input_ids"] + ids
    text = RunningText(reader(tokenizer), ())
    for begin in range(0, len(ids), size):
        text.add(ids[begin : begin + size], last=begin + size >= len(ids))
    assert text.text == tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_in_two_chunks(name):
    tokenizer, (first, second) = TOKENIZERS[name], E_ACUTE[name]
    assert tokenizer.decode([first, second]) == "é"
    text = RunningText(reader(tokenizer), ("é!",))
    word = tokenizer("What", add_special_tokens=False)["input_ids"]
    text.add([*word, first], last=False)
    assert text.take() == "What"
    text.add([second], last=True)
    assert text.take() == "é"


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
    text = RunningText(reader(tokenizer), ())
    for i in range(1000):
        text.add([i % 2], last=False)
    assert max(tokenizer.decoded) < 10
    assert text.text.startswith("a star a star")
