"""Reading JSON files, and writing files and directories that appear whole or not at all."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from jaxprune.errors import UserError


def is_file(path: pathlib.Path) -> bool:
    """Whether a path is a file's; False for what is no path at all, such as a name too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_json(path: pathlib.Path, *, repair: str = "download it again") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: the file.
        repair: what to do where it is damaged, for the error's text.

    Raises:
        UserError: when the file is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}; expected a Hugging Face model directory."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
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
    partial = _partial(target)
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        raise UserError(f"Cannot write {target} ({error}).") from None
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written
            partial.unlink()


@contextlib.contextmanager
def whole_directory(
    target: pathlib.Path, failures: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[pathlib.Path]:
    """A context that fills a new directory, which appears whole or not at all.

    Args:
        target: the directory, which does not exist.
        failures: the errors that mean that it cannot be written.

    Yields:
        The directory to fill: beside the target, under which it is put at the end.

    Raises:
        UserError: when it cannot be written.
    """
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except failures as error:
        raise UserError(f"Cannot write {target} ({error}).") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.partial")
