"""By how much two rows differ, seed by seed and sample by sample, and how sure that is. Reads records only.

Both rows are compared on the same test samples and at the same seeds, so that what they share (a hard sample, a lucky
batch order) is in neither the difference nor its interval. With d_s the difference at seed s of S, d their mean, and
D* the mean over seeds of the differences on resampled test samples (one draw for all seeds, for the test set is one):

    interval = 2.5 % and 97.5 % quantiles of  D* + c_S · mean over resampled seeds of (d_s - d)

over 10,000 draws, with c_S = sqrt(S / (S - 1)) · t_{S-1} / z at 97.5 %. Without c_S resampling would take five seeds
for more than they are: its variance is short by (S - 1) / S, and its tails are a normal's (Hesterberg 2015, arXiv
1411.5279, on narrowness). With one seed the second term is missing, and the interval says nothing of other seeds. Both
terms hold the noise of single samples at single seeds, which errs on the wide side (as does the bootstrap of
crossed factors in Owen 2007).

A metric whose samples a record does not keep is compared over seeds alone: d ± t_{S-1} · standard deviation / sqrt S.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from kronlab.evals.statistics import CONFIDENCE, pass_at_k, resampled_sums
from kronlab.runs import DONE

if TYPE_CHECKING:
    from kronlab.report.tables import RowResult

DRAWS: Final = 10_000
BY_SAMPLES, BY_BOTH, BY_SEEDS = "samples", "samples and seeds", "seeds"
"""What an interval is over, `Difference.how`."""
_SEED: Final = 20_000_011
_TAIL: Final = (1 - CONFIDENCE) / 2
_DIGITS: Final = 12  # what is equal up to rounding is equal


class Term(NamedTuple):
    """A summand of a contrast: weight · (metric of `row` - metric of `baseline_row`)."""

    weight: float
    row: RowResult
    baseline_row: RowResult
    eval: str
    metric: str


class Measured(NamedTuple):
    """One metric of one finished cell; `seed` is None for a base model, which has none."""

    seed: int | None
    value: float
    stderr: float | None
    n: int
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A row's metric minus the baseline's, in the metric's own unit, with its 95 % interval.

    `seeds` is how many seeds both have; `how` what the interval is over: BY_SAMPLES (one seed), BY_BOTH, or BY_SEEDS
    (Student's t).
    """

    mean: float
    low: float
    high: float
    seeds: int
    how: str

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of 0."""
        return self.low > 0 or self.high < 0


def metric_values(row: RowResult, eval: str, metric: str) -> list[Measured]:
    """One metric of one eval in every finished record that has it, in the order of the records."""
    found = []
    for record in row.records:
        if record is None or record["status"] != DONE or eval not in record["eval"]:
            continue
        m = record["eval"][eval]["metrics"].get(metric)
        if m is not None:
            found.append(Measured(record["config"].get("seed"), m["value"], m["stderr"], m["n"], record))
    return found


def seed_means(row: RowResult, parts: Sequence[tuple[str, str]]) -> dict[int | None, tuple[float, float | None]]:
    """Seed -> the unweighted mean over several (eval, metric) and its standard error over samples, where all are known.

    A seed that lacks one of them is left out. Several cells of one seed (of several arms) count by their mean.
    """
    found: list[dict[int | None, list[Measured]]] = []
    for part in parts:
        of_part: dict[int | None, list[Measured]] = {}
        for one in metric_values(row, *part):
            of_part.setdefault(one.seed, []).append(one)
        found.append(of_part)
    means: dict[int | None, tuple[float, float | None]] = {}
    for seed in found[0]:
        groups = [of_part.get(seed, []) for of_part in found]
        if not all(groups):
            continue
        value = statistics.fmean(statistics.fmean(one.value for one in group) for group in groups)
        errors = [None if one.stderr is None else one.stderr / len(group) for group in groups for one in group]
        known = [error for error in errors if error is not None]
        means[seed] = value, math.hypot(*known) / len(groups) if len(known) == len(errors) else None
    return means


def baseline_of(row: RowResult, rows: Iterable[RowResult], baseline: str) -> RowResult | None:
    """The row of key `baseline` in the same group; None where there is none, and for the baseline itself."""
    key = f"{row.group}/{baseline}" if row.group else baseline
    return next((other for other in rows if other.key == key != row.key), None)


def difference(row: RowResult, baseline_row: RowResult, eval: str, metric: str) -> Difference | None:
    """The paired difference of one metric; None where nothing can be paired, or where nothing tells its interval.

    Records are paired at equal seeds, training tasks and test data. A base model has no seed and no task: it is
    compared with every record of the other row.
    """
    return mean_difference(row, baseline_row, [(eval, metric)])


def mean_difference(row: RowResult, baseline_row: RowResult, parts: Sequence[tuple[str, str]]) -> Difference | None:
    """As `difference`, of the unweighted mean over several (eval, metric), at the seeds that have all of them."""
    return contrast([Term(1 / len(parts), row, baseline_row, *part) for part in parts])


def contrast(terms: Sequence[Term]) -> Difference | None:
    """As `difference`, of a weighted sum of differences (e.g. a slope over rows), at the seeds common to all."""
    found = [_pairs(term.row, term.baseline_row, term.eval, term.metric) for term in terms]
    seeds = [seed for seed in found[0] if all(seed in other for other in found)]
    if not seeds:
        return None
    # [seed][term] -> pairs; more than one where a row has several cells of one seed
    grid = [[(term.weight, pairs[seed]) for term, pairs in zip(terms, found, strict=True)] for seed in seeds]
    deltas = np.array(
        [math.fsum(weight * statistics.fmean(p.delta for p in pairs) for weight, pairs in at_seed) for at_seed in grid]
    )
    mean, count = float(deltas.mean()), len(seeds)
    if any(pair.terms is None for at_seed in grid for _, pairs in at_seed for pair in pairs):
        return over_seeds(deltas.tolist())
    weighted = [
        (pair, weight / (count * len(pairs))) for at_seed in grid for weight, pairs in at_seed for pair in pairs
    ]
    drawn = mean + _resampled(weighted)
    if count > 1:
        widened = math.sqrt(count / (count - 1)) * _student(count) / ndtri(1 - _TAIL)
        chosen = np.random.default_rng(_SEED).integers(count, size=(DRAWS, count))
        drawn += widened * (deltas - mean)[chosen].mean(1)
    low, high = np.quantile(np.round(drawn, _DIGITS), [_TAIL, 1 - _TAIL])
    return Difference(mean, float(low), float(high), count, BY_BOTH if count > 1 else BY_SAMPLES)


def over_seeds(values: Sequence[float]) -> Difference | None:
    """Mean of one number for each seed with Student's interval; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean, half = statistics.fmean(values), _student(count) * statistics.stdev(values) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count, BY_SEEDS)


def _student(count: int) -> float:
    return float(stdtrit(count - 1, 1 - _TAIL))


class _Terms(NamedTuple):
    """A metric as a function of sums over units: `of(values.sum(0))`, `values` of shape (units, k)."""

    ids: list[str]
    values: np.ndarray
    of: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Pair:
    """Two records at one seed: the difference, and the terms of both where their samples are known."""

    delta: float
    terms: tuple[_Terms, _Terms] | None


def _resampled(weighted: Sequence[tuple[_Pair, float]]) -> np.ndarray:
    """Weighted sum of the pairs' differences on DRAWS resamples of the samples, minus what it is on the samples."""
    by_size: dict[int, list[tuple[_Terms, float]]] = {}
    for pair, weight in weighted:
        assert pair.terms is not None
        for terms, signed in zip(pair.terms, (weight, -weight), strict=True):
            by_size.setdefault(len(terms.values), []).append((terms, signed))
    total = np.zeros(DRAWS)
    for group in by_size.values():  # the same draws for both methods, and for all seeds of one test set
        values = np.hstack([terms.values for terms, _ in group])
        drawn, whole, at = resampled_sums(values, DRAWS), values.sum(0), 0
        for terms, signed in group:
            here = slice(at, at + terms.values.shape[1])
            total += signed * (terms.of(drawn[:, here]) - terms.of(whole[here]))
            at = here.stop
    return total


def _pairs(row: RowResult, baseline_row: RowResult, eval: str, metric: str) -> dict[int | None, list[_Pair]]:
    pairs: dict[int | None, list[_Pair]] = {}
    baselines = metric_values(baseline_row, eval, metric)
    for ours in metric_values(row, eval, metric):
        for theirs in baselines:
            if _comparable(ours.record, theirs.record, eval):
                seed = theirs.seed if ours.seed is None else ours.seed
                terms = [_terms(m.record["eval"][eval], metric) for m in (ours, theirs)]
                pairs.setdefault(seed, []).append(_Pair(ours.value - theirs.value, _same_units(*terms)))
    return pairs


def _comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any], eval: str) -> bool:
    for key in ("seed", "task"):
        a, b = ours["config"].get(key), theirs["config"].get(key)
        if a is not None and b is not None and a != b:
            return False
    return bool(ours["eval"][eval]["data_sha"] == theirs["eval"][eval]["data_sha"])


def _same_units(ours: _Terms | None, theirs: _Terms | None) -> tuple[_Terms, _Terms] | None:
    if ours is None or theirs is None or ours.ids != theirs.ids or len(ours.ids) < 2:
        return None
    return ours, theirs


def _terms(section: Mapping[str, Any], metric: str) -> _Terms | None:
    """A metric's terms from the samples that the record keeps; None where they do not give its recorded value."""
    samples, name = section["samples"], metric.removesuffix("_ranked")
    tolerance = 1e-9
    terms: _Terms | None = None
    if name in ("nll_per_token", "nll", "mse") and "nll" in samples:
        terms = _Terms(samples["id"], _columns(samples["nll"], samples["nll_tokens"]), _ratio)
        tolerance = 1e-4  # records round the NLL of a sample to four digits
    elif name == "choice_nll" and name in samples:
        terms, tolerance = _mean_terms(samples["id"], samples[name]), 1e-4
    elif name in _OF_COUNTS and set(samples.get("predicted", [2])) <= {0, 1}:
        said, right = np.array(samples["predicted"]), np.array(samples["correct"])
        gold = np.where(right == 1, said, 1 - said)  # of two classes
        terms = _Terms(samples["id"], _columns(gold * said, gold, said, np.ones(len(gold))), _OF_COUNTS[name])
    elif found := re.fullmatch(r"pass@(\d+)", name):
        terms = _problems(samples, int(found[1]))
    elif name == "accuracy" or metric == next(iter(section["metrics"])):
        terms = _mean_terms(samples["id"], samples["correct"])
    if terms is None or abs(float(terms.of(terms.values.sum(0))) - section["metrics"][metric]["value"]) > tolerance:
        return None
    return terms


def _problems(samples: Mapping[str, Any], k: int) -> _Terms:
    """pass@k: the units are problems, of which the samples are `<problem>#<number>`."""
    verdicts: dict[str, list[int]] = {}
    for name, right in zip(samples["id"], samples["correct"], strict=True):
        verdicts.setdefault(name.partition("#")[0], []).append(right)
    return _mean_terms(list(verdicts), [pass_at_k(len(v), sum(v), k) for v in verdicts.values()])


def _mean_terms(ids: list[str], values: Sequence[float]) -> _Terms:
    return _Terms(ids, _columns(values, np.ones(len(ids))), _ratio)


def _columns(*columns: Any) -> np.ndarray:
    return np.column_stack([np.asarray(column, dtype=np.float64) for column in columns])


# Of sums over the last axis, (..., k) -> (...); 0 where there is nothing to divide by, as scikit-learn has it.
def _ratio(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0], sums[..., 1])


def _f1(sums: np.ndarray) -> np.ndarray:
    both, gold, said, _ = np.moveaxis(sums, -1, 0)
    return _divided(2 * both, gold + said)


def _matthews(sums: np.ndarray) -> np.ndarray:
    both, gold, said, n = np.moveaxis(sums, -1, 0)
    return _divided(n * both - gold * said, np.sqrt(gold * (n - gold) * said * (n - said)))


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    above, below = np.asarray(above), np.asarray(below)
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)


_OF_COUNTS: Final = {"f1": _f1, "matthews": _matthews}
