"""Rotary position embedding (RoFormer, arXiv 2104.09864), and its published scalings."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.ops.axes import AnyArray


def frequencies(head_dim: int, theta: float | int) -> Float[np.ndarray, " half"]:
    """Inverse frequencies, float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return 1.0 / np.float32(theta) ** exponent


def llama3_frequencies(
    inv_freq: Float[np.ndarray, " half"],
    *,
    factor: float | int,
    low: float | int,
    high: float | int,
    original_length: int,
) -> Float[np.ndarray, " half"]:
    """Llama 3.1's scaling: long waves are divided by `factor`, short ones kept, a ramp between.

    Args:
        inv_freq: float32.
        factor: by how much.
        low: waves longer than `original_length / low` are divided.
        high: waves shorter than `original_length / high` are kept.
        original_length: the longest sequence that the model was first trained for.
    """
    wavelength = 2 * math.pi / inv_freq
    ramp = np.clip((original_length / wavelength - low) / (high - low), 0.0, 1.0)
    scaled: np.ndarray = (1 - ramp) * inv_freq / factor + ramp * inv_freq
    return scaled.astype(np.float32)


def dynamic_frequencies(
    length: Int[AnyArray, " B"],
    *,
    head_dim: int,
    theta: float | int,
    factor: float | int,
    max_length: int,
) -> Float[Array, "B half"]:
    """ "Dynamic NTK" scaling: the base grows once a row is longer than `max_length`.

    Args:
        length: int32, positions in use in each row.
        head_dim: d.
        theta: the base.
        factor: how much longer than `max_length` rows may become.
        max_length: rows up to this length keep their frequencies unchanged.

    Returns:
        Inverse frequencies, float32.
    """
    stretch = factor * jnp.maximum(length, max_length) / max_length - (factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / base[:, None] ** exponent


def longrope_frequencies(
    length: Int[AnyArray, " B"],
    *,
    head_dim: int,
    theta: float | int,
    short: Sequence[float],
    long: Sequence[float],
    original_length: int,
) -> Float[Array, "B half"]:
    """LongRoPE (arXiv 2402.13753): each frequency divided by its own factor, by a row's length.

    Args:
        length: int32, positions in use in each row.
        head_dim: d.
        theta: the base.
        short, long: the divisors of rows up to `original_length`, and of longer ones.
        original_length: the longest sequence that the model was first trained for.

    Returns:
        Inverse frequencies, float32.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wave = np.float32(theta) ** exponent
    few, many = (1.0 / (np.asarray(factors, np.float32) * wave) for factors in (short, long))
    return jnp.where((length > original_length)[:, None], many, few)


def angles(
    positions: Int[AnyArray, "B Q"] | Int[AnyArray, "A B Q"],
    inv_freq: Float[AnyArray, " half"] | Float[AnyArray, "B half"],
    sections: Sequence[int] | None = None,
) -> Float[Array, "B Q half"]:
    """The angles by which heads are rotated: position times inverse frequency, float32.

    Positions of several axes (Qwen2-VL, arXiv 2409.12191: time, height and width) share the
    frequencies out among them: the first `sections[0]` follow the first axis, and so on.

    Args:
        positions: int32, of one axis or of A.
        inv_freq: float32, one for all rows, or different from row to row.
        sections: how many frequencies follow each of the A axes; with A axes alone.

    Raises:
        ValueError: if `sections` do not go with the axes or with the frequencies.
    """
    if inv_freq.ndim == 1:
        inv_freq = inv_freq[None]  # [B or 1, half]
    places = jnp.asarray(positions, jnp.float32)
    if places.ndim == 2:
        if sections is not None:
            raise ValueError(f"Positions of one axis have no sections, but {sections} came.")
        return places[..., None] * inv_freq[:, None]
    if sections is None or len(sections) != len(places) or sum(sections) != inv_freq.shape[1]:
        raise ValueError(
            f"Positions of {len(places)} axes need as many sections, which add up to the "
            f"{inv_freq.shape[1]} frequencies; {sections} came."
        )
    ends = itertools.accumulate(sections)
    each = (
        axis[..., None] * inv_freq[:, None, end - size : end]  # [B, Q, size]
        for axis, size, end in zip(places, sections, ends, strict=True)
    )
    return jnp.concatenate(list(each), axis=-1)


def rotate(
    x: Float[AnyArray, "B H Q d"], angles: Float[AnyArray, "B Q half"], scale: float | int = 1.0
) -> Float[Array, "B H Q d"]:
    """Rotate heads, pairing element i with i + d / 2.

    Args:
        x: queries or keys.
        angles: float32, see `angles`.
        scale: of cos and sin; LongRoPE (arXiv 2402.13753) has an attention factor here.

    Returns:
        In the dtype of `x`; computed in float32.
    """
    cos, sin = scale * jnp.cos(angles)[:, None], scale * jnp.sin(angles)[:, None]  # [B, 1, Q, half]
    if x.shape[2] == 1:  # a single token: there is nothing to win
        return _by_halves(x, cos, sin)
    found: Array = _by_platform(x, cos, sin)
    return found


@jax.jit  # traced once a shape
def _by_platform(
    x: Float[AnyArray, "B H Q d"], cos: Float[Array, "B 1 Q half"], sin: Float[Array, "B 1 Q half"]
) -> Float[Array, "B H Q d"]:
    found: Array = jax.lax.platform_dependent(x, cos, sin, tpu=_by_product, default=_by_halves)
    return found


def _by_halves(
    x: Float[AnyArray, "B H Q d"], cos: Float[Array, "B 1 Q half"], sin: Float[Array, "B 1 Q half"]
) -> Float[Array, "B H Q d"]:
    a, b = jnp.split(jnp.asarray(x, jnp.float32), 2, axis=-1)  # [B, H, Q, half] each
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _by_product(
    x: Float[AnyArray, "B H Q d"], cos: Float[Array, "B 1 Q half"], sin: Float[Array, "B 1 Q half"]
) -> Float[Array, "B H Q d"]:
    """The same numbers: on a TPU to exchange halves costs more than a product that does it."""
    half = cos.shape[-1]
    exchange = np.zeros((2 * half, 2 * half), np.float32)  # (a, b) -> (-b, a)
    exchange[half:, :half], exchange[:half, half:] = -np.eye(half), np.eye(half)
    other = jnp.einsum(
        "bhqd,de->bhqe",
        x,
        exchange.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST,  # every sum has one term: nothing is rounded
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([y, y], axis=-1) for y in (cos, sin))
    return (jnp.asarray(x, jnp.float32) * cos + other * sin).astype(x.dtype)
