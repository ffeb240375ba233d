"""Scores and their intervals: against numpy, scipy and what an interval promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import matthews_corrcoef

from kronlab.evals.statistics import bootstrap_metric, mean_metric, ratio_metric, resampled_sums


def test_interval_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=300)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = mean_metric(values.tolist())["ci95"]
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.05 * width)  # 2,000 resamples: ends known to a few percent
    assert high == pytest.approx(expected.high, abs=0.05 * width)


def test_the_same_values_give_the_same_interval_and_order_does_not_matter_much() -> None:
    values = [0.0, 1.0] * 50
    assert mean_metric(values) == mean_metric(values)
    assert mean_metric([1.0] * 9)["ci95"] == [1.0, 1.0]


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = mean_metric((draw.random(100) < 0.3).astype(float).tolist())["ci95"]
        hits += low <= 0.3 <= high
    assert 176 <= hits <= 200  # 95 % of 200 is 190, standard deviation 3.1; the percentile interval is a little short


def test_any_statistic_of_pairs() -> None:
    draw = np.random.default_rng(0)
    gold = draw.integers(0, 2, 200)
    guess = np.where(draw.random(200) < 0.8, gold, 1 - gold)
    metric = bootstrap_metric(matthews_corrcoef, gold, guess)
    assert metric["value"] == pytest.approx(matthews_corrcoef(gold, guess))
    assert metric["ci95"][0] < metric["value"] < metric["ci95"][1]
    # pairs must stay together: shuffled apart there is no correlation
    assert metric["ci95"][0] > 0.3


def test_mean_as_a_general_statistic_is_the_mean() -> None:
    values = np.random.default_rng(5).normal(size=80)
    general, special = bootstrap_metric(np.mean, values), mean_metric(values.tolist())
    assert general["value"] == pytest.approx(special["value"])
    assert general["stderr"] == pytest.approx(special["stderr"], rel=0.1)
    assert general["ci95"] == pytest.approx(special["ci95"], abs=0.05)


def test_ratio_of_sums_moves_with_both() -> None:
    draw = np.random.default_rng(2)
    below = draw.integers(5, 50, 150).astype(float)
    above = 0.7 * below + draw.normal(size=150)
    metric = ratio_metric(above.tolist(), below.tolist())
    general = bootstrap_metric(lambda a, b: a.sum() / b.sum(), above, below)
    assert metric["value"] == pytest.approx(above.sum() / below.sum())
    assert metric["ci95"] == pytest.approx(general["ci95"], abs=5e-3)
    assert metric["stderr"] == pytest.approx(general["stderr"], rel=0.1)


def test_one_sample_has_an_interval_of_no_use_and_no_error() -> None:
    assert mean_metric([0.5])["stderr"] is None
    assert bootstrap_metric(np.mean, [0.5])["stderr"] is None


def test_a_statistic_that_most_resamples_do_not_have_gets_no_interval() -> None:
    metric = bootstrap_metric(lambda a: math.nan if a.sum() < 3 else 1.0, [1.0, 1.0, 1.0])
    assert metric["ci95"] == [1.0, 1.0]
    metric = bootstrap_metric(lambda a: 1.0 if set(a) == {0, 1, 2, 3} else math.nan, [0, 1, 2, 3])
    assert metric["ci95"] is None


def test_resampled_sums_are_of_n_rows_drawn_with_replacement() -> None:
    """One-hot rows: the sums are the counts, multinomial with mean 1 and variance 1 - 1/n."""
    counts = resampled_sums(np.eye(7), 20_000)
    assert counts.shape == (20_000, 7)
    assert (counts.sum(1) == 7).all()
    assert counts.mean(0) == pytest.approx(1, abs=0.03)
    assert counts.var(0) == pytest.approx(1 - 1 / 7, abs=0.04)
    covariance = np.cov(counts[:, 0], counts[:, 1])[0, 1]
    assert covariance == pytest.approx(-1 / 7, abs=0.03)
    # the draws go by length: two arrays drawn apart are as if drawn together
    values = np.random.default_rng(0).normal(size=(7, 2))
    together = resampled_sums(values, 100)
    assert np.allclose(np.hstack([resampled_sums(values[:, [i]], 100) for i in (0, 1)]), together)
    assert np.allclose(counts[:100] @ values, together)
