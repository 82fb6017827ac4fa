"""Many requests from a folder or a file, and their answers into one: `jaxprune generate --out`."""

import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from jaxprune.data.lines import image_paths, parse_lines, read_text, whole_lines
from jaxprune.engine.answer import Answer
from jaxprune.errors import UserError
from jaxprune.files import as_path, parse_json

PIPE = "-"
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


def done_already(out: pathlib.Path, requests: list[dict[str, Any]]) -> int:
    """How many requests a file of answers answers; a line that was cut off is taken away.

    Raises:
        UserError: for a file of other requests.
    """
    if not out.exists():
        return 0
    try:
        content = out.read_bytes()
    except OSError as error:
        raise UserError(f"{out} cannot be read ({error}).") from None
    lines, rest = whole_lines(content)
    for number, line in enumerate(lines):
        try:
            fields = parse_json(line)
        except ValueError:
            fields = None
        answered = isinstance(fields, dict) and {"text", "error"} & set(fields)
        if number >= len(requests) or not answered or _differ(fields, requests[number]):
            raise UserError(
                f"{out} is there already, and line {number + 1} is no answer to request "
                f"{number + 1}; name another file."
            )
    if rest:
        _take_away(out, rest, requests[len(lines) :])
    return len(lines)


def _differ(fields: Any, request: dict[str, Any]) -> bool:
    return any(fields.get(name) != value for name, value in request.items())


def _take_away(out: pathlib.Path, rest: bytes, requests: list[dict[str, Any]]) -> None:
    """Cut off a line that was not finished, if it is the beginning of the next answer."""
    begun = json.dumps(requests[0])[:-1].encode() if requests else b""
    if not begun or not (rest.startswith(begun) or begun.startswith(rest)):
        raise UserError(f"{out} is there already, and ends in no answer; name another file.")
    with out.open("r+b") as file:
        file.truncate(out.stat().st_size - len(rest))


def write(
    answers: Iterable[Any], requests: list[dict[str, Any]], file: TextIO, *, details: bool
) -> int:
    """A line of JSON for every request as its answer comes; how many could not be answered."""
    failed = 0
    for request, answer in zip(requests, answers, strict=True):
        failed += isinstance(answer, UserError)
        file.write(json.dumps({**request, **_fields(answer, details)}) + "\n")
        file.flush()
    return failed


def _fields(answer: Any, details: bool) -> dict[str, Any]:
    if isinstance(answer, UserError):
        return {"error": str(answer)}
    assert isinstance(answer, Answer)
    return answer.as_dict() if details else {"text": answer.text}
