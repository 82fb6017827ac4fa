import jax.numpy as jnp
import numpy as np

from jaxprune.engine.sampling import make_sampling, next_token


def shares(logits, draws=4000, **options):
    """How often each token is drawn."""
    defaults = {"temperature": 1.0, "top_k": None, "top_p": None}
    sampling = make_sampling(
        **{**defaults, **options}, seeds=list(range(draws)), vocab_size=len(logits)
    )
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    tokens = np.asarray(next_token(rows, sampling, jnp.asarray(0), greedy=False))
    return np.bincount(tokens, minlength=len(logits)) / draws


PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3])
LOGITS = np.log(PROBABILITIES)


def test_draws_follow_the_distribution():
    np.testing.assert_allclose(shares(LOGITS), PROBABILITIES, atol=0.03)
    hot = PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()
    np.testing.assert_allclose(shares(LOGITS, temperature=2.0), hot, atol=0.03)


def test_top_k_and_top_p_cut_the_tail():
    np.testing.assert_allclose(shares(LOGITS, top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    # .4 alone does not reach .5; .4 and .3 do.
    np.testing.assert_allclose(shares(LOGITS, top_p=0.5), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(shares(LOGITS, top_p=0.39), [0, 1, 0, 0])


def test_top_p_counts_what_top_k_left():
    # Of the two likeliest, .4 is 4/7 of the probability: enough for .5 alone.
    np.testing.assert_allclose(shares(LOGITS, top_k=2, top_p=0.5), [0, 1, 0, 0])


def test_greedy_takes_the_first_of_equals():
    sampling = make_sampling(temperature=0, top_k=None, top_p=None, seeds=[0], vocab_size=3)
    logits = jnp.asarray([[1.0, 2.0, 2.0]])
    assert next_token(logits, sampling, jnp.asarray(0), greedy=True).tolist() == [1]
