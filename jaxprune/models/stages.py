"""The stages that a family with a decoder of LLaMA's making has, whatever its vision tower is.

    pixel_values --encode--> features, signals --(pruning)--> visual tokens
    visual tokens + token ids --embed--> Tokens --prefill--> logits, caches --decode--> ...

A family adds `encode`, `project` and `init_params`. Its `params` have a key "language_model".
Nothing here is jitted: the engine puts one `jax.jit` around each stage.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.models.family import Arrays, Embedded, LayerCache, Prefilled
from jaxprune.models.llama.modeling import LlamaDecoder
from jaxprune.ops.cuts import CONTEXT, NO_CUTS, Schedule, Tokens
from jaxprune.ops.tiles import CLS
from jaxprune.ops.visual import PROJECTED, Selection, Signal, VisionOutput


class DecoderStages:
    """From visual tokens to answers; see `models.family.Family`."""

    def project(
        self, params: Arrays, config: Any, features: Float[Array, "*any C"]
    ) -> Float[Array, "*any D"]:
        """Features -> the decoder's width."""
        raise NotImplementedError

    def init_params(self, config: Any, key: Array) -> Arrays:
        """Random parameters, for training from scratch and for tests."""
        raise NotImplementedError

    def with_projected(
        self, params: Arrays, config: Any, vision: VisionOutput, signals: frozenset[Signal]
    ) -> VisionOutput:
        """What a tower gives, and what the projector makes of it where that is asked for."""
        if PROJECTED not in signals:
            return vision
        projected = self.project(params, config, vision.features)
        return vision._replace(signals={**vision.signals, PROJECTED: projected})

    def visual_embeddings(
        self, params: Arrays, config: Any, selection: Selection
    ) -> Float[Array, "I K D"]:
        """The selected visual tokens as the decoder takes them."""
        return self.project(params, config, selection.tokens)

    def embed_text(
        self, params: Arrays, config: Any, token_ids: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """Token ids -> the decoder's embeddings."""
        x: Array = _decoder(params, config, token_ids, method="embed")
        return x

    def embed(
        self,
        params: Arrays,
        config: Any,
        layout: Embedded,
        selection: Selection | None,
    ) -> Tokens:
        """Text embeddings with the visual ones laid in where the images stand."""
        token_ids, index, kind, positions, lengths = map(jnp.asarray, layout)
        x = self.embed_text(params, config, token_ids)
        cell = jnp.full((2, *kind.shape), -1, jnp.int32)
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
            place = patch % config.tower.tokens_per_tile
            cells = jnp.stack(jnp.divmod(place, config.tower.grid[1]))
            cell = jnp.where(is_visual & (patch >= 0), cells, -1).astype(jnp.int32)
        slots = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return Tokens(x, positions, slots < lengths[:, None], kind, slots, cell)

    def prefill(
        self,
        params: Arrays,
        config: Any,
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
        self, params: Arrays, config: Any, hidden_states: Float[Array, "*any D"]
    ) -> Float[Array, "*any V"]:
        """Hidden states of the last layer -> float32 logits."""
        found: Array = _decoder(params, config, hidden_states, method="logits")
        return found

    def decode(
        self,
        params: Arrays,
        config: Any,
        token_ids: Int[Array, " B"],
        positions: Int[Array, " B"],
        caches: tuple[LayerCache, ...],
        slot: Int[Array, ""],
        seen: Bool[Array, "B M"],
    ) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...]]:
        """One generated token a row; see `LlamaDecoder.decode`."""
        found: tuple[Array, tuple[LayerCache, ...]] = _decoder(
            params, config, token_ids, positions, caches, slot, seen, method="decode"
        )
        return found

    def param_shapes(self, config: Any) -> Arrays:
        """The parameters' shapes and dtypes, without any memory."""
        shapes: Arrays = jax.eval_shape(lambda: self.init_params(config, jax.random.key(0)))
        return shapes


def init_decoder(config: Any, key: Array) -> Arrays:
    """Random parameters of the decoder."""
    ids = jnp.zeros((1, 1), jnp.int32)
    params: Arrays = LlamaDecoder(config.text_config).init(key, ids)["params"]
    return params


def _decoder(params: Arrays, config: Any, *args: Any, **kwargs: Any) -> Any:
    decoder = LlamaDecoder(config.text_config)
    return decoder.apply({"params": params["language_model"]}, *args, **kwargs)
