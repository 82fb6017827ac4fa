"""What a pruning method is: hyperparameters in a frozen dataclass, and pure functions."""

import dataclasses
from typing import ClassVar

import jax

from jaxprune.errors import UserError
from jaxprune.ops.visual import Selection, VisionOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionMethod:
    """Shortens an image before the decoder sees it.

    A method is hashable data and a static argument of the jitted stages: the same method
    runs the same program. `features` never hold a CLS token here; with the "full" select
    strategy the caller takes it off and puts it back.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "vision"
    paper: ClassVar[str]
    summary: ClassVar[str]
    signals: ClassVar[frozenset[str]] = frozenset()
    """What `encode_image` has to provide besides the features."""
    extra_tokens: ClassVar[int] = 0
    """Tokens that come out on top of the kept ones."""

    def check(self, num_tokens: int) -> None:
        """Raise `UserError` when the method cannot run on images of `num_tokens` tokens."""

    def fixed_count(self, num_tokens: int) -> int | None:
        """How many tokens come out of every image, or None where images differ."""
        raise NotImplementedError

    def counts(self, vision: VisionOutput) -> jax.Array:
        """How many tokens come out of each image, int32 `[I]`."""
        raise NotImplementedError

    def select(self, vision: VisionOutput, capacity: int) -> Selection:
        """The tokens that are left, in `capacity` slots, which all counts fit into."""
        raise NotImplementedError


def check_keep(keep: int | None) -> None:
    """Raise `UserError` unless `keep` is None or a positive whole number."""
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise UserError(f"keep is {keep!r}; expected a number of visual tokens, 1 or more.")


def check_keep_fits(keep: int | None, num_tokens: int) -> None:
    """Raise `UserError` when more tokens are to be kept than an image has."""
    if keep is not None and keep > num_tokens:
        raise UserError(f"keep is {keep}, but an image of this model has {num_tokens} tokens.")
