"""EVS, Efficient Video Sampling: what changed since the frame before (arXiv 2510.14624).

With x_tp the visual token at place p of frame t, as the projector gives it:

    s_tp = 1 - cos(x_tp, x_(t-1)p),   255 in the first frame

Of F frames of P tokens the max(P, int(F P keep_rate)) with the largest s stay, in raster order. The
first frame therefore stays whole. Neither attention nor text is looked at, and nothing is merged.
The published code gives the share that goes, q = 1 - keep_rate.

It keeps the rotary positions of the whole video and moves the text up behind it; under
`positions="original"` the text comes after the whole video, as everywhere here. Still images stay
as they are.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.methods.video import OverFrames
from jaxprune.ops.greedy import unit
from jaxprune.ops.ranking import best

FIRST = 255.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EVS(OverFrames):
    """Keep what changed since a video's frame before.

    Args:
        keep_rate: the share of a video's patches that stays, at least the first frame.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "Efficient Video Sampling, arXiv 2510.14624"
    summary: ClassVar[str] = "keep of a video what changed since the frame before"

    def video_count(self, frames: int, patches: int) -> int:
        return max(patches, int(frames * patches * self.keep_rate))

    def among(
        self, x: Float[Array, "T N D"], inside: Bool[Array, "T N"], count: Int[Array, ""]
    ) -> Bool[Array, "T N"]:
        x = unit(x)
        changed = 1 - jnp.sum(x[1:] * x[:-1], axis=-1)
        scores = jnp.concatenate([jnp.full_like(x[:1, :, 0], FIRST), changed])
        return best(scores.ravel(), inside.ravel(), count).reshape(inside.shape)
