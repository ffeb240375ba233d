"""What a claim is tested by: an effect with its 95 % interval, and the region in which a true claim has it.

Reads evidence that is loaded already, and no config or model. Effects of metrics are gains: positive is better, whether
the metric is to be high or low. docs/claims.md describes every kind of test.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kronlab.report.alignment import findings
from kronlab.report.cost import cases_of, ratio_of_medians, setting
from kronlab.report.paired import Difference, Term, contrast, metric_values, over_seeds
from kronlab.report.tables import RowResult
from kronlab.runs import DIVERGED

SUPPORTED, CONTRADICTED, UNDECIDED, NOT_RUN = "supported", "contradicted", "undecided", "not run here"
VERDICTS: Final = (SUPPORTED, CONTRADICTED, UNDECIDED, NOT_RUN)


class Absent(Exception):
    """What a test needs is not there; says what."""


class Settled(Exception):
    """A verdict without a measured effect.

    Attributes:
        verdict: UNDECIDED where the records do not tell an interval.
    """

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


# ------------------------------------------------------------------------------------------------------------ evidence


@dataclass(frozen=True)
class Check:
    """Outcome of a computation done when the claims are made: how many of its cases came out as claimed."""

    agreeing: int
    total: int
    said: str


@dataclass(frozen=True)
class Evidence:
    """What one test may look at.

    Attributes:
        about: the setting, a line of the table's config.
        command: makes the records.
        rows: of a table of cells, with the records that are there.
        record: of a benchmark or an alignment.
        check: of a computation.
        reason: why there is nothing.
    """

    about: str = ""
    command: str = ""
    rows: Sequence[RowResult] = ()
    record: Mapping[str, Any] | None = None
    check: Check | None = None
    reason: str = ""

    def row(self, key: str) -> RowResult:
        """Raises:
        Absent: the table has no such row.
        """
        for row in self.rows:
            if row.key == key:
                return row
        raise Absent(f"the table has no row {key} at this scale")


@dataclass(frozen=True)
class Part:
    """One metric of one eval, of the records with these settings (dotted keys of their config)."""

    eval: str
    metric: str
    where: Mapping[str, Any] = field(default_factory=dict)

    def of(self, row: RowResult) -> RowResult:
        """The row with no other records."""
        if not self.where:
            return row
        kept = [
            r for r in row.records if r is not None and all(_at(r["config"], k) == v for k, v in self.where.items())
        ]
        return replace(row, records=kept)

    @property
    def unit(self) -> str:
        if "nll" in self.metric:
            return "nats" if self.metric.startswith("choice") else "nats/token"
        return "points"

    def __str__(self) -> str:
        where = ", ".join(f"{key}={value}" for key, value in self.where.items())
        return f"{self.eval} {self.metric}" + (f" ({where})" if where else "")


def _at(config: Any, path: str) -> Any:
    """A value by its dotted path, numbers for places in a list; None where there is none."""
    for name in path.split("."):
        if isinstance(config, Mapping):
            config = config.get(name)
        elif isinstance(config, Sequence) and not isinstance(config, str) and name.isdigit():
            config = config[int(name)] if int(name) < len(config) else None
        else:
            return None
    return config


def _parts(test: Mapping[str, Any]) -> list[Part]:
    return [Part(**part) for part in test["metrics"]]


# ------------------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True)
class Effect:
    """What a test has measured.

    Attributes:
        value, low, high: with its 95 % interval, in the metric's own unit.
        unit: "points" are shown times 100.
        count, counted: of what it is the mean: "seeds" or "rounds"; None where nothing was repeated.
        over: what the interval is over.
        models: names of the base models.
        said: what else to know.
    """

    value: float
    low: float
    high: float
    unit: str
    count: int | None
    counted: str
    over: str
    models: tuple[str, ...] = ()
    said: str = ""

    @property
    def repeated(self) -> str:
        """How often it was measured, for people; empty where nothing was repeated."""
        return "" if self.count is None else _counted(self.count, self.counted)

    @property
    def text(self) -> str:
        if self.low == self.value == self.high:
            return quantity(self.value, self.unit)
        bare = self.unit.partition(" ")[0]
        low, high = (quantity(bound, bare, named=False) for bound in (self.low, self.high))
        return f"{quantity(self.value, self.unit)} [{low}, {high}]"


def _counted(number: int, things: str) -> str:
    return f"{number} {things if number != 1 else things.removesuffix('s')}"


def quantity(value: float, unit: str, *, named: bool = True) -> str:
    """A number in its unit, for people; signed where it is a difference."""
    value = round(value, 9) + 0.0  # no sign for what is 0 up to rounding
    if value == 0 and named:
        return "0"
    kind = unit.partition(" ")[0]
    form = {"points": "+.1f", "nats": "+.3f", "nats/token": "+.3f", "ratio": ".2f", "share": ".0%"}.get(kind, "+.3f")
    text = format(value * (100 if kind == "points" else 1), form)
    return f"{text} {unit}" if named and unit and kind not in ("ratio", "share") else text


@dataclass(frozen=True)
class Region:
    """Where the effect lies if the claim is true. `closed`: the bounds belong to it."""

    low: float = -math.inf
    high: float = math.inf
    closed: bool = False

    def verdict(self, effect: Effect) -> str:
        """SUPPORTED or CONTRADICTED where the whole interval lies inside or outside, else UNDECIDED."""
        low, high = effect.low, effect.high
        inside = low >= self.low and high <= self.high if self.closed else low > self.low and high < self.high
        outside = high < self.low or low > self.high
        return SUPPORTED if inside else CONTRADICTED if outside else UNDECIDED


def _gain(test: Mapping[str, Any], evidence: Evidence, weighted: Sequence[tuple[float, str, str]]) -> Effect:
    """Weighted sum of the gains of one row over another, mean over the test's metrics.

    Raises:
        Absent, Settled: there is nothing to compare, or nothing that tells an interval.
    """
    sign = 1 if test["goal"] == "max" else -1
    parts = _parts(test)
    terms: list[Term] = []
    lacking: dict[tuple[str, str], None] = {}
    for weight, *keys in weighted:
        for part in parts:
            ours, theirs = (part.of(evidence.row(key)) for key in keys)
            lacking |= {(row.key, str(part)): None for row in (ours, theirs) if not _has(row, part)}
            terms.append(Term(sign * weight / len(parts), ours, theirs, part.eval, part.metric))
    if lacking:
        raise Absent("no finished cell: " + ", ".join(f"{key} on {part}" for key, part in lacking))
    found = contrast(terms)
    if found is None:
        raise Settled(UNDECIDED, "no seed and test data that all rows share, or one seed and no samples of this metric")
    return _effect(found, [row for term in terms for row in (term.row, term.baseline_row)], _unit(parts))


def _has(row: RowResult, part: Part) -> bool:
    return bool(metric_values(row, part.eval, part.metric))


def _unit(parts: Sequence[Part]) -> str:
    return parts[0].unit  # `faults` sees to it that all have one


def _effect(found: Difference, rows: Sequence[RowResult], unit: str) -> Effect:
    records = [record for row in rows for record in row.records if record is not None]
    models = tuple(sorted({record["config"]["model"]["name"] for record in records}))
    diverged = {row.key: sum(r is not None and r["status"] == DIVERGED for r in row.records) for row in rows}
    said = ", ".join(f"{key} {n}" for key, n in diverged.items() if n)
    said = f"diverged, in no mean: {said}" if said else ""
    return Effect(found.mean, found.low, found.high, unit, found.seeds, "seeds", found.how, models, said)


# --------------------------------------------------------------------------------------------------------------- kinds


def _difference(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    return _gain(test, evidence, [(1.0, test["ours"], test["theirs"])])


def _degradation(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    """What `ours` gains from before to after, minus what `theirs` gains; both lose, so positive is to lose less."""
    (ours_before, ours_after), (theirs_before, theirs_after) = test["ours"], test["theirs"]
    return _gain(test, evidence, [(1.0, ours_after, ours_before), (-1.0, theirs_after, theirs_before)])


def _trend(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    """Least-squares slope of the metric on log2 of the axis: the gain of a doubling."""
    points = _points(test, evidence)
    logs = [math.log2(value) for value, _ in points]
    mean = statistics.fmean(logs)
    total = math.fsum((x - mean) ** 2 for x in logs)
    first = points[0][1]
    weights = [((x - mean) / total, key, first) for x, (_, key) in zip(logs, points, strict=True)]
    effect = _gain(test, evidence, weights[1:])  # the weights sum to 0: the first row is the zero of all
    return replace(effect, unit=f"{effect.unit} a doubling", said=joined(_told_points(test, points), effect.said))


def _diminishing(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    """The gain of a doubling at the low end of the axis, minus that at its high end."""
    points = _points(test, evidence)
    (a, first), (b, second) = points[:2]
    (c, before), (d, last) = points[-2:]
    ends = [(1 / math.log2(b / a), second, first), (-1 / math.log2(d / c), last, before)]
    effect = _gain(test, evidence, ends)
    return replace(effect, unit=f"{effect.unit} a doubling", said=joined(_told_points(test, points), effect.said))


def _points(test: Mapping[str, Any], evidence: Evidence) -> list[tuple[float, str]]:
    """(value on the axis, row key), ascending: the given rows, or the largest family that differs in the axis alone.

    Raises:
        Absent: fewer than three.
    """
    section, _, name = test["axis"].rpartition(".")
    parts = _parts(test)
    families: dict[str, dict[float, str]] = {}
    for row in [evidence.row(key) for key in test["rows"]] if "rows" in test else evidence.rows:
        record = next((r for r in row.records if r is not None), None)
        value = None if record is None else _at(record["config"], test["axis"])
        if not isinstance(value, int | float) or not all(_has(part.of(row), part) for part in parts):
            if "rows" in test:
                raise Absent(f"no finished cell: {row.key}")
            continue
        others = {key: v for key, v in _at(record and record["config"], section).items() if key != name}
        alike = "" if "rows" in test else repr((row.group, sorted(others.items(), key=repr)))
        families.setdefault(alike, {}).setdefault(float(value), row.key)
    points = max(families.values(), key=len, default={})
    if len(points) < 3:
        raise Absent(f"{len(points)} finished rows that differ in {test['axis']} alone, of at least 3")
    return sorted(points.items())


def _told_points(test: Mapping[str, Any], points: Sequence[tuple[float, str]]) -> str:
    return f"{test['axis'].rpartition('.')[2]} = {', '.join(f'{value:g}' for value, _ in points)}"


def joined(*texts: str) -> str:
    return "; ".join(filter(None, texts))


def _spread(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    """How much farther apart the settings `theirs` end than the settings `ours`: largest minus smallest, by seed."""
    groups = {side: [evidence.row(key) for key in test[side]] for side in ("theirs", "ours")}
    parts = _parts(test)
    diverged = {
        side: [row.key for row in rows if any(r is not None and r["status"] == DIVERGED for r in row.records)]
        for side, rows in groups.items()
    }
    by_seed = {side: _spreads(rows, parts) for side, rows in groups.items()}
    for side, other, verdict in (("theirs", "ours", SUPPORTED), ("ours", "theirs", CONTRADICTED)):
        if diverged[side] and not diverged[other] and len(by_seed[other]) >= test["at_least"]:
            raise Settled(verdict, f"diverged: {', '.join(diverged[side])}")
    seeds = [seed for seed in by_seed["ours"] if seed in by_seed["theirs"]]
    if not seeds:
        raise Absent("no seed at which all of the settings are finished")
    deltas = [by_seed["theirs"][seed] - by_seed["ours"][seed] for seed in seeds]
    found = over_seeds(deltas)
    if found is None:
        raise Settled(UNDECIDED, f"one seed: {quantity(deltas[0], _unit(parts))}")
    return _effect(found, [*groups["theirs"], *groups["ours"]], _unit(parts))


def _spreads(rows: Sequence[RowResult], parts: Sequence[Part]) -> dict[int | None, float]:
    """Largest minus smallest value among the rows, mean over the metrics, by seed; of seeds that all have."""
    ranges: list[dict[int | None, float]] = []
    for part in parts:
        values = [{m.seed: m.value for m in metric_values(part.of(row), part.eval, part.metric)} for row in rows]
        common = [seed for seed in values[0] if all(seed in other for other in values)]
        ranges.append({seed: max(v[seed] for v in values) - min(v[seed] for v in values) for seed in common})
    seeds = [seed for seed in ranges[0] if all(seed in other for other in ranges)]
    return {seed: statistics.fmean(found[seed] for found in ranges) for seed in seeds}


_PART_OF = {"wall": "step", "saved_bytes": "step", "peak_memory_bytes": "memory"}


def _ratio(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    """What one peer of a benchmark costs over what another costs."""
    if evidence.record is None:
        raise Absent(evidence.reason or "no record of a benchmark")
    what = test["quantity"]
    case = next((c for c in cases_of(evidence.record, _PART_OF[what]) if setting(c) == test["case"]), None)
    if case is None:
        raise Absent(f"{test['case']} was not measured")
    found = {key: case["peers"].get(key, {}).get(what) for key in (test["ours"], test["theirs"])}
    lacking = [key for key, value in found.items() if value is None]
    if lacking:
        raise Absent(f"{test['case']}, not measured: {', '.join(lacking)}")
    ours, theirs = found.values()
    model = (case["settings"]["model"],)
    if what == "wall":
        value, low, high = ratio_of_medians(ours, theirs)
        return Effect(value, low, high, "ratio", len(ours), "rounds", "rounds", model)
    value = ours / theirs
    return Effect(value, value, value, "ratio", None, "", "one measurement", model)


def _alignment(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    if evidence.record is None:
        raise Absent(evidence.reason or "no record of an alignment")
    found = next((f for f in findings(evidence.record, test["thresholds"]) if f.name == test["finding"]), None)
    if found is None:
        raise Absent(f"the grid does not tell {test['finding']}")
    settings, (low, high) = evidence.record["settings"], found.interval
    said = "" if found.formula is None else f"formula: {found.formula:+.3f}"
    layers = f"{len(evidence.record['layers'])} layers of one model"
    return Effect(found.value, low, high, "", settings["seeds"], "seeds", layers, (settings["model"]["name"],), said)


def _aligned(test: Mapping[str, Any]) -> Region:
    at_least = test["thresholds"]["rank_correlation" if test["finding"].startswith("rank") else "exponent"]
    return Region(high=-at_least, closed=True) if test["finding"] == "exponent of r1" else Region(at_least, closed=True)


def _identity(test: Mapping[str, Any], evidence: Evidence) -> Effect:
    if evidence.check is None:
        raise Absent(evidence.reason or f"{test['check']} was not computed")
    check = evidence.check
    share = check.agreeing / check.total
    said = f"{check.agreeing} of {check.total} {check.said}"
    return Effect(share, share, share, "share", None, "", "nothing, it is exact", (), said)


@dataclass(frozen=True)
class Kind:
    """A kind of test.

    Attributes:
        measure: the effect; raises Absent or Settled.
        region: where it lies if the claim is true.
        told: the test in words.
        needs, may: keys of its config, besides those that every test has.
        source: what it reads: the kind of a table, or "check".
    """

    measure: Callable[[Mapping[str, Any], Evidence], Effect]
    region: Callable[[Mapping[str, Any]], Region]
    told: Callable[[Mapping[str, Any]], str]
    needs: frozenset[str]
    may: frozenset[str] = frozenset()
    source: str = "cells"


def _on(test: Mapping[str, Any]) -> str:
    parts = _parts(test)
    return str(parts[0]) if len(parts) == 1 else f"the mean of {', '.join(map(str, parts))}"


def _margin(test: Mapping[str, Any], sign: int = 1, suffix: str = "") -> str:
    return quantity(sign * test["margin"], _parts(test)[0].unit + suffix)


def _range_told(test: Mapping[str, Any]) -> str:
    low, high = test["range"]
    what = {"wall": "time", "saved_bytes": "bytes kept for backward", "peak_memory_bytes": "peak memory"}
    bounds = f"at most {high:g}" if low == 0 else f"from {low:g} to {high:g}"
    return f"{what[test['quantity']]} of {test['ours']} / {test['theirs']}, {test['case']}: {bounds}"


def _rising(test: Mapping[str, Any]) -> Region:
    return Region(low=test["margin"]) if test["direction"] == "up" else Region(high=-test["margin"])


_COMPARED: Final = frozenset({"ours", "theirs", "metrics", "goal", "margin"})
KINDS: Final[Mapping[str, Kind]] = {
    "difference": Kind(
        _difference,
        lambda test: Region(low=test["margin"]),
        lambda test: f"gain of {test['ours']} over {test['theirs']} in {_on(test)}: above {_margin(test)}",
        _COMPARED,
    ),
    "within": Kind(
        _difference,
        lambda test: Region(low=-test["margin"]),
        lambda test: f"gain of {test['ours']} over {test['theirs']} in {_on(test)}: above {_margin(test, -1)}",
        _COMPARED,
    ),
    "trend": Kind(
        _trend,
        _rising,
        lambda test: (
            f"gain in {_on(test)} for each doubling of {test['axis']} alone: "
            + (f"above {_margin(test)}" if test["direction"] == "up" else f"below {_margin(test, -1)}")
        ),
        frozenset({"axis", "direction", "metrics", "goal", "margin"}),
        frozenset({"rows"}),
    ),
    "diminishing": Kind(
        _diminishing,
        lambda test: Region(low=test["margin"]),
        lambda test: (
            f"gain in {_on(test)} of the first doubling of {test['axis']} minus that of the last: above {_margin(test)}"
        ),
        frozenset({"axis", "metrics", "goal", "margin"}),
        frozenset({"rows"}),
    ),
    "degradation": Kind(
        _degradation,
        lambda test: Region(low=test["margin"]),
        lambda test: (
            f"what {' to '.join(test['ours'])} gains minus what {' to '.join(test['theirs'])} gains in {_on(test)} "
            f"(both may lose): above {_margin(test)}"
        ),
        _COMPARED,
    ),
    "spread": Kind(
        _spread,
        lambda test: Region(low=test["margin"]),
        lambda test: (
            f"largest minus smallest of {_on(test)} among {', '.join(test['theirs'])}, minus the same among "
            f"{', '.join(test['ours'])}: above {_margin(test)}"
        ),
        _COMPARED - {"goal"},
    ),
    "ratio": Kind(
        _ratio,
        lambda test: Region(low=test["range"][0], high=test["range"][1], closed=True),
        _range_told,
        frozenset({"ours", "theirs", "case", "quantity", "range"}),
        source="bench",
    ),
    "alignment": Kind(
        _alignment,
        _aligned,
        lambda test: (
            f"{test['finding']} of measured first-step cosines: "
            + (f"at most {r.high:g}" if (r := _aligned(test)).low == -math.inf else f"at least {r.low:g}")
        ),
        frozenset({"finding", "thresholds"}),
        source="align",
    ),
    "identity": Kind(
        _identity,
        lambda test: Region(low=1.0, closed=True),
        lambda test: f"{test['check']}: every case comes out",
        frozenset({"check"}),
        frozenset({"anchors"}),
        source="check",
    ),
}
"""Kinds of tests by name."""


_COMMON: Final = frozenset({"kind", "table", "scale", "at_least", "decides"})


def faults_of(test: Mapping[str, Any], scales: Sequence[str]) -> list[str]:
    """What is wrong with the config of one test."""
    if test.get("kind") not in KINDS:
        return [f".kind={test.get('kind')!r}: must be one of {', '.join(KINDS)}"]
    kind = KINDS[test["kind"]]
    needs = kind.needs | ({"kind"} if kind.source == "check" else {"kind", "table", "scale"})
    missing, unknown = needs - set(test), set(test) - needs - kind.may - _COMMON
    found = [f": lacks {', '.join(sorted(missing))}, which {test['kind']} needs"] if missing else []
    found += [f": {', '.join(sorted(unknown))}: no setting of {test['kind']}"] if unknown else []
    if "scale" in test and test["scale"] not in scales:
        found.append(f".scale={test['scale']!r}: must be one of {', '.join(scales)}")
    if test.get("goal", "max") not in ("min", "max"):
        found.append(f".goal={test['goal']!r}: must be min or max")
    if test.get("direction", "up") not in ("up", "down"):
        found.append(f".direction={test['direction']!r}: must be up or down")
    if test.get("quantity", "wall") not in _PART_OF:
        found.append(f".quantity={test['quantity']!r}: must be one of {', '.join(_PART_OF)}")
    if test.get("margin", 0) < 0:
        found.append(f".margin={test['margin']!r}: must be at least 0")
    if "metrics" in test:
        wrong = [part for part in test["metrics"] if not {"eval", "metric"} <= set(part) <= {"eval", "metric", "where"}]
        if wrong or not test["metrics"]:
            found.append(f".metrics={test['metrics']!r}: must be a list of eval, metric and perhaps where")
        elif len({part.unit for part in _parts(test)}) > 1:
            found.append(".metrics: metrics of different units have no mean")
    return found
