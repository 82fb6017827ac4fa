"""SparseVLM: the text that looks at the image rates its tokens; what is dropped is recycled.

Paper: arXiv 2410.04417; published code: Gumpest/SparseVLMs at 26a5f48, whose versions 1.5 and 2.0
("SparseVLM+") are `version="1.5"` and `"plus"`.

Raters, once, on the embeddings v of the visual tokens and t of the text after the image:

    q_t = mean over the visual tokens of softmax over the text of (v . t);  raters: q_t > mean q

Before each of `cut_layers`, by the attention A of the layer before:

    1.5            the score of a visual token is what it receives from the raters, mean over heads
    plus           A[h, i, j] is divided by w_ij = (2 / sqrt(d)) sum_f cos((p_i - p_j) theta_f), the
                   rotary product of vectors of ones; then the mean over the half of the heads whose
                   raters give the visual tokens the most
    keep           the k tokens with the highest scores

    budget         192                128                96                64
    k, 1.5         300, 200, 110      303, 110, 36       238, 48, 26       66, 30, 17
    k, plus        300, 200, 118      238, 108, 60       246, 54, 28       66, 34, 20

Version 1.5 recycles. Of the p tokens dropped at a cut it takes the int(0.3 p) + 1 best and puts
them into c = int(that / 10) + 1 clusters of what leaves the layer, by DPC-kNN:

    distance       ||x_i - x_j|| / sqrt(D)
    density        exp(- mean of the c smallest squared distances, itself included)
    delta          the distance to the nearest denser token; of the densest one the largest of all
    centres        the c largest density * delta; the others join the nearest
    new tokens     sum over a cluster / (its size + 1e-6), in the order of the centres, behind the
                   visual tokens; candidates at later cuts

Positions: version 1.5 renumbers after each cut, which `positions="renumber"` reproduces; plus
keeps them, the default here for both. A new token is then where the last dropped one was.

For another number N of visual tokens, k is round(k N / 576), at least 1.

Deviations from the published code: every row of a batch has raters of its own. Where all q_t are
equal, all text rates, and without text after the image its last token does. The code breaks ties
of densities with noise; here the token with the higher score is the denser one. It drops at
least one token at each cut; here none where no more than k have come. Half of the heads is 14
there, whatever the model has. Of several images, new tokens stand behind the last one.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import UserError, check_choice, check_whole
from jaxprune.methods.base import (
    DecoderMethod,
    as_layers,
    check_budget,
    removed_before,
    round_half_up,
)
from jaxprune.ops.attention.definition import (
    EXACT,
    LEAST,
    Options,
    asking_slots,
    attention_weights,
    received_from_few,
)
from jaxprune.ops.cuts import (
    QUESTION,
    VISUAL,
    Depth,
    LayerView,
    Recycled,
    Tokens,
    is_last,
    is_visual,
    keep_best,
)
from jaxprune.ops.ranking import descending_order, gather_tokens, ranks

MADE_FOR = 576
BUDGETS = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "plus": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderMethod):
    """Keep the visual tokens that the raters of the text attend to.

    Args:
        budget: 192, 128, 96 or 64: the published numbers of that name.
        keep_tokens: instead of `budget`, how many of 576 tokens each cut keeps, not rising.
        version: "1.5", which recycles, or "plus".
        cut_layers: the first layers without the dropped tokens, one a cut.
    """

    budget: int | None = None
    keep_tokens: tuple[int, ...] | None = None
    version: str = "1.5"
    cut_layers: tuple[int, ...] = (3, 7, 16)

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, arXiv 2410.04417"
    summary: ClassVar[str] = "keep what the rating part of the text attends to, recycle the rest"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("version", self.version, tuple(BUDGETS))
        object.__setattr__(self, "cut_layers", as_layers(self.cut_layers))
        if (self.budget is None) == (self.keep_tokens is None):
            raise UserError("sparsevlm needs either budget, e.g. budget=128, or keep_tokens.")
        numbers = self.keep_tokens
        if self.budget is not None:
            check_budget(self.budget, BUDGETS[self.version])
            numbers = self.numbers
        if not isinstance(numbers, tuple | list) or len(numbers) != len(self.cut_layers):
            raise UserError(
                f"The tokens to keep are {numbers!r}; expected a number for each of the layers "
                f"{self.cut_layers}."
            )
        for number in numbers:
            check_whole("keep_tokens", number)
        if self.keep_tokens is not None:
            object.__setattr__(self, "keep_tokens", tuple(numbers))

    @property
    def numbers(self) -> tuple[int, ...]:
        """How many tokens each cut keeps, of 576."""
        if self.keep_tokens is not None:
            return self.keep_tokens
        assert self.budget is not None
        return BUDGETS[self.version][self.budget]

    @property
    def asks(self) -> tuple[str, ...]:
        return ("text",)

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        left = [num_tokens]
        for number in self.numbers:
            kept = min(scaled(number, num_tokens), left[-1])
            left.append(kept + self.recycled(left[-1] - kept))
        return removed_before(self.cut_layers, left[1:], num_tokens, depth)

    def recycled(self, dropped: int) -> int:
        """How many new tokens are made of so many."""
        return number_of_clusters(pool_size(dropped)) if dropped and self.version == "1.5" else 0

    def keep(
        self, view: LayerView, candidates: Bool[Array, "B S"], count: Int[Array, " B"]
    ) -> Bool[Array, "B S"]:
        if view.layer + 1 not in self.cut_layers:
            return candidates
        assert view.entered is not None
        cut, slots = self.cut_layers.index(view.layer + 1), view.entered.valid.shape[1]
        entered = jnp.sum(is_visual(view.entered.kind) & view.entered.valid, axis=1)
        present = jnp.sum(candidates, axis=1)
        wanted = jnp.array([scaled(self.numbers[cut], n) for n in range(slots + 1)])[entered]
        new = jnp.array([self.recycled(n) for n in range(slots + 1)])
        # A visual token that is never dropped takes the place of one that is kept.
        kept = jnp.minimum(wanted, present)
        kept = jnp.minimum(kept, count - new[present - kept])
        return keep_best(self.rank(view), candidates, kept)

    def rank(self, view: LayerView) -> Float[Array, "B S"]:
        assert view.entered is not None
        rows = view.text_slots or view.entered.valid.shape[1]
        rates = raters(view.entered, rows)
        asks = jnp.take_along_axis(rates, jnp.maximum(view.tokens.slot, 0), axis=1)
        asks = (asks & view.tokens.valid & (view.tokens.kind != VISUAL)).astype(jnp.float32)[None]
        if self.version == "plus":
            return received_without_distance(view, asks, rows)
        options = Options(causal=True, rows=rows)
        return received_from_few(view.q, view.k, view.tokens.valid, asks, options)[0]

    def recycle(
        self, view: LayerView, dropped: Bool[Array, "B S"], room: Int[Array, " B"]
    ) -> Recycled | None:
        if self.version != "1.5" or view.layer + 1 not in self.cut_layers:
            return None
        gone = jnp.sum(dropped, axis=1)
        size = jnp.where(gone > 0, pool_size(gone), 0)
        number = jnp.minimum(number_of_clusters(size), jnp.minimum(room, size))
        most = pool_size(dropped.shape[1])
        score = jnp.where(dropped, self.rank(view), -jnp.inf)
        x = gather_tokens(view.after, descending_order(score)[:, :most]).astype(jnp.float32)
        return Recycled(cluster_means(x, size, number, number_of_clusters(most)), number)


def scaled(number: int, num_tokens: int) -> int:
    """What of 576 tokens is `number`, of so many."""
    return max(1, round_half_up(number * num_tokens / MADE_FOR))


def pool_size(dropped: Any) -> Any:
    """int(0.3 p) + 1, of whole numbers or arrays of them."""
    return 3 * dropped // 10 + 1


def number_of_clusters(pool: Any) -> Any:
    """int(n / 10) + 1, of whole numbers or arrays of them."""
    return pool // 10 + 1


def raters(entered: Tokens, rows: int) -> Bool[Array, "B S"]:
    """The text after the image that looks at it more than such text does on average.

    Args:
        entered: embedded tokens.
        rows: an upper bound of a row's text.
    """
    kind, valid = entered.kind, entered.valid
    text = ((kind == QUESTION) | is_last(kind)) & valid
    visual = (is_visual(kind) & valid)[..., None]  # [B, S, 1]
    slots, asks = asking_slots(text[None].astype(jnp.float32), rows)  # [B, Q]
    used = asks[..., 0] > 0
    x = entered.x.astype(jnp.float32)
    like = jnp.einsum("bsd,bqd->bsq", x, gather_tokens(x, slots), precision=EXACT)
    shares = jax.nn.softmax(jnp.where(used[:, None], like, LEAST), axis=-1)
    looks = jnp.sum(jnp.where(visual, shares, 0.0), axis=1) / jnp.maximum(visual.sum(1), 1)
    mean = jnp.sum(looks, axis=1, where=used) / jnp.maximum(used.sum(axis=1), 1)
    above = used & (looks > mean[:, None])
    above = jnp.where(above.any(axis=1, keepdims=True), above, used)
    return jnp.zeros(kind.shape, bool).at[jnp.arange(len(kind))[:, None], slots].max(above)


def received_without_distance(
    view: LayerView, asks: Float[Array, "1 B S"], rows: int
) -> Float[Array, "B S"]:
    """What the raters give, freed of what rotation adds, by the heads that see the image.

    Args:
        view: the layer.
        asks: 1 for the raters.
        rows: an upper bound of their number.
    """
    assert view.angles is not None
    tokens, S = view.tokens, view.tokens.valid.shape[1]
    slots, some = asking_slots(asks, rows)  # [B, Q], [B, Q, 1]
    few = jnp.take_along_axis(view.q, slots[:, None, :, None], axis=2)
    seen = tokens.valid[:, None] & (jnp.arange(S) <= slots[..., None])  # [B, Q, S]
    weights = attention_weights(few, view.k, seen)  # [B, J, G, Q, S]
    # cos(a - b) = cos a cos b + sin a sin b
    ones = jnp.concatenate([jnp.cos(view.angles), jnp.sin(view.angles)], axis=-1)
    added = jnp.einsum("bqf,bsf->bqs", gather_tokens(ones, slots), ones, precision=EXACT)
    added = added * 2 / view.q.shape[-1] ** 0.5
    counts = (seen & (some > 0) & (added != 0))[:, None, None]
    freed = jnp.where(counts, weights / jnp.where(added == 0, 1, added)[:, None, None], 0.0)
    by_head = freed.sum(axis=3).reshape(len(slots), -1, S)  # [B, H, S]
    candidates = (tokens.kind == VISUAL) & tokens.valid
    total = jnp.sum(jnp.where(candidates[:, None], by_head, 0.0), axis=-1)  # [B, H]
    half = max(1, total.shape[1] // 2)
    chosen = ranks(descending_order(total)) < half
    return jnp.sum(jnp.where(chosen[..., None], by_head, 0.0), axis=1) / half


def squared_distances(
    x: Float[Array, "B pool D"], here: Bool[Array, "B pool"]
) -> Float[Array, "B pool pool"]:
    """Of those that are here; of two tokens each is exactly as far from the other."""
    # From their middle, so that little is lost: hidden states have much in common.
    middle = jnp.sum(x, axis=1, keepdims=True, where=here[..., None])
    x = x - middle / jnp.maximum(here.sum(axis=1), 1)[:, None, None]
    size = jnp.sum(x**2, axis=-1)
    product = jnp.einsum("bpd,bqd->bpq", x, x, precision=EXACT)
    squared = size[:, :, None] + size[:, None] - (product + product.swapaxes(1, 2))
    return jnp.where(jnp.eye(x.shape[1], dtype=bool), 0.0, jnp.maximum(squared, 0.0))


def cluster_means(
    x: Float[Array, "B pool D"], size: Int[Array, " B"], number: Int[Array, " B"], most: int
) -> Float[Array, "B R D"]:
    """The means of clusters of tokens, by DPC-kNN.

    Args:
        x: float32, the tokens by falling score.
        size: of the pool, its first tokens.
        number: of clusters, and of the neighbours that make a density.
        most: R, an upper bound of the clusters.
    """
    pool = x.shape[1]
    here = jnp.arange(pool) < size[:, None]
    squared = squared_distances(x, here) / x.shape[-1]
    near = jnp.sort(jnp.where(here[:, None], squared, jnp.inf), axis=-1)
    nearest = jnp.where(jnp.arange(pool) < number[:, None, None], near, 0.0)
    sparsity = nearest.sum(axis=-1) / jnp.maximum(number, 1)[:, None]  # the density is exp(-this)
    mine, others = sparsity[:, :, None], sparsity[:, None]
    earlier = jnp.arange(pool) < jnp.arange(pool)[:, None]
    denser = here[:, None] & ((others < mine) | ((others == mine) & earlier))
    delta = jnp.sqrt(jnp.min(jnp.where(denser, squared, jnp.inf), axis=-1))
    both = here[:, :, None] & here[:, None]
    farthest = jnp.sqrt(jnp.max(jnp.where(both, squared, 0.0), axis=(1, 2)))
    delta = jnp.where(denser.any(axis=-1), delta, farthest[:, None])
    peak = jnp.where(here, jnp.exp(-sparsity) * delta, -jnp.inf)
    centres = descending_order(peak)[:, :most]  # [B, R]
    used = jnp.arange(centres.shape[1]) < number[:, None]
    is_centre = (centres[:, None] == jnp.arange(pool)[:, None]) & used[:, None]  # [B, pool, R]
    away = jnp.take_along_axis(squared, centres[:, None], axis=2)
    away = jnp.where(is_centre, -1.0, jnp.where(used[:, None], away, jnp.inf))
    joins = jax.nn.one_hot(jnp.argmin(away, axis=-1), centres.shape[1]) * here[..., None]
    total = jnp.einsum("bpr,bpd->brd", joins, x, precision=EXACT)
    return total / (joins.sum(axis=1) + 1e-6)[..., None]
