"""Files with an object of JSON in each line: what users give and what commands write."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxprune.errors import UserError
from jaxprune.files import as_path, parse_json

T = TypeVar("T")
_MOST_ERRORS = 10


def read_text(path: Any, what: str = "The data file") -> str:
    """The text of a file, without a byte order mark.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        UserError: for a file that is missing or no text.
    """
    path = as_path(path, what)
    try:
        text: str = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; expected a file of JSON.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from None
    return text


def parse_lines(
    text: str, name: object, thing: str, parse: Callable[[str, Mapping[str, Any]], T]
) -> list[T]:
    """What the lines of a file say; empty ones do not count.

    Args:
        text: the file's.
        name: of the file, for messages.
        thing: what each line is, for messages.
        parse: makes something of one; it is given "data.jsonl, line 3" for its messages, and
            the fields of the object.

    Raises:
        UserError: for no lines, or what is wrong with each of the first ten that are bad.
    """
    found, wrong = try_lines(text, name, thing, parse)
    if wrong:
        raise UserError(listed(wrong, f"lines of {name}"))
    if not found:
        raise UserError(f"{name} has no {thing}s; expected an object of JSON in each line.")
    return found


def try_lines(
    text: str, name: object, thing: str, parse: Callable[[str, Mapping[str, Any]], T]
) -> tuple[list[T], list[str]]:
    """What `parse_lines` gives, and what is wrong with each of the lines that are bad."""
    found, wrong = [], []
    # Not splitlines: JSON may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_parsed(f"{name}, line {number}", line, thing, parse))
        except UserError as error:
            wrong.append(str(error))
    return found, wrong


def listed(wrong: Sequence[str], things: str) -> str:
    """What is wrong with each of some things, the first ten of them, as one message."""
    if len(wrong) == 1:
        return wrong[0]
    first = f"; the first {_MOST_ERRORS}" if len(wrong) > _MOST_ERRORS else ""
    return "\n  ".join([f"{len(wrong):,} {things} are wrong{first}:", *wrong[:_MOST_ERRORS]])


def _parsed(where: str, line: str, thing: str, parse: Callable[[str, Mapping[str, Any]], T]) -> T:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where} is no {thing}; expected an object of JSON.")
    return parse(where, fields)


def image_paths(where: str, image: Any, folder: pathlib.Path) -> list[str]:
    """The images of a line: a path or several, relative to its file, or "data:" URLs.

    Raises:
        UserError: for anything else.
    """
    several = image if isinstance(image, list) else [image]
    if not all(isinstance(one, str) for one in several):
        raise UserError(f"{where} has the image {image!r}; expected a path, or a list of them.")
    what = f"{where}: the image"
    return [one if is_data_url(one) else str(folder / as_path(one, what)) for one in several]


def is_data_url(image: str) -> bool:
    """Whether it is the image itself, and not where it is."""
    return image.startswith("data:")


def check_images(where: str, images: list[str]) -> None:
    """Raise `UserError` for a path that leads to no file."""
    for image in images:
        if not is_data_url(image) and not as_path(image, f"{where}: the image").is_file():
            raise UserError(f"{where}: the image {image} does not exist.")


def whole_lines(content: bytes) -> tuple[list[str], bytes]:
    """The lines of a file that is appended to, and what was cut off while it was written."""
    whole, newline, rest = content.rpartition(b"\n")
    return (whole.decode("utf-8", "replace").split("\n") if newline else []), rest
