"""Baselines that look at nothing: the same places of every image."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxprune.errors import check_seed
from jaxprune.methods.counted import Counted, Group
from jaxprune.ops.ranking import descending_order, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPlaces(Counted):
    """Keep a random subset, drawn once from (seed, N) and the same for every image of N."""

    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "keep a random subset of the patches"
    traced: ClassVar[tuple[str, ...]] = ("seed",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def among(self, group: Group) -> Bool[Array, " P"]:
        # A draw for each place by itself, so that padding changes nothing; the smallest stay.
        place = group.place
        key = jax.random.fold_in(jax.random.key(self.seed), group.number)
        draws = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(place)
        return ranks(descending_order(jnp.where(place >= 0, -draws, -jnp.inf))) < self.keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformPlaces(Counted):
    """Keep evenly spaced patches, floor((j + 0.5) N / keep)."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "keep evenly spaced patches"

    def among(self, group: Group) -> Bool[Array, " P"]:
        chosen = (2 * jnp.arange(self.keep) + 1) * group.number // (2 * self.keep)
        at_place = jnp.zeros(group.place.shape, bool).at[chosen].set(True)
        return at_place[jnp.maximum(group.place, 0)]
