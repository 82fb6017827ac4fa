"""LLaMA decoder (arXiv 2302.13971), fed with embeddings rather than token ids.

Pre-RMSNorm, rotary positions, SwiGLU, grouped-query attention. Two ways through it:
`prefill` takes a whole prompt and builds the key/value caches, `decode` takes one new
token a row. Layers are a plain list, so that every layer can own a cache of its own length.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.ops import rope
from jaxprune.ops.attention import Watch, attention, cached_attention, causal_attention
from jaxprune.ops.cuts import AFTER_ATTENTION, BETWEEN_LAYERS, NO_CUTS, Schedule


class Tokens(flax.struct.PyTreeNode):
    """A padded batch of embedded tokens; slot order is causal order.

    Attributes:
        x: `[B, S, D]` hidden states.
        positions: int32 `[B, S]`, carried along, never implied by the slot.
        valid: bool `[B, S]`; a slot that is not valid is padding.
        kind: int32 `[B, S]`, what a token is to a schedule: see `ops.schedule`.
    """

    x: jax.Array
    positions: jax.Array
    valid: jax.Array
    kind: jax.Array


class LayerCache(flax.struct.PyTreeNode):
    """One layer's keys and values, with room for the tokens still to come.

    Attributes:
        k: `[B * key/value heads, S + new, d]`, rotated. One axis for rows and heads is what
            a batched product takes: with two, XLA on a CPU copies the cache at every step.
            On a device mesh it is two, `[B, key/value heads, S + new, d]`, each on its own axis.
        v: as `k`.
        valid: bool `[B, S + new]`. Every layer has its own, so that all can be donated.
        length: int32 `[]`, S: generated token i goes to slot S + i of every row.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    length: jax.Array


class Prefilled(flax.struct.PyTreeNode):
    """A prompt behind the last layer.

    Attributes:
        tokens: what is left of it; `x` is `[B, S', D]`, before the last norm.
        caches: one a layer, of what entered its attention.
        records: for each layer that drops tokens, what `schedule.record` noted behind it:
            positions int32 `[B, S_l]` and valid bool `[B, S_l]` of what it left.
    """

    tokens: Tokens
    caches: tuple[LayerCache, ...]
    records: tuple[Any, ...]


def rope_frequencies(config: LlamaConfig, length: jax.Array) -> jax.Array:
    """Inverse frequencies `[d / 2]`, or `[B, d / 2]` where they follow the length `[B]`."""
    scaling = config.rope_scaling
    if scaling.kind == "dynamic":
        return rope.dynamic_frequencies(
            length,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            factor=scaling.factor,
            max_length=config.max_position_embeddings,
        )
    inv_freq = rope.frequencies(config.head_dim, config.rope_theta)
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    if scaling.kind == "llama3":
        inv_freq = rope.llama3_frequencies(
            inv_freq,
            factor=scaling.factor,
            low=scaling.low_freq_factor,
            high=scaling.high_freq_factor,
            original_length=scaling.original_max_position_embeddings,
        )
    return jnp.asarray(inv_freq, jnp.float32)


class LlamaAttention(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        c = self.config

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=c.attention_bias, dtype=c.dtype, param_dtype=c.dtype)

        self.q_proj = dense(c.num_attention_heads * c.head_dim)
        self.k_proj = dense(c.num_key_value_heads * c.head_dim)
        self.v_proj = dense(c.num_key_value_heads * c.head_dim)
        self.o_proj = dense(c.hidden_size)

    def qkv(
        self, x: jax.Array, positions: jax.Array, inv_freq: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[B, T, D]` -> q `[B, H, T, d]`, k and v `[B, key/value heads, T, d]`, rotated."""

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, self.config.head_dim).swapaxes(1, 2)

        q = rope.rotate(heads(self.q_proj(x)), positions, inv_freq)
        k = rope.rotate(heads(self.k_proj(x)), positions, inv_freq)
        return q, k, heads(self.v_proj(x))


def join_heads(heads: jax.Array) -> jax.Array:
    """`[B, H, T, d]` -> `[B, T, H * d]`."""
    B, _, T, _ = heads.shape
    return heads.swapaxes(1, 2).reshape(B, T, -1)


class LlamaMLP(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        c = self.config

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=c.mlp_bias, dtype=c.dtype, param_dtype=c.dtype)

        self.gate_proj = dense(c.intermediate_size)
        self.up_proj = dense(c.intermediate_size)
        self.down_proj = dense(c.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.config.hidden_act]
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


def rms_norm(config: LlamaConfig) -> nn.RMSNorm:
    """RMSNorm as LLaMA has it."""
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=config.dtype, param_dtype=config.dtype)


class LlamaLayer(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        self.input_layernorm = rms_norm(self.config)
        self.self_attn = LlamaAttention(self.config)
        self.post_attention_layernorm = rms_norm(self.config)
        self.mlp = LlamaMLP(self.config)

    def attend(
        self,
        x: jax.Array,
        positions: jax.Array,
        inv_freq: jax.Array,
        valid: jax.Array,
        mask: jax.Array | None = None,
        watch: Watch | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Attention among `[B, S, D]`: heads `[B, S, H * d]`, k, v, and what `watch` asks for."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), positions, inv_freq)
        if mask is not None:
            return join_heads(attention(q, k, v, mask)), k, v, None
        heads, received = causal_attention(q, k, v, valid, watch)
        return join_heads(heads), k, v, received

    def attend_cached(
        self,
        x: jax.Array,
        positions: jax.Array,
        inv_freq: jax.Array,
        cache: LayerCache,
        step: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """One new token a row, `[B, 1, D]`, against the cache, which takes it in: its heads."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), positions, inv_freq)
        slot = cache.length + step
        seen = jnp.ones((x.shape[0], 1), bool)
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot)
        cache = cache.replace(
            k=update(cache.k, _merge_heads(k), axis=cache.k.ndim - 2),
            v=update(cache.v, _merge_heads(v), axis=cache.v.ndim - 2),
            valid=update(cache.valid, seen, axis=1),
        )
        return join_heads(cached_attention(q, cache.k, cache.v, cache.valid)), cache

    def feed_forward(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """The rest of the layer: output projection and MLP, each with its residual."""
        x = x + self.self_attn.o_proj(heads)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaDecoder(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.dtype
        )
        self.layers = [LlamaLayer(c) for _ in range(c.num_hidden_layers)]
        self.norm = rms_norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, dtype=c.dtype, param_dtype=c.dtype
            )

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Text alone: int32 `[B, S]` -> float32 logits `[B, S, vocabulary]`."""
        positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
        valid = jnp.ones(token_ids.shape, bool)
        kind = jnp.zeros(token_ids.shape, jnp.int32)
        tokens = Tokens(self.embed(token_ids), positions, valid, kind)
        return self.logits(self.prefill(tokens, new_slots=0).tokens.x)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """int32 `[B, S]` -> `[B, S, D]`."""
        return self.embed_tokens(token_ids)

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states `[..., D]`, not yet normed -> float32 logits `[..., vocabulary]`."""
        x = self.norm(x)
        head = self.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        return head(x).astype(jnp.float32)

    def prefill(
        self,
        tokens: Tokens,
        *,
        new_slots: int,
        mask: jax.Array | None = None,
        schedule: Schedule = NO_CUTS,
        counts: Any = None,
    ) -> Prefilled:
        """A whole prompt through all layers, dropping tokens as a schedule says.

        Args:
            tokens: the embedded prompt.
            new_slots: room in the caches for tokens to be generated.
            mask: bool `[B or 1, S, S]` instead of the causal one, for packed training rows
                without a schedule.
            schedule: where and how tokens are dropped.
            counts: int32 `[L, B]`, candidates left behind each layer; for a schedule.
        """
        length = jnp.max(jnp.where(tokens.valid, tokens.positions, -1), axis=-1) + 1
        inv_freq = rope_frequencies(self.config, length)
        caches, records = [], []
        for l, layer in enumerate(self.layers):
            watch = schedule.watch(l, tokens)
            heads, k, v, received = layer.attend(
                tokens.x, tokens.positions, inv_freq, tokens.valid, mask, watch
            )
            caches.append(_new_cache(k, v, tokens.valid, new_slots))
            # The heads go along, so that the output projection is spared the dropped tokens.
            tokens, heads = schedule.apply(AFTER_ATTENTION, l, (tokens, heads), received, counts)
            tokens = tokens.replace(x=layer.feed_forward(tokens.x, heads))
            (tokens,) = schedule.apply(BETWEEN_LAYERS, l, (tokens,), received, counts)
            if l in schedule.layers:
                records.append(schedule.record(tokens, received))
        return Prefilled(tokens, tuple(caches), tuple(records))

    def decode(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        caches: tuple[LayerCache, ...],
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """One generated token a row through all layers.

        Args:
            token_ids: int32 `[B]`.
            positions: int32 `[B]`.
            caches: one a layer.
            step: int32 `[]`, how many generated tokens the caches hold already.

        Returns:
            float32 logits `[B, vocabulary]` for the next token, and the caches.
        """
        x = self.embed(token_ids[:, None])
        inv_freq = rope_frequencies(self.config, positions + 1)
        updated = []
        for layer, cache in zip(self.layers, caches, strict=True):
            heads, cache = layer.attend_cached(x, positions[:, None], inv_freq, cache, step)
            updated.append(cache)
            x = layer.feed_forward(x, heads)
        return self.logits(x[:, 0]), tuple(updated)


def _merge_heads(x: jax.Array) -> jax.Array:
    """`[B, key/value heads, S, d]` -> `[B * key/value heads, S, d]`, but not on a mesh."""
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    return x if on_mesh else x.reshape(-1, *x.shape[2:])


def _new_cache(k: jax.Array, v: jax.Array, valid: jax.Array, new_slots: int) -> LayerCache:
    def with_room(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, new_slots if i == axis else 0) for i in range(x.ndim)])

    k, v = _merge_heads(k), _merge_heads(v)
    return LayerCache(
        k=with_room(k, k.ndim - 2),
        v=with_room(v, v.ndim - 2),
        valid=with_room(valid, 1),
        length=jnp.asarray(valid.shape[1], jnp.int32),
    )
