"""Removing tokens at layers inside the decoder: the machinery of every decoder-side method.

Layer by layer, a schedule ranks the candidates by what it sees of that layer and keeps as many
as a count says. It runs in two ways that give the same logits:

    gather  the sequence is really shortened, to a static length per layer: fast
    mask    shapes stay full and dropped tokens are masked: one compiled program
            evaluates any counts

The counts are traced in both, so they never cause a compilation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import UserError, check_choice
from jaxprune.ops.attention import Watch
from jaxprune.ops.ranking import LEAST, descending_order, nonzero_first, ranks

Tree = TypeVar("Tree")

# What a token of the prompt is to a schedule.
CONTEXT = 0  # text before or between images, or a CLS token: never pruned, never asked
VISUAL = 1
QUESTION = 2  # text after the last image, its last token apart
LAST = 3  # the prompt's last token: asked, never pruned
ANSWER = 4  # a teacher-forced answer: never pruned, never asked
LAST_VISUAL = 5  # the same as LAST, of a prompt that ends with an image

KEPT = "kept"
"""The name, to `jax.checkpoint`, of which candidates stay."""

AFTER_ATTENTION = "after_attention"
BETWEEN_LAYERS = "between_layers"

QUERIES = ("last", "text", "visual", "all")


class Depth(NamedTuple):
    """What a method has to know of a model.

    Attributes:
        num_hidden_layers: of its decoder.
        made_for: the names by which recipes know it: presets of its sizes, its fingerprint.
        spare_cls: whether its tower has a CLS token that could be a visual token and is none.
        grid: rows and columns of a tile's visual tokens; None: of whatever square holds them.
    """

    num_hidden_layers: int
    made_for: frozenset[str] = frozenset()
    spare_cls: bool = False
    grid: tuple[int, int] | None = None


class Tokens(NamedTuple):
    """A padded batch of embedded tokens; slot order is causal order.

    Attributes:
        x: `[B, S, D]` hidden states.
        positions: int32 `[B, S]`, or `[A, B, S]` where rotary positions have several axes;
            carried along, never implied by the slot.
        valid: bool `[B, S]`; a slot that is not valid is padding.
        kind: int32 `[B, S]`, what a token is to a schedule.
        slot: int32 `[B, S]`, where the token stood when it entered the decoder; -1 for one
            that is made of others at a cut.
        cell: int32 `[2, B, S]`, row and column of a visual token's patch in the grid of its
            tile; -1 for what is no patch. None where there are no images.
    """

    x: Float[Array, "B S D"]
    positions: Int[Array, "*A B S"]
    valid: Bool[Array, "B S"]
    kind: Int[Array, "B S"]
    slot: Int[Array, "B S"]
    cell: Int[Array, "2 B S"] | None = None


class LayerView(NamedTuple):
    """What a ranker sees of a layer; what it does not look at is not computed.

    Attributes:
        tokens: those that entered the layer's cut; `tokens.x` is what the cut is of.
        before: `[B, S, D]`, hidden states that entered the layer.
        q: `[B, H, S, d]`, the layer's queries, rotated.
        k: `[B, J, S, d]`, its keys, rotated.
        q_plain, k_plain: the same before rotation.
        watched: what `received` gives, or None.
        output: what `after` gives, or None.
        layer: its number.
        final_norm: the decoder's last norm, for `normed`.
        angles: `[B, S, half]`, by which queries and keys are rotated.
        entered: the tokens as they entered the decoder; a token's slot says which it was.
        text_slots: an upper bound of a row's text tokens; None: there may be any number.
    """

    tokens: Tokens
    before: Float[Array, "B S D"]
    q: Float[Array, "B H S d"]
    k: Float[Array, "B J S d"]
    q_plain: Float[Array, "B H S d"]
    k_plain: Float[Array, "B J S d"]
    watched: Float[Array, "n B S"] | None = None
    output: Float[Array, "B S D"] | None = None
    layer: int = 0
    final_norm: Callable[[Float[Array, "B S D"]], Float[Array, "B S D"]] | None = None
    angles: Float[Array, "B S half"] | None = None
    entered: Tokens | None = None
    text_slots: int | None = None

    @property
    def received(self) -> Float[Array, "n B S"]:
        """The attention that each token received, float32, a row for each query of the score.

        Raises:
            UserError: without a score.
        """
        if self.watched is None:
            raise UserError(
                "view.received is the attention that a method's score asks for, and this one "
                "has no score; give it one, see docs/extending.md."
            )
        return self.watched

    @property
    def after(self) -> Float[Array, "B S D"]:
        """The hidden states that leave the layer.

        Raises:
            UserError: for a cut after the layer's attention, where there are none yet.
        """
        if self.output is None:
            raise UserError(
                'view.after is what leaves a layer, which a cut "after_attention" is in the '
                'middle of; read view.tokens.x, or cut "between_layers".'
            )
        return self.output

    @property
    def normed(self) -> Float[Array, "B S D"]:
        """What `after` gives under the decoder's last norm, as the logits are made of it."""
        assert self.final_norm is not None
        return self.final_norm(self.after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How candidates are ranked: by the product of the attention that they receive.

    Attributes:
        queries: whose attention counts, one factor each: "last" (the prompt's last token),
            "text" (all text after the last image), "visual", or "all".
        heads: "mean" or "max" over the heads.
        later: a token's own attention does not count, and its sum is divided by the number
            of the queries after it; without, sums are compared as they are.
        rotated: the attention is the layer's own; else that of its queries and keys before
            rotation, which does not see how far apart tokens stand.
    """

    queries: tuple[str, ...]
    heads: str = "mean"
    later: bool = False
    rotated: bool = True

    def __post_init__(self) -> None:
        check_choice("heads", self.heads, ("mean", "max"))
        if not isinstance(self.queries, tuple) or not self.queries:
            raise UserError(f"queries are {self.queries!r}; expected a tuple of names.")
        for name in self.queries:
            check_choice("queries", name, QUERIES)


class Recycled(NamedTuple):
    """New tokens that stand for dropped ones.

    Attributes:
        x: `[B, R, D]`, hidden states.
        number: int32 `[B]`, how many of them there are in each row, the first ones.
    """

    x: Float[Array, "B R D"]
    number: Int[Array, " B"]


@runtime_checkable  # so that the tests can check it
class Ranker(Protocol):
    """What decides at a cut who stays: hashable, a static argument."""

    @property
    def score(self) -> Score | None:
        """The attention that its layers have to note down, if any."""

    @property
    def asks(self) -> tuple[str, ...]:
        """Whose attention it goes by, noted down or computed by itself, as in `Score.queries`."""

    def keep(
        self, view: LayerView, candidates: Bool[Array, "B S"], count: Int[Array, " B"]
    ) -> Bool[Array, "B S"]:
        """Which candidates stay, at most `count` of them; what it says of others is not heard."""

    def recycle(
        self, view: LayerView, dropped: Bool[Array, "B S"], room: Int[Array, " B"]
    ) -> Recycled | None:
        """What is made of dropped tokens, at most `room` new ones; asked between layers alone."""


@dataclasses.dataclass(frozen=True)
class ByAttention:
    """The candidates that receive the most attention; without a score, those that come first."""

    score: Score | None = None

    @property
    def asks(self) -> tuple[str, ...]:
        return () if self.score is None else self.score.queries

    def keep(
        self, view: LayerView, candidates: Bool[Array, "B S"], count: Int[Array, " B"]
    ) -> Bool[Array, "B S"]:
        first = self.score is None
        score = jnp.zeros(candidates.shape) if first else jnp.prod(view.received, axis=0)
        return keep_best(score, candidates, count)

    def recycle(
        self, view: LayerView, dropped: Bool[Array, "B S"], room: Int[Array, " B"]
    ) -> Recycled | None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where a decoder drops tokens and how it ranks them; hashable, a static argument.

    Attributes:
        layers: the layers that drop tokens.
        cut: "after_attention": between a layer's attention and its MLP;
            "between_layers": after its MLP.
        ranker: who stays.
        prune_text: text after the last image is a candidate too.
        renumber: survivors take the positions 0, 1, 2 ...; else they keep theirs.
        lengths: slots left after each of the decoder's layers, which are gathered
            together; None masks the dropped tokens instead.
        query_slots: an upper bound of the text tokens of a row; what makes scores cheap
            that only text asks for.
    """

    layers: tuple[int, ...] = ()
    cut: str = BETWEEN_LAYERS
    ranker: Ranker = ByAttention()
    prune_text: bool = False
    renumber: bool = False
    lengths: tuple[int, ...] | None = None
    query_slots: int | None = None

    def watch(self, layer: int, tokens: Tokens) -> Watch | None:
        """What layer `layer`'s attention has to note down, if anything."""
        score = self.ranker.score
        if layer not in self.layers or score is None:
            return None
        queries = [query_weights(name, tokens) for name in score.queries]
        few = set(score.queries) <= {"last", "text"}
        rows = 1 if score.queries == ("last",) else self.query_slots
        return Watch(
            queries=jnp.stack(queries),
            heads=score.heads,
            later=score.later,
            rows=rows if few else None,
            rotated=score.rotated,
        )

    def apply(
        self,
        cut: str,
        layer: int,
        tokens: Tokens,
        others: Tree,
        view: LayerView,
        counts: Any,
    ) -> tuple[Tokens, Tree]:
        """What is left after the cut of layer `layer`, if it makes one at this place.

        Args:
            cut: the place that the decoder has come to.
            layer: the layer.
            tokens: those that have come there.
            others: whatever else there is of each of them: arrays `[B, S, ...]`.
            view: what the ranker sees.
            counts: int32 `[L, B]`, candidates left after each layer.
        """
        if cut != self.cut or layer not in self.layers:
            return tokens, others
        among = candidates(tokens, prune_text=self.prune_text)
        # A method of a user's own may say of what is no candidate, or of how many, what it likes.
        kept = keep_masked(self.ranker.keep(view, among, counts[layer]), among, counts[layer])
        # Named, so that a gradient that computes a layer again does not decide again.
        kept = checkpoint_name(kept, KEPT)
        dropped, room = among & ~kept, counts[layer] - jnp.sum(among & kept, axis=1)
        left = tokens._replace(valid=tokens.valid & kept)
        if cut == BETWEEN_LAYERS:
            new = self.ranker.recycle(view, dropped, room)
            left = left if new is None else with_recycled(left, new, among, dropped)
        return self.cut_to(layer, left, others)

    def cut_to(self, layer: int, tokens: Tokens, others: Tree) -> tuple[Tokens, Tree]:
        """The tokens that are still valid, in the layer's slots and at their positions."""
        if self.renumber:
            place = jnp.cumsum(tokens.valid, axis=1, dtype=jnp.int32) - 1
            tokens = tokens._replace(positions=jnp.broadcast_to(place, tokens.positions.shape))
        if self.lengths is None or self.lengths[layer] >= tokens.valid.shape[1]:
            return tokens, others
        slots = nonzero_first(tokens.valid, self.lengths[layer])
        return take_slots(tokens, slots), jax.tree.map(lambda x: _take(x, slots), others)

    def record(self, tokens: Tokens, view: LayerView) -> tuple[Array, ...]:
        """What is noted down after a layer that drops tokens: who is left.

        Returns:
            slots int32 `[B, S']` and valid bool `[B, S']`.
        """
        del view
        return tokens.slot, tokens.valid


NO_CUTS = Schedule()


def query_weights(name: str, tokens: Tokens) -> Float[Array, "B S"]:
    """1 for the tokens that ask, 0 for the others."""
    kind = tokens.kind
    asks = {
        "last": is_last(kind),
        "text": (kind == QUESTION) | is_last(kind),
        "visual": is_visual(kind),
        "all": kind != ANSWER,
    }[name]
    return (asks & tokens.valid).astype(jnp.float32)


def is_last(kind: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Whether a token is its prompt's last."""
    return (kind == LAST) | (kind == LAST_VISUAL)


def is_visual(kind: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Whether a token is visual, to be pruned or not."""
    return (kind == VISUAL) | (kind == LAST_VISUAL)


def candidates(tokens: Tokens, *, prune_text: bool) -> Bool[Array, "B S"]:
    """The tokens that may be dropped."""
    found = tokens.kind == VISUAL
    if prune_text:
        found |= tokens.kind == QUESTION
    return found & tokens.valid


def keep_best(
    score: Float[Array, "B S"], candidates: Bool[Array, "B S"], count: Int[Array, " B"]
) -> Bool[Array, "B S"]:
    """All but the lowest-scoring candidates; ties keep the lower slot.

    Args:
        score: float32.
        candidates: those that may go.
        count: candidates that stay.

    Returns:
        True for everything that is no candidate.
    """
    score = score.astype(jnp.float32)
    score = jnp.where(score > LEAST, score, LEAST)  # -inf and NaN are still a candidate's
    rank = ranks(descending_order(jnp.where(candidates, score, -jnp.inf)))
    return ~candidates | (rank < count[:, None])


def keep_masked(
    mask: Bool[Array, "B S"], candidates: Bool[Array, "B S"], count: Int[Array, " B"]
) -> Bool[Array, "B S"]:
    """The candidates that a mask keeps; of more than `count`, the first."""
    kept = mask & candidates
    return ~candidates | (kept & (jnp.cumsum(kept, axis=1) <= count[:, None]))


def with_recycled(
    tokens: Tokens, new: Recycled, candidates: Bool[Array, "B S"], dropped: Bool[Array, "B S"]
) -> Tokens:
    """The tokens with new ones in the slots of dropped ones, behind what was the last candidate.

    All new ones have the position of the last dropped one, and no slot or cell of their own.

    Args:
        tokens: without those that are dropped.
        new: no more than are dropped.
        candidates: what was to be chosen from.
        dropped: which of these are gone.
    """
    B, S = dropped.shape
    slots = nonzero_first(dropped, min(new.x.shape[1], S))  # [B, R]
    R = slots.shape[1]
    number, used = jnp.arange(B)[:, None], jnp.arange(R) < new.number[:, None]
    fresh = jnp.zeros((B, S), bool).at[number, slots].max(used)

    def last(where: Bool[Array, "B S"]) -> Int[Array, "B 1"]:
        return jnp.max(jnp.where(where, jnp.arange(S), 0), axis=1, keepdims=True)

    x = new.x[:, :R].astype(tokens.x.dtype)
    x = tokens.x.at[number, slots].set(jnp.where(used[..., None], x, _take(tokens.x, slots)))
    placed = Tokens(
        x=x,
        positions=jnp.where(fresh, _take_last(tokens.positions, last(dropped)), tokens.positions),
        valid=tokens.valid | fresh,
        kind=jnp.where(fresh, VISUAL, tokens.kind),
        slot=jnp.where(fresh, -1, tokens.slot),
        cell=None if tokens.cell is None else jnp.where(fresh, -1, tokens.cell),
    )
    key = jnp.where(fresh, 2 * last(candidates) + 1, 2 * jnp.arange(S))
    return take_slots(placed, jnp.argsort(key, axis=1))  # stable


def take_slots(tokens: Tokens, slots: Int[Array, "B K"]) -> Tokens:
    """The tokens of some slots, in their order."""
    return Tokens(
        x=_take(tokens.x, slots),
        positions=_take_last(tokens.positions, slots),
        valid=_take(tokens.valid, slots),
        kind=_take(tokens.kind, slots),
        slot=_take(tokens.slot, slots),
        cell=None if tokens.cell is None else _take_last(tokens.cell, slots),
    )


def _take(x: Array, slots: Int[Array, "B K"]) -> Array:
    """`[B, S, ...]` at `[B, K]` -> `[B, K, ...]`."""
    return jnp.take_along_axis(x, slots.reshape(*slots.shape, *(1,) * (x.ndim - 2)), axis=1)


def _take_last(x: Int[Array, "*A B S"], slots: Int[Array, "B K"]) -> Int[Array, "*A B K"]:
    """`[..., B, S]` at `[B, K]` -> `[..., B, K]`."""
    along = jnp.broadcast_to(slots, (*x.shape[:-1], slots.shape[1]))
    return jnp.take_along_axis(x, along, axis=-1)
