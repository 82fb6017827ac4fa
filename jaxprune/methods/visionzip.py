"""VisionZip: what CLS attends to, CLS itself, and the rest summed up (arXiv 2412.04467).

Of every tile K tokens are left. With x its N features, and a the CLS query's attention and m the
keys of the layer that makes them (a and m the mean over heads, m of length one):

    1.  dominant      CLS and the D - 1 patches with the largest a
    2.  the rest      R = N + 1 - D patches in raster order; those at 0, s, 2s, ... are targets,
                      s = R // M, M of them
    3.  contextual    each other patch of the rest joins the target with the largest m . m; a
                      target becomes x_target + the mean of those that joined it
    4.  order         CLS, dominant patches in raster order, contextual tokens in target order

The paper's text has means where its code, and step 3, has a sum.

Options and what they reproduce:
    keep            K = D + M, CLS among them. The paper's 192, 128 and 64 are 162 + 30, 108 + 20
                    and 54 + 10; another K is split in the same proportion.
    dominant,       D and M, the flags of the published code; there CLS is one of the D.
    contextual
    cls             None: CLS stays where the tower has one that the projector can read, and that
                    is no visual token anyway. The others have one patch more: LLaVA-HR has no CLS
                    token, and InternVL's is narrower than its merged patches. Where CLS tokens are
                    features (a "full" strategy, Video-LLaVA) they stay as under every method, and
                    are not counted. False leaves CLS out anywhere.

On images of several tiles the published code also reduces every tile for itself. There all tiles
are complete and no newlines are left; the first tile's tokens come as in step 4, then the dominant
patches of all others, their CLS tokens and their contextual ones. Here padding is no part of the
rest, newlines stay with their rows, and all CLS tokens come first, all contextual ones last. A
tile of too few patches has fewer dominant ones; one of fewer than M patches repeats some.

Without M (a small K) nothing is summed up; the published code divides by zero.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import UserError, check_whole
from jaxprune.methods.base import (
    Merged,
    VisionMethod,
    check_keep,
    round_half_up,
)
from jaxprune.methods.fastervlm import ATTENTION
from jaxprune.ops.cuts import Depth
from jaxprune.ops.greedy import unit
from jaxprune.ops.merging import weighted_sum
from jaxprune.ops.ranking import best, gather_tokens, nonzero_first
from jaxprune.ops.tiles import Chosen, ExtraTokens, Patches
from jaxprune.ops.visual import FEATURE, Signal, VisionOutput

KEYS = Signal("keys", layer=FEATURE)
SHARE = 10 / 64
"""Of K tokens those that are contextual, as the paper splits 192, 128 and 64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip(VisionMethod):
    """Keep CLS and what it attends to, and sum up the rest.

    Args:
        keep: tokens of every tile; or, instead of it,
        dominant, contextual: those that are kept, CLS among them, and those that sum up others.
        cls: whether CLS stays; None: where the model has one to spare.
    """

    keep: int | None = None
    dominant: int | None = None
    contextual: int | None = None
    cls: bool | None = None

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    summary: ClassVar[str] = "keep CLS and what it attends to, sum up the rest"
    signals: ClassVar[frozenset[Signal]] = frozenset({ATTENTION, KEYS})

    def __post_init__(self) -> None:
        check_keep(self.keep)
        parts = (self.dominant, self.contextual)
        if (self.keep is None) == (parts == (None, None)) or parts.count(None) == 1:
            raise UserError(
                "visionzip needs either keep, e.g. keep=64, or dominant with contextual."
            )
        for name, least in (("dominant", 1), ("contextual", 0)):
            number = getattr(self, name)
            if number is not None:
                check_whole(name, number, least=least)
        if self.cls not in (None, True, False):
            raise UserError(f"cls is {self.cls!r}; expected True, False or None.")
        super().__post_init__()

    def on_model(self, depth: Depth) -> "VisionZip":
        if self.cls and not depth.spare_cls:
            raise UserError(
                "cls is True, but this model has no CLS token that could be a visual token and is "
                "none; leave it out."
            )
        return dataclasses.replace(self, cls=depth.spare_cls if self.cls is None else self.cls)

    @property
    def num_contextual(self) -> int:
        """M."""
        if self.keep is None:
            assert self.contextual is not None
            return self.contextual
        return round_half_up(SHARE * self.keep)

    @property
    def num_tokens(self) -> int:
        """K."""
        if self.keep is None:
            assert self.dominant is not None
            return self.dominant + self.num_contextual
        return self.keep

    @property
    def extra_tokens(self) -> ExtraTokens:
        return ExtraTokens(front=int(bool(self.cls)), after=self.num_contextual)

    def check(self, num_patches: int) -> None:
        most = num_patches + self.extra_tokens.front
        if self.num_tokens > most:
            raise UserError(
                f"visionzip is to keep {self.num_tokens} tokens of every tile, but an image of "
                f"this request has {most}; that is the most."
            )

    def fixed_count(self, num_patches: int) -> int:
        # Each contextual token needs a patch to begin with.
        room = max(num_patches - self.num_contextual, 0)
        return min(self.num_tokens - self.extra_tokens.number, room)

    def video_count(self, frames: int, patches: int) -> int:
        return frames * self.fixed_count(patches)

    def choose(self, patches: Patches) -> Chosen:
        a, inside = patches.signals[ATTENTION], patches.place >= 0  # [I, T, N]
        own = jnp.sum(inside, axis=-1, keepdims=True)
        room = jnp.maximum(own - self.num_contextual, 0)
        dominant = best(a, inside, jnp.minimum(self.num_tokens - self.extra_tokens.number, room))
        # Padding falls away anyway. As if it were kept, it is no part of the rest.
        return Chosen(dominant | ~inside)

    def merge_tokens(
        self, tiles: VisionOutput, kept: Bool[Array, "F N"], indices: Int[Array, "F K"]
    ) -> Merged:
        extra = [sum_up(tiles.features, tiles.signals[KEYS], ~kept, self.num_contextual)]
        if self.cls:
            assert tiles.cls is not None
            extra = [tiles.cls[:, None].astype(jnp.float32), *extra]
        return Merged(gather_tokens(tiles.features, indices), jnp.concatenate(extra, axis=1))


def sum_up(
    x: Float[Array, "F N C"], keys: Float[Array, "F N c"], rest: Bool[Array, "F N"], number: int
) -> Float[Array, "F M C"]:
    """Evenly spaced patches of the rest, each with the mean of those most like it: float32."""
    x, m = x.astype(jnp.float32), unit(keys)
    if not number:
        return x[:, :0]
    R = jnp.sum(rest, axis=1, keepdims=True)  # [F, 1]
    places = jnp.arange(number) * jnp.maximum(R // number, 1) % jnp.maximum(R, 1)  # [F, M]
    targets = jnp.take_along_axis(nonzero_first(rest, rest.shape[1]), places, axis=1)
    # A rounded product would decide who joins whom.
    likeness = jnp.einsum(
        "fmc,fnc->fmn", gather_tokens(m, targets), m, precision=jax.lax.Precision.HIGHEST
    )
    is_target = (targets[..., None] == jnp.arange(rest.shape[1])).any(axis=1)  # [F, N]
    nearest = jnp.argmax(likeness, axis=1)  # [F, N]
    joins = (nearest[:, None] == jnp.arange(number)[:, None]) & (rest & ~is_target)[:, None]
    mean = joins / jnp.maximum(joins.sum(axis=-1, keepdims=True), 1)  # [F, M, N]
    summed = gather_tokens(x, targets) + weighted_sum(mean, x)
    return jnp.where(R[..., None] > 0, summed, 0.0)
