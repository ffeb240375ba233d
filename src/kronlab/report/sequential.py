"""Tables of sequential fine-tuning: what a method keeps of task i when it goes on to others. Reads records only.

With A_i(...) the accuracy on task i after training on the tasks in brackets, in order, with one adapter:

    kept accuracy       A_i(i, j)                 kept share   A_i(i, j) / A_i(i)
    forgetting          A_i(i) - A_i(i, j)
    forward transfer    A_j(i, j) - A_j(j)

and along a chain of tasks 1, 2, ... k:

    backward transfer   mean over i < k of A_i(1, ... k) - A_i(1, ... i)    (Lopez-Paz & Ranzato, arXiv 1706.08840)

Differences are paired: same seeds, same test samples (`kronlab.report.paired`). The interval of the share k is that of
the mean of A_i(i, j) - k·A_i(i), over A_i(i): the linearisation of a ratio at its estimate.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from kronlab.errors import ConfigError
from kronlab.report.paired import (
    DRAWS,
    Difference,
    Term,
    baseline_of,
    contrast,
    difference,
    mean_difference,
    metric_values,
    seed_means,
)
from kronlab.report.tables import Column, RowResult, Table, notes_below
from kronlab.runs import DONE

Record = Mapping[str, Any]
_PAIRED = "Paired, with 95 % intervals"
_INTERVALS = (
    "Intervals: 95 %, same test samples, same seeds, over test samples and, where there are several, seeds "
    f"({DRAWS:,} bootstrap draws). *: it excludes 0, without correction for the number of comparisons."
)


@dataclass(frozen=True)
class Task:
    """A task of the table: by which eval and metric it is judged, and its name for people."""

    name: str
    eval: str
    metric: str
    title: str


@dataclass(frozen=True)
class Retention:
    """One method on one ordered pair of tasks (i, j), in the metrics' own units; None where records are missing.

    Attributes:
        first: A_i(i). kept: A_i(i, j). second: A_j(j). reached: A_j(i, j).
        share: A_i(i, j) / A_i(i) with its interval; None where A_i(i) is 0.
        forgetting: A_i(i) - A_i(i, j). transfer: A_j(i, j) - A_j(j).
    """

    first: float | None
    kept: float | None
    second: float | None
    reached: float | None
    share: Difference | None
    forgetting: Difference | None
    transfer: Difference | None


def tasks_of(spec: Mapping[str, Any], scale: str) -> list[Task]:
    """The tasks that a scale takes in every order."""
    return [Task(name, **spec["tasks"][name]) for name in spec["scales"][scale]["tasks"]]


def pairs_of(spec: Mapping[str, Any], scale: str) -> list[tuple[Task, Task]]:
    """Every ordered pair of the tasks of a scale."""
    return list(permutations(tasks_of(spec, scale), 2))


def chains_of(spec: Mapping[str, Any], scale: str) -> list[list[Task]]:
    """The longer chains of a scale, each of the tasks that the table knows; none where it has none."""
    chains = spec["scales"][scale].get("chains") or []
    for name in (name for chain in chains for name in chain):
        if name not in spec["tasks"]:
            raise ConfigError(
                f"{spec['name']}, scale {scale}: chains: no task {name!r}; it has {', '.join(spec['tasks'])}"
            )
    return [[Task(name, **spec["tasks"][name]) for name in chain] for chain in chains]


def trained_on(record: Record) -> tuple[str, ...]:
    """The names of the tasks that a record was trained on, in order; none for a base model."""
    config = record["config"]
    if "task" not in config:
        return ()
    return *(task["name"] for task in config.get("after") or []), config["task"]["name"]


def arm(row: RowResult, *tasks: str) -> RowResult:
    """The records of a row that were trained on these tasks, in this order.

    They carry no task any more: they are to be paired with records of other tasks, at equal seeds.
    """
    found = [r for r in row.records if r is not None and trained_on(r) == tasks]
    untied = [{**r, "config": {k: v for k, v in r["config"].items() if k not in ("task", "after")}} for r in found]
    return replace(row, records=untied)


def retention(row: RowResult, first: Task, second: Task) -> Retention:
    """What the records of a row say about one ordered pair of tasks."""
    alone, other = arm(row, first.name), arm(row, second.name)
    both = arm(row, first.name, second.name)
    return Retention(
        first=_mean(alone, first),
        kept=_mean(both, first),
        second=_mean(other, second),
        reached=_mean(both, second),
        share=_share(alone, both, first),
        forgetting=contrast([_forgetting(row, first, second)]),
        transfer=contrast([_transfer(row, first, second)]),
    )


def _forgetting(row: RowResult, first: Task, second: Task, weight: float = 1.0) -> Term:
    return Term(weight, arm(row, first.name), arm(row, first.name, second.name), first.eval, first.metric)


def _transfer(row: RowResult, first: Task, second: Task, weight: float = 1.0) -> Term:
    return Term(weight, arm(row, first.name, second.name), arm(row, second.name), second.eval, second.metric)


def _kept_apart(row: RowResult, reference: RowResult, first: Task, second: Task, weight: float = 1.0) -> Term:
    ours, theirs = (arm(r, first.name, second.name) for r in (row, reference))
    return Term(weight, ours, theirs, first.eval, first.metric)


@dataclass(frozen=True)
class Overall:
    """One method's means over all ordered pairs; None where records are missing.

    The intervals allow for what pairs share: test samples are drawn anew once for all pairs, and so are seeds.
    They speak of these tasks, not of others.

    Attributes:
        forgetting, transfer: as in `Retention`. apart: A_i(i, j) minus the baseline's; None for the baseline.
    """

    forgetting: Difference | None
    transfer: Difference | None
    apart: Difference | None


def overall(row: RowResult, reference: RowResult | None, pairs: Sequence[tuple[Task, Task]]) -> Overall:
    """What the records of a row say about all pairs together."""
    weight = 1 / len(pairs)
    apart = [_kept_apart(row, reference, *pair, weight) for pair in pairs] if reference is not None else None
    return Overall(
        forgetting=contrast([_forgetting(row, *pair, weight) for pair in pairs]),
        transfer=contrast([_transfer(row, *pair, weight) for pair in pairs]),
        apart=contrast(apart) if apart else None,
    )


def _mean(row: RowResult, *tasks: Task) -> float | None:
    found = seed_means(row, _judged(tasks))
    return statistics.fmean(value for value, _ in found.values()) if found else None


def _share(alone: RowResult, both: RowResult, task: Task) -> Difference | None:
    before, after = _by_seed(alone, task), _by_seed(both, task)
    seeds = [seed for seed in before if seed in after]
    whole = statistics.fmean(before[seed] for seed in seeds) if seeds else 0.0
    if not whole > 0:
        return None
    share = statistics.fmean(after[seed] for seed in seeds) / whole
    scaled = replace(alone, records=[_scaled(record, task, share) for record in alone.records if record is not None])
    rest = difference(both, scaled, task.eval, task.metric)
    return (
        None
        if rest is None
        else replace(rest, mean=share, low=share + rest.low / whole, high=share + rest.high / whole)
    )


def _by_seed(row: RowResult, task: Task) -> dict[int | None, float]:
    return {measured.seed: measured.value for measured in metric_values(row, task.eval, task.metric)}


def _scaled(record: Record, task: Task, factor: float) -> dict[str, Any]:
    """A record whose metric, and the samples that it is the mean of, are multiplied."""
    if record["status"] != DONE or task.eval not in record["eval"]:
        return dict(record)
    section = record["eval"][task.eval]
    metric = section["metrics"][task.metric]
    samples = {**section["samples"], "correct": [factor * right for right in section["samples"]["correct"]]}
    # the metric stays in its place: the first is the one that `correct` is about
    metrics = {**section["metrics"], task.metric: {**metric, "value": factor * metric["value"]}}
    return {**record, "eval": {**record["eval"], task.eval: {**section, "metrics": metrics, "samples": samples}}}


# ---- the table ----


def build(spec: Mapping[str, Any], scale: str, rows: Sequence[RowResult], *, extra_notes: Sequence[str] = ()) -> Table:
    """One row for each method and ordered pair, and for each method the mean over all pairs.

    `rows` are the methods; the base model, if it is among them, goes below the table.
    """
    base = [row for row in rows if "method=none" in spec["rows"][row.key]["overrides"]]
    methods = [row for row in rows if row not in base]
    pairs = pairs_of(spec, scale)
    groups, keys, shown, found = [], [], [], []
    for first, second in pairs:
        for row in methods:
            groups.append(f"{first.title} → {second.title}")
            keys.append(f"{first.name}>{second.name}/{row.key}")
            shown.append(replace(row, group=f"{first.name}>{second.name}"))
            found.append(retention(row, first, second))
    kept = [_kept_difference(spec, methods, row, *pair) for pair in pairs for row in methods]
    several = methods if len(pairs) > 1 else []
    means = [overall(row, baseline_of(row, methods, spec["baseline"]), pairs) for row in several]
    columns = _columns(found, kept, _label(methods, spec["baseline"]), means)
    columns[2:2] = [_with_means(column, len(means)) for column in _published(spec, scale, shown, found)]
    groups += ["mean of all pairs"] * len(several)
    keys += [f"mean/{row.key}" for row in several]
    shown += several
    return Table(
        name=spec["name"],
        scale=scale,
        title=spec["title"],
        labels=[row.label for row in shown],
        keys=keys,
        columns=[_parameters(shown), *columns],
        notes=[*_notes(spec, scale, rows, base), *extra_notes],
        groups=groups,
        group_title="first → second task",
        seeds=_every_seed(spec, scale, rows),
        more=_chains(spec, scale, methods),
    )


def _chains(spec: Mapping[str, Any], scale: str, methods: Sequence[RowResult]) -> list[Table]:
    """The table of the longer chains: every stage of each, every method; none where nothing has been recorded."""
    chains = chains_of(spec, scale)
    stages = list(dict.fromkeys(tuple(chain[:k]) for chain in chains for k in range(1, len(chain) + 1)))
    tasks = list(dict.fromkeys(task for stage in stages for task in stage))
    shown = [(stage, row, _after(row, stage)) for stage in stages for row in methods]
    if not any(after.records for stage, _, after in shown if len(stage) > 2):
        return []

    def accuracy(task: Task) -> list[float | None]:
        return [_mean(after, task) if task in stage else None for stage, _, after in shown]

    references = [baseline_of(row, methods, spec["baseline"]) for _, row, _ in shown]
    apart = [
        None if reference is None else mean_difference(after, _after(reference, stage), _judged(stage))
        for (stage, _, after), reference in zip(shown, references, strict=True)
    ]
    baseline = _label(methods, spec["baseline"])
    table = Table(
        name=f"{spec['name']}-chains",
        scale=scale,
        title="Longer chains of tasks, one adapter",
        labels=[row.label for _, row, _ in shown],
        keys=[f"{'>'.join(task.name for task in stage)}/{row.key}" for stage, row, _ in shown],
        columns=[
            *[_score(f"{task.title} (%)", accuracy(task)) for task in tasks],
            _score("mean of the tasks so far (%)", [_mean(after, *stage) for stage, _, after in shown]),
            _interval("backward transfer (points)", [backward(row, stage) for stage, row, _ in shown], _PAIRED),
            _interval(f"mean so far: difference to {baseline} (points)", apart, _PAIRED),
        ],
        notes=[
            f"Setting, seeds and rates: those of {spec['name']}, whose `seeds.csv` has every value.",
            "Backward transfer: mean over the earlier tasks of the accuracy now minus the accuracy when the task had "
            "just been learnt; negative: forgotten.",
            _INTERVALS,
        ],
        groups=[" → ".join(task.title for task in stage) for stage, _, _ in shown],
        group_title="trained on",
    )
    return [table]


def backward(row: RowResult, chain: Sequence[Task]) -> Difference | None:
    """Backward transfer along a chain; None for a chain of one task, and where a record is missing."""
    earlier = range(1, len(chain))
    now = _after(row, chain)
    terms = [
        Term(1 / len(earlier), now, _after(row, chain[:k]), chain[k - 1].eval, chain[k - 1].metric) for k in earlier
    ]
    return contrast(terms) if terms else None


def _after(row: RowResult, chain: Sequence[Task]) -> RowResult:
    return arm(row, *[task.name for task in chain])


def _judged(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    return [(task.eval, task.metric) for task in tasks]


def _label(rows: Sequence[RowResult], key: str) -> str:
    return next((row.label for row in rows if row.key == key), key)


def _kept_difference(
    spec: Mapping[str, Any], rows: Sequence[RowResult], row: RowResult, first: Task, second: Task
) -> Difference | None:
    reference = baseline_of(row, rows, spec["baseline"])
    return None if reference is None else contrast([_kept_apart(row, reference, first, second)])


def _columns(
    found: Sequence[Retention], kept: Sequence[Difference | None], baseline: str, means: Sequence[Overall]
) -> list[Column]:
    scores = [
        _score("first task, alone (%)", [r.first for r in found]),
        _score("first task, after the second (%)", [r.kept for r in found]),
        _score("second task, alone (%)", [r.second for r in found]),
        _score("second task, after the first (%)", [r.reached for r in found]),
        _interval("kept share (%)", [r.share for r in found], _PAIRED, signed=False),
    ]
    forgetting = [*(r.forgetting for r in found), *(mean.forgetting for mean in means)]
    transfer = [*(r.transfer for r in found), *(mean.transfer for mean in means)]
    apart = [*kept, *(mean.apart for mean in means)]
    return [
        *(_with_means(column, len(means)) for column in scores),
        _interval("forgetting (points)", forgetting, _PAIRED),
        _interval("forward transfer (points)", transfer, _PAIRED),
        _interval(f"first task, after the second: difference to {baseline} (points)", apart, _PAIRED),
    ]


def _score(title: str, values: Sequence[float | None]) -> Column:
    percent = [None if value is None else 100 * value for value in values]
    return Column(title, ["" if value is None else f"{value:.1f}" for value in percent], percent)


def _interval(title: str, found: Sequence[Difference | None], block: str, *, signed: bool = True) -> Column:
    sign = "+" if signed else ""

    def text(d: Difference) -> str:
        mean, low, high = (f"{100 * x:{sign}.1f}" for x in (d.mean, d.low, d.high))
        return f"{mean} [{low}, {high}]" + (" *" if signed and d.excludes_zero else "")

    def numbers(get: Callable[[Difference], float]) -> list[float | None]:
        return [None if d is None else get(d) for d in found]

    return Column(
        title,
        ["" if d is None else text(d) for d in found],
        numbers(lambda d: 100 * d.mean),
        more={
            "low": numbers(lambda d: 100 * d.low),
            "high": numbers(lambda d: 100 * d.high),
            "seeds": numbers(lambda d: d.seeds),
        },
        block=block,
    )


def _published(
    spec: Mapping[str, Any], scale: str, shown: Sequence[RowResult], found: Sequence[Retention]
) -> Iterator[Column]:
    """Published accuracy on the first task after the second, by `<first>><second>` in a row's `published`."""
    known = [row.published.get(row.group) for row in shown]
    if not any(known):
        return
    values = [None if p is None else float(p["value"]) for p in known]
    cells = ["" if p is None else f"{p['value']:.2f} [{p['confidence']}]" for p in known]
    yield Column("first task, after the second: published (%)", cells, values)
    if scale == "paper":
        apart = [None if r.kept is None or v is None else 100 * r.kept - v for r, v in zip(found, values, strict=True)]
        cells = ["" if a is None else f"{a:+.2f}" for a in apart]
        yield Column("first task, after the second: ours − published (points)", cells, apart)


def _with_means(column: Column, methods: int) -> Column:
    """The column with the mean over all pairs for each method; where a pair is missing, there is none."""
    means: list[float | None] = []
    for method in range(methods):
        values = column.values[method::methods]
        known = [value for value in values if value is not None]
        means.append(statistics.fmean(known) if len(known) == len(values) else None)
    return replace(
        column,
        cells=[*column.cells, *["" if mean is None else f"{mean:.1f}" for mean in means]],
        values=[*column.values, *means],
        more={what: [*numbers, *[None] * methods] for what, numbers in column.more.items()},
    )


def _parameters(shown: Sequence[RowResult]) -> Column:
    values: list[float | None] = []
    for row in shown:
        done = [record for record in row.records if record is not None and record["status"] == DONE]
        values.append(done[0]["parameters"]["trainable"] if done else None)
    return Column("trainable parameters", ["" if v is None else f"{v:,.0f}" for v in values], values)


def _notes(spec: Mapping[str, Any], scale: str, rows: Sequence[RowResult], base: Sequence[RowResult]) -> Iterator[str]:
    yield from notes_below(spec, scale, rows, [], _on_intervals())
    untrained = [(task, _mean(row, task)) for row in base for task in tasks_of(spec, scale)]
    if known := [f"{task.title} {100 * value:.1f} %" for task, value in untrained if value is not None]:
        yield f"Untrained: {', '.join(known)}."
    pairs = [f"{first.name}>{second.name}" for first, second in pairs_of(spec, scale)]
    published = [row.published[pair] for row in rows for pair in pairs if pair in row.published]
    if published:
        sources = dict.fromkeys(f"{p['source']} [{p['confidence']}]" for p in published)
        yield f"Published numbers: {'; '.join(sources)}. {' '.join(spec['published']['note'].split())}"


def _on_intervals() -> list[str]:
    return [
        "Forgetting: first task alone minus first task after the second. Forward transfer: second task after the first "
        "minus second task alone. Kept share: first task after the second, in percent of what it was alone.",
        f"{_INTERVALS} The mean of the kept shares has none: it is no weighted sum of accuracies.",
    ]


def _every_seed(spec: Mapping[str, Any], scale: str, rows: Sequence[RowResult]) -> str:
    """The value of each task's metric in each record; cells without one have a line as well."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["row", "method", "trained on", "seed", "eval", "metric", "value", "n", "status", "record", "command"]
    )
    judged = {(task.eval, task.metric) for task in tasks_of(spec, scale)}
    for row in rows:
        for record in row.records:
            if record is None:
                writer.writerow([row.key, row.label, *[""] * 6, "missing", "", ""])
                continue
            cell = [row.key, row.label, " > ".join(trained_on(record)), record["config"].get("seed", "")]
            values = [
                [part[0], part[1], f"{one.value:.10g}", one.n]
                for part in sorted(judged)
                for one in metric_values(replace(row, records=[record]), *part)
            ]
            for value in values or [[""] * 4]:
                writer.writerow([*cell, *value, record["status"], record["id"], record["command"]])
    return out.getvalue()
