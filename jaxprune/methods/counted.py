"""Vision-side methods that keep a given number of patches of every image, or of every tile."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxprune.errors import check_choice
from jaxprune.methods.base import VisionMethod, check_keep, check_keep_fits
from jaxprune.ops.tiles import Chosen, Patches, Questions
from jaxprune.ops.visual import Signal

BUDGETS = ("image", "tile")
AT_ONCE = 2**26
"""Pairs of patches that may be compared at the same time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """The patches of which a number is kept: those of an image, or of one of its tiles.

    The patches of a tile follow each other row by row, those outside the picture among them.

    Attributes:
        signals: `[P, ...]` each.
        place: int32 `[P]`, a patch's place in reading order among those of the group; -1 for
            what is no part of the picture, whose signals mean nothing.
        questions: what is asked about the image, `[Q, D]` and `[Q]`.
        tile_patches: how many patches a tile has; static.
    """

    signals: dict[Signal, Array]
    place: Int[Array, " P"]
    questions: Questions | None
    tile_patches: int = dataclasses.field(metadata={"static": True})

    @property
    def inside(self) -> Bool[Array, " P"]:
        """What is part of the picture."""
        return self.place >= 0

    @property
    def number(self) -> Int[Array, ""]:
        """How many patches there are."""
        return jnp.sum(self.inside, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(VisionMethod):
    """Keeps `keep` patches, all of them where there are fewer.

    Args:
        keep: how many.
        budget: "image": of all tiles of an image together; "tile": of every tile.
    """

    keep: int
    budget: str = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_choice("budget", self.budget, BUDGETS)

    def check(self, num_patches: int) -> None:
        if self.budget == "image":
            check_keep_fits(self.keep, num_patches)

    def fixed_count(self, num_patches: int) -> int | None:
        return min(self.keep, num_patches)

    def video_count(self, frames: int, patches: int) -> int | None:
        if self.budget == "tile":
            return frames * min(self.keep, patches)
        return min(self.keep, frames * patches)

    def choose(self, patches: Patches) -> Chosen:
        place, asked = patches.place, patches.questions
        I, T, N = place.shape
        inside, groups, size = place >= 0, I, T * N
        if self.budget == "tile":
            place = jnp.where(inside, jnp.cumsum(inside, axis=2) - 1, -1)
            groups, size = I * T, N
        if asked is not None:
            asked = jax.tree.map(lambda x: jnp.repeat(x, groups // I, axis=0), asked)
        signals = {s: x.reshape(groups, size, *x.shape[3:]) for s, x in patches.signals.items()}
        group = Group(signals, place.reshape(groups, size), asked, N)
        at_once = max(1, AT_ONCE // size**2)
        kept = jax.lax.map(self.among, group, batch_size=min(at_once, groups))
        return Chosen(kept.reshape(I, T, N) & inside)

    @abc.abstractmethod
    def among(self, group: Group) -> Bool[Array, " P"]:
        """Which patches of a group stay: `keep` of them, or all that are part of the picture."""
