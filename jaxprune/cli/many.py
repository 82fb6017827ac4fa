"""Many requests from a folder or a file, and their answers into one: `jaxprune generate --out`."""

import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from jaxprune.data.lines import image_paths, parse_lines, read_text, whole_lines
from jaxprune.engine.answer import Answer
from jaxprune.errors import UserError
from jaxprune.files import as_path, parse_json, whole_file

PIPE = "-"
_REQUEST = ("image", "prompt")
_SETTINGS = "settings"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def from_folder(folder: pathlib.Path, prompt: str) -> list[dict[str, Any]]:
    """A request for every image of a folder, by name.

    Raises:
        UserError: for no folder, or one without an image.
    """
    folder = as_path(folder, "--images")
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError:
        raise UserError(f"--images is {folder}, which is no directory that can be read.") from None
    if not paths:
        raise UserError(f"{folder} has no images; expected files *{', *'.join(SUFFIXES)}.")
    return [{"image": str(path), "prompt": prompt} for path in paths]


def from_file(name: str, prompt: str | None) -> list[dict[str, Any]]:
    """A request for every line of JSON: "prompt" or "question", and "image", one or a list.

    Args:
        name: a file, to which images are relative, or "-" for stdin.
        prompt: of lines that have none.

    Raises:
        UserError: for what cannot be read, or lines that are no requests; it names them.
    """
    folder = pathlib.Path() if name == PIPE else as_path(name, "--data").parent

    def parse(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        said = fields.get("prompt", fields.get("question", prompt))
        if not isinstance(said, str):
            raise UserError(f'{where} is no request; expected an object with the text "prompt".')
        image = fields.get("image")
        paths = [] if image is None else image_paths(where, image, folder)
        return {"image": paths if isinstance(image, list) else next(iter(paths), None),
                "prompt": said}  # fmt: skip

    return parse_lines(_text_of(name), name, "request", parse)


def _text_of(name: str) -> str:
    if name != PIPE:
        return read_text(name, "--data")
    try:
        return sys.stdin.read()
    except ValueError as error:
        raise UserError(f"stdin cannot be read as text ({error}).") from None


def settings_digest(*settings: Any) -> str:
    """8 hex digits of what decides answers, beside the request."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


def lines_of(
    out: pathlib.Path, requests: Sequence[dict[str, Any]], settings: str
) -> dict[int, dict[str, Any]]:
    """The lines of a file of answers and errors, by the place of the request that each is of.

    Args:
        out: the file.
        requests: all of them.
        settings: what `settings_digest` gives.

    Raises:
        UserError: for a file of other requests or settings, or none of ours.
    """
    if not out.exists():
        return {}
    try:
        lines, rest = whole_lines(out.read_bytes())
    except OSError as error:
        raise UserError(f"{out} cannot be read ({error}).") from None
    places: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        places.setdefault(json.dumps(request), []).append(place)
    found = {}
    for number, line in enumerate(lines, start=1):
        fields = _parsed(line)
        answered = isinstance(fields, dict) and {"text", "error"} & set(fields)
        same = json.dumps({x: fields.get(x) for x in _REQUEST}) if answered else ""
        if not places.get(same):
            raise UserError(
                f"{out} is there already, and line {number} is no answer to a request of these; "
                "name another file."
            )
        if fields.get(_SETTINGS) != settings:
            raise UserError(
                f"{out} is there already, and line {number} was answered by another model or "
                "method, or with other options; name another file."
            )
        found[places[same].pop(0)] = fields
    if rest and not any(_begins(rest, same) for same, left in places.items() if left):
        raise UserError(f"{out} is there already, and ends in no answer; name another file.")
    return found


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _begins(line: bytes, request: str) -> bool:
    """Whether a line that was cut off is of a request."""
    begun = request[:-1].encode()
    return line.startswith(begun) or begun.startswith(line)


def rewrite(out: pathlib.Path, lines: Mapping[int, dict[str, Any]]) -> None:
    """Have a file hold these lines and no others, in the order of their requests."""
    with whole_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(lines[place]) + "\n" for place in sorted(lines))


def write(
    answers: Iterable[Any],
    requests: list[dict[str, Any]],
    file: TextIO,
    *,
    details: bool,
    settings: str | None = None,
) -> int:
    """A line of JSON for every request as its answer comes; how many could not be answered."""
    failed, also = 0, {} if settings is None else {_SETTINGS: settings}
    for request, answer in zip(requests, answers, strict=True):
        failed += isinstance(answer, UserError)
        file.write(json.dumps({**request, **_fields(answer, details), **also}) + "\n")
        file.flush()
    return failed


def _fields(answer: Any, details: bool) -> dict[str, Any]:
    if isinstance(answer, UserError):
        return {"error": str(answer)}
    assert isinstance(answer, Answer)
    return answer.as_dict() if details else {"text": answer.text}
