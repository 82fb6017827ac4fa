"""The methods of an evaluation: in whatever form they came, as arguments under a name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.errors import UserError
from jaxprune.methods import NO_PRUNING
from jaxprune.methods.base import Method
from jaxprune.methods.recipes import Recipe
from jaxprune.methods.resolve import check_names
from jaxprune.methods.written import with_options


class Named(NamedTuple):
    """A method.

    Attributes:
        label: what it is called in tables.
        arguments: "method" and its options, as `jaxprune.generate` takes them.
    """

    label: str
    arguments: dict[str, Any]


def name_methods(methods: Any) -> list[Named]:
    """The methods, "none" in front unless it is among them.

    Args:
        methods: one or a list of: a name or a text "name:keep=64;order=raster", an instance, a
            recipe or its path, a pair of those as a tuple, or a dict with "method" and options.

    Raises:
        UserError: for what is none of these, unknown names and options, or the same twice.
    """
    several = methods if isinstance(methods, list) else [methods]
    named = [_named(method) for method in several]
    if NO_PRUNING not in [one.label for one in named]:
        named.insert(0, _named(NO_PRUNING))
    labels = [one.label for one in named]
    twice = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if twice:
        raise UserError(f"The method {twice[0]} is there twice; give each once.")
    return named


def _named(method: Any) -> Named:
    if isinstance(method, Mapping):
        if "method" not in method:
            raise UserError(f"{dict(method)!r} is no method; expected the key 'method'.")
        arguments = {str(name): value for name, value in method.items()}
        options = {name: value for name, value in arguments.items() if name != "method"}
        label = _with_options(_label(arguments["method"]), options)
    elif isinstance(method, str):
        label, arguments = method.strip(), with_options(method)
    else:
        label, arguments = _label(method), {"method": method}
    # For another model's recipe; it is `resolve` that takes it, not a method.
    check_names(**{name: value for name, value in arguments.items() if name != "fractions"})
    return Named(label, arguments)


def _label(method: Any) -> str:
    if method is None:
        return NO_PRUNING
    if isinstance(method, Recipe):
        return _with_options(f"{method.method} recipe", method.asked)
    if isinstance(method, tuple | list) and not isinstance(method, Method):
        return ",".join(map(_label, method))
    if isinstance(method, Method) and dataclasses.is_dataclass(method):
        name = getattr(method, "name", type(method).__name__)
        return _with_options(name, _set_options(method))
    return str(method)


def _set_options(method: Any) -> dict[str, Any]:
    """The options of an instance that are not the default."""
    fields = [field for field in dataclasses.fields(method) if field.init]
    values = {field.name: getattr(method, field.name) for field in fields}
    return {f.name: values[f.name] for f in fields if values[f.name] is not f.default
            and values[f.name] != f.default}  # fmt: skip


def _with_options(name: str, options: Mapping[str, Any]) -> str:
    written = ";".join(f"{option}={value}" for option, value in options.items())
    return f"{name}:{written}" if written else name


def labels_of(methods: Sequence[Named]) -> list[str]:
    """What they are called."""
    return [method.label for method in methods]
