"""A score with its uncertainty: mean or any statistic of paired arrays, standard error, bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from kronlab.errors import ConfigError

RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95
_SEED: Final = 20_000_003
_CHUNK: Final = 4_000_000  # resampled values held at once


def mean_metric(values: Sequence[float]) -> dict[str, Any]:
    """Mean, number of values, standard error of the mean and its bootstrap interval.

    stderr = sample standard deviation / sqrt n (None for n = 1); ci95 as in :func:`bootstrap_metric`.
    """
    n = len(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    array = np.asarray(values, dtype=np.float64)
    return {"value": mean, "n": n, "stderr": error, "ci95": _interval(_resampled_means(array))}


def ratio_metric(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """sum(numerators) / sum(denominators), samples as the units.

    stderr is that of a ratio estimator, sqrt(n / (n - 1) * sum of squared residuals) / sum(denominators); ci95 as in
    :func:`bootstrap_metric`.
    """
    n, total = len(numerators), math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    residuals = [a - ratio * b for a, b in zip(numerators, denominators, strict=True)]
    error = math.sqrt(n / (n - 1) * math.fsum(x * x for x in residuals)) / total if n > 1 else None
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    below = _resampled_means(b)  # the same resamples for both: paired
    drawn = np.divide(_resampled_means(a), below, out=np.full_like(below, np.nan), where=below > 0)
    return {"value": ratio, "n": n, "stderr": error, "ci95": _interval(drawn)}


def bootstrap_metric(statistic: Callable[..., float], *arrays: Sequence[Any] | np.ndarray) -> dict[str, Any]:
    """`statistic(*arrays)` of paired arrays, with the standard deviation and interval of its bootstrap distribution.

    Percentile bootstrap over samples (Efron & Tibshirani 1993, ch. 13): 2,000 resamples with a fixed seed, so that the
    same rows give the same interval. Resamples on which the statistic is not finite are left out; ci95 is None where
    fewer than half are left, or n = 1.
    """
    data = [np.asarray(a) for a in arrays]
    n = len(data[0])
    rng = np.random.default_rng(_SEED)
    values = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(n, size=n)
        values.append(_finite(statistic, [a[chosen] for a in data]))
    drawn = np.asarray(values, dtype=np.float64)
    kept = drawn[np.isfinite(drawn)]
    error = float(kept.std(ddof=1)) if n > 1 and len(kept) > 1 else None
    return {"value": float(statistic(*data)), "n": n, "stderr": error, "ci95": _interval(drawn)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    n samples were drawn and c of them are right (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ConfigError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ConfigError(f"pass@{k} of {n} samples, {c} right: needs 1 <= k <= samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def resampled_sums(values: np.ndarray, draws: int) -> np.ndarray:
    """Sums over resamples of the rows of `values`: (n, k) -> (draws, k).

    The draws depend on n alone, so that arrays of one length are resampled together.
    """
    n, rng = len(values), np.random.default_rng(_SEED)
    step = max(1, _CHUNK // 32 // n)  # what fits the cache is faster
    sums = []
    for at in range(0, draws, step):
        size = min(step, draws - at)
        chosen = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n)  # how often each row is drawn
        sums.append(counts.astype(np.float64) @ values)
    return np.concatenate(sums)


def crossed_interval(statistic: Callable[[np.ndarray], float], values: np.ndarray) -> list[float] | None:
    """Percentile interval of `statistic(values)` under resampling of the first two axes, each by itself.

    For units that are crossed, such as seeds and layers (Owen 2007, "The pigeonhole bootstrap"): pairs of them are not
    independent of the others in their row or column. Otherwise as :func:`bootstrap_metric`.
    """
    rng = np.random.default_rng(_SEED)
    drawn = []
    for _ in range(RESAMPLES):
        rows, columns = (rng.integers(n, size=n) for n in values.shape[:2])
        drawn.append(_finite(statistic, [values[np.ix_(rows, columns)]]))
    return _interval(np.asarray(drawn, dtype=np.float64))


def _finite(statistic: Callable[..., float], arrays: list[np.ndarray]) -> float:
    try:
        return float(statistic(*arrays))
    except (ValueError, ZeroDivisionError):  # a resample of one class alone
        return float("nan")


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of RESAMPLES resamples of `values`; the same draws for every array of one length."""
    n = len(values)
    rng = np.random.default_rng(_SEED)
    step = max(1, _CHUNK // max(n, 1))
    means = [values[rng.integers(n, size=(min(step, RESAMPLES - at), n))].mean(1) for at in range(0, RESAMPLES, step)]
    return np.concatenate(means)


def _interval(drawn: np.ndarray) -> list[float] | None:
    kept = drawn[np.isfinite(drawn)]
    if len(kept) < RESAMPLES / 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return [float(low), float(high)]
