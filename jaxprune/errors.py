"""The one exception type that a user's mistake raises, and the checks of values that raise it."""

import math
import numbers
from typing import TypeGuard

LARGEST = 2**31 - 1
"""Programs take whole numbers of 32 bits."""


class UserError(ValueError):
    """Something the caller can put right: what came, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class UserNote(UserWarning):
    """Something in a model's files that a user may want to know of; nothing is wrong."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite real number that a float can be; True and False are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_whole(name: str, value: object, *, least: int = 1, what: str = "a whole number") -> None:
    """Raise `UserError` unless `value` is a whole number, `least` or more, of 32 bits."""
    if not is_whole(value) or not least <= value <= LARGEST:
        shown = (
            "a number of too many digits" if is_whole(value) and value > LARGEST else repr(value)
        )
        raise UserError(f"{name} is {shown}; expected {what}, {least} or more.")


def check_share(name: str, value: object, *, zero: bool = False, one: bool = True) -> None:
    """Raise `UserError` unless `value` is a share: a number from 0 (or above it) to 1."""
    if is_number(value) and (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        return
    low, high = "from 0" if zero else "above 0", "to 1" if one else "to below 1"
    raise UserError(f"{name} is {value!r}; expected a share {low} {high}.")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `UserError` unless `value` is one of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{name} is {value!r}; expected one of: {', '.join(allowed)}.")


def check_flag(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; expected True or False.")


def check_layer(name: str, value: object, *, first: int = 1) -> None:
    """Raise `UserError` unless `value` is a layer's number, `first` or more."""
    check_whole(name, value, least=first, what="a layer's number")


def check_seed(seed: object) -> None:
    """Raise `UserError` unless `seed` is a whole number of 32 bits."""
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}; expected a whole number from 0 to 2**32 - 1.")
