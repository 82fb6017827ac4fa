"""That the library is used where JAX can be: outside of tracing, in the process that began."""

import os
from typing import Any

import jax

from jaxprune.errors import UserError

_first: list[int] = []  # the process in which devices were first used


def check_here(arrays: Any, what: str) -> None:
    """Raise `UserError` inside a transformation, or in a child that was forked off.

    JAX's threads do not come along into a forked process, where it would wait for them for ever.

    Args:
        arrays: a tree of a model's.
        what: cannot be done there, for the message.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays)):
        raise UserError(
            f"{what} cannot run inside jax.jit, grad or vmap; the pure function of a model is "
            "jaxprune.forward."
        )
    if not _first:
        _first.append(os.getpid())
    if _first[0] != os.getpid():
        raise UserError(
            f"{what} cannot run in a process that was forked off one that used JAX; start it with "
            'multiprocessing.get_context("spawn"), or load the model in the child alone.'
        )
