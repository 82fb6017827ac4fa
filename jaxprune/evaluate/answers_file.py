"""A file of answers, to which an evaluation is appended and later evaluations as well.

The first line says what the answers are of: the data, the model and how long an answer may be.
A method has a line with its options, and then one for each question. An evaluation that is begun
again, or has more methods than before, goes on behind the last whole line; a file of anything
else is refused, since its answers would be mixed with others.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image

from jaxprune.data.lines import whole_lines
from jaxprune.errors import UserError, is_number, is_whole
from jaxprune.evaluate.data import Item
from jaxprune.files import as_path, parse_json
from jaxprune.inputs.images import load_image

_HEADER = "jaxprune evaluation"
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a question.

    Attributes:
        text: the answer, None where there is none.
        error: why there is none.
        visual_tokens: that enter a layer of the decoder, mean over layers.
        macs: the decoder's multiply-adds for the prompt.
        seconds: its share of those of its batch; None where there is no answer.
        compiled: XLA programs that were made in the batch's seconds.
    """

    text: str | None
    error: str | None
    visual_tokens: float | None
    macs: int | None
    seconds: float | None
    compiled: int


class Known(NamedTuple):
    """What a file of answers holds already.

    Attributes:
        outcomes: by the method's label and the number of the question, from 1.
        methods: those that have a line, with their options' digest.
        whole: how many of the file's bytes are whole lines.
    """

    outcomes: dict[tuple[str, int], Outcome]
    methods: dict[str, str]
    whole: int


NOTHING_KNOWN = Known({}, {}, 0)

_OUTCOME = [field.name for field in dataclasses.fields(Outcome)]


def digest_of(items: Sequence[Item]) -> str:
    """12 hex digits of questions, answers and images, wherever the images lie.

    Raises:
        UserError: for an image that cannot be read.
    """
    found = hashlib.sha256()
    for item in items:
        fields = dataclasses.asdict(dataclasses.replace(item, image=None, scoring=item.scored_by))
        found.update(json.dumps(fields).encode())
        for image in item.image if isinstance(item.image, list | tuple) else [item.image]:
            found.update(_content(image))
    return found.hexdigest()[:12]


def _content(image: Any) -> bytes:
    """What an image is, at little cost: a file's bytes, not its pixels."""
    if isinstance(image, str) and image.startswith("data:"):
        return image.encode()
    if isinstance(image, str | pathlib.Path):
        try:
            return as_path(image, "The image").read_bytes()
        except OSError as error:
            raise UserError(f"The image {image} cannot be read ({error}).") from None
    if image is None:
        return b""
    loaded = load_image(image)
    if not isinstance(loaded, Image.Image):
        raise UserError("An image that is encoded already cannot be kept in a file of answers.")
    return np.asarray(loaded).tobytes()


def read_answers(path: pathlib.Path, identity: Mapping[str, Any], samples: int) -> Known:
    """What a file of answers holds already.

    Args:
        path: the file; it need not exist.
        identity: what its first line has to say, or a part of that.
        samples: how many questions there are.

    Raises:
        UserError: for a file of another evaluation, or of none.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return NOTHING_KNOWN
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    texts, rest = whole_lines(content)
    begun = json.dumps({_HEADER: _FORMAT})[:-1].encode()
    if not texts and (rest.startswith(begun) or begun.startswith(rest)):
        return NOTHING_KNOWN
    there = _fields(texts[0]) if texts else {}
    if _HEADER not in there:
        raise UserError(f"{path} is there already and holds no evaluation; name another file.")
    if there[_HEADER] != _FORMAT:
        raise UserError(f"{path} is of another version of jaxprune; name another file.")
    other = [name for name, value in identity.items() if there.get(name) != value]
    if other:
        raise UserError(
            f"{path} is of an evaluation with other {', '.join(other)}; name another file, or "
            "remove it."
        )
    outcomes: dict[tuple[str, int], Outcome] = {}
    methods: dict[str, str] = {}
    due: set[tuple[str, int]] = set()
    for number, text in enumerate(texts[1:], start=2):
        fields = _fields(text)
        method = str(fields.get("method"))
        if "options" in fields and method not in methods:
            methods[method] = str(fields["options"])
            due |= {(method, sample) for sample in range(1, samples + 1)}
            continue
        outcome = _outcome(fields)
        if outcome is None or (line := (method, fields["sample"])) not in due:
            raise UserError(f"{path}, line {number} is no answer that is due; remove the file.")
        outcomes[line] = outcome
        due.remove(line)
    return Known(outcomes, methods, len(content) - len(rest))


def _outcome(fields: Mapping[str, Any]) -> Outcome | None:
    """What a line says came of a question; None where no line of ours says so."""
    known: dict[str, Any] = {name: fields.get(name) for name in _OUTCOME}
    found = Outcome(**known)
    texts = found.text, found.error
    numbers = found.visual_tokens, found.macs, found.seconds
    sound = (
        texts.count(None) == 1
        and all(x is None or isinstance(x, str) for x in texts)
        and all(x is None or is_number(x) for x in numbers)
        and all(is_whole(x) for x in (found.compiled, fields.get("sample")))
    )
    return found if sound else None


def check_options(path: pathlib.Path, there: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise `UserError` where a method's answers are there with other options.

    Args:
        path: the file, for the message.
        there: the digests of the options in the file, by label.
        wanted: those that are asked for.
    """
    other = [label for label, digest in wanted.items() if there.get(label, digest) != digest]
    if other:
        raise UserError(
            f"{path} has answers under other options of {', '.join(other)}; name another file, or "
            "remove it."
        )


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = parse_json(text)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


@contextlib.contextmanager
def appending(path: pathlib.Path, identity: Mapping[str, Any], whole: int) -> Iterator[TextIO]:
    """A context with the file, open behind its last whole line.

    Args:
        path: the file.
        identity: its first line, written where there is none.
        whole: how many of its bytes stay.

    Raises:
        UserError: when it cannot be written.
    """
    try:
        file = path.open("a", encoding="utf-8")
        file.truncate(whole)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error}).") from None
    with file:
        if not whole:
            file.write(json.dumps({_HEADER: _FORMAT, **identity}) + "\n")
        yield file


def append_method(file: TextIO, method: str, options: str) -> None:
    """Write the line that a method's answers need before them."""
    _write(file, {"method": method, "options": options})


def append(
    file: TextIO, method: str, sample: int, item: Item, outcome: Outcome, score: float
) -> None:
    """Write an answer's line."""
    fields = {name: x for name, x in dataclasses.asdict(outcome).items() if x is not None}
    line = {"method": method, "sample": sample, "question": item.question,
            "answers": [*item.answers], "score": score, **fields}  # fmt: skip
    _write(file, line)


def _write(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()
