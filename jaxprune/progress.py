"""One progress bar for everything that takes longer than a few seconds."""

import sys
from collections.abc import Generator, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def track(
    items: Iterable[T], label: str, total: int, *, show: bool | None = None
) -> Generator[T, None, None]:
    """Yield `items` while a bar on stderr shows how many of `total` are done.

    `show=None` shows the bar in a terminal alone, so logs and pipes stay clean.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=label)
