"""LLaVA-1.5 as pure functions over a nested dict of arrays, one function a stage.

    pixel_values --encode_image--> features, signals --(pruning)--> visual tokens
    visual tokens --visual_embeddings--> [I, K, D]
    these + token ids --embed--> Tokens --prefill--> logits, caches --decode--> ...

`params` has the keys "vision_tower", "multi_modal_projector" and "language_model".
Nothing here is jitted: whoever composes the stages puts one `jax.jit` around each.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.clip.modeling import ClipVisionTower
from jaxprune.models.llama.modeling import LayerCache, LlamaDecoder, Prefilled, Tokens
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.ops.cuts import NO_CUTS, Schedule
from jaxprune.ops.visual import Selection, VisionOutput

Params = dict[str, Any]


class Projector(nn.Module):
    """Two linear layers from the tower's width to the decoder's."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def dense(name: str) -> nn.Dense:
            return nn.Dense(
                c.text_config.hidden_size,
                use_bias=c.multimodal_projector_bias,
                dtype=c.dtype,
                param_dtype=c.dtype,
                name=name,
            )

        return dense("linear_2")(ACTIVATIONS[c.projector_hidden_act](dense("linear_1")(x)))


def encode_image(
    params: Params,
    config: LlavaConfig,
    pixel_values: jax.Array,
    signals: frozenset[str] = frozenset(),
) -> VisionOutput:
    """Pixels `[I, H, W, 3]` -> features `[I, N, C]` and the signals asked for."""
    vision: Any = ClipVisionTower(config.vision_config).apply(
        {"params": params["vision_tower"]},
        pixel_values,
        feature_layers=config.feature_layers,
        keep_cls=config.keep_cls,
        signals=signals,
        method="encode",
    )
    return vision


def project(params: Params, config: LlavaConfig, features: jax.Array) -> jax.Array:
    """Features `[..., C]` -> visual embeddings `[..., D]`."""
    visual: Any = Projector(config).apply({"params": params["multi_modal_projector"]}, features)
    return visual


def visual_embeddings(params: Params, config: LlavaConfig, selection: Selection) -> jax.Array:
    """The selected visual tokens as the decoder takes them: `[I, K, D]`."""
    return project(params, config, selection.tokens)


def embed(
    params: Params,
    config: LlavaConfig,
    token_ids: jax.Array,
    visual_index: jax.Array,
    kind: jax.Array,
    lengths: jax.Array,
    visual: jax.Array | None,
) -> Tokens:
    """Text embeddings with the visual ones laid in where the images stand.

    Args:
        token_ids: int32 `[B, S]`; what stands at a visual slot does not matter.
        visual_index: int32 `[B, S]`: which of the batch's `I * K` visual tokens a slot
            takes, or -1 for a text token.
        kind: int32 `[B, S]`, what a slot's token is to a schedule: see `ops.schedule`.
        lengths: int32 `[B]`: slots in use, from the left.
        visual: `[I, K, D]`, or None for a batch of text alone.

    Returns:
        Tokens of `[B, S, D]` with contiguous positions.
    """
    x = _decoder(params, config, token_ids, method="embed")
    if visual is not None:
        every = visual.reshape(-1, visual.shape[-1])  # [I * K, D]
        rows = jnp.take(every, jnp.maximum(visual_index, 0), axis=0, mode="clip")
        x = jnp.where((visual_index >= 0)[..., None], rows, x)
    slots = jnp.arange(token_ids.shape[1], dtype=jnp.int32)[None]
    valid = slots < lengths[:, None]
    positions = jnp.broadcast_to(slots, valid.shape)
    return Tokens(x=x, positions=positions, valid=valid, kind=kind)


def prefill(
    params: Params,
    config: LlavaConfig,
    tokens: Tokens,
    *,
    new_slots: int,
    schedule: Schedule = NO_CUTS,
    counts: Any = None,
) -> Prefilled:
    """The prompt through all layers; see `LlamaDecoder.prefill`."""
    options = {"new_slots": new_slots, "schedule": schedule, "counts": counts}
    prefilled: Any = _decoder(params, config, tokens, method="prefill", **options)
    return prefilled


def logits(params: Params, config: LlavaConfig, hidden_states: jax.Array) -> jax.Array:
    """Hidden states `[..., D]` of the last layer -> float32 logits `[..., vocabulary]`."""
    found: jax.Array = _decoder(params, config, hidden_states, method="logits")
    return found


def decode(
    params: Params,
    config: LlavaConfig,
    token_ids: jax.Array,
    positions: jax.Array,
    caches: tuple[LayerCache, ...],
    step: jax.Array,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """One generated token a row: float32 logits `[B, vocabulary]` and the caches."""
    return _decoder(params, config, token_ids, positions, caches, step, method="decode")


def _decoder(params: Params, config: LlavaConfig, *args: Any, **kwargs: Any) -> Any:
    decoder = LlamaDecoder(config.text_config)
    return decoder.apply({"params": params["language_model"]}, *args, **kwargs)


def init_params(config: LlavaConfig, key: jax.Array) -> Params:
    """Random parameters, for training from scratch and for tests."""
    vision, projector, text = jax.random.split(key, 3)
    size = config.vision_config.image_size
    width = config.vision_config.hidden_size * len(config.feature_layers)
    tower = ClipVisionTower(config.vision_config)
    decoder = LlamaDecoder(config.text_config)
    return {
        "vision_tower": tower.init(vision, jnp.zeros((1, size, size, 3)))["params"],
        "multi_modal_projector": Projector(config).init(projector, jnp.zeros((1, width)))["params"],
        "language_model": decoder.init(text, jnp.zeros((1, 1), jnp.int32))["params"],
    }


def param_shapes(config: LlavaConfig) -> Params:
    """The parameters' shapes and dtypes, without any memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
