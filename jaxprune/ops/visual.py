"""What travels between a vision tower, a vision-side pruning method and the decoder."""

import dataclasses
from typing import Literal, NamedTuple

from jaxtyping import Array, Float, Int

from jaxprune.errors import UserError, check_choice

KINDS: dict[str, tuple[str, ...]] = {
    "cls_attention": ("mean", "sum", "joined"),
    "received_attention": ("mean",),
    "keys": ("mean", "joined"),
    "hidden_states": ("mean",),
    "features": ("mean",),
    "projected": ("mean",),
    "text_similarity": ("mean",),
}


FEATURE: Literal["feature"] = "feature"


@dataclasses.dataclass(frozen=True)
class Signal:
    """Something that a vision tower can give beside its features, for a method to go by.

    With F tiles of N visual tokens each:

        cls_attention       float32 `[F, N]`: attention of the CLS query, softmaxed over CLS and
                            patches, the CLS entry dropped
        received_attention  float32 `[F, N]`: attention that a patch receives, the mean over all
                            queries; what stands in where a tower has no CLS token
        keys                `[F, N, d]` or `[F, N, C]`
        hidden_states       `[F, N, C]`, a layer's output
        features            `[F, N, C]`, what the projector reads
        projected           `[F, N, D]`, what the projector makes of it
        text_similarity     float32 `[F, N]`: cosine of a patch and what is asked about its image,
                            in the space of a CLIP's two towers

    Args:
        kind: one of these names.
        layer: the tower's layer, from 0, or from the end: -1 is the last one; or "feature":
            the layer that makes the features, of several the last. Of "features",
            "projected" and "text_similarity" there is one of each, whatever it is.
        heads: "mean" over the heads, their "sum", or "joined": the heads' widths as one.

    Raises:
        UserError: for a kind that there is not.
    """

    kind: str
    layer: int | Literal["feature"] = -1
    heads: str = "mean"

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.heads not in KINDS[self.kind]:
            known = ", ".join(f"{kind} ({' or '.join(heads)})" for kind, heads in KINDS.items())
            raise UserError(
                f"There is no signal {self.kind!r} with heads={self.heads!r}; expected one of, "
                f"with their heads: {known}."
            )
        if self.kind in ("features", "projected", "text_similarity"):
            object.__setattr__(self, "layer", -1)
        if isinstance(self.layer, str):
            check_choice("layer", self.layer, (FEATURE,))

    def __lt__(self, other: "Signal") -> bool:
        return str(self) < str(other)  # JAX sorts the keys of a tree

    def layer_of(self, *, layers: int, feature_layer: int) -> int:
        """Its layer from 0, in a tower of so many whose features a certain one makes."""
        return feature_layer if isinstance(self.layer, str) else self.layer % layers

    def check(self, layers: int) -> None:
        """Raise `UserError` unless a tower of so many layers has the signal's."""
        if not isinstance(self.layer, str) and not -layers <= self.layer < layers:
            raise UserError(
                f"The method asks for {self}, but the vision tower has {layers} layers."
            )


CLS_ATTENTION = Signal("cls_attention", heads="joined")
"""What PruMerge and iti go by: the CLS query's attention, one head over the full width."""
FEATURES = Signal("features")
PROJECTED = Signal("projected")
TEXT_SIMILARITY = Signal("text_similarity")
"""The only signal that is not the vision tower's, and that depends on the question."""


class VisionOutput(NamedTuple):
    """Features of tiles, and the signals that were asked for.

    Attributes:
        features: `[F, N, C]`, a tile's visual tokens.
        cls: `[F, C]`, the CLS token as the layers of the features have it; None where there is
            none, or none of their width.
        signals: see `Signal`.
    """

    features: Float[Array, "F N C"]
    cls: Float[Array, "F C"] | None
    signals: dict[Signal, Array]


class Selection(NamedTuple):
    """The visual tokens that are left, in the order in which the decoder reads them.

    Attributes:
        tokens: `[I, K, C]`, those in use first. What stands at a newline does not matter.
        counts: int32 `[I]`, tokens in use.
        indices: int32 `[I, K]`, the patch that a token stands at, or what else it is: see
            `ops.tiles`.
        positions: int32 `[I, K]`, or `[A, I, K]` where positions have several axes, counted
            from the image's first one.
    """

    tokens: Float[Array, "I K C"]
    counts: Int[Array, " I"]
    indices: Int[Array, "I K"]
    positions: Int[Array, "*A I K"]
