"""What an evaluation is read from."""

import collections
import dataclasses
import json

import pytest

import jaxprune
from jaxprune.evaluate.data import Item, read_items
from tests.cases import picture

LINE = {"image": "a.png", "question": "What?", "answer": "red"}


@pytest.fixture
def write(tmp_path):
    """A function that writes lines, objects or texts, to a file beside an image."""
    picture(0).save(tmp_path / "a.png")

    def write(*lines):
        path = tmp_path / "data.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts), encoding="utf-8-sig")
        return path

    return write


def test_lines(write, tmp_path):
    path = write(
        LINE,
        "",
        {"image": ["a.png", "a.png"], "prompt": "Where?", "answers": ["left"] * 10, "kind": 3},
        {**LINE, "answer": "B", "choices": ["a cat", "a dog"], "kind": "animals"},
        {**LINE, "answer": "Yes", "pair": 7},
        {**LINE, "answer": "no", "pair": 7},
        {**LINE, "answer": "no", "scoring": "pope"},
        {**LINE, "image": "data:image/png;base64,AA=="},
    )
    image = str(tmp_path / "a.png")
    assert read_items(path) == [
        Item([image], "What?", ("red",)),
        Item([image, image], "Where?", ("left",) * 10, kind="3"),
        Item([image], "What?", ("B",), kind="animals", choices=("a cat", "a dog")),
        Item([image], "What?", ("Yes",), pair="7"),
        Item([image], "What?", ("no",), pair="7"),
        Item([image], "What?", ("no",), scoring="pope"),
        Item(["data:image/png;base64,AA=="], "What?", ("red",)),
    ]
    assert [item.scored_by for item in read_items(path)] == [
        "exact", "vqa", "choice", "mme", "mme", "pope", "exact",
    ]  # fmt: skip
    assert len(read_items(path, samples=2)) == 2
    assert {item.scored_by for item in read_items(path, scoring="exact")} == {"exact"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no question; expected an object"),
        ({"image": "a.png", "question": "What?"}, "line 2 is no question"),
        ({**LINE, "answers": ["red"]}, "line 2 is no question"),
        ({**LINE, "prompt": "Why?"}, "line 2 is no question"),
        ({**LINE, "question": " "}, "line 2 has the question ' '"),
        ({**LINE, "answer": 3}, r"line 2 has the answers \(3,\); expected a list of texts"),
        ({**LINE, "choices": "abc"}, "line 2 has the choices 'abc'; expected a list"),
        ({"image": "a.png", "question": "What?", "answers": []}, "line 2 has no answers"),
        ({**LINE, "kind": 1.5}, "line 2 has the kind 1.5"),
        ({**LINE, "image": "b.png"}, "line 2: the image .*b.png does not exist"),
        ({**LINE, "image": None}, "line 2 has the image None"),
        ({**LINE, "scoring": "bleu"}, "line 2: scoring is 'bleu'; expected one of: exact"),
        ({**LINE, "scoring": "pope"}, r"line 2 has the answers \['red'\]; pope needs yes or no"),
        ({**LINE, "answer": "no", "scoring": "mme"}, 'line 2 has no "pair"'),
        ({**LINE, "choices": ["a", "b"]}, "line 2 has the answer 'red'; expected the letter or"),
        ({**LINE, "scoring": "choice"}, "line 2 has 0 choices"),
        ({**LINE, "answer": "yes", "pair": "x"}, r"1 pairs of .* have another number.*: x \(1\)"),
    ],
)
def test_lines_that_are_none(line, message, write):
    with pytest.raises(jaxprune.UserError, match=message):
        read_items(write(LINE, line))


def test_one_error_tells_of_all_lines(write):
    with pytest.raises(jaxprune.UserError) as found:
        read_items(write("{", LINE, {**LINE, "image": "b.png"}, *["[]"] * 12))
    first, *each = str(found.value).split("\n")
    assert "14 lines of" in first and "the first 10" in first
    numbers = [line.partition("line ")[2][:2].strip(" :") for line in each]
    assert numbers == [str(n) for n in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11)]


def test_a_scoring_of_all_is_held_against_every_line(write):
    with pytest.raises(jaxprune.UserError, match="line 1 has the answers"):
        read_items(write(LINE), scoring="pope")
    with pytest.raises(jaxprune.UserError, match="scoring is 'bleu'"):
        read_items(write(LINE), scoring="bleu")


def test_scenes():
    found = read_items(samples=12)
    assert set(collections.Counter(item.kind for item in found).values()) == {2}
    assert len(read_items()) == 240
    assert found[0].scored_by == "exact"


def test_items_of_ones_own():
    item = Item(picture(0), "What?", ["red"])
    assert read_items([item, item], samples=1) == [item]
    with pytest.raises(jaxprune.UserError, match="Item 2 of data has no answers"):
        read_items([item, Item(picture(0), "What?", [])])
    for fields, message in (
        ({"answers": "red"}, "has the answers 'red'; expected a list of texts"),
        ({"answers": 3}, "has the answers 3; expected a list of texts"),
        ({"choices": {"a": "b"}}, "has the choices {'a': 'b'}; expected a list of texts"),
        ({"kind": 3}, "has the kind 3; expected a text, or None"),
        ({"pair": ["a"]}, r"has the pair \['a'\]; expected a text, or None"),
    ):
        with pytest.raises(jaxprune.UserError, match=f"Item 1 of data {message}"):
            read_items([dataclasses.replace(item, **fields)])
    for data in ([], 3, ["red"]):
        with pytest.raises(jaxprune.UserError, match="expected the path of a JSONL file"):
            read_items(data)
