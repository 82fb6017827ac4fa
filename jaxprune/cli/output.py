"""Where commands write: results to stdout, notes and errors to stderr, files that are new."""

import contextlib
import pathlib
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from jaxprune.errors import UserError
from jaxprune.files import new_path

stderr = Console(stderr=True)
_WIDTH = 120  # of tables whose columns do not fit into a narrow terminal


def note(text: str) -> None:
    """A line on stderr, as long as it is."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """A context that takes seconds; a terminal says so meanwhile."""
    with stderr.status(text) if stderr.is_terminal else contextlib.nullcontext():
        yield


def print_wide(table: Table) -> None:
    """Print a table in at least 120 columns; in a file or a pipe there are 80 otherwise."""
    Console(width=max(_WIDTH, Console().width)).print(table)


def refuse_existing(path: pathlib.Path) -> None:
    """Raise `UserError` unless a file of this name can be made."""
    new_path(path, "The file to write")
    if not path.expanduser().absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent} is no directory; make it first.")
