"""Masked multi-head attention that never holds the whole attention matrix.

    attention           any mask, by chunks of queries: the vision tower, packed training rows
    causal_attention    a prompt, and what pruning reads from it: how much attention every
                        key received from some of the queries
    cached_attention    one new token a row against a cache

On a CPU, a prompt goes by square blocks that its caches hold, the upper triangle left out;
an accelerator is better off with fewer and larger products.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERY_CHUNK = 512
"""Queries handled at once: scratch memory is B * H * QUERY_CHUNK * S, not B * H * S * S."""

BLOCK = 128
"""Queries and keys handled at once on a CPU."""

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
    chunks = functools.partial(_by_chunks, heads=heads, later=later)
    blocks = functools.partial(_by_blocks, heads=heads, later=later)
    if valid.shape[1] <= BLOCK:
        blocks = chunks
    out, received = jax.lax.platform_dependent(q, k, v, valid, weights, cpu=blocks, default=chunks)
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


def _by_chunks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    weights: jax.Array | None,
    *,
    heads: str,
    later: bool,
) -> tuple[jax.Array, jax.Array]:
    """Chunks of queries against all keys: the output, and the sums if there are weights."""
    mask = causal_mask(valid)
    if weights is None:
        return attention(q, k, v, mask), jnp.zeros(())
    B, S = valid.shape
    slots = jnp.broadcast_to(jnp.arange(S), (B, S))

    def chunk(q: jax.Array, mask: jax.Array, weights: jax.Array, slots: jax.Array) -> tuple:
        attended = _weights(q, k, mask)
        out = jnp.einsum("bkgts,bksd->bkgtd", attended.astype(v.dtype), v)
        itself = slots[..., None] == jnp.arange(S)
        received = _received(attended, weights, heads, itself if later else None)
        return out.reshape(*q.shape[:3], v.shape[-1]), received

    found: tuple[jax.Array, jax.Array] = _over_chunks(chunk, q, mask, weights, slots, summed=1)
    return found


def _by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    weights: jax.Array | None,
    *,
    heads: str,
    later: bool,
) -> tuple[jax.Array, jax.Array]:
    """Square blocks, those above the diagonal left out: as `_by_chunks`.

    The softmax's maximum and sum are carried along a row of blocks; what a key received needs
    the finished ones, and so a second way through the row.
    """
    B, H, S, d = q.shape
    K = k.shape[1]
    n = -(-S // BLOCK)
    t = -(-S // n)
    columns = (jnp.arange(n), _split(k, 2, n), _split(v, 2, n), _split(valid, 1, n))
    place = jnp.arange(t)
    diagonal = place[:, None] >= place  # [t, t]

    def logits(i: jax.Array, q: jax.Array, j: jax.Array, k: jax.Array, ok: jax.Array) -> jax.Array:
        found = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
        seen = ok[:, None] & (diagonal | (j < i))  # [B, t, t]
        return jnp.where(seen[:, None, None], found * d**-0.5, _LEAST)

    @jax.checkpoint  # a gradient computes the blocks anew instead of keeping them
    def row(part: tuple) -> tuple:
        i, q, weights = part
        q = q.reshape(B, K, H // K, t, d)

        def attend(carry: tuple, column: tuple) -> tuple:
            j, k, v, ok = column

            def add() -> tuple:
                most, total, out = carry
                found = logits(i, q, j, k, ok)
                new = jnp.maximum(most, found.max(-1))
                p, old = jnp.exp(found - new[..., None]), jnp.exp(most - new)
                mixed = jnp.einsum(
                    "bkgts,bksd->bkgtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32
                )
                return new, total * old + p.sum(-1), out * old[..., None] + mixed

            return jax.lax.cond(j <= i, add, lambda: carry), None

        start = (
            jnp.full((B, K, H // K, t), _LEAST),
            jnp.zeros((B, K, H // K, t)),
            jnp.zeros((B, K, H // K, t, v.shape[-1])),
        )
        (most, total, out), _ = jax.lax.scan(attend, start, columns)
        out = (out / total[..., None]).astype(v.dtype).reshape(B, H, t, -1)
        if weights is None:
            return out, jnp.zeros(())

        whole = most + jnp.log(total)

        def note(_: None, column: tuple) -> tuple:
            j, k, _, ok = column

            def add() -> jax.Array:
                attended = jnp.exp(logits(i, q, j, k, ok) - whole[..., None])
                itself = jnp.broadcast_to(jnp.eye(t, dtype=bool) & (i == j), (B, t, t))
                return _received(attended, weights, heads, itself if later else None)

            return None, jax.lax.cond(j <= i, add, lambda: jnp.zeros((weights.shape[-1], B, t)))

        received: jax.Array = jax.lax.scan(note, None, columns)[1]  # [n, sums, B, t]
        return out, jnp.moveaxis(received, 0, 2).reshape(*received.shape[1:3], n * t)[..., :S]

    parts = (jnp.arange(n), _split(q, 2, n), None if weights is None else _split(weights, 1, n))
    out, received = jax.lax.map(row, parts)
    return _join(out, S), received.sum(0)


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
    return _received(_weights(rows, k, mask), some, watch.heads, itself if watch.later else None)


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


def _received(
    attended: jax.Array, weights: jax.Array, heads: str, itself: jax.Array | None
) -> jax.Array:
    """Sums over the queries of a block: float32 `[n, B, S]`.

    Args:
        attended: float32 `[B, H / G, G, t, S]`.
        weights: float32 `[B, t, n]`.
        heads: "mean" or "max".
        itself: bool `[B, t, S]`, what does not count: the queries' own keys.
    """
    B, K, G, t, S = attended.shape
    if itself is not None:
        attended = jnp.where(itself[:, None, None], 0.0, attended)
    if heads == "max":
        return jnp.einsum("btn,bts->nbs", weights, attended.max((1, 2)), precision=_EXACT)
    # A mean over heads and a sum over queries are one product.
    every = jnp.broadcast_to(weights[:, None] / (K * G), (B, K * G, *weights.shape[1:]))
    flat = attended.reshape(B, K * G * t, S)
    return jnp.einsum("brn,brs->nbs", every.reshape(B, K * G * t, -1), flat, precision=_EXACT)


def causal_mask(valid: jax.Array) -> jax.Array:
    """Each slot sees the valid slots up to itself: bool `[B, S]` -> bool `[B, S, S]`."""
    S = valid.shape[-1]
    return jnp.tril(jnp.ones((S, S), bool))[None] & valid[:, None, :]
