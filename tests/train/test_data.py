"""What is read to be learned from."""

import json
import re

import pytest

import jaxprune
from jaxprune.calibrate import Sample
from jaxprune.errors import UserNote
from jaxprune.train.data import Conversation, Turn, conversation_of, read_data
from tests.cases import picture


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


SEEN = {"id": 1, "image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("A cat.")]}
SAID = {"conversations": [human("Hi"), gpt("Hello")]}


@pytest.fixture
def write(tmp_path):
    """A function that writes samples, as a list or in lines, to a file beside two images."""
    (tmp_path / "more").mkdir()
    for name in ("a.png", "more/b.png"):
        picture(0, (4, 4)).save(tmp_path / name)

    def write(*samples, lines=False):
        path = tmp_path / ("data.jsonl" if lines else "data.json")
        text = "\n".join(map(json.dumps, samples)) if lines else json.dumps(list(samples), indent=1)
        path.write_text(text, encoding="utf-8-sig")
        return path

    return write


@pytest.mark.parametrize("lines", [False, True])
def test_both_forms(write, tmp_path, lines):
    a, b = str(tmp_path / "a.png"), str(tmp_path / "more" / "b.png")
    path = write(
        SEEN,
        SEEN,  # the same id again
        {**SAID, "image": None},
        {"image": ["a.png", "more/b.png"],
         "conversations": [{"from": "system", "value": "Be brief."}, human("<image> and <image>?"),
                           gpt(" Two "), human("Sure?"), gpt("Yes")]},
        {"image": "a.png", "question": "Where?", "answer": "left"},
        {"image": ["a.png"], "prompt": "<image>?", "answers": ["right", "the right"]},
        lines=lines,
    )  # fmt: skip
    found = read_data(path)
    assert [(list(x.images), list(x.turns), x.system) for x in found] == [
        ([a], [Turn("What?", "A cat.", 1)], None),
        ([a], [Turn("What?", "A cat.", 1)], None),
        ([], [Turn("Hi", "Hello", 0)], None),
        ([a, b], [Turn("and ?", "Two", 2), Turn("Sure?", "Yes", 0)], "Be brief."),
        ([a], [Turn("Where?", "left", None)], None),
        ([a], [Turn("<image>?", "right", None)], None),
    ]
    assert found[3].where == ("data.jsonl, line 4" if lines else "data.json, sample 4")


def test_a_folder_of_images(write, tmp_path):
    path = write({**SEEN, "image": "b.png"})
    assert read_data(path, tmp_path / "more")[0].images == [str(tmp_path / "more" / "b.png")]
    with pytest.raises(jaxprune.UserError, match=r"folder of images .* does not exist"):
        read_data(path, tmp_path / "none")


@pytest.mark.parametrize(
    "question, images, expected",
    [
        ("What?\n<image>", 1, ("What?", 1)),
        ("What is in the <image> here?", 1, ("What is in the  here?", 1)),
        ("What?", 2, ("What?", 2)),  # nobody places them
        (r"<image> What does \<image> do?", 1, (r"What does \<image> do?", 1)),
        ("What does the <image> tag do?", 0, ("What does the <image> tag do?", 0)),
    ],
)
def test_images_are_moved_to_the_front(write, question, images, expected):
    said = {"image": ["a.png"] * images, "conversations": [human(question), gpt("x")]}
    (found,) = read_data(write(said))
    assert (found.turns[0].question, found.turns[0].images) == expected


def test_what_is_asked_at_a_turn():
    turns = [Turn("a", "b", 1), Turn("c", "d", 0), Turn("e", "f", 1)]
    sample = Conversation(["x", "y"], turns, "s")
    messages, images = sample.asked(1)
    assert images == ["x"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": "a"}]
    assert sample.asked(2)[1] == ["x", "y"]
    assert conversation_of(Sample("x", "a", "b"), "It").asked(0) == (
        [{"role": "user", "content": "a"}],
        ["x"],
    )


WRONG = {
    "is a int; expected an object": 7,
    "no sample; expected an object with": {"image": "a.png"},
    "has conversations that are no list": {"conversations": "Hi"},
    "has 0 turns": {"conversations": []},
    "has 3 turns; expected a gpt's": {"conversations": [human("a"), gpt("b"), human("")]},
    "turn of 'gpt' where one of 'human'": {"conversations": [gpt("a"), human("b")]},
    "turn of 'bot' where one of 'gpt'": {"conversations": [human("a"), {"from": "bot"}]},
    "turn of 'system' where": {"conversations": [human("a"), {"from": "system", "value": "b"}]},
    "a question without an answer; it came ' '": {"conversations": [human("a"), gpt(" ")]},
    "a question without an answer; it came None": {"conversations": [human("a"), {"from": "gpt"}]},
    "a question without an answer; it came \\[\\]": {"question": "a", "answers": []},
    "has the question 7; expected a text": {"conversations": [human(7), gpt("b")]},
    "has the system message None": {"conversations": [{"from": "system"}, human("a"), gpt("b")]},
    "has 1 <image> placeholder.* 0 image": {"conversations": [human("<image>\na"), gpt("b")]},
    "has 2 <image> placeholder.* 1 image": {**SEEN, "conversations": [human("<image><image>"),
                                                                     gpt("b")]},
    "has 2 <image> placeholder.* 3 image": {"image": ["a.png"] * 3, "answer": "b",
                                            "question": "<image><image> a"},
    "the image .*c.png does not exist": {**SEEN, "image": "c.png"},
    "the image .*empty.png is an empty file": {**SEEN, "image": "empty.png"},
    "has the image 7; expected a path": {**SEEN, "image": 7},
    "has a video, which cannot be learned": {**SAID, "video": "a.mp4"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_one_that_is_wrong(write, tmp_path, message):
    (tmp_path / "empty.png").touch()
    path = write(SEEN, WRONG[message], SAID)
    with pytest.raises(jaxprune.UserError, match=r"^data\.json, sample 2.*" + message):
        read_data(path)
    with pytest.warns(UserNote, match=r"^1 of 3 samples are left out\.\ndata\.json, sample 2"):
        assert len(read_data(path, skip=True)) == 2


@pytest.mark.parametrize("lines", [False, True])
def test_many_that_are_wrong(write, lines):
    path = write(SEEN, *[{**SEEN, "image": f"{i}.png"} for i in range(12)], lines=lines)
    with pytest.raises(jaxprune.UserError, match=r"12 samples of data.* the first 10") as told:
        read_data(path)
    assert re.findall(r"(\d+)\.png", str(told.value)) == [str(i) for i in range(10)]
    with pytest.raises(jaxprune.UserError, match="12 samples"):
        read_data(write(*[SAID | {"image": f"{i}.png"} for i in range(12)]), skip=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no samples"),
        ("[]", "has no samples"),
        ('[{"id": 1}', "is not JSON"),
        ("[" * 100_000, "is not JSON .nested too deeply"),
        ("{}", "line 1 is no sample"),
        ("Hi", "line 1 is not JSON"),
        ("7", "line 1 is no sample; expected an object of JSON"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(jaxprune.UserError, match=message):
        read_data(tmp_path / "d.json")
    with pytest.raises(jaxprune.UserError, match=r"none\.json does not exist"):
        read_data(tmp_path / "none.json")


def test_what_is_no_sample():
    with pytest.raises(jaxprune.UserError, match="Sample 3 is a dict; expected"):
        conversation_of({}, "Sample 3")
    with pytest.raises(jaxprune.UserError, match="Sample 3 has a question without an answer"):
        conversation_of(Sample("x", "a"), "Sample 3")
