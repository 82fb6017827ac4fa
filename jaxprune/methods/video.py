"""Vision-side methods that compare the frames of a video."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.errors import check_share
from jaxprune.methods.base import VisionMethod
from jaxprune.ops.tiles import Chosen, Patches
from jaxprune.ops.visual import PROJECTED, Signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverFrames(VisionMethod):
    """Keeps a share of the patches of a video that is seen as one, and images whole.

    Args:
        keep_rate: the share.
    """

    keep_rate: float

    signals: ClassVar[frozenset[Signal]] = frozenset({PROJECTED})
    of_videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("keep_rate", self.keep_rate)

    def fixed_count(self, num_patches: int) -> int | None:
        return num_patches

    @abc.abstractmethod
    def video_count(self, frames: int, patches: int) -> int: ...

    def choose(self, patches: Patches) -> Chosen:
        inside = patches.place >= 0  # [I, T, N]
        _, T, N = inside.shape
        counts = np.array([self.video_count(frames, N) for frames in range(T + 1)])

        def of_video(video: tuple[Array, Array]) -> Array:
            tokens, inside = video
            frames = jnp.sum(inside.any(axis=-1))
            return self.among(tokens.astype(jnp.float32), inside, jnp.asarray(counts)[frames])

        kept = jax.lax.map(of_video, (patches.signals[PROJECTED], inside))
        return Chosen(jnp.where(patches.video[:, None, None], kept, inside))

    @abc.abstractmethod
    def among(
        self, x: Float[Array, "T N D"], inside: Bool[Array, "T N"], count: Int[Array, ""]
    ) -> Bool[Array, "T N"]:
        """Which patches of a video stay, `count` of them.

        Args:
            x: its frames' visual tokens as the projector gives them; those after the last frame
                mean nothing.
            inside: what is part of a frame.
            count: what `video_count` says.
        """
