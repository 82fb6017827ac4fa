"""SparseVLM against the plain decoder, and its published counts."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.engine.answer import answers_of
from jaxprune.methods.sparsevlm import BUDGETS, cluster_means, raters, squared_distances
from jaxprune.ops.cuts import CONTEXT, LAST, LAST_VISUAL, QUESTION, VISUAL, Tokens
from tests.builders import start
from tests.cases import picture
from tests.methods.comparing import DEPTH, SEVEN_B, N, compare


def clusters(x, number):
    """New tokens of the pool `x` `[n, D]`, which is by falling score."""
    n, D = x.shape
    distance = np.array([[np.linalg.norm(a - b) for b in x] for a in x]) / np.sqrt(D)
    sparsity = [np.mean(np.sort(row**2)[:number]) for row in distance]
    peaks = []
    for i in range(n):
        denser = [
            distance[i, j]
            for j in range(n)
            if sparsity[j] < sparsity[i] or (sparsity[j] == sparsity[i] and j < i)
        ]
        peaks.append(np.exp(-sparsity[i]) * (min(denser) if denser else distance.max()))
    centres = sorted(range(n), key=lambda i: (-peaks[i], i))[:number]
    members = {centre: [centre] for centre in centres}
    for i in set(range(n)) - set(centres):
        members[min(centres, key=lambda c: (distance[i, c], centres.index(c)))].append(i)
    return np.stack([x[members[c]].sum(0) / (len(members[c]) + 1e-6) for c in centres])


def sparsevlm(numbers, layers, *, plus=False, theta=1e4):
    noted = {}

    def delete(l, place, weights, visual, question, seen):
        if l == 0 and place == "after_attention":
            like = seen.before[visual] @ seen.before[question].T
            grown = np.exp(like - like.max(1, keepdims=True))
            looks = (grown / grown.sum(1, keepdims=True)).mean(0)
            noted.update(rates=looks > looks.mean(), number=visual.sum())
        if place != "between_layers" or l + 1 not in layers:
            return np.array([], int)
        where, asks = np.nonzero(visual)[0], np.nonzero(question)[0][noted["rates"]]
        wanted = int(np.floor(numbers[layers.index(l + 1)] * noted["number"] / 576 + 0.5))
        keep = min(max(1, wanted), len(where))
        given = weights[:, asks][:, :, where]  # [H, raters, n]
        if plus:
            d = seen.k.shape[-1]
            inv_freq = theta ** (-np.arange(0, d, 2) / d)
            for i, t in enumerate(asks):
                for j, v in enumerate(where):
                    away = seen.positions[t] - seen.positions[v]
                    given[:, i, j] /= 2 / np.sqrt(d) * np.cos(away * inv_freq).sum()
            heads = np.argsort(-given.sum(axis=(1, 2)), kind="stable")[: len(given) // 2]
            given = given[heads]
        order = where[np.argsort(-given.mean(0).mean(0), kind="stable")]
        gone = order[keep:]
        if plus or not len(gone):
            return gone
        pool = gone[: int(0.3 * len(gone)) + 1]
        return gone, clusters(seen.after[pool], int(len(pool) / 10) + 1)

    return delete


CASES = [
    ({}, (380, 150), (1, 3)),
    ({}, (60, 40, 9), (1, 2, 3)),
    ({"positions": "renumber"}, (100, 40), (1, 2)),
    ({"version": "plus"}, (380, 150), (1, 3)),
]


@pytest.mark.parametrize("options, numbers, layers", CASES)
def test_it_equals_the_plain_decoder(model, options, numbers, layers):
    method = jaxprune.SparseVLM(keep_tokens=numbers, cut_layers=layers, **options)
    compare(model, method, sparsevlm(numbers, layers, plus="version" in options))


@pytest.mark.parametrize(
    "budget, left, made, mean",
    [
        (192, (300, 200, 110), (9, 4, 3), 206.5),
        (128, (303, 110, 36), (9, 7, 3), 145.4),
        (96, (238, 48, 26), (11, 7, 1), 114.1),
        (64, (66, 30, 17), (16, 2, 1), 82.3),
    ],
)
def test_it_keeps_and_recycles_the_published_numbers(budget, left, made, mean):
    kept = 576 - jaxprune.SparseVLM(budget=budget).removed(576, SEVEN_B)
    assert [kept[1], *kept[[2, 6, 15]]] == [576, *np.add(left, made)]
    assert np.append(576, kept[:-1]).mean() == pytest.approx(mean, abs=0.0501)


@pytest.mark.parametrize("budget, mean", [(192, 206.8), (128, 144.1), (96, 113.9), (64, 81.8)])
def test_plus_keeps_the_published_numbers(budget, mean):
    method = jaxprune.SparseVLM(budget=budget, version="plus")
    kept = 576 - method.removed(576, SEVEN_B)
    assert tuple(kept[[2, 6, 15]]) == BUDGETS["plus"][budget]
    assert np.append(576, kept[:-1]).mean() == pytest.approx(mean, abs=0.0501)


def test_few_tokens(model):
    """One stays of however few; where no more than that have come, nothing changes."""
    method = jaxprune.SparseVLM(keep_tokens=(17,), cut_layers=(1,))
    assert [n - method.removed(n, DEPTH)[-1] for n in (0, 1, 2, 10)] == [0, 1, 2, 2]
    plain = start(model, picture(4), "What?")
    whole = jaxprune.SparseVLM(keep_tokens=(576, 576), cut_layers=(1, 2))
    for gather in (True, False):
        kept = start(model, picture(4), "What?", method=whole, gather=gather)
        chex.assert_trees_all_close(kept.first_logits, plain.first_logits, atol=1e-5)


@pytest.mark.parametrize("version", ["1.5", "plus"])
def test_a_prompt_that_ends_with_its_image(model, version):
    """Its last token, a visual one, rates and stays, in the place of one that would be kept."""
    method = jaxprune.SparseVLM(keep_tokens=(90,), cut_layers=(2,), version=version)
    for gather in (True, False):
        run = start(model, picture(4), "What is this? <image>", method=method, chat=False,
                    gather=gather)  # fmt: skip
        kept = answers_of(run)[0].kept_by_layer[1][0].tolist()
        assert len(kept) == (12 if version == "1.5" else 10)
        assert (N - 1) in kept and kept.count(-1) == (2 if version == "1.5" else 0)


def test_new_tokens_stand_behind_the_last_of_several_images(model):
    method = jaxprune.SparseVLM(keep_tokens=(200,), cut_layers=(1,))
    for gather in (True, False):
        run = start(model, [[picture(1), picture(2)]], ["<image> then <image> which?"],
                    method=method, chat=False, gather=gather)  # fmt: skip
        (slots, valid), *_ = run.survivors
        left = np.asarray(slots[0])[np.asarray(valid[0])].tolist()
        made = [i for i, slot in enumerate(left) if slot < 0]
        kind = run.prompt.layout.embedded.kind[0]
        assert len(made) == 3 and made == list(range(made[0], made[0] + 3))
        assert kind[left[made[0] - 1]] == VISUAL and kind[left[made[-1] + 1]] == QUESTION
        assert [slot for slot in left if slot >= 0] == sorted(slot for slot in left if slot >= 0)
        first, second = answers_of(run)[0].kept_by_layer[0]
        assert second.tolist()[-3:] == [-1] * 3 and -1 not in first


def tokens_of(kinds, x):
    kind = jnp.array([kinds])
    slots = jnp.arange(len(kinds))[None]
    return Tokens(jnp.asarray(x)[None], slots, kind >= 0, kind, slots)


def test_who_rates():
    v, t = CONTEXT, QUESTION
    x = np.array([[9.0, 0], [1, 0], [1, 0], [0, 3], [2, 0], [0, 1]])
    found = raters(tokens_of([v, VISUAL, VISUAL, t, t, LAST], x), rows=4)
    assert np.nonzero(found[0])[0].tolist() == [4]
    alike = raters(tokens_of([v, VISUAL, VISUAL, t, t, LAST], 0 * x), rows=4)
    assert np.nonzero(alike[0])[0].tolist() == [3, 4, 5]
    silent = raters(tokens_of([v, v, v, VISUAL, VISUAL, LAST_VISUAL], x), rows=4)
    assert np.nonzero(silent[0])[0].tolist() == [5]


def test_distances_of_what_has_much_in_common(rng):
    """As hidden states have, in a few large channels: little is lost, and nobody is lopsided."""
    x = rng.normal(size=(2, 12, 64)) + 500 * (np.arange(64) < 2)
    here = np.arange(12) < np.array([[12], [7]])
    found = np.asarray(squared_distances(jnp.asarray(x, jnp.float32), jnp.asarray(here)))
    x = np.float32(x).astype(float)
    expected = ((x[:, :, None] - x[:, None]) ** 2).sum(-1)
    for own, exact, n in zip(found, expected, (12, 7), strict=True):
        np.testing.assert_allclose(own[:n, :n], exact[:n, :n], rtol=1e-5)
        np.testing.assert_array_equal(own, own.T)
        assert not own.diagonal().any()


@pytest.mark.parametrize("seed", range(4))
def test_clusters_in_padding_are_those_alone(seed):
    """With two clusters nearest neighbours tie in density; one row repeats a token."""
    rng = np.random.default_rng(seed)
    sizes, x = [19, 1, 12, 20], rng.normal(size=(4, 20, 6))
    x[3, 1:4] = x[3, 0]
    numbers = [n // 10 + 1 for n in sizes]
    found = cluster_means(jnp.asarray(x, jnp.float32), jnp.array(sizes), jnp.array(numbers), 3)
    for row, own, size, number in zip(found, x, sizes, numbers, strict=True):
        expected = clusters(np.float32(own[:size]).astype(float), number)
        chex.assert_trees_all_close(np.asarray(row[:number]), np.float32(expected), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "either budget, e.g. budget=128, or keep_tokens"),
        ({"budget": 100}, "budget is 100; expected one of: 192, 128, 96, 64; the nearest is 96"),
        ({"budget": 64, "version": "2"}, "version is '2'; expected one of: 1.5, plus"),
        ({"keep_tokens": (5,)}, "expected a number for each of the layers"),
        ({"keep_tokens": (5, 0, 0)}, "keep_tokens is 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(jaxprune.UserError, match=message):
        jaxprune.methods.resolve("sparsevlm", SEVEN_B, **options)
