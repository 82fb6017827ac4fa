"""Masked multi-head attention that never holds the whole attention matrix.

    attention           any mask, by chunks of queries: packed training rows
    full_attention      everything sees everything: the vision tower
    causal_attention    a prompt, and what pruning reads from it: how much attention every
                        key received from some of the queries
    cached_attention    one new token a row against a cache

A CPU is fastest where a few heads' weights fit into its cache; an accelerator is better off
with fewer and larger products.
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

QUERY_CHUNK = 512
"""Queries handled at once: scratch memory is B * H * QUERY_CHUNK * S, not B * H * S * S."""

BLOCK = 320
"""Queries of a prompt handled at once on a CPU, for a few heads of one row."""

FULL_BLOCK = 640
"""The same where every query sees every key: with no diagonal, fewer parts are faster."""

SHORT = 128
"""Up to so many slots all weights of all heads are made at once everywhere: less to compile."""

STAIRS = 4
"""Parts of a prompt whose queries see the keys up to their part's end alone, on a CPU. More of
them skip more of what lies above the diagonal, and take longer to compile."""

_LEAST = jnp.finfo(jnp.float32).min
_EXACT = jax.lax.Precision.HIGHEST  # a rounded sum would change who is dropped


class Watch(NamedTuple):
    """Which attention weights are summed up: a key's sum over queries, heads reduced first.

    Attributes:
        queries: float32 `[n, B, T]`, the weight of every query in each of n sums.
        heads: "mean" or "max" over the heads of a weight, before queries are summed.
        later: leave out what a token gives to itself, and divide a key's sum by the
            weight of the queries behind it.
        rows: at most so many queries of a row have any weight, so only these are looked
            at; None looks at all, inside the attention itself.
    """

    queries: jax.Array
    heads: str
    later: bool = False
    rows: int | None = None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention over an explicit mask, grouped-query heads included.

    Args:
        q: queries `[B, H, T, d]`.
        k: keys `[B, H / G, S, d]`; G = 1 is plain multi-head attention.
        v: values, as `k`.
        mask: bool `[B or 1, T, S]`, True where query t may look at key s. A query with
            no key at all (a padded slot) gets the mean of the values, not NaN.

    Returns:
        `[B, H, T, d]` in the dtype of `v`; the softmax is float32.
    """
    chunked = functools.partial(_chunk, k=k, v=v)
    return _over_chunks(chunked, q, mask)


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of every slot to every slot: `[I, H, S, d]` each -> `[I, H, S, d]`."""
    valid = jnp.ones((q.shape[0], q.shape[2]), bool)
    out, _ = _by_platform(q, k, v, valid, None, heads="mean", later=False, causal=False)
    return out


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, watch: Watch | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of every slot to the valid slots up to itself, and what `watch` asks for.

    Args:
        q: queries `[B, H, S, d]`.
        k: keys `[B, H / G, S, d]`.
        v: values, as `k`.
        valid: bool `[B, S]`.
        watch: which attention weights are summed up.

    Returns:
        The output `[B, H, S, d]` in the dtype of `v`, and float32 `[n, B, S]`, or None.
    """
    inside = watch if watch is not None and watch.rows is None else None
    weights = None if inside is None else jnp.moveaxis(inside.queries, 0, -1)  # [B, S, n]
    heads = "mean" if inside is None else inside.heads
    later = inside is not None and inside.later
    out, received = _by_platform(q, k, v, valid, weights, heads=heads, later=later, causal=True)
    if watch is None:
        return out, None
    if watch.rows is not None:
        received = _received_from_rows(q, k, valid, watch)
    if watch.later:
        behind = watch.queries.sum(-1, keepdims=True) - jnp.cumsum(watch.queries, axis=-1)
        received = received / jnp.maximum(behind, 1.0)
    return out, received


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    """One query a row against a cache, whose rows and key/value heads may be one axis.

    Args:
        q: `[B, H, 1, d]`.
        k: `[B * H / G, S, d]` or `[B, H / G, S, d]`.
        v: as `k`.
        valid: bool `[B, S]`.

    Returns:
        `[B, H, 1, d]` in the dtype of `v`.
    """
    B, H, _, d = q.shape
    *rows, S, _ = k.shape
    grouped = q.reshape(*rows, -1, d)
    logits = jnp.einsum("...gd,...sd->...gs", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(valid[:, None], logits.reshape(B, H, S) * d**-0.5, _LEAST)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("...gs,...sd->...gd", weights.reshape(*rows, -1, S), v)
    return out.reshape(B, H, 1, -1)


def _by_platform(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, weights: Any, **how: Any
) -> tuple[jax.Array, jax.Array]:
    """The output `[B, H, S, d]`, and float32 `[n, B, S]` if there are weights `[B, S, n]`."""
    chunks: Any = functools.partial(_by_chunks, **how)
    on_mesh = not jax.sharding.get_abstract_mesh().empty  # a loop over rows would gather them
    if on_mesh or q.shape[2] <= SHORT:
        return chunks(q, k, v, valid, weights)
    heads = functools.partial(_by_heads, **how)
    found: tuple[jax.Array, jax.Array] = jax.lax.platform_dependent(
        q, k, v, valid, weights, cpu=heads, default=chunks
    )
    return found


def _by_chunks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    weights: jax.Array | None,
    *,
    heads: str,
    later: bool,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Chunks of queries of all rows and heads against all keys."""
    mask = causal_mask(valid) if causal else valid[:, None] & jnp.ones((q.shape[2], 1), bool)
    if weights is None:
        return attention(q, k, v, mask), jnp.zeros((0, *valid.shape))
    B, S = valid.shape
    slots = jnp.broadcast_to(jnp.arange(S), (B, S))

    def chunk(q: jax.Array, mask: jax.Array, weights: jax.Array, slots: jax.Array) -> tuple:
        attended = _weights(q, k, mask)
        out = jnp.einsum("bkgts,bksd->bkgtd", attended.astype(v.dtype), v)
        itself = slots[..., None] == jnp.arange(S)
        received = _received(_over_heads(attended, heads), weights, itself if later else None)
        return out.reshape(*q.shape[:3], v.shape[-1]), received

    found: tuple[jax.Array, jax.Array] = _over_chunks(chunk, q, mask, weights, slots, summed=1)
    return found


def _by_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    weights: jax.Array | None,
    *,
    heads: str,
    later: bool,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Blocks of queries of a few heads of one row against the keys that they may see."""
    B, H, S, d = q.shape
    K = k.shape[1]
    few = heads_at_once(K)
    size = -(-S // (BLOCK * STAIRS)) * BLOCK if causal else S

    def row(part: tuple) -> tuple:
        q, k, v, valid, weights = part  # [K, G, S, d], [K, S, d] twice, [S], [S, n]
        outs, received = [], jnp.zeros((0 if weights is None else weights.shape[-1], S))
        for begin in range(0, S, size):
            end = min(S, begin + size)
            keys = end if causal else S
            out, found = stair(q[:, :, begin:end], k[:, :keys], v[:, :keys], valid[:keys], begin,
                               None if weights is None else weights[begin:end])  # fmt: skip
            outs.append(out)
            received = received.at[:, :keys].add(found)
        return jnp.concatenate(outs, axis=2), received

    def stair(
        q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, begin: int, weights: Any
    ) -> tuple[jax.Array, jax.Array]:
        """A part of the queries, `[K, G, T, d]`, against so many keys."""
        parts = -(-q.shape[2] // (BLOCK if causal else FULL_BLOCK))
        queries = _split(q, 2, parts)  # [parts, K, G, t, d]
        t, width = queries.shape[3], k.shape[1]
        k, v = (x.reshape(K // few, few, *x.shape[1:]) for x in (k, v))

        @jax.checkpoint  # a gradient computes the weights anew instead of keeping them
        def block(part: tuple) -> Any:
            i, q, weights = part
            place = begin + i * t + jnp.arange(t)[:, None]
            seen = valid & (place >= jnp.arange(width)) if causal else valid[None]  # [t, keys]

            def attend(summed: jax.Array | None, part: tuple) -> tuple:
                q, k, v = part  # [few, G, t, d], [few, keys, d] twice
                logits = jnp.einsum("kgtd,ksd->kgts", q, k, preferred_element_type=jnp.float32)
                logits = jnp.where(seen, logits * d**-0.5, _LEAST)
                # A softmax whose sum is divided by behind the product, where there is less.
                most = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
                grown = jnp.exp(logits - most)
                share = 1 / grown.sum(-1, keepdims=True)  # [few, G, t, 1]
                out = jnp.einsum(
                    "kgts,ksd->kgtd", grown.astype(v.dtype), v, preferred_element_type=jnp.float32
                )
                if summed is not None:  # one head after the other: the weights are read once
                    for head in (grown * share).reshape(-1, t, width):
                        summed = jnp.maximum(summed, head) if heads == "max" else summed + head
                return summed, (out * share).astype(v.dtype)

            start: Any = None if weights is None else jnp.zeros((t, width))
            each = (q.reshape(K // few, few, *q.shape[1:]), k, v)
            found: Any = jax.lax.scan(attend, start, each)
            summed, out = found[0], found[1].reshape(K, H // K, t, -1)
            if weights is None:
                return out, jnp.zeros((0, width))
            summed = summed / H if heads == "mean" else summed
            itself = place == jnp.arange(width)
            received = _received(summed[None], weights[None], itself[None] if later else None)
            return out, received[:, 0]

        parted = None if weights is None else _split(weights, 0, parts)
        out, received = jax.lax.map(block, (jnp.arange(parts), queries, parted))
        out = jnp.moveaxis(out, 0, 2)  # [K, G, parts, t, d]
        out = out.reshape(*out.shape[:2], parts * t, -1)[:, :, : q.shape[2]]
        return out, received.sum(0)

    out, received = jax.lax.map(row, (q.reshape(B, K, H // K, S, d), k, v, valid, weights))
    return out.reshape(B, H, S, -1), jnp.moveaxis(received, 0, 1)


def heads_at_once(number: int) -> int:
    """As many key/value heads as there are cores, if they divide; a divisor of `number`."""
    cores = min(number, os.cpu_count() or 1)
    return next(n for n in range(cores, 0, -1) if number % n == 0)


def _received_from_rows(q: jax.Array, k: jax.Array, valid: jax.Array, watch: Watch) -> jax.Array:
    """The sums of a watch for at most `watch.rows` queries, looked at once more: `[n, B, S]`."""
    assert watch.rows is not None
    S = valid.shape[1]
    weights = jnp.moveaxis(watch.queries, 0, -1)  # [B, S, n]
    asked = jnp.any(weights > 0, axis=-1)
    # Slots are distinct, so the queries in use come first; the others have no weight.
    chosen = jax.lax.top_k(jnp.where(asked, jnp.arange(S) + 1, 0), min(watch.rows, S))[1]  # [B, R]
    rows = jnp.take_along_axis(q, chosen[:, None, :, None], axis=2)
    mask = valid[:, None] & (jnp.arange(S) <= chosen[..., None])  # [B, R, S]
    some = jnp.take_along_axis(weights, chosen[..., None], axis=1)
    itself = chosen[..., None] == jnp.arange(S)
    attended = _over_heads(_weights(rows, k, mask), watch.heads)
    return _received(attended, some, itself if watch.later else None)


def _over_chunks(function, q, mask, *others, summed=None):  # type: ignore[no-untyped-def]
    """`function(q, mask, *others)` over chunks of the queries.

    q is `[B, H, T, ...]`, all others `[B or 1, T, ...]`. The result has `[B, H, T, d]`, or is
    a tuple whose entry number `summed` is added up over the chunks.
    """
    T = q.shape[2]
    if T <= QUERY_CHUNK:
        return function(q, mask, *others)
    parts = -(-T // QUERY_CHUNK)
    split = (_split(q, 2, parts), *(_split(x, 1, parts) for x in (mask, *others)))
    results = jax.lax.map(lambda part: function(*part), split)
    if summed is None:
        return _join(results, T)
    return _join(results[0], T), results[summed].sum(0)


def _split(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """An axis in equal parts, the last one padded: `[..., T, ...]` -> `[parts, ..., t, ...]`."""
    t = -(-x.shape[axis] // parts)
    width = [(0, 0)] * x.ndim
    width[axis] = (0, parts * t - x.shape[axis])
    x = jnp.pad(x, width)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], parts, t, *x.shape[axis + 1 :]), axis, 0)


def _join(out: jax.Array, length: int) -> jax.Array:
    """`[parts, B, H, t, d]` -> `[B, H, length, d]`."""
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length]


def _chunk(q: jax.Array, mask: jax.Array, *, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = _weights(q, k, mask).astype(v.dtype)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights, v)
    return out.reshape(*q.shape[:3], v.shape[-1])


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmaxed attention, float32 `[B, H / G, G, T, S]`."""
    B, H, T, d = q.shape
    grouped = q.reshape(B, k.shape[1], H // k.shape[1], T, d)
    logits = jnp.einsum("bkgtd,bksd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * d**-0.5, _LEAST)
    return jax.nn.softmax(logits, axis=-1)


def _over_heads(attended: jax.Array, heads: str) -> jax.Array:
    """float32 `[B, H / G, G, t, S]` -> `[B, t, S]`."""
    return attended.max((1, 2)) if heads == "max" else attended.mean((1, 2))


def _received(attended: jax.Array, weights: jax.Array, itself: jax.Array | None) -> jax.Array:
    """Sums over the queries of a block: float32 `[n, B, S]`.

    Args:
        attended: float32 `[B, t, S]`, heads reduced.
        weights: float32 `[B, t, n]`.
        itself: bool `[B, t, S]`, what does not count: the queries' own keys.
    """
    if itself is not None:
        attended = jnp.where(itself, 0.0, attended)
    return jnp.einsum("btn,bts->nbs", weights, attended, precision=_EXACT)


def causal_mask(valid: jax.Array) -> jax.Array:
    """Each slot sees the valid slots up to itself: bool `[B, S]` -> bool `[B, S, S]`."""
    S = valid.shape[-1]
    return jnp.tril(jnp.ones((S, S), bool))[None] & valid[:, None, :]
