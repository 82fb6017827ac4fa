"""Rotary position embedding (RoFormer, arXiv 2104.09864), and its published scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Inverse frequencies, float32 `[d / 2]`."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return 1.0 / np.float32(theta) ** exponent


def llama3_frequencies(
    inv_freq: np.ndarray, *, factor: float, low: float, high: float, original_length: int
) -> np.ndarray:
    """Llama 3.1's scaling: long waves are divided by `factor`, short ones kept, a ramp between.

    Args:
        inv_freq: float32 `[d / 2]`.
        low: waves longer than `original_length / low` are divided.
        high: waves shorter than `original_length / high` are kept.
    """
    wavelength = 2 * math.pi / inv_freq
    ramp = np.clip((original_length / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - ramp) * inv_freq / factor + ramp * inv_freq).astype(np.float32)


def dynamic_frequencies(
    length: jax.Array, *, head_dim: int, theta: float, factor: float, max_length: int
) -> jax.Array:
    """ "Dynamic NTK" scaling: the base grows once a row is longer than `max_length`.

    Args:
        length: int32 `[B]`, positions in use in each row.

    Returns:
        float32 `[B, d / 2]`.
    """
    stretch = factor * jnp.maximum(length, max_length) / max_length - (factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / base[:, None] ** exponent


def rotate(x: jax.Array, positions: jax.Array, inv_freq: jax.Array) -> jax.Array:
    """Rotate heads by their positions, pairing element i with i + d / 2.

    Args:
        x: `[B, H, T, d]`.
        positions: int32 `[B, T]`.
        inv_freq: `[d / 2]`, or `[B, d / 2]` where it differs from row to row.

    Returns:
        `[B, H, T, d]` in the dtype of `x`; the angles are float32.
    """
    if inv_freq.ndim == 1:
        inv_freq = inv_freq[None]
    angles = positions[..., None].astype(jnp.float32) * inv_freq[:, None]  # [B, T, d/2]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
