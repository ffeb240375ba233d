"""Paired differences: against slow plain references, and what an interval promises."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from kronlab.evals.statistics import pass_at_k
from kronlab.report.paired import (
    BY_BOTH,
    BY_SAMPLES,
    BY_SEEDS,
    Difference,
    baseline_of,
    difference,
    mean_difference,
    metric_values,
)
from kronlab.report.tables import RowResult


def record(
    metrics: dict[str, float],
    samples: dict[str, list[Any]],
    *,
    seed: int | None = 0,
    eval: str = "sums",
    sha: str = "s",
    task: str | None = "sums",
    status: str = "done",
) -> dict[str, Any]:
    n = len(next(iter(samples.values())))
    config = ({} if seed is None else {"seed": seed}) | ({} if task is None else {"task": {"name": task}})
    section = {
        "metrics": {name: {"value": value, "n": n, "stderr": 0.1} for name, value in metrics.items()},
        "samples": {"id": [f"i{i}" for i in range(n)]} | samples,
        "data_sha": sha,
    }
    return {"status": status, "config": config} | ({"eval": {eval: section}} if status == "done" else {})


def graded(correct: Sequence[int], **more: Any) -> dict[str, Any]:
    """A record of right and wrong answers; a second metric of which it keeps no samples."""
    share = float(np.mean(correct))
    return record({"exact_match": share, "exact_match_other": share / 2}, {"correct": list(map(int, correct))}, **more)


def losses(nll: Sequence[float], tokens: Sequence[int] | None = None, **more: Any) -> dict[str, Any]:
    tokens = [1] * len(nll) if tokens is None else tokens
    value = sum(nll) / sum(tokens)
    return record({"accuracy": 0.0, "nll_per_token": value}, {"nll": list(nll), "nll_tokens": list(tokens)}, **more)


def row(*records: dict[str, Any] | None, key: str = "ours", group: str = "") -> RowResult:
    return RowResult(key, key, records, group=group)


def found(*arguments: Any) -> Difference:
    made = difference(*arguments)
    assert made is not None
    return made


# ---- the interval ----


def test_one_seed_agrees_with_a_plain_bootstrap_over_samples() -> None:
    draw = np.random.default_rng(0)
    a, b = (draw.random((2, 150)) < [[0.6], [0.4]]).astype(int)
    made = found(row(graded(a)), row(graded(b)), "sums", "exact_match")
    plain = [(a[i] - b[i]).mean() for i in draw.integers(0, 150, (10_000, 150))]
    low, high = np.quantile(plain, [0.025, 0.975])
    assert (made.mean, made.seeds, made.how) == (pytest.approx(a.mean() - b.mean()), 1, BY_SAMPLES)
    assert made.low == pytest.approx(low, abs=0.01)  # one sample is 0.007
    assert made.high == pytest.approx(high, abs=0.01)
    assert made.excludes_zero


def test_several_seeds_agree_with_a_plain_bootstrap_of_the_formula() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.integers(1, 9, 40)
    ours, base = (draw.normal(1.0, 0.2, (3, 40)) * tokens + draw.normal(0, 0.2, (3, 1)) * tokens for _ in range(2))
    made = found(
        row(*(losses(x.tolist(), tokens.tolist(), seed=s) for s, x in enumerate(ours))),
        row(*(losses(x.tolist(), tokens.tolist(), seed=s) for s, x in enumerate(base))),
        "sums",
        "nll_per_token",
    )
    by_seed = [(x.sum() - y.sum()) / tokens.sum() for x, y in zip(ours, base, strict=True)]
    mean = statistics.fmean(by_seed)
    widened = (3 / 2) ** 0.5 * scipy.stats.t.ppf(0.975, 2) / scipy.stats.norm.ppf(0.975)
    plain = []
    for _ in range(4000):
        chosen = draw.integers(0, 40, 40)
        on_samples = [
            x[chosen].sum() / tokens[chosen].sum() - y[chosen].sum() / tokens[chosen].sum()
            for x, y in zip(ours, base, strict=True)
        ]
        of_seeds = [by_seed[s] - mean for s in draw.integers(0, 3, 3)]
        plain.append(statistics.fmean(on_samples) + widened * statistics.fmean(of_seeds))
    low, high = np.quantile(plain, [0.025, 0.975])
    assert (made.mean, made.seeds, made.how) == (pytest.approx(mean), 3, BY_BOTH)
    assert made.low == pytest.approx(low, abs=0.05 * (high - low))
    assert made.high == pytest.approx(high, abs=0.05 * (high - low))


def test_five_seeds_without_noise_of_samples_give_students_interval() -> None:
    deltas = [0.1, -0.2, 0.35, 0.0, 0.22]
    ours = row(*(losses([d] * 30, seed=s) for s, d in enumerate(deltas)))
    made = found(ours, row(*(losses([0.0] * 30, seed=s) for s in range(5))), "sums", "nll_per_token")
    exact = scipy.stats.ttest_1samp(deltas, 0).confidence_interval(0.95)
    assert (made.low, made.high) == pytest.approx((exact.low, exact.high), abs=0.1 * (exact.high - exact.low))


@pytest.mark.parametrize(("seeds", "of_seeds", "widest"), [(1, 0.0, 1.1), (2, 0.1, 6.0), (5, 0.1, 1.9), (5, 0.0, 2.0)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(seeds: int, of_seeds: float, widest: float) -> None:
    """d = 0.3 + seed + sample + noise; one seed cannot know of the others, so there is no spread of seeds then."""
    draw = np.random.default_rng(7)
    n, times, truth = 60, 100, 0.3
    spread = (of_seeds**2 / seeds + 0.5**2 / n + 0.5**2 / (n * seeds)) ** 0.5
    hits, widths = 0, []
    for _ in range(times):
        d = truth + draw.normal(0, of_seeds, (seeds, 1)) + draw.normal(0, 0.5, n) + draw.normal(0, 0.5, (seeds, n))
        shared = draw.normal(0, 3, n)  # hard for both: must not matter
        made = found(
            row(*(losses((shared + x).tolist(), seed=s) for s, x in enumerate(d))),
            row(*(losses(shared.tolist(), seed=s) for s in range(seeds))),
            "sums",
            "nll_per_token",
        )
        hits += made.low <= truth <= made.high
        widths.append((made.high - made.low) / (2 * 1.96 * spread))
    assert hits >= 0.9 * times  # at 95 % the standard deviation is 2.2 of 100
    assert statistics.median(widths) <= widest, "cover by being far too wide is no cover"


def test_a_difference_is_its_own_opposite_and_the_same_every_time() -> None:
    draw = np.random.default_rng(3)
    a, b = ([graded(draw.random(50) < 0.5, seed=s) for s in range(3)] for _ in range(2))
    there, back = found(row(*a), row(*b), "sums", "exact_match"), found(row(*b), row(*a), "sums", "exact_match")
    assert there.mean == pytest.approx(-back.mean)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.02)
    assert there == found(row(*a), row(*b), "sums", "exact_match")


@settings(max_examples=25, deadline=None)
@given(
    right=st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=3),
    nll=st.lists(st.floats(0, 50), min_size=6, max_size=6),
)
def test_identical_methods_do_not_differ(right: list[list[int]], nll: list[float]) -> None:
    ones = [graded(correct, seed=s) for s, correct in enumerate(right)]
    twos = [losses(nll, [3, 1, 4, 1, 5, 9], seed=s) for s in range(len(right))]
    for records, metric in ((ones, "exact_match"), (twos, "nll_per_token")):
        made = found(row(*records), row(*records), "sums", metric)
        assert (made.mean, made.low, made.high) == (0, 0, 0)
        assert not made.excludes_zero


# ---- metrics ----


def _two_classes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(5)
    gold = (draw.random(120) < 0.6).astype(int)
    return gold, *(np.where(draw.random(120) < p, gold, 1 - gold) for p in (0.85, 0.7))


@pytest.mark.parametrize(("metric", "function"), [("f1", f1_score), ("matthews_ranked", matthews_corrcoef)])
def test_metrics_of_a_whole_set_are_computed_again_on_each_resample(
    metric: str, function: Callable[..., float]
) -> None:
    gold, a, b = _two_classes()
    ours, base = (
        record({metric: function(gold, said)}, {"correct": (said == gold).tolist(), "predicted": said.tolist()})
        for said in (a, b)
    )
    made = found(row(ours), row(base), "sums", metric)
    draw = np.random.default_rng(6)
    plain = [function(gold[i], a[i]) - function(gold[i], b[i]) for i in draw.integers(0, 120, (600, 120))]
    low, high = np.quantile(plain, [0.025, 0.975])
    assert made.how == BY_SAMPLES
    assert made.mean == pytest.approx(function(gold, a) - function(gold, b))
    assert made.low == pytest.approx(low, abs=0.12 * (high - low))
    assert made.high == pytest.approx(high, abs=0.12 * (high - low))


def test_constant_predictions_have_f1_and_correlation_zero_as_in_the_library() -> None:
    gold, a, _ = _two_classes()
    never = np.zeros_like(gold)
    for metric, function in (("f1", f1_score), ("matthews", matthews_corrcoef)):
        ours, base = (
            record({metric: function(gold, p)}, {"correct": (p == gold).tolist(), "predicted": p.tolist()})
            for p in (a, never)
        )
        assert found(row(ours), row(base), "sums", metric).mean == pytest.approx(function(gold, a))


def test_pass_at_k_resamples_problems_and_not_their_samples() -> None:
    draw = np.random.default_rng(8)
    right = [(draw.random((60, 4)) < p).astype(int) for p in (0.5, 0.3)]
    scores = [np.array([pass_at_k(4, int(c.sum()), 2) for c in r]) for r in right]
    ours, base = (
        record(
            {"pass@2": float(s.mean())},
            {"id": [f"p{i}#{j}" for i in range(60) for j in range(4)], "correct": r.ravel().tolist()},
        )
        for r, s in zip(right, scores, strict=True)
    )
    made = found(row(ours), row(base), "sums", "pass@2")
    d = scores[0] - scores[1]
    low, high = np.quantile([d[i].mean() for i in draw.integers(0, 60, (4000, 60))], [0.025, 0.975])
    assert made.how == BY_SAMPLES
    assert (made.low, made.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_a_metric_without_samples_has_students_interval_over_seeds() -> None:
    ours, base = ([0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]), ([0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1])
    rows = [row(*(graded(c, seed=s) for s, c in enumerate(all_seeds))) for all_seeds in (ours, base)]
    made = found(*rows, "sums", "exact_match_other")
    deltas = [(np.mean(a) - np.mean(b)) / 2 for a, b in zip(ours, base, strict=True)]
    exact = scipy.stats.ttest_1samp(deltas, 0).confidence_interval(0.95)
    assert (made.low, made.high) == pytest.approx((exact.low, exact.high))
    assert made.how == BY_SEEDS
    single = [row(r.records[0]) for r in rows]
    assert difference(*single, "sums", "exact_match_other") is None, "neither samples nor seeds tell an interval"


def test_samples_that_do_not_give_the_recorded_value_are_not_used() -> None:
    """E.g. the headline of an eval whose samples were judged right or wrong by another rule."""
    ours, base = graded([1, 0, 1]), graded([0, 0, 1])
    ours["eval"]["sums"]["metrics"]["exact_match"]["value"] = 0.9
    assert difference(row(ours), row(base), "sums", "exact_match") is None
    three = [record({"f1": 0.5}, {"correct": [1, 0, 1], "predicted": p}) for p in ([0, 1, 2], [0, 1, 1])]
    assert difference(row(three[0]), row(three[1]), "sums", "f1") is None, "three classes: the right one is not known"


# ---- pairing ----


def test_only_equal_seeds_tasks_and_data_are_compared() -> None:
    one = graded([1, 0, 1, 1])
    for other in (
        graded([1, 1, 1, 0], seed=1),
        graded([1, 1, 1, 0], sha="t"),
        graded([1, 1, 1, 0], task="products"),
        graded([1, 1, 1, 0], eval="products"),
        graded([1, 1, 1, 0], status="diverged"),
        None,
    ):
        assert difference(row(one), row(other), "sums", "exact_match") is None
    assert difference(row(graded([1])), row(graded([0])), "sums", "exact_match") is None, "one sample has no spread"


def test_seeds_that_one_of_the_two_lacks_are_left_out() -> None:
    ours = row(graded([1, 1, 0, 1], seed=0), graded([0, 1, 0, 1], seed=1), None, graded([1, 1, 1, 1], seed=3))
    base = row(graded([0, 0, 0, 0], seed=3), graded([0, 1, 0, 0], seed=1), graded([0] * 4, seed=0, status="diverged"))
    made = found(ours, base, "sums", "exact_match")
    assert made.seeds == 2
    assert made.mean == pytest.approx(((0.5 - 0.25) + (1.0 - 0.0)) / 2)


def test_a_base_model_is_compared_with_every_seed() -> None:
    base = row(graded([1, 0, 0, 0], seed=None, task=None))
    others = row(graded([1, 1, 0, 0], seed=0), graded([1, 1, 1, 0], seed=1))
    made = found(base, others, "sums", "exact_match")
    assert (made.seeds, made.mean) == (2, pytest.approx(-0.375))
    assert found(others, base, "sums", "exact_match").mean == pytest.approx(0.375)


def test_the_mean_over_evals_is_taken_at_seeds_that_have_all_of_them() -> None:
    draw = np.random.default_rng(9)
    right = draw.random((2, 2, 3, 40)) < 0.5  # row, eval, seed, sample
    rows = [
        row(
            *(
                graded(right[r, e, s], eval=name, task=name, sha=name, seed=s)
                for e, name in enumerate("ab")
                for s in range(3)
                if (r, e, s) != (0, 1, 2)
            )
        )
        for r in range(2)
    ]
    made = mean_difference(*rows, [("a", "exact_match"), ("b", "exact_match")])
    assert made is not None
    assert made.seeds == 2
    assert made.mean == pytest.approx(float(right[0, :, :2].mean() - right[1, :, :2].mean()))
    alone = found(*rows, "a", "exact_match")
    assert alone.seeds == 3
    assert mean_difference(*rows, [("a", "exact_match"), ("c", "exact_match")]) is None


def test_measured_values_are_those_of_the_finished_records_that_have_them() -> None:
    records = [graded([1, 0], seed=4), None, graded([1, 0], status="failed"), graded([1, 1], eval="b"), graded([1, 1])]
    values = metric_values(row(*records), "sums", "exact_match")
    assert [(m.seed, m.value, m.stderr, m.n) for m in values] == [(4, 0.5, 0.1, 2), (0, 1.0, 0.1, 2)]
    assert [m.record for m in values] == [records[0], records[4]]
    assert metric_values(row(*records), "sums", "pass@1") == []


def test_the_baseline_is_that_of_the_group() -> None:
    rows = [row(key=f"{group}/{key}", group=group) for group in ("one", "two") for key in ("lora", "cdka")]
    assert baseline_of(rows[3], rows, "lora") is rows[2]
    assert baseline_of(rows[2], rows, "lora") is None
    assert baseline_of(rows[1], rows, "dora") is None
    alone = [row(key="lora"), row(key="cdka")]
    assert baseline_of(alone[1], alone, "lora") is alone[0]
