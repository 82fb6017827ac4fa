"""Removing tokens at layers inside the decoder: the machinery of every decoder-side method.

Layer by layer, a schedule ranks the candidates by the attention that they receive in that
layer and keeps as many as a count says. It runs in two ways that give the same logits:

    gather  the sequence is really shortened, to a static length per layer: fast
    mask    shapes stay full and dropped tokens are masked: one compiled program
            evaluates any counts

The counts are traced in both, so they never cause a compilation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.ops.attention import Watch
from jaxprune.ops.ranking import descending_order, nonzero_first, ranks

# What a token of the prompt is to a schedule.
CONTEXT = 0  # text before or between images: never pruned, never asked
VISUAL = 1
QUESTION = 2  # text behind the last image, its last token apart
LAST = 3  # the prompt's last token: asked, never pruned
ANSWER = 4  # a teacher-forced answer: never pruned, never asked
LAST_VISUAL = 5  # the same as LAST, of a prompt that ends with an image

AFTER_ATTENTION = "after_attention"
BETWEEN_LAYERS = "between_layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How candidates are ranked: by the product of the attention that they receive.

    Attributes:
        queries: whose attention counts, one factor each: "last" (the prompt's last token),
            "text" (all text behind the last image), "visual", or "all".
        heads: "mean" or "max" over the heads.
        later: a token's own attention does not count, and its sum is divided by the number
            of the queries behind it; without, sums are compared as they are.
    """

    queries: tuple[str, ...]
    heads: str = "mean"
    later: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where a decoder drops tokens and how it ranks them; hashable, a static argument.

    Attributes:
        layers: the layers that drop tokens.
        cut: "after_attention": between a layer's attention and its MLP;
            "between_layers": behind its MLP.
        score: how candidates are ranked; None ranks them by their place, earlier first.
        prune_text: text behind the last image is a candidate too.
        lengths: slots left behind each of the decoder's layers, which are gathered
            together; None masks the dropped tokens instead.
        query_slots: an upper bound of the text tokens of a row; what makes scores cheap
            that only text asks for.
    """

    layers: tuple[int, ...] = ()
    cut: str = BETWEEN_LAYERS
    score: Score | None = None
    prune_text: bool = False
    lengths: tuple[int, ...] | None = None
    query_slots: int | None = None

    def watch(self, layer: int, tokens: Any) -> Watch | None:
        """What layer `layer`'s attention has to note down, if anything."""
        if layer not in self.layers or self.score is None:
            return None
        queries = [query_weights(name, tokens) for name in self.score.queries]
        few = set(self.score.queries) <= {"last", "text"}
        rows = 1 if self.score.queries == ("last",) else self.query_slots
        return Watch(
            queries=jnp.stack(queries),
            heads=self.score.heads,
            later=self.score.later,
            rows=rows if few else None,
        )

    def apply(
        self, cut: str, layer: int, tree: Any, received: jax.Array | None, counts: Any
    ) -> Any:
        """What is left behind the cut of layer `layer`, if it makes one at this place.

        Args:
            cut: the place that the decoder has come to.
            layer: the layer.
            tree: a tuple of the tokens, with `valid` and `kind`, and whatever else there is
                of each of them: arrays `[B, S, ...]`.
            received: float32 `[n, B, S]`, what `watch` asked for.
            counts: int32 `[L, B]`, candidates left behind each layer.
        """
        if cut != self.cut or layer not in self.layers:
            return tree
        tokens, *others = tree
        score = jnp.zeros(tokens.valid.shape) if received is None else jnp.prod(received, axis=0)
        kept = keep_best(score, candidates(tokens, prune_text=self.prune_text), counts[layer])
        tokens = tokens.replace(valid=tokens.valid & kept)
        if self.lengths is None or self.lengths[layer] >= tokens.valid.shape[1]:
            return tokens, *others
        return compact((tokens, *others), tokens.valid, self.lengths[layer])

    def record(self, tokens: Any, received: jax.Array | None) -> Any:
        """What is noted down behind a layer that drops tokens: who is left.

        Returns:
            positions int32 `[B, S']` and valid bool `[B, S']`.
        """
        del received
        return tokens.positions, tokens.valid


NO_CUTS = Schedule()


def query_weights(name: str, tokens: Any) -> jax.Array:
    """1 for the tokens that ask, 0 for the others: float32 `[B, S]`."""
    kind = tokens.kind
    asks = {
        "last": is_last(kind),
        "text": (kind == QUESTION) | is_last(kind),
        "visual": is_visual(kind),
        "all": kind != ANSWER,
    }[name]
    return (asks & tokens.valid).astype(jnp.float32)


def is_last(kind: jax.Array) -> jax.Array:
    """Whether a token is its prompt's last."""
    return (kind == LAST) | (kind == LAST_VISUAL)


def is_visual(kind: jax.Array) -> jax.Array:
    """Whether a token is visual, to be pruned or not."""
    return (kind == VISUAL) | (kind == LAST_VISUAL)


def candidates(tokens: Any, *, prune_text: bool) -> jax.Array:
    """The tokens that may be dropped: bool `[B, S]`."""
    found = tokens.kind == VISUAL
    if prune_text:
        found |= tokens.kind == QUESTION
    return found & tokens.valid


def keep_best(score: jax.Array, candidates: jax.Array, count: jax.Array) -> jax.Array:
    """All but the lowest-scoring candidates; ties keep the lower slot.

    Args:
        score: float32 `[B, S]`.
        candidates: bool `[B, S]`.
        count: int32 `[B]`, candidates that stay.

    Returns:
        bool `[B, S]`, True for everything that is no candidate.
    """
    rank = ranks(descending_order(jnp.where(candidates, score, -jnp.inf)))
    return ~candidates | (rank < count[:, None])


def compact(tree: Any, valid: jax.Array, length: int) -> Any:
    """Valid slots of a pytree of `[B, S, ...]` to the front, in order, in `length` slots."""
    slots = nonzero_first(valid, length)

    def gather(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, slots.reshape(*slots.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(gather, tree)
