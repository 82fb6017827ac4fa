"""FitPrune: prune where the attention's distribution changes least (arXiv 2409.10197).

Run time, in a layer l that deletes t_l > 0 tokens, with A = max over heads of its attention:

    self score     u_j = (1/n) sum of A[i, j] over the n visual tokens i
    cross score    c_j = sum of A[t, j] over the text t after the image
    delete         the t_l visual tokens with the smallest u_j c_j, after the attention and
                   before its output projection and the MLP

The layer's attention saw the deleted tokens and its key/value cache keeps them; its MLP and
all later layers do not have them. Survivors keep their positions.

The deletions t_0 ... t_{L-1} come from a recipe: a published one, by the share of the visual
tokens' FLOPs that it saves, or one made by `jaxprune calibrate`.

    scaling     A recipe is made for N0 visual tokens. For another number N "kept" scales what
                is left after each layer, round(N kept_l(N0) / N0); "authors" deletes
                t_l N // N0, as the published code does. The published LLaVA-NeXT recipes,
                whose images all differ, are scaled as they were there; others by "kept".

The published code runs batches of one and finds the image at a fixed position; here every
row deletes its own tokens, wherever its images stand.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from jaxprune.errors import UserError, check_share
from jaxprune.methods import recipes
from jaxprune.methods.base import DecoderMethod
from jaxprune.ops.cuts import AFTER_ATTENTION, Depth, Score

MOST_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitPrune(DecoderMethod):
    """Delete tokens that neither the image nor the text attends to.

    Args:
        save: the share of the visual tokens' FLOPs to save: one of the published recipes
            for the model's family, 0.1, 0.2, ... 0.9 and 0.55 for LLaVA-1.5.
        deletions: instead of `save`, visual tokens deleted in each layer, `[L]`.
        num_tokens: the number of visual tokens that `deletions` are made for.
        scaling: "kept" or "authors"; None takes what the published recipe says, else "kept".
    """

    save: float | None = None
    deletions: tuple[int, ...] | None = None
    num_tokens: int | None = None
    scaling: str | None = None

    name: ClassVar[str] = "fitprune"
    paper: ClassVar[str] = "FitPrune, arXiv 2409.10197"
    summary: ClassVar[str] = "delete what neither image nor text attends to, by a fitted recipe"
    cut: ClassVar[str] = AFTER_ATTENTION

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.save is None) == (self.deletions is None):
            raise UserError(
                "fitprune needs either save, e.g. save=0.6, or deletions with num_tokens."
            )
        if self.save is not None:
            check_share("save", self.save, one=False)
        if self.scaling not in (None, "kept", "authors"):
            raise UserError(f"scaling is {self.scaling!r}; expected 'kept' or 'authors'.")
        if self.deletions is None:
            if self.num_tokens is not None:
                raise UserError("num_tokens goes with deletions; with save, a recipe says it.")
            return
        listed = isinstance(self.deletions, tuple | list)
        whole = listed and all(type(t) is int and t >= 0 for t in self.deletions)
        number = self.num_tokens
        if (
            not whole
            or type(number) is not int
            or not max(1, sum(self.deletions)) <= number <= MOST_TOKENS
        ):
            raise UserError(
                f"deletions are {self.deletions!r} with num_tokens={self.num_tokens!r}; "
                "expected whole numbers, together at most num_tokens, which is 1 to "
                f"{MOST_TOKENS:,}."
            )
        object.__setattr__(self, "deletions", tuple(self.deletions))

    @property
    def score(self) -> Score:
        return Score(queries=("visual", "text"), heads="max")

    def removed(self, num_tokens: int, depth: Depth) -> np.ndarray:
        deletions, made_for, scaling = self.recipe(depth)
        if (self.scaling or scaling) == "authors":
            return np.cumsum(deletions * num_tokens // made_for)
        kept = made_for - np.cumsum(deletions)
        return num_tokens - np.floor(num_tokens * kept / made_for + 0.5).astype(np.int64)

    def recipe(self, depth: Depth) -> tuple[np.ndarray, int, str]:
        """Deletions per layer, the number of visual tokens that they are for, and the scaling."""
        deletions, made_for, scaling = self.deletions, self.num_tokens, "kept"
        if deletions is None:
            found = recipes.published("fitprune", depth, self.save)
            deletions, made_for = found.options["deletions"], found.options["num_tokens"]
            scaling = found.options.get("scaling", scaling)
        if len(deletions) != depth.num_hidden_layers:
            raise UserError(
                f"The FitPrune recipe is for {len(deletions)} layers, but the decoder has "
                f"{depth.num_hidden_layers}; make one with `jaxprune calibrate`."
            )
        assert made_for is not None
        return np.array(deletions, np.int64), made_for, scaling
