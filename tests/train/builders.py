"""Models, batches and runs that the tests of training share."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
from jaxprune.train.settings import Settings
from tests.cases import picture

FEW = jaxprune.Buckets(batch=(1, 2, 4), images=(1, 2, 4), row_images=(1,), text=(32,))
QUESTIONS = ("What?", "Where is the red circle?", "a b c", "Is it?")
ANSWERS = ("no", "it is", "left", "I see")


def batch_of(model, numbers=(0, 1), *, answers=ANSWERS, **options):
    """The rows of so many numbers: a picture, a question and an answer each."""
    return jaxprune.batch(
        model,
        [picture(i) for i in numbers],
        [QUESTIONS[i] for i in numbers],
        answers=[answers[i] for i in numbers],
        buckets=FEW,
        **options,
    )


def settings_of(**fields):
    """A run with rates that leave a trace, without dropout."""
    own = {"rank": 4, "alpha": 6.0, "dropout": 0.0, "warmup": 0.0}
    rates = {"learning_rate": 1e-2, "projector_rate": 1e-3}
    return Settings(**{**own, **rates, **fields})


def random_adapters(adapters, seed=0):
    """Adapters of such shapes whose two factors both do something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapters)
