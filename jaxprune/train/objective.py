"""What training lowers: the cross-entropy of answers, by `forward` with pruning on."""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.engine.forward import Batch, hidden_states, logits
from jaxprune.inputs.request import NO_LABEL
from jaxprune.model import Params
from jaxprune.models.llama.config import with_remat
from jaxprune.ops.cuts import Tokens
from jaxprune.ops.ranking import nonzero_first
from jaxprune.train.lora import adapted
from jaxprune.train.settings import Settings
from jaxprune.train.trained import LORA, Trained, acting, whole


class Scored(NamedTuple):
    """How well a batch's answers are foretold, each token after what truly came before it.

    Attributes:
        loss: float32, the sum of the answers' tokens' cross-entropies, in nats.
        tokens: int32, how many these are.
        right: int32, answers of which every token is the likeliest.
        rows: int32, answers.
    """

    loss: Float[Array, ""]
    tokens: Int[Array, ""]
    right: Int[Array, ""]
    rows: Int[Array, ""]


def score(params: Params | Mapping[str, Any], batch: Batch) -> Scored:
    """The answers of a batch, scored; a pure function, differentiable in the parameters.

    Logits are made of the slots alone that have a label.

    Args:
        params, batch: as for `jaxprune.forward`.
    """
    tokens = hidden_states(params, batch).tokens
    labels = _labels_of(tokens, batch)  # [B, S']
    size = labels.shape[1] if batch.answer_slots is None else batch.answer_slots
    places = nonzero_first(labels != NO_LABEL, min(size, labels.shape[1]))  # [B, Q]
    labels = jnp.take_along_axis(labels, places, axis=1)
    hidden = jnp.take_along_axis(tokens.x, places[..., None], axis=1)
    found, used = logits(params, batch, hidden), labels != NO_LABEL  # [B, Q, V]
    label = jnp.maximum(labels, 0)[..., None]
    own = jnp.take_along_axis(found, label, axis=-1)[..., 0]
    loss = jnp.where(used, jax.nn.logsumexp(found, axis=-1) - own, 0.0)
    answered = used.any(axis=1)
    right = answered & jnp.all((found.argmax(axis=-1) == label[..., 0]) | ~used, axis=1)
    return Scored(
        loss.sum(),
        used.sum(dtype=jnp.int32),
        right.sum(dtype=jnp.int32),
        answered.sum(dtype=jnp.int32),
    )


def _labels_of(tokens: Tokens, batch: Batch) -> Int[Array, "B S"]:
    """The labels of what is left of a batch, by the slots that it had."""
    labels = jnp.take_along_axis(jnp.asarray(batch.labels), jnp.maximum(tokens.slot, 0), axis=1)
    return jnp.where(tokens.valid & (tokens.slot >= 0), labels, NO_LABEL)


def score_trained(
    trained: Trained, rest: Params, batch: Batch, settings: Settings, key: Array | None = None
) -> Scored:
    """`score` of a model and what is trained of it.

    Args:
        trained: see `trained`.
        rest: the other arrays, which get no gradient.
        batch: as for `score`.
        settings: of the run.
        key: of the adapters' dropout; None drops nothing.
    """
    adapters: AbstractContextManager[Any] = nullcontext()
    if LORA in trained:
        adapters = adapted(trained[LORA], acting(settings), key)
    with adapters:
        return score(whole(jax.lax.stop_gradient(rest), trained), batch)


def objective(
    trained: Trained, rest: Params, batch: Batch, settings: Settings, key: Array | None = None
) -> tuple[Float[Array, ""], Scored]:
    """The mean cross-entropy of a batch's answer tokens, float32, and what it is made of.

    Args:
        trained, rest, batch, settings, key: as for `score_trained`.
    """
    config = with_remat(batch.config, settings.remat)
    again = dataclasses.replace(batch, config=config)
    found = score_trained(trained, rest, again, settings, key)
    return found.loss / jnp.maximum(found.tokens, 1), found
