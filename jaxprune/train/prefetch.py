"""Making things in a thread while those before them are used."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class _Ended(NamedTuple):
    """The last thing that a thread says; with an error, if it came to one."""

    error: BaseException | None


def prefetched(items: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The same items, of which a thread makes up to `ahead` while they are waited for.

    An error comes where the item would have come that raised it. The thread ends with the
    generator: where that is closed, or an error or Ctrl-C goes through it, once the item in hand
    is made.
    """
    ready: queue.Queue[T | _Ended] = queue.Queue(ahead)
    wanted = threading.Event()
    wanted.set()

    def work() -> None:
        error = None
        try:
            for item in items:
                ready.put(item)
                if not wanted.is_set():
                    return
        except BaseException as raised:
            error = raised
        ready.put(_Ended(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _Ended):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        wanted.clear()
        while thread.is_alive():  # it may wait for room
            _empty(ready)
            thread.join(0.02)


def _empty(ready: "queue.Queue[T]") -> None:
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return
