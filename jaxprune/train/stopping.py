"""Ctrl-C in a run: the update in hand is finished and saved, and then the run ends."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the second is what a cloud sends before it takes a VM


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """A context in which the first Ctrl-C, or SIGTERM, asks to stop; a second one acts as ever.

    Yields:
        Whether one came. Outside of the main thread, which alone is told of signals, never.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def as_before() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        as_before()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        as_before()
