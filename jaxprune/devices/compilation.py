"""XLA compilations: counting them, forbidding them, refusing them before a process is full."""

import contextlib
import functools
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax

from jaxprune.errors import UserError


class NotWarm(UserError):
    """A compilation where none is allowed."""


# What JAX reports before XLA sets to work, and whenever a program was made, from source or from
# the persistent cache.
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_MADE = "/jax/core/compile/backend_compile_duration"
_MOST_MAPPINGS = pathlib.Path("/proc/sys/vm/max_map_count")


class _Thread(threading.local):
    """A thread compiles what it calls.

    Attributes:
        programs: what it has made so far.
        seconds: what XLA took for them.
        forbidden: whether it may make none.
        guarded: whether it is in a stage, which is refused before the process is full.
    """

    def __init__(self) -> None:
        self.programs: list[str] = []
        self.seconds = 0.0
        self.forbidden = False
        self.guarded = False


_thread = _Thread()


@functools.cache
def _listen() -> None:
    def heard(event: str, duration_secs: float, **details: str | int) -> None:
        if event == _LOWERED and _thread.guarded:
            check_mappings()
        if event == _MADE:
            _thread.programs.append(str(details.get("fun_name", "a program")))
            _thread.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(heard)


class Compilations:
    """The XLA programs that this thread has made since an instant.

    Attributes:
        programs: their names, oldest first.
        seconds: what XLA took.
    """

    def __init__(self) -> None:
        _listen()
        self._first, self._before = len(_thread.programs), _thread.seconds

    @property
    def programs(self) -> list[str]:
        return _thread.programs[self._first :]

    @property
    def seconds(self) -> float:
        return _thread.seconds - self._before

    def __len__(self) -> int:
        return len(_thread.programs) - self._first


@contextlib.contextmanager
def no_compilation() -> Iterator[Compilations]:
    """A context in which every XLA compilation of this thread is an error.

    What `warmup` covered runs as before. A request that needs another program raises after
    the compilation, naming the stage and the shape; the program is then there for the next one.

    Yields:
        `Compilations`, whose length stays 0.

    Raises:
        jaxprune.UserError: for a compilation.
    """
    found, before = Compilations(), _thread.forbidden
    _thread.forbidden = True
    try:
        yield found
        if len(found):
            raise NotWarm(
                f"{len(found)} XLA programs were made where none is allowed: "
                f"{', '.join(found.programs[:3])}."
            )
    finally:
        _thread.forbidden = before


def check_mappings() -> None:
    """Raise `UserError` while there still is room for a few more programs.

    On Linux a program on a CPU takes over a hundred memory mappings, and a process has 65,530
    unless `vm.max_map_count` says otherwise. Beyond them LLVM ends the process.
    """
    if jax.default_backend() != "cpu":
        return
    try:
        most = int(_MOST_MAPPINGS.read_text())
        held = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except (OSError, ValueError):  # not Linux
        return
    if held > 0.95 * most:
        raise UserError(
            f"This process holds {held} of the {most} memory mappings that Linux gives it, most of "
            "them for compiled programs; what is compiled still runs, but nothing more can be. Use "
            "fewer buckets or methods in a process, free all programs with jax.clear_caches(), or "
            "raise the limit (sysctl vm.max_map_count)."
        )


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """A context in which `check_mappings` is asked before a program is made."""
    _listen()
    before, _thread.guarded = _thread.guarded, True
    try:
        yield
    finally:
        _thread.guarded = before


@contextlib.contextmanager
def covered(stage: str, shape: dict[str, Any]) -> Iterator[None]:
    """Raise `UserError` when a stage compiles under `no_compilation`, and say for which shape.

    Where there is no room for another program it is refused before it is made.
    """
    found = Compilations()
    with guarded():
        yield
    if _thread.forbidden and len(found):
        sizes = ", ".join(f"{name}={value}" for name, value in shape.items())
        raise NotWarm(
            f"The stage {stage!r} had to be compiled for {sizes}, which no_compilation forbids; "
            "pass warmup the same method and buckets that hold this shape."
        )
