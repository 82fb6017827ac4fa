"""One progress bar for everything that takes longer than a few seconds."""

import sys
import time
from collections.abc import Generator, Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PLAIN_SECONDS = 60


class PlainLines:
    """What a log or a pipe gets instead of a bar: a line a minute.

    Args:
        label: what is done.
        total: of how many.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._told = label, total, time.monotonic()

    def tell(self, done: int, note: str = "") -> None:
        """Say so on stderr, if the last line was a minute ago."""
        now = time.monotonic()
        if now - self._told >= PLAIN_SECONDS:
            self._told = now
            told = f"{self._label}: {done} of {self._total}{note and f', {note}'}"
            print(told, file=sys.stderr, flush=True)


def track(
    items: Iterable[T], label: str, total: int, *, show: bool | None = None
) -> Generator[T, None, None]:
    """Yield `items` while a bar on stderr shows how many of `total` are done.

    `show=None` shows the bar in a terminal alone; logs and pipes get a line a minute.
    """
    if not (sys.stderr.isatty() if show is None else show):
        lines = PlainLines(label, total) if show is None else None
        for done, item in enumerate(items, 1):
            yield item
            if lines is not None:
                lines.tell(done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=label)
