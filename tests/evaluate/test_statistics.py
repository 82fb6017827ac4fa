"""Intervals against what is known of them."""

import importlib

import numpy as np
import pytest

from jaxprune.evaluate.statistics import mean_interval, paired_difference


def test_an_interval_is_as_wide_as_the_normal_one(rng):
    values = rng.random(400) < 0.7
    found = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert found.mean == values.mean()
    np.testing.assert_allclose(found[1:], values.mean() + np.array([-half, half]), atol=0.004)


def test_draws_are_those_of_a_plain_loop(rng):
    values, groups = rng.random(7), np.array(["b", "a", "b", "c", "c", "c", "a"])
    found = mean_interval(values, groups, seed=3, resamples=50)
    names, draws, means = np.unique(groups), np.random.default_rng(3), []
    for row in draws.integers(3, size=(50, 3)):
        means.append(np.concatenate([values[groups == names[i]] for i in row]).mean())
    np.testing.assert_allclose(found[1:], np.quantile(means, [0.025, 0.975]))


def test_questions_that_fail_together_widen_the_interval(rng):
    images = rng.random(50) < 0.5
    values, groups = np.repeat(images, 6), np.repeat(np.arange(50), 6)
    alone, together = mean_interval(values), mean_interval(values, groups)
    assert together.high - together.low == pytest.approx(6**0.5 * (alone.high - alone.low), rel=0.1)


def test_memory_is_bounded_and_draws_stay_the_same(rng, monkeypatch):
    values = rng.random(30)
    whole = mean_interval(values, resamples=100)
    module = importlib.import_module("jaxprune.evaluate.statistics")
    monkeypatch.setattr(module, "_DRAWN_AT_ONCE", 70)
    assert mean_interval(values, resamples=100) == whole


def test_a_difference_is_paired(rng):
    before = (rng.random(300) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:12]] = 1  # a few are better, none is worse
    found = paired_difference(before, after)
    assert found.mean == pytest.approx(0.04)
    assert found.significant and 0 < found.low < 0.04 < found.high < 0.08
    # Unpaired, the two means could not be told apart.
    assert mean_interval(before).high > mean_interval(after).low
    back = paired_difference(after, before)
    assert back.significant and back.high < 0


def test_the_same_answers_differ_by_nothing(rng):
    scores = rng.random(20)
    assert paired_difference(scores, scores) == (0, 0, 0, False)


def test_a_few_samples_prove_nothing():
    assert not paired_difference(np.zeros(5), np.ones(5)).significant
    assert paired_difference(np.zeros(6), np.ones(6)).significant
    # Nor do many about one image.
    assert not paired_difference(np.zeros(60), np.ones(60), np.repeat(np.arange(5), 12)).significant
