"""What travels between a vision tower, a vision-side pruning method and the decoder."""

import flax.struct
import jax


class VisionOutput(flax.struct.PyTreeNode):
    """Features of tiles, and those signals for pruning that were asked for.

    Attributes:
        features: `[F, N, C]`; CLS in front if the select strategy is "full".
        signals: by name,
            "cls_attention": float32 `[F, N]`, one head over the full width,
            softmax(q_cls k^T / sqrt(C)) over CLS and patches, the CLS entry dropped;
            "cls_attention_mean": float32 `[F, N]`, the same from CLIP's own heads, averaged;
            "keys": `[F, N, C]`, the last layer's keys of the patches.
    """

    features: jax.Array
    signals: dict[str, jax.Array]


class Selection(flax.struct.PyTreeNode):
    """The visual tokens that are left, in the order in which the decoder reads them.

    Attributes:
        tokens: `[I, K, C]`, those in use first. What stands at a newline does not matter.
        counts: int32 `[I]`, tokens in use.
        indices: int32 `[I, K]`, the patch a token stands at (see `ops.tiles`), `NEWLINE`, or
            `NO_PATCH` for a token of no single patch and for slots not in use.
    """

    tokens: jax.Array
    counts: jax.Array
    indices: jax.Array
