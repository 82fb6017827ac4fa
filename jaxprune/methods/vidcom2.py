"""VidCom2: unusual frames keep more, and of each what is unusual stays (arXiv 2505.14454).

With x the visual tokens of a video of F frames, P each, as the projector gives them:

    1.  channels    the D // 2 with the least variance over all tokens; on them x has length one
    2.  likeness    G(x, c) = sum_a exp(-|x - c|^2 / 2a),  a = 1/8, 1/4, 1/2, 1, 2,  to the mean c
                    of the video and to that of the frame: Gv and Gf
    3.  frames      w = softmax over t of -mean_p Gv / 0.01
                    share_t = min(1, keep_rate (1 + w_t - mean w)),  k_t = max(1, round(share_t P))
    4.  tokens      of frame t the k_t with the smallest Gv + Gf, in raster order

keep_rate is 0.25 in the published code; round takes halves to the even number. Neither attention
nor text is looked at, and nothing is merged.

Deviation: the k_t of step 3 add up to about keep_rate F P. Here the number is round(keep_rate F P)
exactly, and F at least, so that it is known beforehand: frames whose k_t was rounded the furthest
give or get one patch each, in rounds if need be. Still images stay as they are.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.methods.video import OverFrames
from jaxprune.ops.greedy import unit
from jaxprune.ops.ranking import best, hand_out

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class VidCom2(OverFrames):
    """Keep what is unusual in a video and in its frames.

    Args:
        keep_rate: the share of a video's patches that stays, at least one of every frame.
    """

    keep_rate: float = 0.25

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "VidCom2, arXiv 2505.14454"
    summary: ClassVar[str] = "keep what is unusual in a video and in its frames"

    def video_count(self, frames: int, patches: int) -> int:
        return max(frames, round(self.keep_rate * frames * patches))

    def among(
        self, x: Float[Array, "T N D"], inside: Bool[Array, "T N"], count: Int[Array, ""]
    ) -> Bool[Array, "T N"]:
        x = unit(jnp.where(steady_channels(x, inside), x, 0))
        to_video = likeness(x, mean(x, inside, axis=(0, 1)))
        to_frame = likeness(x, mean(x, inside, axis=1))
        is_frame = inside.any(axis=1)
        logits = -jnp.mean(to_video, axis=1) / TEMPERATURE
        w = jax.nn.softmax(jnp.where(is_frame, logits, -jnp.inf))
        share = jnp.minimum(1, self.keep_rate * (1 + w - 1 / jnp.sum(is_frame)))  # [T]
        kept = of_frames(share * inside.shape[1], is_frame, count, inside.shape[1])
        return best(-to_video - to_frame, inside, kept[:, None])


def mean(
    x: Float[Array, "T N D"], inside: Bool[Array, "T N"], axis: int | tuple[int, ...]
) -> Float[Array, "..."]:
    """The mean of what is inside, with axes of one."""
    number = jnp.sum(inside[..., None], axis=axis, keepdims=True)
    total = jnp.sum(jnp.where(inside[..., None], x, 0), axis=axis, keepdims=True)
    return total / jnp.maximum(number, 1)


def steady_channels(x: Float[Array, "T N D"], inside: Bool[Array, "T N"]) -> Bool[Array, " D"]:
    """Half of the channels, those of the least variance."""
    difference = jnp.where(inside[..., None], x - mean(x, inside, axis=(0, 1)), 0)
    variance = jnp.sum(difference**2, axis=(0, 1))
    return best(-variance, jnp.ones(len(variance), bool), len(variance) // 2)


def likeness(x: Float[Array, "T N D"], c: Float[Array, "#T #N D"]) -> Float[Array, "T N"]:
    """G."""
    distance = jnp.sum((x - c) ** 2, axis=-1)
    return sum((jnp.exp(-distance / (2 * a)) for a in WIDTHS), jnp.zeros_like(distance))


def of_frames(
    wanted: Float[Array, " T"], is_frame: Bool[Array, " T"], count: Int[Array, ""], most: int
) -> Int[Array, " T"]:
    """How many patches each frame keeps: `wanted`, rounded so that they are `count` together."""
    rounded = jnp.maximum(1, jnp.round(wanted)).astype(jnp.int32)
    k = jnp.where(is_frame, rounded, 0)
    missing, lacks = count - jnp.sum(k), wanted - k
    k += hand_out(missing, jnp.where(is_frame, most - k, 0), lacks)
    return k - hand_out(-missing, jnp.where(is_frame, k - 1, 0), -lacks)
