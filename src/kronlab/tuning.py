"""A setting tuned alike for every row of a table: one grid, one rule, on validation data (docs/tuning.md).

Pure bookkeeping: what is to be tried, and what the records of the trials decide. Planning and running are elsewhere.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronlab.errors import ConfigError
from kronlab.runs import DONE

_KEYS = ("grid", "seeds", "overrides", "by")
_BY = {"eval", "metric", "goal"}
_BEST = {"min": "lowest", "max": "highest"}


@dataclass(frozen=True)
class Tuning:
    """The `tune` section of a table's scale, for one arm: what is trained on different tasks is tuned for each.

    Attributes:
        key: the setting, e.g. `trainer.lr`.
        values: the grid, ascending.
        seeds: every value is tried once for each.
        overrides: make the evals of the trials validation evals.
        eval, metric, goal: the best value has the lowest (`min`) or highest (`max`) mean of this metric.
    """

    key: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    eval: str
    metric: str
    goal: str

    @classmethod
    def read(cls, section: Mapping[str, Any], *, where: str, arm: str = "") -> Tuning:
        """Check and read a section.

        Args:
            arm: whose `overrides` and `by` to take, where the section has one for each arm.

        Raises:
            ConfigError: all faults, one a line, each beginning with `where`.
        """
        faults = []
        if set(section) != set(_KEYS):
            raise ConfigError(f"{where}: has {', '.join(section) or 'no keys'}; it must have {', '.join(_KEYS)}")
        grid, seeds, by, overrides = section["grid"], section["seeds"], section["by"], section["overrides"]
        if isinstance(by, Mapping) and set(by) != _BY:
            by = by.get(arm)
        if isinstance(overrides, Mapping):
            overrides = overrides.get(arm)
        if not isinstance(grid, Mapping) or len(grid) != 1:
            raise ConfigError(f"{where}.grid={grid!r}: must be one setting with its values, {{trainer.lr: [...]}}")
        key, values = next(iter(grid.items()))
        if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            faults.append(f"{where}.grid.{key}={values!r}: must be numbers")
        elif any(low >= high for low, high in itertools.pairwise(values)):
            faults.append(f"{where}.grid.{key}={values!r}: must ascend")
        if not seeds or len(set(seeds)) != len(seeds):
            faults.append(f"{where}.seeds={seeds!r}: must be one or more seeds, each once")
        each = f", or an arm's for each arm, and for {arm!r} too" if arm else ""
        if not isinstance(by, Mapping) or set(by) != _BY or by["goal"] not in _BEST:
            faults.append(f"{where}.by={section['by']!r}: must be eval, metric and goal (min or max){each}")
        if not isinstance(overrides, Sequence) or isinstance(overrides, str):
            faults.append(f"{where}.overrides={section['overrides']!r}: must be a list of overrides{each}")
        if faults:
            raise ConfigError("\n".join(faults))
        return cls(str(key), tuple(values), tuple(seeds), tuple(overrides), **by)

    def choose(self, trials: Sequence[tuple[float, Mapping[str, Any] | None]]) -> Choice:
        """What the records decide.

        Args:
            trials: value and record of each trial; the record None if there is none that counts.

        Raises:
            ConfigError: a record lacks the metric that is to decide.
        """
        scores: dict[float, float | None] = {}
        for value in self.values:
            records = [record for tried, record in trials if tried == value]
            if records and all(record is not None for record in records):
                found = [self._score(record) for record in records if record is not None]
                whole = [score for score in found if score is not None]
                scores[value] = statistics.fmean(whole) if len(whole) == len(found) else None
        missing = sum(record is None for _, record in trials)
        return Choice(self, scores, missing)

    def _score(self, record: Mapping[str, Any]) -> float | None:
        """The metric of one trial; None if it diverged."""
        if record["status"] != DONE:
            return None
        metrics = record["eval"][self.eval]["metrics"]
        if self.metric not in metrics:
            raise ConfigError(f"tune.by.metric={self.metric!r}: eval {self.eval} gives {', '.join(metrics)}")
        value = float(metrics[self.metric]["value"])
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Choice:
    """What the trials of one row and arm have shown so far.

    Attributes:
        scores: mean over the trials of every value whose trials are all there; None where one of them diverged.
        missing: trials without a record.
    """

    tuning: Tuning
    scores: Mapping[float, float | None]
    missing: int

    @property
    def value(self) -> float | None:
        """The best value, of equals the smallest; None while a trial is missing, and if every value diverged."""
        whole = {value: score for value, score in self.scores.items() if score is not None}
        if self.missing or not whole:
            return None
        best = (min if self.tuning.goal == "min" else max)(whole.values())
        return min(value for value, score in whole.items() if score == best)

    @property
    def at_edge(self) -> bool:
        """Whether the best value has no worse one beyond it in the grid."""
        return self.value in (self.tuning.values[0], self.tuning.values[-1])

    def why_not(self) -> str:
        """Why there is no value, in a few words."""
        if self.missing:
            return f"{self.tuning.key} is not chosen yet: {self.missing} of its trials are missing"
        tried = ", ".join(f"{value:g}" for value in self.tuning.values)
        return f"diverged at every {self.tuning.key} of the grid ({tried}): no value can be chosen"

    def told(self) -> str:
        """The chosen value and the whole grid's scores."""
        scores = "; ".join(
            f"{value:g}: {'diverged' if score is None else format(score, '.4g')}"
            for value, score in self.scores.items()
        )
        edge = ", **edge of the grid**" if self.at_edge else ""
        return f"{self.tuning.key} {self.value:g}{edge} ({scores})"


def rule(tuning: Tuning) -> str:
    """The rule in one sentence, for the foot of a table."""
    values = ", ".join(f"{value:g}" for value in tuning.values)
    seeds = f"seed{'s' if len(tuning.seeds) > 1 else ''} {', '.join(map(str, tuning.seeds))}"
    best = f"the {_BEST[tuning.goal]} mean {tuning.metric} of {tuning.eval}"
    return (
        f"{tuning.key} of every trained row, out of {values}: the one with {best} at {seeds}, "
        f"on data that are neither trained nor tested on ({', '.join(tuning.overrides)})."
    )
