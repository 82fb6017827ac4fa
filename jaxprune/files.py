"""Reading the JSON files of model directories."""

import json
import pathlib
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
