"""LLaVA-1.5 as pure functions over a nested dict of arrays, one method a stage.

    pixel_values --encode--> features, signals --(pruning)--> visual tokens
    visual tokens + token ids --embed--> Tokens --prefill--> logits, caches --decode--> ...

`params` has the keys "vision_tower", "multi_modal_projector" and "language_model".
Nothing here is jitted: the engine puts one `jax.jit` around each stage.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.models.activations import ACTIVATIONS
from jaxprune.models.clip.modeling import ClipVisionTower
from jaxprune.models.family import Arrays, Embedded, LayerCache, Prefilled
from jaxprune.models.llama.modeling import LlamaDecoder
from jaxprune.models.llava.config import LlavaConfig
from jaxprune.ops.cuts import CONTEXT, NO_CUTS, Schedule, Tokens
from jaxprune.ops.tiles import CLS
from jaxprune.ops.visual import Selection, Signal, VisionOutput

PROJECTED = Signal("projected")


class Projector(nn.Module):
    """Two linear layers from the tower's width to the decoder's."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*any C"]) -> Float[Array, "*any D"]:
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


class LlavaStages:
    """The stages of a LLaVA with a CLIP tower and a LLaMA decoder; see `models.family.Family`."""

    def encode(
        self,
        params: Arrays,
        config: LlavaConfig,
        pixel_values: Float[Array, "F H W 3"],
        signals: frozenset[Signal] = frozenset(),
    ) -> VisionOutput:
        """Pixels of tiles -> features and the signals asked for."""
        vision: Any = ClipVisionTower(config.vision_config).apply(
            {"params": params["vision_tower"]},
            pixel_values,
            feature_layers=config.feature_layers,
            keep_cls=config.keep_cls,
            signals=signals - {PROJECTED},
            method="encode",
        )
        features, cls, found = vision
        if PROJECTED in signals:
            found = {**found, PROJECTED: self.project(params, config, features)}
        return VisionOutput(features, cls, found)

    def project(
        self, params: Arrays, config: LlavaConfig, features: Float[Array, "*any C"]
    ) -> Float[Array, "*any D"]:
        """Features -> the decoder's width."""
        projector = {"params": params["multi_modal_projector"]}
        visual: Any = Projector(config).apply(projector, features)
        projected: Array = visual
        return projected

    def visual_embeddings(
        self, params: Arrays, config: LlavaConfig, selection: Selection
    ) -> Float[Array, "I K D"]:
        """The selected visual tokens as the decoder takes them."""
        return self.project(params, config, selection.tokens)

    def embed_text(
        self, params: Arrays, config: LlavaConfig, token_ids: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """Token ids -> the decoder's embeddings."""
        x: Array = _decoder(params, config, token_ids, method="embed")
        return x

    def embed(
        self,
        params: Arrays,
        config: LlavaConfig,
        layout: Embedded,
        selection: Selection | None,
    ) -> Tokens:
        """Text embeddings with the visual ones laid in where the images stand."""
        token_ids, index, kind, positions, lengths = map(jnp.asarray, layout)
        x = self.embed_text(params, config, token_ids)
        if selection is not None:
            is_visual, at = index >= 0, jnp.maximum(index, 0)
            visual = self.visual_embeddings(params, config, selection)
            every = visual.reshape(-1, visual.shape[-1])  # [I * K, D]
            x = jnp.where(is_visual[..., None], jnp.take(every, at, axis=0, mode="clip"), x)
            axes = selection.positions.shape[:-2]
            within = jnp.take(selection.positions.reshape(*axes, -1), at, axis=-1, mode="clip")
            positions = positions + jnp.where(is_visual, within, 0)
            patch = jnp.take(selection.indices.reshape(-1), at, mode="clip")
            kind = jnp.where(is_visual & (patch <= CLS), CONTEXT, kind)
        slots = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return Tokens(x, positions, slots < lengths[:, None], kind, slots)

    def prefill(
        self,
        params: Arrays,
        config: LlavaConfig,
        tokens: Tokens,
        *,
        new_slots: int,
        schedule: Schedule = NO_CUTS,
        counts: Any = None,
    ) -> Prefilled:
        """The prompt through all layers; see `LlamaDecoder.prefill`."""
        options = {"new_slots": new_slots, "schedule": schedule, "counts": counts}
        prefilled: Prefilled = _decoder(params, config, tokens, method="prefill", **options)
        return prefilled

    def logits(
        self, params: Arrays, config: LlavaConfig, hidden_states: Float[Array, "*any D"]
    ) -> Float[Array, "*any V"]:
        """Hidden states of the last layer -> float32 logits."""
        found: Array = _decoder(params, config, hidden_states, method="logits")
        return found

    def decode(
        self,
        params: Arrays,
        config: LlavaConfig,
        token_ids: Int[Array, " B"],
        positions: Int[Array, " B"],
        caches: tuple[LayerCache, ...],
        step: Int[Array, " B"],
        active: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...]]:
        """One generated token a row; see `LlamaDecoder.decode`."""
        found: tuple[Array, tuple[LayerCache, ...]] = _decoder(
            params, config, token_ids, positions, caches, step, active, method="decode"
        )
        return found

    def init_params(self, config: LlavaConfig, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""
        vision, projector, text = jax.random.split(key, 3)
        size = config.vision_config.image_size
        width = config.vision_config.hidden_size * len(config.feature_layers)
        parts = {
            "vision_tower": ClipVisionTower(config.vision_config).init(
                vision, jnp.zeros((1, size, size, 3))
            ),
            "multi_modal_projector": Projector(config).init(projector, jnp.zeros((1, width))),
            "language_model": LlamaDecoder(config.text_config).init(
                text, jnp.zeros((1, 1), jnp.int32)
            ),
        }
        return {name: part["params"] for name, part in parts.items()}

    def param_shapes(self, config: LlavaConfig) -> Arrays:
        """The parameters' shapes and dtypes, without any memory."""
        shapes: Arrays = jax.eval_shape(lambda: self.init_params(config, jax.random.key(0)))
        return shapes


def _decoder(params: Arrays, config: LlavaConfig, *args: Any, **kwargs: Any) -> Any:
    decoder = LlamaDecoder(config.text_config)
    return decoder.apply({"params": params["language_model"]}, *args, **kwargs)
