"""Baselines that look at nothing: the same places of every image."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UserError
from jaxprune.methods.base import VisionMethod, check_keep, check_keep_fits
from jaxprune.ops.visual import Selection, VisionOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedPlaces(VisionMethod):
    """Keep `keep` patches whose places depend on N alone, in raster order."""

    keep: int

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @abc.abstractmethod
    def places(self, num_tokens: int) -> np.ndarray:
        """The kept places, ascending, int `[keep]`."""

    def check(self, num_tokens: int) -> None:
        check_keep_fits(self.keep, num_tokens)

    def fixed_count(self, num_tokens: int) -> int | None:
        return self.keep

    def counts(self, vision: VisionOutput) -> jax.Array:
        return jnp.full(vision.features.shape[:1], self.keep, jnp.int32)

    def select(self, vision: VisionOutput, capacity: int) -> Selection:
        images, N, _ = vision.features.shape
        unused = capacity - self.keep
        places = np.pad(self.places(N), (0, unused))
        indices = np.pad(self.places(N), (0, unused), constant_values=-1)
        return Selection(
            tokens=vision.features[:, places],
            counts=self.counts(vision),
            indices=jnp.broadcast_to(jnp.asarray(indices, jnp.int32), (images, capacity)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPlaces(FixedPlaces):
    """Keep a random subset, drawn once from (seed, N) and the same for every image."""

    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "keep a random subset of the patches"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"seed is {self.seed!r}; expected a whole number, 0 or more.")

    def places(self, num_tokens: int) -> np.ndarray:
        return np.sort(np.argsort(self.draws(num_tokens), kind="stable")[: self.keep])

    def draws(self, num_tokens: int) -> np.ndarray:
        """A number for each place; the smallest `keep` stay. A place's draw is its own."""
        with jax.ensure_compile_time_eval():
            key = jax.random.fold_in(jax.random.key(self.seed), num_tokens)
            keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(np.arange(num_tokens))
            return np.asarray(jax.vmap(jax.random.uniform)(keys))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformPlaces(FixedPlaces):
    """Keep evenly spaced patches, floor((j + 0.5) N / keep)."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "keep evenly spaced patches"

    def places(self, num_tokens: int) -> np.ndarray:
        return (2 * np.arange(self.keep) + 1) * num_tokens // (2 * self.keep)
