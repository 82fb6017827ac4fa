"""LLaMA decoder (arXiv 2302.13971), fed with embeddings rather than token ids.

Pre-RMSNorm, rotary positions, SwiGLU, grouped-query attention. Two ways through it:
`prefill` takes a whole prompt and builds the key/value caches, `decode` takes one new
token a row. Layers are a plain list, so that every layer can own a cache of its own length.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.family import LayerCache, Prefilled
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.ops import rope
from jaxprune.ops.attention import Cached, Watch, attention, cached_attention, causal_attention
from jaxprune.ops.axes import on_mesh
from jaxprune.ops.cuts import (
    AFTER_ATTENTION,
    BETWEEN_LAYERS,
    KEPT,
    NO_CUTS,
    LayerView,
    Schedule,
    Tokens,
)
from jaxprune.ops.products import dot_general


def rope_frequencies(config: LlamaConfig, length: Int[Array, " B"]) -> Float[Array, "*B f"]:
    """Inverse frequencies `[d / 2]`, or `[B, d / 2]` where they follow the rows' lengths."""
    scaling = config.rope_scaling
    if scaling.kind == "dynamic":
        return rope.dynamic_frequencies(
            length,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            factor=scaling.factor,
            max_length=config.max_position_embeddings,
        )
    if scaling.kind == "longrope":
        return rope.longrope_frequencies(
            length,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            short=scaling.short_factor,
            long=scaling.long_factor,
            original_length=scaling.original_max_position_embeddings,
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


class Int8Dense(nn.Module):
    """A dense layer over a matrix of whole numbers; see `models.int8`."""

    features: int
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any N"]:
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (x.shape[-1], self.features), jnp.int8)
        scale = self.param("scale", zeros, (self.features,), jnp.float32)
        across = (((x.ndim - 1,), (0,)), ((), ()))
        y = dot_general(x, kernel, across, preferred_element_type=jnp.float32) * scale
        if self.use_bias:
            y = y + self.param("bias", zeros, (self.features,), self.dtype)
        return y.astype(self.dtype)


def dense(config: LlamaConfig, features: int, bias: bool) -> nn.Dense | Int8Dense:
    """A dense layer of the decoder's layers."""
    if config.int8:
        return Int8Dense(features, bias, config.dtype)
    return plain_dense(config, features, bias)


def plain_dense(config: LlamaConfig, features: int, bias: bool) -> nn.Dense:
    """A dense layer that is never rounded."""
    c = config
    return nn.Dense(
        features, use_bias=bias, dtype=c.dtype, param_dtype=c.dtype, dot_general=dot_general
    )


class LlamaAttention(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        c = self.config

        self.q_proj = dense(c, c.num_attention_heads * c.head_dim, c.attention_bias)
        self.k_proj = dense(c, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.v_proj = dense(c, c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.o_proj = dense(c, c.hidden_size, c.output_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = rms_norm(c), rms_norm(c)

    def qkv(self, x: Float[Array, "B Q D"]) -> tuple[Array, Array, Array]:
        """q `[B, H, Q, d]`, k and v `[B, J, Q, d]`, not rotated."""

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, self.config.head_dim).swapaxes(1, 2)

        flat = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if x.shape[0] * x.shape[1] < x.shape[2]:
            # Without the barrier a TPU's compiler makes the products give heads, and for that
            # copies the matrices to another layout; they are larger here than what goes through.
            flat = jax.lax.optimization_barrier(flat)
        q, k, v = map(heads, flat)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def rotate(self, heads: Float[Array, "B H Q d"], angles: Float[Array, "B Q f"]) -> Array:
        """Queries or keys at their positions."""
        return rope.rotate(heads, angles, self.config.rope_scaling.attention_factor)


def join_heads(heads: Float[Array, "B H Q d"]) -> Float[Array, "B Q Hd"]:
    """The heads of every token side by side."""
    B, _, Q, _ = heads.shape
    return heads.swapaxes(1, 2).reshape(B, Q, -1)


class LlamaMLP(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        c = self.config

        self.gate_proj = dense(c, c.intermediate_size, c.mlp_bias)
        self.up_proj = dense(c, c.intermediate_size, c.mlp_bias)
        self.down_proj = dense(c, c.hidden_size, c.mlp_bias)

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
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
        tokens: Tokens,
        angles: Float[Array, "B S f"],
        mask: Bool[Array, "#B S S"] | None = None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "B S Hd"], Array, LayerView]:
        """Attention among a prompt's tokens: the heads, the values, and what a ranker sees."""
        plain_q, plain_k, v = self.self_attn.qkv(self.input_layernorm(tokens.x))
        q, k = (self.self_attn.rotate(heads, angles) for heads in (plain_q, plain_k))
        received = None
        if mask is not None:
            heads = attention(q, k, v, mask)
        elif watch is None or watch.rotated:
            heads, received = causal_attention(q, k, v, tokens.valid, watch)
        else:
            heads, _ = causal_attention(q, k, v, tokens.valid)
            # Nobody takes the heads of this one, so that only the weights are computed.
            _, received = causal_attention(plain_q, plain_k, v, tokens.valid, watch)
        view = LayerView(tokens, tokens.x, q, k, plain_q, plain_k, watched=received)
        return join_heads(heads), v, view

    def attend_cached(
        self,
        x: Float[Array, "B 1 D"],
        angles: Float[Array, "B 1 f"],
        cache: LayerCache,
        seen: Bool[Array, "B M"],
    ) -> tuple[Float[Array, "B 1 Hd"], tuple[Array, Array]]:
        """One new token a row against the cache: its heads, and its keys and values."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(x))
        q, k = (self.self_attn.rotate(heads, angles) for heads in (q, k))
        k, v = _merge_heads(k), _merge_heads(v)
        own = Cached(k, v, jnp.ones((len(x), 1), bool))
        prompt, answer = (
            Cached(cache.k, cache.v, cache.valid),
            Cached(cache.new_k, cache.new_v, seen),
        )
        heads = cached_attention(q, prompt, answer, own)
        return join_heads(heads), (k, v)

    def feed_forward(
        self, x: Float[Array, "B Q D"], heads: Float[Array, "B Q Hd"]
    ) -> Float[Array, "B Q D"]:
        """The rest of the layer: output projection and MLP, each with its residual."""
        x = x + self.self_attn.o_proj(heads)
        return x + self.mlp(self.post_attention_layernorm(x))

    def __call__(
        self,
        tokens: Tokens,
        angles: Float[Array, "B S f"],
        mask: Bool[Array, "#B S S"] | None,
        watch: Watch | None,
        cut: Callable[..., tuple[Tokens, Array]],
    ) -> tuple[Tokens, Array, LayerView]:
        """A prompt through the layer, `cut` in its middle: tokens, values, what a ranker sees."""
        heads, v, view = self.attend(tokens, angles, mask, watch)
        # The heads go along, so that the output projection is spared the dropped tokens.
        tokens, heads = cut(tokens, heads, view)
        return tokens._replace(x=self.feed_forward(tokens.x, heads)), v, view


PRODUCT = "product"
"""The name, to `jax.checkpoint`, of a matrix's product to which something is added."""

_KEEPING = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names(KEPT, PRODUCT),
    ),
    "full": jax.checkpoint_policies.save_only_these_names(KEPT),
}


def through(layer: LlamaLayer, tokens: Tokens, *others: Any) -> tuple[Tokens, Array, LayerView]:
    """A prompt through a layer, of which a gradient keeps what `LlamaConfig.remat` says."""
    if layer.config.remat == "none":
        return layer(tokens, *others)
    policy = _KEEPING[layer.config.remat]
    again: Any = nn.remat(lambda layer, tokens: layer(tokens, *others), policy=policy)
    found: tuple[Tokens, Array, LayerView] = again(layer, tokens)
    return found


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
            self.lm_head = plain_dense(c, c.vocab_size, False)

    def __call__(self, token_ids: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        """Text alone -> float32 logits."""
        return self.logits(self.prefill(text_tokens(self.embed(token_ids)), new_slots=0).tokens.x)

    def embed(self, token_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Token ids as hidden states."""
        return self.embed_tokens(token_ids)

    def logits(self, x: Float[Array, "*any D"]) -> Float[Array, "*any V"]:
        """Hidden states, not yet normed -> float32 logits."""
        x = self.norm(x)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x).astype(jnp.float32)
        table = self.embed_tokens.embedding
        return dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ()))).astype(jnp.float32)

    def prefill(
        self,
        tokens: Tokens,
        *,
        new_slots: int,
        mask: Bool[Array, "#B S S"] | None = None,
        schedule: Schedule = NO_CUTS,
        counts: Any = None,
    ) -> Prefilled:
        """A whole prompt through all layers, dropping tokens as a schedule says.

        Args:
            tokens: the embedded prompt.
            new_slots: room in the caches for tokens to be generated.
            mask: instead of the causal one, for packed training rows without a schedule.
            schedule: where and how tokens are dropped.
            counts: int32 `[L, B]`, candidates left after each layer; for a schedule.
        """
        entered, length = tokens, _next_position(tokens)
        inv_freq = rope_frequencies(self.config, length)
        caches, records = [], []
        for l, layer in enumerate(self.layers):
            watch = schedule.watch(l, tokens)
            angles = rope.angles(tokens.positions, inv_freq, self.config.rope_sections)
            told: dict[str, Any] = {
                "layer": l,
                "final_norm": self.norm,
                "angles": angles,
                "entered": entered,
                "text_slots": schedule.query_slots,
            }
            cut = functools.partial(_cut_within, schedule, counts, told)
            before = tokens
            tokens, v, view = through(layer, tokens, angles, mask, watch, cut)
            shift = length - _next_position(before) if schedule.renumber else None
            caches.append(_new_cache(view.k, v, before.valid, new_slots, shift))
            if l in schedule.layers:
                after = view._replace(**told, output=tokens.x)
                tokens, _ = schedule.apply(BETWEEN_LAYERS, l, tokens, (), after, counts)
                records.append(schedule.record(tokens, after))
        return Prefilled(tokens, tuple(caches), tuple(records))

    def decode(
        self,
        token_ids: Int[Array, " B"],
        positions: Int[Array, " B"],
        caches: tuple[LayerCache, ...],
        slot: Int[Array, ""],
        seen: Bool[Array, "B M"],
    ) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...]]:
        """One generated token a row through all layers.

        Args:
            token_ids: int32.
            positions: int32, where the tokens go.
            caches: one a layer.
            slot: of the generated tokens, in which all rows' are put.
            seen: which of the slots before each row's token sees; itself it sees anyway.

        Returns:
            float32 logits for the next token, and the caches.
        """
        x = self.embed(token_ids[:, None])
        inv_freq = rope_frequencies(self.config, positions + 1)
        new = []
        for layer, cache in zip(self.layers, caches, strict=True):
            # Generated text is at the same position on every axis.
            own = positions if cache.shift is None else positions - cache.shift
            angles = rope.angles(own[:, None], inv_freq)
            heads, token = layer.attend_cached(x, angles, cache, seen)
            new.append(token)
            x = layer.feed_forward(x, heads)
        # The caches take the tokens in when all layers are done: as long as a TPU has a cache in
        # its own memory, to be read, it would write there and then copy all of it back.
        pairs = zip(caches, new, strict=True)
        return self.logits(x[:, 0]), tuple(_with_token(cache, *kv, slot) for cache, kv in pairs)


def text_tokens(x: Float[Array, "B S D"]) -> Tokens:
    """Embedded text without padding, for a decoder on its own."""
    slots = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return Tokens(x, slots, jnp.ones(x.shape[:2], bool), jnp.zeros_like(slots), slots)


def _cut_within(
    schedule: Schedule,
    counts: Any,
    told: dict[str, Any],
    tokens: Tokens,
    heads: Float[Array, "B S Hd"],
    view: LayerView,
) -> tuple[Tokens, Array]:
    """What a schedule leaves of a layer's tokens and their heads; `told` is for its ranker."""
    seen = view._replace(**told)
    return schedule.apply(AFTER_ATTENTION, told["layer"], tokens, heads, seen, counts)


def _next_position(tokens: Tokens) -> Int[Array, " B"]:
    """The position after a row's last one."""
    positions = tokens.positions
    if positions.ndim == 3:
        positions = positions.max(axis=0)
    return jnp.max(jnp.where(tokens.valid, positions, -1), axis=-1) + 1


def _with_token(
    cache: LayerCache, k: Float[Array, "..."], v: Float[Array, "..."], slot: Int[Array, ""]
) -> LayerCache:
    """The cache with a token more in every row, all in one slot."""

    def put(cached: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, cached.ndim - 2)

    return cache._replace(new_k=put(cache.new_k, k), new_v=put(cache.new_v, v))


def _merge_heads(x: Float[Array, "B J S d"]) -> Float[Array, "*BJ S d"]:
    """Rows and key/value heads as one axis, but not on a mesh."""
    return x if on_mesh() else x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _new_cache(
    k: Float[Array, "B J S d"],
    v: Float[Array, "B J S d"],
    valid: Bool[Array, "B S"],
    new_slots: int,
    shift: Int[Array, " B"] | None,
) -> LayerCache:
    B, J, _, d = k.shape
    nothing = _merge_heads(jnp.zeros((B, J, new_slots, d), k.dtype))
    return LayerCache(_merge_heads(k), _merge_heads(v), valid, nothing, nothing, shift)
