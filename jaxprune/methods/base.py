"""What a pruning method is: hyperparameters in a frozen dataclass, and pure functions."""

import copy
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxprune.errors import UserError
from jaxprune.ops.cuts import BETWEEN_LAYERS, Score
from jaxprune.ops.tiles import Chosen, Patches
from jaxprune.ops.visual import VisionOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionMethod:
    """Shortens an image before the decoder sees it.

    A method is hashable data. Jitted stages take it as a tree whose leaves are the fields named
    in `traced`: methods that differ in nothing else run the same program. `features` never
    hold a CLS token here; with the "full" select strategy the caller takes it off and puts it
    back.

    Of an image of several tiles a method that decides by the image looks at every tile for
    itself; a fixed number of patches is counted over all tiles together, among the patches
    that the decoder would read.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "vision"
    paper: ClassVar[str]
    summary: ClassVar[str]
    signals: ClassVar[frozenset[str]] = frozenset()
    """What `encode_image` has to provide besides the features."""
    merges: ClassVar[bool] = False
    """Whether kept tokens take the others in; every tile then gets one token more."""
    traced: ClassVar[tuple[str, ...]] = ()
    """Fields, whole numbers below 2**32, that programs get as arguments, uint32 `[]`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        jax.tree_util.register_pytree_node(cls, _traced_fields, _with_fields)

    def check(self, num_patches: int) -> None:
        """Raise `UserError` when the method cannot run on images of `num_patches` patches."""

    def fixed_count(self, num_patches: int) -> int | None:
        """How many tokens come out of an image of one tile; None where images differ."""
        raise NotImplementedError

    def choose(self, patches: Patches) -> Chosen:
        """Which patches stay."""
        raise NotImplementedError

    def merge_tokens(
        self, vision: VisionOutput, kept: jax.Array, indices: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of a method that merges: what the kept patches become, tile by tile.

        Args:
            vision: of F tiles.
            kept: bool `[F, N]`.
            indices: int32 `[F, K]`, the kept patches and, behind them, others.

        Returns:
            `[F, K, C]`, and one more token for each tile, `[F, C]`.
        """
        raise NotImplementedError


def _traced_fields(method: VisionMethod) -> tuple[tuple[Any, ...], VisionMethod]:
    leaves = tuple(np.uint32(getattr(method, name)) for name in method.traced)
    return leaves, dataclasses.replace(method, **dict.fromkeys(method.traced, 0))


def _with_fields(method: VisionMethod, leaves: tuple[Any, ...]) -> VisionMethod:
    method = copy.copy(method)  # not made anew: its checks cannot look at a traced value
    for name, leaf in zip(method.traced, leaves, strict=True):
        object.__setattr__(method, name, leaf)
    return method


class Depth(NamedTuple):
    """What a decoder-side method has to know of a model: its family and its layers."""

    family: str
    num_hidden_layers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderMethod:
    """Removes tokens at layers inside the decoder, by the attention that they receive.

    The counts are computed on the host and traced; what the program depends on is the
    score, the cut and the lengths that the layers get.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "decoder"
    paper: ClassVar[str]
    summary: ClassVar[str]
    cut: ClassVar[str] = BETWEEN_LAYERS
    prune_text: ClassVar[bool] = False

    @property
    def score(self) -> Score | None:
        """How candidates are ranked; None where all of them go."""
        raise NotImplementedError

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        """Tokens gone behind the cut of each layer, not falling: int `[L]`.

        Args:
            num_tokens: visual tokens of the row that enter the decoder.
            depth: the model's.

        Raises:
            UserError: when the method has no schedule for a model of this depth.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepRates(DecoderMethod):
    """A decoder-side method given by the share of the visual tokens that each layer gets."""

    def rates(self, depth: Depth) -> tuple[float, ...]:
        """The keep rate of each layer, 1 for the first, not increasing: `[L]`."""
        raise NotImplementedError

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        # What layer l + 1 gets is what is left behind layer l.
        rates = np.array(self.rates(depth), np.float64)
        kept = np.floor(rates * num_tokens + 0.5).astype(np.int64)
        return num_tokens - np.append(kept[1:], kept[-1])


@functools.lru_cache(maxsize=64)
def removed_table(method: DecoderMethod, depth: Depth, most: int) -> np.ndarray:
    """`method.removed` for every number of visual tokens up to `most`: int `[most + 1, L]`."""
    return np.stack([method.removed(n, depth) for n in range(most + 1)])


def round_half_up(x: float) -> int:
    """floor(x + 0.5): 0.5 becomes 1, 1.5 becomes 2."""
    return math.floor(x + 0.5)


def check_share(name: str, value: object, *, zero: bool = False, one: bool = True) -> None:
    """Raise `UserError` unless `value` is a share: a number from 0 (or above it) to 1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (0 < value < 1 or (zero and value == 0) or (one and value == 1)):  # type: ignore[operator]
        return
    low, high = "from 0" if zero else "above 0", "to 1" if one else "to below 1"
    raise UserError(f"{name} is {value!r}; expected a share {low} {high}.")


def check_layer(name: str, value: object, *, first: int = 1) -> None:
    """Raise `UserError` unless `value` is a layer's number, `first` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < first:
        raise UserError(f"{name} is {value!r}; expected a layer's number, {first} or more.")


def check_depth(name: str, layer: int, depth: Depth) -> None:
    """Raise `UserError` unless the model has a layer `layer`, counted from 0."""
    if layer >= depth.num_hidden_layers:
        raise UserError(
            f"{name} is {layer}, but the decoder has {depth.num_hidden_layers} layers, 0 to "
            f"{depth.num_hidden_layers - 1}."
        )


def check_keep(keep: int | None) -> None:
    """Raise `UserError` unless `keep` is None or a positive whole number."""
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise UserError(f"keep is {keep!r}; expected a number of visual tokens, 1 or more.")


def check_keep_fits(keep: int | None, num_patches: int) -> None:
    """Raise `UserError` when more patches are to be kept than an image has."""
    if keep is not None and keep > num_patches:
        raise UserError(f"keep is {keep}, but an image of this request has {num_patches} patches.")
