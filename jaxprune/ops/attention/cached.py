"""One new token a row against a cache of keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.ops.attention.definition import LEAST
from jaxprune.ops.axes import AnyArray
from jaxprune.ops.products import at_least_two_rows


class Cached(NamedTuple):
    """Some of a batch's keys and values, whose rows and key/value heads may be one axis.

    Attributes:
        k: `[B * J, S, d]` or `[B, J, S, d]`.
        v: as `k`.
        seen: bool `[B, S]`, which of them each row's token sees.
    """

    k: Float[AnyArray, "*BJ S d"]
    v: Float[AnyArray, "*BJ S d"]
    seen: Bool[AnyArray, "B S"]


def cached_attention(q: Float[AnyArray, "B H 1 d"], *parts: Cached) -> Float[Array, "B H 1 d"]:
    """One query a row against keys and values that lie in one place or in several.

    Args:
        q: queries.
        *parts: the keys and values.

    Returns:
        In the dtype of the values; the softmax, over all parts, is float32.
    """
    B, H, _, d = q.shape
    logits = []
    for part in parts:
        grouped = q.reshape(*part.k.shape[:-2], -1, d)  # [..., G, d]
        found = at_least_two_rows(_logits, grouped, part.k).reshape(B, H, -1)
        logits.append(jnp.where(part.seen[:, None], found * d**-0.5, LEAST))
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)  # [B, H, all S]
    out, begin = jnp.zeros((B, H, d)), 0
    for part in parts:
        end = begin + part.seen.shape[1]
        own = weights[..., begin:end].astype(part.v.dtype)
        own = own.reshape(*part.v.shape[:-2], -1, end - begin)  # [..., G, S]
        out += at_least_two_rows(_values, own, part.v).reshape(B, H, d)
        begin = end
    return out[:, :, None].astype(parts[0].v.dtype)


def _logits(
    q: Float[AnyArray, "*BJ G d"], k: Float[AnyArray, "*BJ S d"]
) -> Float[Array, "*BJ G S"]:
    return jnp.einsum("...gd,...sd->...gs", q, k, preferred_element_type=jnp.float32)


def _values(
    weights: Float[AnyArray, "*BJ G S"], v: Float[AnyArray, "*BJ S d"]
) -> Float[Array, "*BJ G d"]:
    return jnp.einsum("...gs,...sd->...gd", weights, v, preferred_element_type=jnp.float32)
