"""Paths and JSON as users have them, and files and directories that appear whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from jaxprune.errors import UserError

PARTIAL = ".jaxprune-partial-"
"""How what is not yet whole is called, beside what it will be."""
_UNFINISHED: set[pathlib.Path] = set()


def as_path(value: object, what: str) -> pathlib.Path:
    """The path that a user gave.

    Args:
        value: a string or another path.
        what: it is of, for the message: "The image".

    Raises:
        UserError: for what no file can be called.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise UserError(f"{what} is a {type(value).__name__}; expected a path.")
    text = os.fspath(value)
    try:
        if not text or "\0" in text:
            raise ValueError
        path = pathlib.Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except PermissionError:
        raise UserError(
            f"{what} is {path}, which may not be looked at; check its folder."
        ) from None
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a null character
        raise UserError(f"{what} is {text[:60]!r}, which is not a path; name another.") from None
    return path


def new_path(value: object, what: str) -> pathlib.Path:
    """The path of something to be written.

    Raises:
        UserError: for what is no path, or is there already, or would lie in no directory.
    """
    path = as_path(value, what)
    try:
        if os.path.lexists(path):
            raise UserError(f"{path} exists; name another, nothing is overwritten.")
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise UserError(f"{parent} is no directory; {what.lower()} cannot be in it.")
    except PermissionError:
        raise UserError(
            f"{path} cannot be looked at; {what.lower()} needs another place."
        ) from None
    return path


def parse_json(text: str) -> Any:
    """What a text of JSON says.

    Raises:
        ValueError: for what is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: pathlib.Path, *, repair: str = "download it again") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        repair: what to do where it is damaged, for the error's text.

    Raises:
        UserError: when the file is missing, unreadable or holds something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}; expected a Hugging Face model directory."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); {repair}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


@contextlib.contextmanager
def whole_file(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context that writes a file, which appears whole or not at all; one there is replaced.

    Args:
        target: the file.

    Yields:
        The path to write to: beside the target, under which it is put at the end.

    Raises:
        UserError: when it cannot be written.
    """
    try:
        with _beside(target.absolute().parent) as place:
            partial = place / target.name
            yield partial
            partial.replace(target)
    except OSError as error:
        raise UserError(f"Cannot write {target} ({error}).") from None


@contextlib.contextmanager
def whole_directory(
    target: pathlib.Path, failures: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[pathlib.Path]:
    """A context that fills a new directory, which appears whole or not at all.

    Args:
        target: the directory, which does not exist. Of several that are filled at once for one
            target the first to be done is kept.
        failures: the errors that mean that it cannot be written.

    Yields:
        The directory to fill: beside the target, under which it is put at the end.

    Raises:
        UserError: when it cannot be written.
    """
    try:
        parent = target.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with _beside(parent) as place:
            partial = place / target.name
            partial.mkdir()
            yield partial
            if os.path.lexists(target):
                raise UserError(f"{target} exists by now; another program was first. It is kept.")
            partial.rename(target)
    except failures as error:
        raise UserError(f"Cannot write {target} ({error}).") from None


@contextlib.contextmanager
def _beside(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory of this process's own in another, so on its disk; gone at the end."""
    place = pathlib.Path(tempfile.mkdtemp(prefix=PARTIAL, dir=parent))
    _UNFINISHED.add(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _UNFINISHED.discard(place)


def remove_whole(target: pathlib.Path) -> None:
    """Take a directory away, at once under its name, whatever interrupts the rest.

    Raises:
        UserError: when it cannot be moved.
    """
    try:
        with _beside(target.absolute().parent) as place:
            target.rename(place / target.name)
    except OSError as error:
        raise UserError(f"Cannot remove {target} ({error}).") from None


def remove_partial(parent: pathlib.Path) -> None:
    """Take away what killed processes left half-written, or half-removed, in a directory."""
    for place in parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(place, ignore_errors=True)


def remove_unfinished() -> None:
    """Take away what this process is in the middle of writing, before it is ended."""
    for place in list(_UNFINISHED):
        shutil.rmtree(place, ignore_errors=True)
