"""AdamW (arXiv 1711.05101) with a warm-up and a cosine, as LLaVA's training runs it.

That is what Hugging Face's trainer does by default: b1 .9, b2 .999, eps 1e-8; matrices decay and
biases and norms do not; the rate rises linearly over ceil(warmup * updates) updates, of which the
first has a rate of 0, and then falls to 0 along half a cosine. Gradients are clipped by their norm
over everything that is trained.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxprune.train.settings import Settings
from jaxprune.train.trained import PROJECTOR, WHAT

B1, B2, EPS = 0.9, 0.999, 1e-8


def peaks(settings: Settings) -> dict[str, float]:
    """The highest learning rate of each part that is trained."""
    return {
        part: settings.projector_rate if part == PROJECTOR else settings.learning_rate
        for part in WHAT[settings.train]
    }


def share_of_peak(settings: Settings, updates: int, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The learning rate of an update, as a share of its peak; float32.

    Args:
        settings: of the run.
        updates: of the whole run.
        step: updates before this one.
    """
    rising = min(math.ceil(settings.warmup * updates), updates - 1)  # one update alone learns too
    up = jnp.asarray(step, jnp.float32) / max(rising, 1)
    done = (step - rising) / max(updates - rising, 1)
    return jnp.where(step < rising, up, 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0))))


def make_optimiser(settings: Settings, updates: int) -> optax.GradientTransformation:
    """The optimiser of a run of so many updates."""
    rates = peaks(settings)

    def by_part(changes: Any, _params: Any) -> Any:
        return {
            part: jax.tree.map(lambda x, rate=rates[part]: rate * x, own)
            for part, own in changes.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity(),
        optax.scale_by_adam(B1, B2, EPS),
        optax.add_decayed_weights(
            settings.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        ),
        optax.stateless(by_part),
        optax.scale_by_learning_rate(lambda step: share_of_peak(settings, updates, step)),
    )
