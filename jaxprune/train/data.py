"""Conversations to learn from, out of files.

Two forms are read: LLaVA's, a JSON list (or a line of JSON each) of

    {"id": ..., "image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

whose image may be missing or several; and lines of an image, a question and an answer, as
`calibrate` and `evaluate` take them. As in LLaVA's own trainer (haotian-liu/LLaVA,
`preprocess_multimodal`), "<image>" in what a human says is moved to the front of that turn.
"""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxprune.data.lines import check_images, image_paths, is_data_url, listed, read_text, try_lines
from jaxprune.data.samples import Sample
from jaxprune.errors import UserError, UserNote, check_flag
from jaxprune.files import as_path, parse_json
from jaxprune.inputs.prompts import ESCAPED, Message, check_placeholders, num_places
from jaxprune.models.family import IMAGE_PLACEHOLDER

T = TypeVar("T")


class Turn(NamedTuple):
    """A question and its answer.

    Attributes:
        question: what is asked.
        answer: what is to be said.
        images: how many of the conversation's images stand in front of the question; None: all
            of them, where the question says "<image>", as for `jaxprune.generate`.
    """

    question: str
    answer: str
    images: int | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        images: whatever `jaxprune.generate` takes, in their order.
        turns: one or more.
        system: what is said before them.
        where: it comes from, for messages.
    """

    images: Sequence[Any]
    turns: Sequence[Turn]
    system: str | None = None
    where: str = "The sample"

    def asked(self, turn: int) -> tuple[list[Message], list[Any]]:
        """The messages up to a turn's question, as `jaxprune.generate` takes them, and images."""
        said: list[Message] = []
        if self.system is not None:
            said.append({"role": "system", "content": self.system})
        for question, answer, images in self.turns[: turn + 1]:
            said.append({"role": "user", "content": _content(question, images)})
            said.append({"role": "assistant", "content": answer})
        return said[:-1], list(self.images[: self._images_until(turn)])

    def _images_until(self, turn: int) -> int:
        own = [one.images for one in self.turns[: turn + 1]]
        return len(self.images) if None in own else sum(n for n in own if n is not None)


def _content(question: str, images: int | None) -> Any:
    if images is None:
        return question
    return [{"type": "image"}] * images + [{"type": "text", "text": question}]


def conversation_of(sample: Any, where: str) -> Conversation:
    """A sample of either kind as a conversation.

    Raises:
        UserError: for anything else, or a sample without an answer.
    """
    if isinstance(sample, Conversation):
        turns = [turn for turn in sample.turns if isinstance(turn, Turn)]
        if not turns or len(turns) < len(sample.turns):
            raise UserError(f"{where} has the turns {sample.turns!r}; expected one Turn or more.")
        checked = [one._replace(answer=_answer(where, one.answer)) for one in turns]
        for one in checked:
            _text(where, "question", one.question)
        return dataclasses.replace(sample, turns=checked)
    if not isinstance(sample, Sample):
        raise UserError(
            f"{where} is a {type(sample).__name__}; expected what read_data gives, or a "
            "jaxprune.calibrate.Sample."
        )
    turn = Turn(sample.question, _answer(where, sample.answer))
    several = isinstance(sample.image, list | tuple)
    images = sample.image if several else [] if sample.image is None else [sample.image]
    return Conversation(images, [turn], where=where)


def read_data(path: Any, images: Any = None, *, skip: bool = False) -> list[Conversation]:
    """The samples of a file, all of them checked but for what is in the images.

    Args:
        path: a JSON or JSONL file, see above.
        images: the folder that paths of images are relative to; None: the file's own.
        skip: leave out samples that are wrong, and warn of them; else they are an error.

    Raises:
        UserError: for a file that is missing, empty or no JSON; for samples without an answer,
            with turns of other roles or in another order, with images that do not exist or are
            not as many as their places: the first ten are told, and how many there are.
    """
    check_flag("skip", skip)
    text, path = read_text(path, "The data file"), as_path(path, "The data file")
    folder = path.parent if images is None else as_path(images, "The folder of images")
    if not folder.is_dir():
        raise UserError(f"The folder of images {folder} does not exist.")
    parse = functools.partial(_conversation, folder=folder)
    if text.lstrip().startswith("["):
        found, wrong = _try_list(text, path, parse)
    else:
        found, wrong = try_lines(text, path.name, "sample", parse)
    if not found and not wrong:
        raise UserError(f"{path} has no samples; expected LLaVA's format, or lines of JSON.")
    return kept(found, wrong, path.name, skip=skip)


def kept(found: list[T], wrong: Sequence[str], name: str, *, skip: bool) -> list[T]:
    """What is left of samples of which some are wrong.

    Args:
        found: those that are right.
        wrong: what is wrong with each of the others.
        name: where they come from, for messages.
        skip: leave the others out, with a warning.

    Raises:
        UserError: where they must not be left out, or all are wrong.
    """
    if wrong and not (skip and found):
        advice = "" if skip else "\nRepair them, or have such samples skipped (skip=True, --skip)."
        if skip:
            advice = "\nThese are all, so there is nothing left to learn."
        raise UserError(listed(wrong, f"samples of {name}") + advice)
    if wrong:
        told = listed(wrong, f"samples of {name}")
        warnings.warn(
            f"{len(wrong):,} of {len(wrong) + len(found):,} samples are left out.\n{told}",
            UserNote,
            stacklevel=3,
        )
    return found


def _try_list(
    text: str, path: pathlib.Path, parse: Callable[[str, Mapping[str, Any]], T]
) -> tuple[list[T], list[str]]:
    """What a JSON list says, and what is wrong with those of its samples that are bad."""
    try:
        samples = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}).") from None
    found, wrong = [], []
    for number, sample in enumerate(samples, start=1):
        try:
            found.append(parse(f"{path.name}, sample {number}", sample))
        except UserError as error:
            wrong.append(str(error))
    return found, wrong


def _conversation(where: str, fields: Any, folder: pathlib.Path) -> Conversation:
    """What a sample says, in either form."""
    if not isinstance(fields, Mapping):
        raise UserError(f"{where} is a {type(fields).__name__}; expected an object of JSON.")
    if fields.get("video") is not None:
        raise UserError(f"{where} has a video, which cannot be learned from; give images.")
    image = fields.get("image")
    images = [] if image is None else image_paths(where, image, folder)
    if "conversations" in fields:
        system, turns = _turns(where, fields["conversations"], len(images))
    else:
        system, turns = None, [_single_turn(where, fields)]
        _check_places(where, num_places(turns[0].question) or len(images), len(images))
    check_images(where, images)
    for one in images:
        if not is_data_url(one) and not pathlib.Path(one).stat().st_size:
            raise UserError(f"{where}: the image {one} is an empty file.")
    return Conversation(images, turns, system, where)


def _single_turn(where: str, fields: Mapping[str, Any]) -> Turn:
    given = [name for name in ("question", "prompt") if name in fields]
    if len(given) != 1 or ("answer" in fields) == ("answers" in fields):
        raise UserError(
            f'{where} is no sample; expected an object with "conversations", or with "image", '
            '"question" and "answer".'
        )
    answers = fields.get("answers", fields.get("answer"))
    answer = answers[0] if isinstance(answers, list) and answers else answers
    return Turn(_text(where, given[0], fields[given[0]]), _answer(where, answer))


def _turns(where: str, said: Any, images: int) -> tuple[str | None, list[Turn]]:
    """What LLaVA's "conversations" say: a system message if there is one, and the turns."""
    if not isinstance(said, list) or not all(isinstance(one, Mapping) for one in said):
        raise UserError(
            f'{where} has conversations that are no list of {{"from": ..., "value": ...}}.'
        )
    system = None
    if said and said[0].get("from") == "system":
        system, said = _text(where, "system message", said[0].get("value")), said[1:]
    for number, one in enumerate(said):
        expected = ("human", "gpt")[number % 2]
        if one.get("from") != expected:
            raise UserError(
                f"{where} has a turn of {one.get('from')!r} where one of {expected!r} is expected; "
                "human and gpt take turns, and a human begins."
            )
    if not said or len(said) % 2:
        raise UserError(f"{where} has {len(said)} turns; expected a gpt's after each human's.")
    questions = [_text(where, "question", one.get("value")) for one in said[::2]]
    answers = [_answer(where, one.get("value")) for one in said[1::2]]
    own = _images_of(where, questions, images)
    moved = [_without_places(x) if n and images else x for x, n in zip(questions, own, strict=True)]
    return system, [Turn(*turn) for turn in zip(moved, answers, own, strict=True)]


def _images_of(where: str, questions: Sequence[str], images: int) -> list[int]:
    """How many images stand in each question; if none says so, all stand in the first.

    Raises:
        UserError: where there are not as many as places.
    """
    places = [x.replace(ESCAPED, "").count(IMAGE_PLACEHOLDER) for x in questions]
    if not images:  # "<image>" within a sentence is but a word
        asked = [{"role": "user", "content": question} for question in questions]
        places, expected = [0] * len(places), num_places(asked)
    elif not any(places):
        places[0] = expected = images
    else:
        expected = sum(places)
    _check_places(where, expected, images)
    return places


def _check_places(where: str, places: int, images: int) -> None:
    try:
        check_placeholders(places, images)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _without_places(question: str) -> str:
    """A question without the images that are moved in front of it."""
    parts = (part.replace(IMAGE_PLACEHOLDER, "") for part in question.split(ESCAPED))
    return ESCAPED.join(parts).strip()


def _text(where: str, name: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has the {name} {text!r}; expected a text.")
    return text


def _answer(where: str, answer: Any) -> str:
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where} has a question without an answer; it came {answer!r}.")
    return answer.strip()
