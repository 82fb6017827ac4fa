"""Baselines that look at nothing: the same places of every image."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxprune.errors import check_seed
from jaxprune.methods.base import VisionMethod, check_keep, check_keep_fits
from jaxprune.ops.ranking import descending_order, ranks
from jaxprune.ops.tiles import Chosen, Patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedPlaces(VisionMethod):
    """Keep `keep` patches whose places depend on an image's number of patches alone."""

    keep: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def check(self, num_patches: int) -> None:
        check_keep_fits(self.keep, num_patches)

    def fixed_count(self, num_patches: int) -> int | None:
        return self.keep

    def choose(self, patches: Patches) -> Chosen:
        place = patches.place.reshape(len(patches.place), -1)  # [I, T * N]
        kept = jax.vmap(self.places)(place, patches.number)
        return Chosen((kept & (place >= 0)).reshape(patches.place.shape))

    @abc.abstractmethod
    def places(self, place: Int[Array, " P"], number: Int[Array, ""]) -> Bool[Array, " P"]:
        """Whether the patch at a place stays, of an image with that number of patches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPlaces(FixedPlaces):
    """Keep a random subset, drawn once from (seed, N) and the same for every image of N."""

    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "keep a random subset of the patches"
    traced: ClassVar[tuple[str, ...]] = ("seed",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def places(self, place: Int[Array, " P"], number: Int[Array, ""]) -> Bool[Array, " P"]:
        # A draw for each place by itself, so that padding changes nothing; the smallest stay.
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        draws = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(place)
        return ranks(descending_order(jnp.where(place >= 0, -draws, -jnp.inf))) < self.keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformPlaces(FixedPlaces):
    """Keep evenly spaced patches, floor((j + 0.5) N / keep)."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "keep evenly spaced patches"

    def places(self, place: Int[Array, " P"], number: Int[Array, ""]) -> Bool[Array, " P"]:
        chosen = (2 * jnp.arange(self.keep) + 1) * number // (2 * self.keep)
        at_place = jnp.zeros(place.shape, bool).at[chosen].set(True)
        return at_place[jnp.maximum(place, 0)]
