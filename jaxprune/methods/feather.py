"""FEATHER: rank without rotary positions, and keep a grid besides.

Paper: arXiv 2412.13180; published code: markendo/FEATHER at c2a09b2.

Rotary positions favour tokens that stand near the question: the lower end of the image. So the
score of a visual token, before a layer K, is made of the queries q and keys k that layer K - 1
has before their rotation, for the prompt's last token:

    score          s_i = mean over heads of softmax(q . k_i / sqrt(d)) over the visual tokens

    before 8       keep the int(0.3 n) highest of the n visual tokens, and every third token of
                   every third row
    before 16      keep the int(0.09 n) highest of the n that are left by then

Survivors keep their positions. How many the first cut leaves depends on how many of the best
stand on the grid, and so does what the second leaves of them; costs count the most.

Deviations from the published code, which knows one square image: the tokens of every tile, and of
every frame, have a grid of their own, from its upper left corner. Newlines and merged tokens are on
none. What is kept for the grid is as many as tiles of n tokens in all may have on theirs, which is
all there are, of an image that is whole. After a vision-side method, whose tokens may all stand on
it, or in a prompt with several images that have padding, some may have to go: those with the lowest
scores. At least one token stays of each cut; in the code int(0.09 n) of few is 0.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import check_whole
from jaxprune.methods.base import DecoderMethod, as_layers, as_shares, removed_before
from jaxprune.ops.attention.definition import attention_weights, over_heads
from jaxprune.ops.cuts import Depth, LayerView, is_last, keep_best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feather(DecoderMethod):
    """Keep what the last token attends to without positions, and at first a grid.

    Args:
        keep_rates: the share of the highest scores that each cut keeps of what comes to it.
        cut_layers: the first layers without the dropped tokens, one a cut.
        stride: of the grid that the first cut keeps too, in rows and columns.
    """

    keep_rates: tuple[float, ...] = (0.3, 0.09)
    cut_layers: tuple[int, ...] = (8, 16)
    stride: int = 3

    name: ClassVar[str] = "feather"
    paper: ClassVar[str] = "FEATHER, arXiv 2412.13180"
    summary: ClassVar[str] = "rank by attention without positions, and keep a grid besides"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "cut_layers", as_layers(self.cut_layers))
        shares = as_shares("keep_rates", self.keep_rates, self.cut_layers)
        object.__setattr__(self, "keep_rates", shares)
        check_whole("stride", self.stride)

    @property
    def asks(self) -> tuple[str, ...]:
        return ("last",)

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        left = [num_tokens]
        for rate in self.keep_rates:
            first = len(left) == 1
            on_grid = most_on_grid(num_tokens, self.stride, depth.grid) if first else 0
            left.append(min(left[-1], share_of(rate, left[-1]) + on_grid))
        return removed_before(self.cut_layers, left[1:], num_tokens, depth)

    def keep(
        self, view: LayerView, candidates: Bool[Array, "B S"], count: Int[Array, " B"]
    ) -> Bool[Array, "B S"]:
        if view.layer + 1 not in self.cut_layers:
            return candidates
        cut = self.cut_layers.index(view.layer + 1)
        score = without_positions(view, candidates)
        S = candidates.shape[1]
        shares = jnp.array([share_of(self.keep_rates[cut], n) for n in range(S + 1)])
        number = jnp.minimum(shares[candidates.sum(axis=1)], count)
        best = candidates & keep_best(score, candidates, number)
        if cut:
            return best
        rest = self.on_grid(view) & candidates & ~best
        return best | (rest & keep_best(score, rest, count - best.sum(axis=1)))

    def on_grid(self, view: LayerView) -> Bool[Array, "B S"]:
        """The patches of every `stride`-th row and column of their tile."""
        cell = view.tokens.cell
        assert cell is not None
        return jnp.all((cell >= 0) & (cell % self.stride == 0), axis=0)


def share_of(rate: float, number: int) -> int:
    """int(rate n), at least 1."""
    return max(1, int(rate * number))


def most_on_grid(number: int, stride: int, grid: tuple[int, int] | None) -> int:
    """How many of an image's tokens may stand in every `stride`-th row and column of their tile.

    As many as whole tiles have, and of what is left over, a tile's upper rows at worst, one of
    `stride`. With whole tiles beside it that may be of several, each of which begins a row.
    """
    side = math.isqrt(number - 1) + 1 if number else 1
    rows, columns = grid or (side, side)
    whole = math.ceil(rows / stride) * math.ceil(columns / stride)
    tiles, rest = divmod(number, rows * columns)
    begun = math.ceil(columns / stride) if tiles and rest else 0
    return tiles * whole + min(whole, math.ceil(rest / stride) + begun)


def without_positions(view: LayerView, candidates: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Attention of the last token to the candidates alone, without rotation: mean over heads."""
    last = jnp.argmax(is_last(view.tokens.kind) & view.tokens.valid, axis=1)
    query = jnp.take_along_axis(view.q_plain, last[:, None, None, None], axis=2)  # [B, H, 1, d]
    weights = attention_weights(query, view.k_plain, candidates[:, None])
    return over_heads(weights, "mean")[:, 0]
