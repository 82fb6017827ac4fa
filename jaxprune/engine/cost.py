"""What a prompt costs in the decoder: tokens, multiply-adds and cache bytes, layer by layer.

The formula is FitPrune's (arXiv 2409.10197), with grouped-query attention counted as it is.
For n tokens into a layer and n' left after its attention, width D, H heads and K key/value
heads of width d, MLP width m, in multiply-adds (a FLOP count is twice that):

    n D (H + 2 K) d     query, key and value projections
    2 n^2 H d           both attention products, the whole square
    n' H d D            output projection
    3 n' D m            MLP

For LLaVA-1.5-7B without pruning this is the 4 n D^2 + 2 n^2 D + 3 n D m of the paper, which
counts the visual tokens alone; both that and the count of all tokens are given here. Three
published conventions give 3.1, 3.8 and 4.6 "TFLOPs" for one and the same unpruned model, so
never compare a bare number.

Ranking by attention is counted apart, `score_macs`. Left out is everything else that choosing
takes, all of it below 1 % of an unpruned prefill of a 7B model. Of the 8.5 TFLOP of LLaVA-1.5-7B's
576 patches and 64 text tokens (and the 43 of LLaVA-NeXT's 2,928), by XLA's own count:

    every patch through the projector, for a method that sees it so       24 GFLOP  (123)
    similarities of all pairs: divprune, cdpruner, holov (scope and
        others: a quarter)                                                 2.7      (68)
    CLIP's text tower, for 77 tokens, and both projections                14        (15 to 18)
    SparseVLM's raters, three cuts' clusters                               1.0
    choosing greedily, DART's cosines, what V2Drop and FEATHER compare      .2 or less

How long that takes is another matter: docs/performance.md.
"""

import dataclasses
import statistics
from typing import Any

import numpy as np

from jaxprune.engine.shapes import tokens_left
from jaxprune.errors import UserError, is_whole
from jaxprune.methods import Plan, resolve
from jaxprune.methods.fitprune import MOST_TOKENS
from jaxprune.models.family import DecoderSizes, ModelConfig
from jaxprune.models.registry import depth_of, family_of
from jaxprune.ops.cuts import AFTER_ATTENTION, Schedule
from jaxprune.ops.tiles import VisualSize

FORMULA = (
    "multiply-adds of the decoder's layers: nD(H+2K)d + 2n^2Hd + n'HdD + 3n'Dm "
    "(FitPrune's formula, arXiv 2409.10197); 1 multiply-add = 2 FLOPs"
)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One decoder layer.

    Attributes:
        text_tokens: text tokens in and out.
        visual_in, visual_out: visual tokens that enter it and that it leaves.
        macs: multiply-adds of all tokens.
        visual_macs: the same formula for the visual tokens alone, as FitPrune counts.
        cache_bytes: keys and values of the prompt's tokens.
    """

    layer: int
    text_tokens: int
    visual_in: int
    visual_out: int
    macs: int
    visual_macs: int
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """A prompt's cost, and what it would be without pruning.

    Attributes:
        layers: one a decoder layer.
        unpruned: the same prompt without pruning.
        visual_tokens: visual tokens that enter the decoder.
        score_macs: multiply-adds spent on ranking by attention, not part of the layers' count.
        lm_head_macs: multiply-adds of one token's logits, not part of the layers' count.
        executed: of a request that ran: what its padded shapes cost a row, see `executed`.
    """

    layers: tuple[LayerCost, ...]
    unpruned: "Cost | None"
    visual_tokens: int
    score_macs: int
    lm_head_macs: int
    executed: dict[str, int] | None = None

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def visual_macs(self) -> int:
        return sum(layer.visual_macs for layer in self.layers)

    @property
    def cache_bytes(self) -> int:
        return sum(layer.cache_bytes for layer in self.layers)

    @property
    def visual_per_layer(self) -> float:
        """Visual tokens that enter a layer, the mean: what makes budgets comparable."""
        return statistics.fmean(layer.visual_in for layer in self.layers)

    @property
    def saved(self) -> dict[str, float]:
        """Shares saved against no pruning: "visual_macs", "macs", "cache_bytes"."""
        if self.unpruned is None:
            return {}
        names = ("visual_macs", "macs", "cache_bytes")
        return {n: 1 - getattr(self, n) / max(getattr(self.unpruned, n), 1) for n in names}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "formula": FORMULA,
            "visual_tokens": self.visual_tokens,
            "visual_per_layer": self.visual_per_layer,
            "macs": self.macs,
            "visual_macs": self.visual_macs,
            "cache_bytes": self.cache_bytes,
            "score_macs": self.score_macs,
            "lm_head_macs": self.lm_head_macs,
            "executed": self.executed,
            "saved": {name: round(share, 6) for name, share in self.saved.items()},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }


def layer_macs(text_config: DecoderSizes, tokens_in: int, tokens_out: int) -> int:
    """Multiply-adds of one layer; `tokens_out` is what is left after its attention."""
    c = text_config
    heads = c.num_attention_heads * c.head_dim
    shared = c.num_key_value_heads * c.head_dim
    before = tokens_in * c.hidden_size * (heads + 2 * shared) + 2 * tokens_in**2 * heads
    after = (
        tokens_out * heads * c.hidden_size + 3 * tokens_out * c.hidden_size * c.intermediate_size
    )
    return int(before + after)


def estimate(
    config: ModelConfig,
    method: Any = "none",
    *,
    text_tokens: int = 64,
    visual_tokens: int | None = None,
    image_size: tuple[int, int] | None = None,
    **method_options: Any,
) -> Cost:
    """The cost of a prompt with one image, without weights, an image or a device.

    Args:
        config: the model's config; `jaxprune.model.read_config` finds one by name.
        method: as for `jaxprune.generate`.
        text_tokens: text tokens of the prompt.
        visual_tokens: visual tokens that enter the decoder, for methods that decide by the
            image; without a vision-side method, those of the image.
        image_size: width and height in pixels, for models whose images differ in tokens;
            None counts the image that has the most.
        **method_options: hyperparameters of a named method.

    Raises:
        UserError: for numbers out of range, a method that does not fit the model, or one that
            decides by the image where `visual_tokens` is None.
    """
    given = {"text_tokens": text_tokens}
    if visual_tokens is not None:
        given["visual_tokens"] = visual_tokens
    for name, value in given.items():
        if not (is_whole(value) and 0 <= value <= MOST_TOKENS):
            raise UserError(f"{name} is {value!r}; expected a number from 0 to {MOST_TOKENS:,}.")
    family_of(config)  # refuses what is no config
    plan = resolve(method, depth_of(config), **method_options)
    fixed = None if plan.vision is None else tokens_left(config, plan.vision)
    if visual_tokens is not None and fixed is not None:
        raise UserError(
            f"The method leaves {fixed} visual tokens of every image; leave out visual_tokens."
        )
    unpruned = None if image_size is None else _image_tokens(config, image_size)
    if visual_tokens is not None:
        most = most_tokens(config) if unpruned is None else unpruned
        if visual_tokens > most:
            raise UserError(
                f"visual_tokens is {visual_tokens}, but an image has {most} before pruning."
            )
        if plan.vision is None:
            unpruned = visual_tokens
    side = config.tower.tile_size
    return prompt_cost(
        config,
        plan,
        text_tokens=text_tokens,
        unpruned_visual_tokens=unpruned,
        visual_tokens=visual_tokens,
        fixed=config.tiling(VisualSize(side, side)).num_cls,
    )


def most_tokens(config: ModelConfig) -> int:
    """Visual tokens of the image that has the most of them, before pruning."""
    return config.most_tokens(config.most_tiles)


def _image_tokens(config: ModelConfig, image_size: tuple[int, int]) -> int:
    """Visual tokens of an image of this size, before pruning."""
    sides = image_size if isinstance(image_size, tuple | list) else ()
    if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
        raise UserError(
            f"image_size is {image_size!r}; expected width and height in pixels, e.g. (672, 672)."
        )
    width, height = sides
    return config.tiling(VisualSize(height, width)).num_tokens


def prompt_cost(
    config: ModelConfig,
    plan: Plan,
    *,
    text_tokens: int,
    unpruned_visual_tokens: int | None = None,
    visual_tokens: int | None = None,
    fixed: int = 0,
) -> Cost:
    """The cost of a prompt under a plan, without running anything.

    Args:
        config: the model's config; its dtype gives the size of the caches.
        plan: what prunes; see `methods.resolve`.
        text_tokens: text tokens of the prompt.
        unpruned_visual_tokens: before any pruning; None for one image.
        visual_tokens: what a vision-side method leaves of them; None asks the method.
        fixed: visual tokens that the decoder never drops.

    Raises:
        UserError: when a vision-side method decides by the image and `visual_tokens` is None.
    """
    full = most_tokens(config) if unpruned_visual_tokens is None else unpruned_visual_tokens
    if plan.vision is None:
        entering = full
    elif visual_tokens is not None:
        entering = visual_tokens
    else:
        plan.vision.check(config.tower.tokens_per_tile if config.one_tile else full)
        known = tokens_left(config, plan.vision)
        if known is None:
            fixed_keep = ", or a fixed keep" if config.one_tile else ""
            raise UserError(
                f"How many tokens {plan.vision.name} leaves depends on the image; give their "
                f"number as visual_tokens (--visual-tokens){fixed_keep}."
            )
        entering = known
    layers = config.text_config.num_hidden_layers
    removed = np.zeros(layers, int)
    if plan.decoder is not None:
        removed = plan.decoder.removed(entering, depth_of(config))
    unpruned = _cost(config, Plan(), text_tokens, full, np.full(layers, full), None)
    left = np.maximum(entering - removed, min(fixed, entering))
    return _cost(config, plan, text_tokens, entering, left, unpruned)


def executed(
    config: ModelConfig, slots: int, schedule: Schedule, *, new_slots: int
) -> dict[str, int]:
    """What one row of a padded batch costs: its shapes, not its tokens.

    Args:
        config: the model's config.
        slots: of the sequence that enters the decoder.
        schedule: with static lengths, or one that makes no cuts.
        new_slots: room in the caches for tokens to be generated.

    Returns:
        "macs" of the prefill, "unpruned_macs" of the same slots without a schedule, and
        "cache_bytes" as allocated.
    """
    c = config.text_config
    L = c.num_hidden_layers
    after = schedule.lengths or (slots,) * L
    before = (slots, *after[:-1])
    at_mlp = after if schedule.cut == AFTER_ATTENTION else before
    pairs = zip(before, at_mlp, strict=True)
    return {
        "macs": sum(layer_macs(c, n, m) for n, m in pairs),
        "unpruned_macs": L * layer_macs(c, slots, slots),
        "cache_bytes": sum(cache_bytes(c, n + new_slots) for n in before),
    }


def cache_bytes(text_config: DecoderSizes, tokens: int) -> int:
    """Bytes of one layer's keys and values."""
    c = text_config
    return 2 * tokens * c.num_key_value_heads * c.head_dim * np.dtype(c.dtype).itemsize


def _cost(
    config: ModelConfig,
    plan: Plan,
    text: int,
    entering: int,
    left: np.ndarray,
    unpruned: Cost | None,
) -> Cost:
    c = config.text_config
    method, layers, scores = plan.decoder, [], 0
    visual_in = entering
    for l in range(c.num_hidden_layers):
        # Text that iti removes counts as visual: which of both goes depends on the prompt.
        visual_out = int(left[l])
        at_mlp = visual_out if method and method.cut == AFTER_ATTENTION else visual_in
        tokens = text + visual_in
        layers.append(
            LayerCost(
                layer=l,
                text_tokens=text,
                visual_in=visual_in,
                visual_out=visual_out,
                macs=layer_macs(c, tokens, text + at_mlp),
                visual_macs=layer_macs(c, visual_in, at_mlp),
                cache_bytes=cache_bytes(c, tokens),
            )
        )
        if method and method.asks and visual_out < visual_in:
            queries = method.asks
            asked = 1 if queries == ("last",) else text
            if set(queries) <= {"last", "text"}:  # their rows of attention, once more
                scores += asked * tokens * (c.num_attention_heads * c.head_dim + len(queries))
            else:
                scores += len(queries) * tokens**2
        visual_in = visual_out
    return Cost(
        layers=tuple(layers),
        unpruned=unpruned,
        visual_tokens=entering,
        score_macs=scores,
        lm_head_macs=c.hidden_size * c.vocab_size,
    )
