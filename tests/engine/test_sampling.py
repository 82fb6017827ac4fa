import jax.numpy as jnp
import numpy as np

from jaxprune.engine.sampling import Ask, likeliest, make_sampling, next_token


def shares(logits, draws=4000, **options):
    """How often each token is drawn."""
    asks = Ask(**{"temperature": 1.0, **options}).of_rows(list(range(draws)), draws)
    sampling = make_sampling(asks, batch=draws, vocab_size=len(logits))
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    tokens = np.asarray(next_token(rows, sampling, jnp.zeros(draws, jnp.int32)))
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
    """In a batch whose other rows draw, too."""
    logits = jnp.tile(jnp.asarray([[1.0, 2.0, 2.0]]), (2, 1))
    for other in (Ask(), Ask(temperature=1.0)):
        sampling = make_sampling([Ask(), other], batch=2, vocab_size=3)
        assert next_token(logits, sampling, jnp.zeros(2, jnp.int32)).tolist()[0] == 1
    assert likeliest(logits).tolist() == [1, 1]


def test_rows_of_a_batch_draw_by_their_own_options():
    asks = [
        Ask(temperature=1.0, top_k=1),
        Ask(),
        *(Ask(temperature=1.0, seed=i) for i in range(50)),
    ]
    sampling = make_sampling(asks, batch=len(asks), vocab_size=4)
    logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (len(asks), 1))
    tokens = next_token(logits, sampling, jnp.zeros(len(asks), jnp.int32)).tolist()
    assert tokens[:2] == [1, 1]
    assert set(tokens[2:]) == {0, 1, 2, 3}
