"""Pruning methods, one file a paper, and their registry."""

import dataclasses
import difflib
from typing import Any

from jaxprune.errors import UserError
from jaxprune.methods.base import VisionMethod
from jaxprune.methods.baselines import RandomPlaces, UniformPlaces
from jaxprune.methods.prumerge import PruMerge, PruMergePlus

METHODS: dict[str, type[VisionMethod]] = {
    cls.name: cls for cls in (PruMerge, PruMergePlus, RandomPlaces, UniformPlaces)
}
NO_PRUNING = "none"


def resolve(method: str | VisionMethod | None, **options: Any) -> VisionMethod | None:
    """A method from what a user wrote; None means no pruning.

    Args:
        method: a name, an instance, or None.
        **options: hyperparameters of a named method; those that are None are left out.

    Raises:
        UserError: for an unknown name (with the nearest known one) or option.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(method, VisionMethod):
        if options:
            raise UserError(
                f"The options {', '.join(options)} came beside a {type(method).__name__}; "
                "set them on the instance."
            )
        return method
    if method is None or method == NO_PRUNING:
        if options:
            raise UserError(f'The options {", ".join(options)} need a method; method is "none".')
        return None
    if not isinstance(method, str):
        raise UserError(f"method is a {type(method).__name__}; expected a name or an instance.")
    if method not in METHODS:
        known = [NO_PRUNING, *METHODS]
        near = difflib.get_close_matches(method, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"Unknown method {method!r}; known: {', '.join(known)}.{hint}")
    cls = METHODS[method]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise UserError(
            f"{method} has no option {', '.join(unknown)}; it has: {', '.join(fields)}."
        )
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        raise UserError(f"{method} needs the option {', '.join(missing)}, e.g. keep=64.")
    return cls(**options)


def describe(cls: type[VisionMethod]) -> dict[str, Any]:
    """Name, family, summary, paper and options (with defaults) of a method, for listings."""
    options = {
        field.name: "required" if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
    }
    return {
        "name": cls.name,
        "family": cls.family,
        "summary": cls.summary,
        "paper": cls.paper,
        "options": options,
    }


__all__ = [
    "METHODS",
    "NO_PRUNING",
    "PruMerge",
    "PruMergePlus",
    "RandomPlaces",
    "UniformPlaces",
    "VisionMethod",
    "describe",
    "resolve",
]
