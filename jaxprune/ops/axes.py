"""Axis letters, the same everywhere in the package, and the arrays that operations take.

Images:
    F   tiles of all images, encoded together
    I   images
    T   tiles of one image, padded
    N   patches of a tile
    K   patches or tokens kept
    M   slots of an unpruned image: its patches and newlines in reading order
    C   width of the vision tower

Sequences:
    B   rows of a batch
    S   slots of a sequence; where queries and keys differ, those of the keys
    Q   queries
    D   width of the decoder
    V   vocabulary
    L   layers

Attention:
    H   heads of the queries
    J   heads of the keys and values
    G   query heads that share one key/value head: H = J * G
    d   width of a head; `half` is d / 2, the number of rotary frequencies
    n   sums of received attention
    A   axes of a rotary position: one for text, more for places in a picture or a video

A lower-case word names an axis of one file, such as the equal `parts` of an axis.
"""

import jax
import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray
"""JAX's arrays and NumPy's: what an operation takes that is also called from the host."""

DATA_AXIS, MODEL_AXIS = "data", "model"
"""Axes of a device mesh: rows of a batch are spread over the one, every layer over the other."""


def on_mesh() -> bool:
    """Whether arrays are laid over a mesh of devices: a loop over rows would gather them."""
    return not jax.sharding.get_abstract_mesh().empty
