"""Weights of 8 bits: each column of a matrix as whole numbers, and what one of them is worth.

Decoding reads every weight for each token and is bound by their bytes; these are half of
bfloat16's. What is multiplied with them keeps its dtype, and sums are float32.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int8

_LARGEST = 127


def rounded(
    kernel: Float[np.ndarray, "D N"],
) -> tuple[Int8[np.ndarray, "D N"], Float[np.ndarray, " N"]]:
    """A matrix as whole numbers from -127 to 127, and the float32 scale of each column."""
    scale = np.abs(kernel).max(axis=0).astype(np.float32) / _LARGEST
    whole = np.rint(kernel / np.where(scale > 0, scale, 1.0))  # half to even
    return whole.astype(np.int8), scale


def with_int8(config: Any) -> Any:
    """The config of a model whose decoder's layers are rounded."""
    text = dataclasses.replace(config.text_config, int8=True)
    return dataclasses.replace(config, text_config=text)
