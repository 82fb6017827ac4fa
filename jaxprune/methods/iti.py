"""Image-text interaction pruning, `iti`, in two stages (arXiv 2409.01162).

Stage 1, before the decoder. With d the CLS token's attention (one head over the full width),
sorted: d_1 >= ... >= d_N. The curve has a long tail; where it begins is

    i* = argmax over i of f(i),    f(i) = (N - i) (d_1 - d_i)^c,

computed as log(N - i) + c log(d_1 - d_i) over i < N with d_i < d_1. The tokens 1 ... i* stay,
in raster order; the others are removed, not merged. A larger c keeps more.

Stage 2, inside the decoder, once, before layer `layer`, by the attention of the layer before.
The importance of a token is the mean over heads, then over the later queries, of the attention
that it receives. The round(stage2 * surviving visual tokens) least important go, whether
visual or text: never the beginning of sequence, what stands before the image, or the last
token. Survivors keep their positions.

Not published and therefore ours: c = 4, layer = 2, stage2 = 0.5, and rows = "text", which
lets only the text after the image ask; rows = "all" is the paper's literal wording. The first
stage renumbers positions and the second keeps them, unless `positions` says otherwise for both.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.errors import UserError, check_choice, check_layer, check_share, is_number
from jaxprune.methods.base import DecoderMethod, Plan, VisionMethod, check_depth, round_half_up
from jaxprune.ops.cuts import Depth, Score
from jaxprune.ops.ranking import descending_order, ranks
from jaxprune.ops.tiles import Chosen, Patches
from jaxprune.ops.visual import CLS_ATTENTION, Signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iti:
    """Both stages of image-text interaction pruning.

    Args:
        c: the exponent of stage 1; larger keeps more.
        stage2: visual tokens that stage 2 removes, as a share of those that enter it.
        layer: the first layer without them.
        rows: "text" or "all": whose attention counts in stage 2.
        prune_text: text after the image may go in stage 2 too.
        positions: "renumber" or "original" in both stages; None: each stage's own default.
    """

    c: float = 4.0
    stage2: float = 0.5
    layer: int = 2
    rows: str = "text"
    prune_text: bool = True
    positions: str | None = None

    name: ClassVar[str] = "iti"
    side: ClassVar[str] = "vision and decoder"
    paper: ClassVar[str] = "Image-text interaction pruning, arXiv 2409.01162"
    summary: ClassVar[str] = "cut the long tail of CLS attention, then what the text ignores"
    signals: ClassVar[frozenset[Signal]] = frozenset({CLS_ATTENTION})

    def __post_init__(self) -> None:
        self.plan()  # both stages check their options

    def plan(self) -> Plan:
        positions = {} if self.positions is None else {"positions": self.positions}
        stage2 = Interaction(
            share=self.stage2,
            layer=self.layer,
            rows=self.rows,
            prune_text=self.prune_text,
            **positions,
        )
        return Plan(LongTail(c=self.c, **positions), stage2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTail(VisionMethod):
    """Stage 1: remove the long tail of the CLS attention."""

    c: float = 4.0

    name: ClassVar[str] = "iti_stage1"
    paper: ClassVar[str] = Iti.paper
    summary: ClassVar[str] = "iti's first stage alone: cut the long tail of CLS attention"
    signals: ClassVar[frozenset[Signal]] = frozenset({CLS_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.c) or not self.c > 0:
            raise UserError(f"c is {self.c!r}; expected a number above 0.")

    def choose(self, patches: Patches) -> Chosen:
        s = patches.signals[CLS_ATTENTION]  # [I, T, N], every tile for itself
        return Chosen(ranks(descending_order(s)) < tail_start(s, self.c)[..., None])


def tail_start(s: Float[Array, "*tiles N"], c: float | Array) -> Int[Array, "*tiles"]:
    """i*, the number of tokens before the tail."""
    N = s.shape[-1]
    d = -jnp.sort(-s.astype(jnp.float32), axis=-1)
    drop = d[..., :1] - d
    i = jnp.arange(1, N + 1)
    possible = (drop > 0) & (i < N)
    f = jnp.log(jnp.maximum(N - i, 1)) + c * jnp.log(jnp.where(possible, drop, 1.0))
    best = jnp.argmax(jnp.where(possible, f, -jnp.inf), axis=-1) + 1  # ties: the smallest i
    return jnp.where(jnp.any(possible, axis=-1), best, N).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interaction(DecoderMethod):
    """Stage 2: remove, once, what the later tokens attend to least."""

    share: float = 0.5
    layer: int = 2
    rows: str = "text"
    prune_text: bool = True  # type: ignore[misc]  # a constant of most methods, an option here

    name: ClassVar[str] = "iti_stage2"
    paper: ClassVar[str] = Iti.paper
    summary: ClassVar[str] = "iti's second stage alone: remove once what the text ignores"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("stage2", self.share, zero=True)
        check_layer("layer", self.layer)
        check_choice("rows", self.rows, ("text", "all"))
        if not isinstance(self.prune_text, bool):
            raise UserError(f"prune_text is {self.prune_text!r}; expected True or False.")

    @property
    def score(self) -> Score:
        return Score(queries=(self.rows,), later=True)

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        check_depth("layer", self.layer, depth)
        after = np.arange(depth.num_hidden_layers) >= self.layer - 1
        return after * round_half_up(self.share * num_tokens)
