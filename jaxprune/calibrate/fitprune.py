"""FitPrune's fit (arXiv 2409.10197, section 3): deletions that move attention least.

1.  One unpruned pass gives, per sample and layer, the masses C = sum of c_j and U = sum of u_j
    over the visual tokens (scores as in `methods/fitprune.py`).
2.  For a tolerance alpha, layer by layer on the already pruned hidden states: of the tokens
    in ascending order of c, the longest prefix whose removal leaves at least (1 - alpha) C;
    the same with u and U; each sample deletes the intersection of its two prefixes.
3.  t_l = floor of the mean size of the intersections.
4.  Deleting stops once the budget is met: at the entry of a layer, the FLOPs spent so far plus
    those of running the rest unpruned, averaged over samples, are at most (1 - save) of all.
5.  Bisection over alpha until the interval is at most 0.01 wide. The answer is the smallest
    alpha whose scheme met the budget; the published code may return one that did not.

What is deleted before the stop does not depend on where it is, so one pass through all layers
serves an alpha, and the stop is found on its sizes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.calibrate.evaluate import CalibrationSet, recorded
from jaxprune.engine.cost import layer_macs
from jaxprune.errors import UserError
from jaxprune.methods import FitPrune
from jaxprune.models.family import DecoderSizes
from jaxprune.ops.cuts import (
    AFTER_ATTENTION,
    VISUAL,
    LayerView,
    Schedule,
    Tokens,
    is_visual,
)

WIDTH = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSchedule(Schedule):
    """A schedule in which the tolerance decides, not a count.

    Its counts are alpha (below 0: delete nothing), C and U float32 `[L, B]`.
    """

    def apply(
        self, cut: str, layer: int, tokens: Tokens, others: Any, view: LayerView, counts: Any
    ) -> tuple[Tokens, Any]:
        if cut != self.cut:
            return tokens, others
        alpha, C, U = counts
        visual = tokens.valid & (tokens.kind == VISUAL)
        c, u = _scores(tokens, view)
        gone = removable(c, visual, (1 - alpha) * C[layer])
        gone &= removable(u, visual, (1 - alpha) * U[layer])
        return tokens._replace(valid=tokens.valid & ~(gone & (alpha >= 0))), others

    def record(self, tokens: Tokens, view: LayerView) -> tuple[Array, ...]:
        """Visual tokens left `[B]`, and the masses C and U `[B]` of an unpruned pass."""
        visual = tokens.valid & is_visual(tokens.kind)
        c, u = _scores(tokens, view)
        return visual.sum(-1), jnp.sum(c * visual, -1), jnp.sum(u * visual, -1)


def _scores(tokens: Tokens, view: LayerView) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """c, averaged over the text that asks, and u, over the visual tokens.

    How many ask is a constant of each row for c; for u it is the number now there.
    """
    by_visual, by_text = view.received
    n = jnp.sum(tokens.valid & is_visual(tokens.kind), -1, keepdims=True)
    return by_text, by_visual / jnp.maximum(n, 1)


def removable(
    score: Float[Array, "B S"], visual: Bool[Array, "B S"], least: Float[Array, " B"]
) -> Bool[Array, "B S"]:
    """The lowest-scoring tokens whose removal leaves a sum of at least `least`.

    Args:
        score: float32.
        visual: those that may go; at least one stays.
        least: float32.
    """
    key = jnp.where(visual, score, jnp.inf)
    order = jnp.argsort(key, axis=-1)  # ascending, visual tokens first
    ordered = jnp.take_along_axis(jnp.where(visual, score, 0.0), order, axis=-1)
    # What is left when the tokens up to and including this place are gone.
    left = jnp.flip(jnp.cumsum(jnp.flip(ordered, -1), -1), -1) - ordered
    n = visual.sum(-1, keepdims=True)
    place = jnp.arange(score.shape[-1])
    goes = (left >= least[:, None]) & (place < n - 1)
    rank = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(goes, rank, axis=-1) & visual


class Scheme(NamedTuple):
    """What a tolerance leads to.

    Attributes:
        deletions: t_l, floored means, int `[L]`.
        saved: share of the visual tokens' multiply-adds saved in the fit, before flooring: at
            the entry of the layer where deleting stops, or of the last one.
        met: whether the budget was met.
    """

    deletions: list[int]
    saved: float
    met: bool


def stop_at_budget(
    sizes: np.ndarray, num_tokens: np.ndarray, made_for: int, text_config: DecoderSizes, save: float
) -> Scheme:
    """Steps 3 and 4: deletions of one tolerance, cut off where the budget is met.

    Args:
        sizes: int `[L, samples]`, each sample's deletions in each layer.
        num_tokens: int `[samples]`, visual tokens of each sample before pruning.
        made_for: the number of visual tokens that the deletions are for; where samples
            have others, the mean is one of fractions.
        text_config: the decoder's sizes.
        save: share of the visual tokens' multiply-adds to save.
    """
    L = len(sizes)

    def macs(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        pairs = zip(before, after, strict=True)
        return np.array([layer_macs(text_config, int(n), int(m)) for n, m in pairs])

    full = L * macs(num_tokens, num_tokens)
    spent, now = np.zeros(len(num_tokens)), num_tokens
    stop, saved = None, 0.0
    for l in range(L):
        saved = float(1 - np.mean((spent + (L - l) * macs(now, now)) / full))
        if saved >= save:
            stop = l
            break
        after = now - sizes[l]
        spent += macs(now, after)
        now = after
    same = (num_tokens == made_for).all()
    means = sizes.mean(axis=1) if same else (sizes / num_tokens).mean(axis=1) * made_for
    deletions = np.floor(means).astype(int)
    deletions[L if stop is None else stop :] = 0
    return Scheme(deletions.tolist(), saved, stop is not None)


def fit(
    data: CalibrationSet,
    *,
    save: float,
    remember: Callable[[str, Callable[[], Any]], Any],
) -> tuple[FitPrune, dict[str, Any]]:
    """Find the deletions for a budget.

    Args:
        data: encoded samples without answers.
        save: share of the visual tokens' multiply-adds to save.
        remember: `remember(key, make)` gives `make()`, or what it gave before an interruption.

    Returns:
        The method, and the report for its recipe.

    Raises:
        UserError: when no tolerance meets the budget.
    """
    text_config = data.engine.config.text_config
    L = text_config.num_hidden_layers
    schedule = FitSchedule(
        layers=tuple(range(L)),
        cut=AFTER_ATTENTION,
        ranker=FitPrune(deletions=(0,) * L, num_tokens=1).ranker,
    )

    def noted(alpha: float, masses: Sequence[tuple[np.ndarray, ...]]) -> list[list[np.ndarray]]:
        """By batch: tokens left, C and U, `[L, B]` each."""
        counts = [(np.float32(alpha), *of_batch) for of_batch in masses]
        found = (records for _, records in recorded(data, schedule, counts))
        return [[np.stack(x) for x in zip(*records, strict=True)] for records in found]

    num_tokens = data.visual_tokens
    made_for = int(num_tokens.max())
    nothing = np.zeros((L, data.batches[0].prompt.batch), np.float32)
    reference = [(C, U) for _, C, U in noted(-1.0, [(nothing, nothing)] * len(data.batches))]

    def scheme(alpha: float) -> Scheme:
        def make() -> Any:
            each = zip(noted(alpha, reference), data.batches, strict=True)
            left = np.concatenate([found[0][:, : batch.rows] for found, batch in each], axis=1)
            before = np.vstack([num_tokens[None], left[:-1]])
            return (before - left).tolist()

        sizes = np.array(remember(f"alpha {alpha!r}", make))
        return stop_at_budget(sizes, num_tokens, made_for, text_config, save)

    best_alpha, best = 1.0, scheme(1.0)
    if not best.met:
        raise UserError(
            f"No tolerance saves {save:g} of the visual tokens' FLOPs; the most is "
            f"{math.floor(1000 * best.saved) / 1000:.3f}. Ask for less."
        )
    low, high = 0.0, 1.0
    while high - low > WIDTH:
        middle = (low + high) / 2
        candidate = scheme(middle)
        if candidate.met:
            high, best_alpha, best = middle, middle, candidate
        else:
            low = middle
    method = FitPrune(deletions=tuple(best.deletions), num_tokens=made_for)
    floored = np.cumsum(best.deletions)
    tokens = made_for - np.concatenate([[0], floored])
    spent = sum(layer_macs(text_config, int(n), int(m)) for n, m in itertools.pairwise(tokens))
    full = L * layer_macs(text_config, made_for, made_for)
    return method, {
        "reached": {"save_in_fit": round(best.saved, 6), "save": round(1 - spent / full, 6)},
        "alpha": best_alpha,
    }
