"""From the rows of a table to the points of a figure. A figure draws its points and nothing else; its CSV holds them.

Intervals are 95 %: over seeds, mean ± t(n - 1; 0.975)·s/√n of Student's distribution; with one seed, value ± 1.96
standard errors over the test samples. Those of differences are `kronlab.report.paired`'s.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from scipy.special import stdtrit

from kronlab.errors import ConfigError
from kronlab.report.figures.style import Look, looks
from kronlab.report.paired import BY_BOTH, BY_SAMPLES, BY_SEEDS, metric_values
from kronlab.report.tables import RowResult, unit_of
from kronlab.runs import DIVERGED, DONE, FAILED

_HOW: Final = {  # what an interval is over, in the words of a caption
    BY_SEEDS: "over seeds (Student's t)",
    BY_SAMPLES: "over test samples",
    BY_BOTH: "over test samples and seeds (bootstrap)",
}


@dataclass(frozen=True)
class Source:
    """What the figures of a table are made of.

    Attributes:
        spec: the table's config section.
        rows: its rows at `scale`, with their records.
        results: the results directory that the records are from.
    """

    spec: Mapping[str, Any]
    scale: str
    rows: Sequence[RowResult]
    results: Path

    @property
    def layout(self) -> Mapping[str, Any]:
        layout: Mapping[str, Any] = self.spec["scales"][self.scale]
        return layout

    def pick(self, keys: Collection[str] | None = None) -> list[RowResult]:
        """The rows of these keys, of every group; None: all that are trained. This scale may lack the row of a key.

        Raises:
            ConfigError: a key that the table does not have.
        """
        if keys is None:
            return [row for row in self.rows if self.method(row) != "none"]
        unknown = [key for key in keys if key not in self.spec["rows"]]
        if unknown:
            known = ", ".join(self.spec["rows"])
            raise ConfigError(f"{self.spec['name']}: a figure names row {unknown[0]!r}; the table has {known}")
        return [row for key in keys for row in self.rows if row_key(row) == key]

    def looks(self) -> dict[str, Look]:
        """The look of every row, the same in all figures of the table."""
        return looks({row.key: self.method(row) for row in self.rows}, {row.key: row.group for row in self.rows})

    def method(self, row: RowResult) -> str:
        """Name of a row's method config, by which it is coloured; of its records where the table sets it elsewhere."""
        overrides = [*self.spec["rows"][row_key(row)].get("overrides", []), *self.layout.get("common", [])]
        named = [text.removeprefix("method=") for text in overrides if text.startswith("method=")]
        names = [*named, *(record["config"]["method"]["name"] for record in done(row))]
        return names[0] if names else ""


@dataclass(frozen=True)
class Point:
    """A mean over seeds with its 95 % interval, or the value of one seed.

    Attributes:
        panel: of the figure, where it has several.
        x: what the figure's x axis says; None where the value is a line across.
        low, high: the interval; None where there is none.
        seeds: how many the value is the mean of.
        how: what the interval is over.
        seed, record: of the value of one seed, and the id of the record that it is from; none for a mean.
    """

    panel: str
    group: str
    key: str
    label: str
    x: float | None
    value: float
    low: float | None = None
    high: float | None = None
    seeds: int = 1
    how: str = ""
    seed: int | None = None
    record: str = ""

    @property
    def is_mean(self) -> bool:
        return not self.record

    @property
    def position(self) -> float:
        """`x` of a point that has one."""
        assert self.x is not None
        return self.x

    @property
    def name(self) -> str:
        """The row's label, with its group if it has one."""
        return f"{self.label}, {self.group}" if self.group else self.label


def as_csv(points: Sequence[Point]) -> str:
    """The points as CSV, numbers to 8 digits: enough to draw them, few enough to be the same on every machine."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(Point)]
    writer.writerow(names)
    for point in points:
        values = [getattr(point, name) for name in names]
        writer.writerow([f"{v:.8g}" if isinstance(v, float) else "" if v is None else v for v in values])
    return out.getvalue()


def row_key(row: RowResult) -> str:
    """The key of a row in the table's config; in a table with groups its own key has the group in front."""
    return row.key.removeprefix(f"{row.group}/") if row.group else row.key


def done(row: RowResult) -> list[Mapping[str, Any]]:
    """The records of a row that are finished."""
    return [record for record in row.records if record is not None and record["status"] == DONE]


def interval(values: Sequence[float], stderr: float | None) -> tuple[float, float, str] | None:
    """Low and high end of the 95 % interval of the mean, and what it is; None for a lone value without standard error.

    Args:
        values: one for each seed.
        stderr: over test samples, of a lone value.
    """
    mean, n = statistics.fmean(values), len(values)
    if n > 1:
        half, how = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n), BY_SEEDS
    elif stderr is not None:
        half, how = 1.96 * stderr, BY_SAMPLES
    else:
        return None
    return mean - half, mean + half, how


def metric_points(row: RowResult, entry: Mapping[str, Any], *, panel: str = "", x: float | None = None) -> list[Point]:
    """Of one row, in the unit of the metric: the mean over seeds with its interval, then every seed; [] if not run."""
    factor = unit_of(entry["metric"]).factor
    found = metric_values(row, entry["eval"], entry["metric"])
    if not found:
        return []
    values, stderr = [factor * measured.value for measured in found], found[0].stderr
    low, high, how = interval(values, None if stderr is None else factor * stderr) or (None, None, "")
    at = Point(panel, row.group, row.key, row.label, x, statistics.fmean(values))
    return [
        replace(at, low=low, high=high, seeds=len(values), how=how),
        *(
            replace(at, value=value, seed=measured.seed, record=measured.record["id"])
            for value, measured in zip(values, found, strict=True)
        ),
    ]


def whiskers(points: Sequence[Point]) -> list[list[float]]:
    """Lengths of the interval below and above each value (0 where there is none), as matplotlib takes them."""
    below = [0.0 if point.low is None else point.value - point.low for point in points]
    above = [0.0 if point.high is None else point.high - point.value for point in points]
    return [below, above]


# ------------------------------------------------------------------------------------------------------ words


def metric_title(source: Source, entry: Mapping[str, Any]) -> str:
    """The metric as the table's column is headed, with its unit."""
    columns = [column for column in source.layout["columns"] if column.get("eval") == entry["eval"]]
    titles = [column["title"] for column in columns if column.get("metric") == entry["metric"]]
    name = titles[0] if titles else f"{entry['eval']}, {entry['metric'].replace('_', ' ')}"
    return f"{name} ({unit_of(entry['metric']).name})"


def caption_of(source: Source, points: Sequence[Point], rows: Sequence[RowResult]) -> list[str]:
    """Sentences for below a figure: table and scale, seeds, what the intervals are, and which rows are not in it."""
    means = [point for point in points if point.is_mean]
    low, high = min(point.seeds for point in means), max(point.seeds for point in means)
    seeds = f"{low} to {high} seeds" if low < high else f"{low} seed{'s' if low > 1 else ''}"
    sentence = f"{source.spec['name']}, scale {source.scale}, {seeds}"
    if ways := list(dict.fromkeys(_HOW[point.how] for point in means if point.how)):
        sentence += f"; intervals: 95 %, {' or '.join(ways)}"
    return [sentence, *absences(rows)]


# A mean over the seeds that are left would hide the others.
_ABSENT: Final = ((None, "Not run yet"), (FAILED, "Failed"), (DIVERGED, "Diverged, in no mean"))


def absences(rows: Sequence[RowResult]) -> list[str]:
    """One sentence for each way in which cells of these rows are lacking, naming the rows."""
    sentences = []
    for state, said in _ABSENT:
        counts = {row.key: sum((r and r["status"]) == state for r in row.records) for row in rows}
        named = [f"{row.label} ({counts[row.key]} of {len(row.records)})" for row in rows if counts[row.key]]
        if named:
            sentences.append(f"{said}: {', '.join(named)}")
    return sentences
