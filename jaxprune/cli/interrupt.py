"""Ctrl-C ends a command at once, whatever it is in the middle of."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from jaxprune.cli.output import note
from jaxprune.files import remove_unfinished

INTERRUPTED = 130
_advice: list[str] = []
_patient = threading.Event()
_SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides


@contextlib.contextmanager
def ending_at_once(*, for_good: bool = False) -> Iterator[None]:
    """A context in which one Ctrl-C ends the process with code 130; nothing half-written stays.

    Python would raise KeyboardInterrupt between two steps of its own: too late in the middle of
    a compilation, and never where the exception is swallowed, as in a garbage collection. So the
    signal is taken by a thread that ends the process itself. What a command has written by then
    is whole and stays.

    Args:
        for_good: nothing comes after it but the process's end, which a Ctrl-C does not stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours to handle
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    before = signal.signal(signal.SIGINT, lambda *_: None)  # so that the pipe gets its number
    pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        _advice.clear()
        if for_good:  # while Python ends, it would fall back to dying of the signal
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        else:
            signal.set_wakeup_fd(pipe_before)
            signal.signal(signal.SIGINT, before)
            os.close(write)  # which ends the thread


def say_at_the_end(advice: str) -> None:
    """What to tell whoever ends the command."""
    _advice[:] = [advice]


@contextlib.contextmanager
def leaving_the_first_one() -> Iterator[None]:
    """A context in which the first Ctrl-C is left to what handles signals there."""
    _patient.set()
    try:
        yield
    finally:
        _patient.clear()


def _watch(pipe: int) -> None:
    while number := os.read(pipe, 1):
        if number[0] != signal.SIGINT:
            continue
        if not _patient.is_set():
            _end()
        _patient.clear()
        note("Finishing what is in hand, then saving; a second Ctrl-C ends at once.")
    os.close(pipe)


def _end() -> None:
    remove_unfinished()
    with contextlib.suppress(Exception):  # the streams may be gone
        if sys.stderr.isatty():
            sys.stderr.write(_SHOW_CURSOR)
        note(" ".join(["Interrupted.", *_advice]))
        sys.stderr.flush()  # not stdout, which a pipe may hold up; what is there is flushed
    os._exit(INTERRUPTED)
