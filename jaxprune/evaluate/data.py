"""Questions with right answers: lines of a file, or drawn scenes."""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.data import scenes
from jaxprune.data.lines import check_images, image_paths, parse_lines, read_text
from jaxprune.errors import UserError, check_choice, check_whole
from jaxprune.evaluate.scoring import (
    CHOICES,
    FEWEST_VOTES,
    SCORINGS,
    VOTES,
    YES_NO,
    letter_of,
    truth_of,
)
from jaxprune.files import as_path

DEFAULT_SCENES = 240


@dataclasses.dataclass(frozen=True)
class Item:
    """One question and what is known of its answer.

    Attributes:
        image: whatever `jaxprune.generate` takes, or a list for several in one prompt.
        question: asked as it is; options to choose from have to stand in it.
        answers: texts, any of which is right, or what each of ten people said (vqa).
        kind: what accuracies are also given by; for MME the category.
        choices: the texts of the options A, B, C ...
        scoring: one of `scoring.SCORINGS`; None goes by what there is: "choice" with choices,
            "mme" with a pair, "vqa" with four answers or more, else "exact".
        pair: MME: what the two questions about an image share.
    """

    image: Any
    question: str
    answers: Sequence[str]
    kind: str | None = None
    choices: Sequence[str] = ()
    scoring: str | None = None
    pair: str | None = None

    @property
    def scored_by(self) -> str:
        """Its scoring, said or not."""
        if self.scoring is not None:
            return self.scoring
        if self.choices:
            return "choice"
        if self.pair is not None:
            return "mme"
        return "vqa" if len(self.answers) >= FEWEST_VOTES else "exact"


def read_items(
    data: Any = None, *, scoring: str | None = None, samples: int | None = None
) -> list[Item]:
    """What is to be answered, checked.

    Args:
        data: the path of a JSONL file, a list of `Item`, or None for drawn scenes of the split
            that nothing is trained or calibrated on.
        scoring: of all; None: each item's own.
        samples: how many, from the first; None: all, or 240 scenes.

    Raises:
        UserError: for what cannot be read, or items that cannot be scored; it names the first
            ten.
    """
    if scoring is not None:
        check_choice("scoring", scoring, SCORINGS)
    if samples is not None:
        check_whole("samples", samples)
    if data is None:
        found = scene_items(DEFAULT_SCENES if samples is None else samples)
        source = "the drawn scenes"
    elif isinstance(data, str | pathlib.Path):
        source = str(data)
        found = _from_file(data, scoring)
    elif isinstance(data, Sequence) and data and all(isinstance(one, Item) for one in data):
        source, found = "data", list(data)
    else:
        raise UserError(
            f"data is {type(data).__name__!r}; expected the path of a JSONL file, or a list of "
            "jaxprune.evaluate.Item with at least one."
        )
    found = found[:samples]
    if scoring is not None:
        found = [dataclasses.replace(item, scoring=scoring) for item in found]
    if not isinstance(data, str | pathlib.Path):
        for number, item in enumerate(found, start=1):
            check_item(f"Item {number} of {source}", item)
    _check_pairs(found, source)
    return found


def scene_items(number: int) -> list[Item]:
    """Held-out scenes, one question each, whose six kinds take turns."""
    pairs = [scenes.sample("held-out", 0, i) for i in range(number)]
    return [Item(scenes.draw(s), q.question, (q.answer,), kind=q.kind) for s, q in pairs]


def _from_file(data: Any, scoring: str | None) -> list[Item]:
    text, path = read_text(data), as_path(data, "The data file")

    def parse(where: str, fields: Mapping[str, Any]) -> Item:
        item = _item(where, fields, path.parent)
        check_item(where, item if scoring is None else dataclasses.replace(item, scoring=scoring))
        check_images(where, item.image)
        return item

    return parse_lines(text, path, "question", parse)


def _item(where: str, fields: Mapping[str, Any], folder: pathlib.Path) -> Item:
    given = [name for name in ("question", "prompt") if name in fields]
    if len(given) != 1 or ("answer" in fields) == ("answers" in fields):
        raise UserError(
            f'{where} is no question; expected an object with "image", "question" (or "prompt"), '
            'and "answer" or "answers".'
        )
    answers = fields["answers"] if "answers" in fields else [fields["answer"]]
    for name, value in (("answers", answers), ("choices", fields.get("choices", []))):
        if not isinstance(value, list):
            raise UserError(f"{where} has the {name} {value!r}; expected a list of texts.")
    return Item(
        image=image_paths(where, fields.get("image"), folder),
        question=fields[given[0]],
        answers=tuple(answers),
        kind=_name(where, "kind", fields),
        choices=tuple(fields.get("choices", ())),
        scoring=fields.get("scoring"),
        pair=_name(where, "pair", fields),
    )


def _name(where: str, name: str, fields: Mapping[str, Any]) -> str | None:
    """What samples are put together by; a number will do."""
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where} has the {name} {value!r}; expected a text or a number.")


def check_item(where: str, item: Item) -> None:
    """Raise `UserError` for an item that cannot be asked or scored."""
    if not isinstance(item.question, str) or not item.question.strip():
        raise UserError(f"{where} has the question {item.question!r}; expected a text.")
    for name, texts in (("answers", item.answers), ("choices", item.choices)):
        if not isinstance(texts, list | tuple) or not all(
            isinstance(text, str) and text.strip() for text in texts
        ):
            raise UserError(f"{where} has the {name} {texts!r}; expected a list of texts.")
    if not item.answers:
        raise UserError(f"{where} has no answers; give at least one.")
    for name, value in (("kind", item.kind), ("pair", item.pair)):
        if not isinstance(value, str | None):
            raise UserError(f"{where} has the {name} {value!r}; expected a text, or None.")
    if item.scoring is not None:
        check_choice(f"{where}: scoring", item.scoring, SCORINGS)
    scoring = item.scored_by
    if scoring in VOTES and len(item.answers) < FEWEST_VOTES:
        raise UserError(
            f"{where} has {len(item.answers)} of the ten annotators' answers that {scoring} goes "
            f"by; give {FEWEST_VOTES} or more, or take exact."
        )
    if scoring in YES_NO and {truth_of(x) for x in item.answers} not in ({"yes"}, {"no"}):
        raise UserError(f"{where} has the answers {[*item.answers]}; {scoring} needs yes or no.")
    if scoring == "mme" and item.pair is None:
        raise UserError(f'{where} has no "pair"; mme needs what both questions share.')
    if scoring in CHOICES:
        _check_choices(where, item)


def _check_choices(where: str, item: Item) -> None:
    if not 2 <= len(item.choices) <= 26:
        raise UserError(f"{where} has {len(item.choices)} choices; expected 2 to 26.")
    for answer in item.answers:
        if letter_of(answer, item.choices) is None:
            raise UserError(
                f"{where} has the answer {answer!r}; expected the letter or the text of one of "
                f"{[*item.choices]}."
            )


def _check_pairs(items: Sequence[Item], source: str) -> None:
    """MME counts pairs: a lone question, as where a file was cut, would spoil the count."""
    of_pair = collections.Counter(
        (item.kind, item.pair) for item in items if item.scored_by == "mme"
    )
    wrong = [(pair, n) for (_, pair), n in of_pair.items() if n != 2]
    if wrong:
        listed = ", ".join(f"{pair} ({n})" for pair, n in wrong[:10])
        raise UserError(
            f"MME asks two questions about an image, but {len(wrong)} pairs of {source} have "
            f"another number of them: {listed}."
        )
