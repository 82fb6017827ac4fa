"""Methods as texts: "name", "one,other", "name:keep=64;order=raster", "name:keep=64,32"."""

import itertools
from collections.abc import Iterable
from typing import Any

from jaxprune.errors import UserError
from jaxprune.files import parse_json


def parse_method(text: str) -> str | tuple[str, ...]:
    """A name or path, or several with commas between."""
    parts = tuple(part.strip() for part in text.split(","))
    return parts[0] if len(parts) == 1 else parts


def parse_option(text: str) -> tuple[str, Any]:
    """An option's name and value, which is read as JSON where it is.

    Raises:
        UserError: for a text without a value.
    """
    name, equals, written = text.partition("=")
    if not equals:
        raise UserError(f"--option is {text!r}; expected name=value.")
    try:
        value = parse_json(written)
    except ValueError:
        value = written
    name = name.strip().replace("-", "_")
    return name, tuple(value) if isinstance(value, list) else value


def with_options(text: str) -> dict[str, Any]:
    """A method and its options, as arguments of `jaxprune.generate`.

    Raises:
        UserError: for an option without a value.
    """
    name, _, written = text.partition(":")
    options = dict(parse_option(option) for option in written.split(";") if option)
    if "method" in options:
        raise UserError(f"{text!r} names two methods; a pair is written one,other.")
    return {"method": parse_method(name), **options}


def one_by_one(texts: Iterable[str]) -> list[str]:
    """Methods whose options have several values, commas between, as a method for each value."""
    found = []
    for text in texts:
        name, colon, written = text.partition(":")
        options = [_values(option) for option in written.split(";") if option]
        found += [name + colon + ";".join(chosen) for chosen in itertools.product(*options)]
    return found


def _values(option: str) -> list[str]:
    """An option for each of its values; a comma within brackets parts none."""
    name, equals, written = option.partition("=")
    values, depth = [""], 0
    for letter in written:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return [f"{name}{equals}{value}" for value in values]
