"""A table from records: Markdown to read, CSV to compute with, LaTeX to cite, and every seed by itself.

Reads records only.

A score is the mean over seeds; with one seed its spread is the standard error over test samples. Beside it stands what
was published, and in a second block the paired difference to the baseline row (`kronlab.report.paired`). What is not
known (a published number nobody could read, a peak memory that the system does not tell) is left empty.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from kronlab.errors import ConfigError
from kronlab.report.paired import (
    BY_BOTH,
    BY_SAMPLES,
    BY_SEEDS,
    DRAWS,
    Difference,
    baseline_of,
    mean_difference,
    metric_values,
    seed_means,
)
from kronlab.runs import DIVERGED, DONE, FAILED

_GIB = 2**30
_LATEX = {mark: f"\\{mark}" for mark in "&%_#${}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "·": "$\\cdot$",
    "√": "$\\surd$",
    "×": "$\\times$",
    "−": "$-$",
    "α": "$\\alpha$",
    "Δ": "$\\Delta$",
    "→": "$\\to$",
}
_COST = "Cost"
_CONFIDENCE: Final = "H: read in the source itself, M: second-hand, C: computed, and it matches what is published"


@dataclass(frozen=True)
class RowResult:
    """One row: its name and its records, flat over arms and seeds (None: not run yet).

    A record may lack an eval: then another arm is graded on it. `published` maps a column's key to value, source and
    confidence. Rows of a group have the key `<group>/<key in the config>`.
    """

    key: str
    label: str
    records: Sequence[Mapping[str, Any] | None]
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    group: str = ""

    @property
    def name(self) -> str:
        """Label and group, for people."""
        return f"{self.label} ({self.group})" if self.group else self.label


class Unit(NamedTuple):
    """How a metric is shown: `factor` times its value, in `name`, with so many digits; and whether less is better."""

    factor: float
    digits: int
    name: str
    less_is_better: bool = False

    @property
    def better(self) -> str:
        return "lower is better" if self.less_is_better else "higher is better"


def unit_of(metric: str) -> Unit:
    """Rates in percent, correlations and F1 times 100, likelihoods in nats, squared errors as they are."""
    if metric == "mse":
        return Unit(1.0, 3, "squared error", less_is_better=True)
    if "nll" in metric:
        return Unit(1.0, 3, "nats/token" if metric == "nll_per_token" else "nats", less_is_better=True)
    return Unit(100.0, 1, "×100" if metric.startswith(("f1", "matthews", "pearson", "spearman")) else "%")


@dataclass(frozen=True)
class Column:
    """A column of the written table, value and spread as text for each row, and as numbers for CSV.

    Attributes:
        more: further numbers of CSV, by what they are.
        block: columns of one block stand together in a table of its own, under the block's name.
        name: the title in CSV, where blocks stand side by side; empty: `title`.
        parts: each (eval, metric) that the numbers are of, where they are of any.
    """

    title: str
    cells: list[str]
    values: list[float | None] = field(default_factory=list)
    spreads: list[float | None] = field(default_factory=list)
    more: Mapping[str, list[float | None]] = field(default_factory=dict)
    block: str = ""
    name: str = ""
    parts: Sequence[tuple[str, str]] = ()

    def numbers(self) -> dict[str, list[float | None]]:
        """Title in CSV -> numbers."""
        name = self.name or self.title
        found = {name: self.values}
        if any(s is not None for s in self.spreads):
            found[f"{name}: spread"] = self.spreads
        return found | {f"{name}: {what}": numbers for what, numbers in self.more.items()}


@dataclass(frozen=True)
class _Score:
    """A column of the layout: the mean over `parts`, each an (eval, metric); mostly there is one."""

    title: str
    parts: list[tuple[str, str]]
    published: str

    @property
    def unit(self) -> Unit:
        units = dict.fromkeys(unit_of(metric) for _, metric in self.parts)
        first = next(iter(units))
        return first if len(units) == 1 else first._replace(name="×100" if first.factor == 100 else "")


def scores_of(layout: Mapping[str, Any], present: Iterable[str]) -> list[_Score]:
    """The score columns that a table has; those of an optional eval that is not `present` are left out.

    The published numbers of an eval stand beside its first column, unless a column names a key of its own.

    Raises:
        ConfigError: a mean is of an eval that has no column.
    """
    lacking = set(layout.get("optional_evals", [])) - set(present)
    metrics: dict[str, str] = {}
    for column in layout["columns"]:
        if "eval" in column:
            metrics.setdefault(column["eval"], column["metric"])
    scores, seen = [], set()
    for column in layout["columns"]:
        evals = column.get("mean_of") or [column["eval"]]
        unknown = [name for name in evals if name not in metrics]
        if unknown:
            raise ConfigError(f"column {column['title']!r}: mean_of names {unknown[0]}, which has no column of its own")
        if lacking & set(evals):
            continue
        default = "mean" if "mean_of" in column else column["eval"]
        key = column.get("published") or ("" if default in seen else default)
        seen.add(default)
        parts = [(name, column.get("metric") or metrics[name]) for name in evals]
        scores.append(_Score(column["title"], parts, key))
    return scores


def _titled(title: str, unit: str) -> str:
    if not unit:
        return title
    return f"{title[:-1]}, {unit})" if title.endswith(")") else f"{title} ({unit})"


def _done(row: RowResult) -> list[Mapping[str, Any]]:
    return [r for r in row.records if r is not None and r["status"] == DONE]


def _over_seeds(values: Sequence[float], errors: Sequence[float | None]) -> tuple[float, float | None]:
    """Mean over seeds, and the standard deviation over seeds; with one seed, the standard error over samples."""
    if len(values) == 1:
        return values[0], errors[0]
    return statistics.fmean(values), statistics.stdev(values)


def _score_column(rows: Sequence[RowResult], score: _Score) -> Column:
    factor, digits, name, _ = score.unit
    made = Column(_titled(score.title, name), [], [], [], {"seeds": []}, parts=score.parts)
    for row in rows:
        found = seed_means(row, score.parts)
        made.more["seeds"].append(len(found))
        if not found:
            states = {r["status"] for r in row.records if r is not None}
            made.cells.append(next((state for state in (DIVERGED, FAILED) if state in states), ""))
            made.values.append(None)
            made.spreads.append(None)
            continue
        value, spread = _over_seeds([v for v, _ in found.values()], [error for _, error in found.values()])
        made.values.append(value * factor)
        made.spreads.append(None if spread is None else spread * factor)
        text = f"{value * factor:.{digits}f}"
        made.cells.append(text if spread is None else f"{text} ± {spread * factor:.{digits}f}")
    return made


def _published_columns(rows: Sequence[RowResult], score: _Score, ours: Column, *, comparable: bool) -> Iterator[Column]:
    """What was published, and by how much ours is above it where the two are of the same models and data."""
    found = [row.published.get(score.published) for row in rows]
    if not any(found):
        return
    values = [None if p is None else float(p["value"]) for p in found]
    cells = ["" if p is None else f"{p['value']:.2f} [{p['confidence']}]" for p in found]
    yield Column(_titled(f"{score.title}: published", score.unit.name), cells, values)
    if comparable:
        apart = [None if a is None or b is None else a - b for a, b in zip(ours.values, values, strict=True)]
        yield Column(
            _titled(f"{score.title}: ours − published", score.unit.name.replace("%", "points")),
            ["" if d is None else f"{d:+.2f}" for d in apart],
            apart,
        )


def _difference_column(score: _Score, found: Sequence[Difference | None], *, baseline: str, block: str) -> Column:
    factor, digits, name, _ = score.unit

    def text(d: Difference) -> str:
        mean, low, high = (f"{factor * x:+.{digits}f}" for x in (d.mean, d.low, d.high))
        return f"{mean} [{low}, {high}]" + (" *" if d.excludes_zero else "")

    return Column(
        _titled(score.title, name.replace("%", "points")),
        ["" if d is None else text(d) for d in found],
        [None if d is None else factor * d.mean for d in found],
        more={
            "low": [None if d is None else factor * d.low for d in found],
            "high": [None if d is None else factor * d.high for d in found],
            "seeds": [None if d is None else d.seeds for d in found],
        },
        block=block,
        name=f"{score.title}: difference to {baseline}",
        parts=score.parts,
    )


def _seeds_column(rows: Sequence[RowResult], scores: Sequence[Column]) -> Column:
    """How many seeds are in the means of a row; a base model has none."""
    cells: list[str] = []
    values: list[float | None] = []
    for i, row in enumerate(rows):
        counts = {int(c.more["seeds"][i] or 0) for c in scores} - {0}
        untrained = all("seed" not in r["config"] for r in _done(row))
        values.append(min(counts) if counts and not untrained else None)
        text = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else "".join(map(str, counts))
        cells.append("–" if counts and untrained else text)
    return Column("seeds", cells, values)


def _record_column(
    rows: Sequence[RowResult], title: str, get: Callable[[Mapping[str, Any]], Any], digits: int = 0, block: str = _COST
) -> Column:
    """The mean of a number over the finished records that have it."""
    values: list[float | None] = []
    for row in rows:
        found = [v for v in map(get, _done(row)) if v is not None]
        values.append(statistics.fmean(found) if found else None)
    return Column(title, ["" if v is None else f"{v:,.{digits}f}" for v in values], values, block=block)


def _cost_columns(rows: Sequence[RowResult]) -> list[Column]:
    def train(key: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], Any]:
        return lambda r: None if r["train"] is None or r["train"][key] is None else r["train"][key] / scale

    def storage(key: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], Any]:
        return lambda r: None if r.get("storage", {}).get(key) is None else r["storage"][key] / scale

    stored = [
        _record_column(rows, "adapter as stored (KiB)", storage("file_bytes", 1024), 1),
        _record_column(rows, "bits a parameter", storage("bits_per_parameter"), 2),
        _record_column(rows, "error of ΔW (%)", storage("delta_error", 0.01), 2),
    ]
    return [
        *[column for column in stored if any(column.cells)],
        _record_column(rows, "training time (s)", train("seconds")),
        _record_column(rows, "tokens/s", train("tokens_per_s")),
        _record_column(rows, "peak memory, training (GiB)", train("peak_memory_bytes", _GIB), 2),
        _record_column(rows, "final training loss", train("final_loss"), 3),
    ]


@dataclass(frozen=True)
class Table:
    """A finished table; `write` puts it into a directory as `<name>.md`, `.csv` and `.tex`.

    Attributes:
        groups: of each row, shown first under `group_title`; empty: rows have none.
        seeds: what goes into `<name>.seeds.csv`, the single values behind the means; empty: there is no such file.
        more: tables of the same records in another form, written beside it under names of their own.
    """

    name: str
    scale: str
    title: str
    labels: list[str]
    columns: list[Column]
    notes: list[str]
    keys: list[str]
    row_title: str = "method"
    groups: list[str] = field(default_factory=list)
    group_title: str = "model"
    seeds: str = ""
    more: Sequence[Table] = ()

    def _names(self) -> tuple[list[str], list[list[str]]]:
        """What names the rows: titles, and for each row its group (if there are groups) and label."""
        if not self.groups:
            return [self.row_title], [[label] for label in self.labels]
        return [self.group_title, self.row_title], [list(pair) for pair in zip(self.groups, self.labels, strict=True)]

    def blocks(self) -> dict[str, list[Column]]:
        """The columns of each block, in order."""
        blocks: dict[str, list[Column]] = {}
        for column in self.columns:
            blocks.setdefault(column.block, []).append(column)
        return blocks

    def markdown(self) -> str:
        titles, names = self._names()
        lines = [f"# {self.title} ({self.name}, scale {self.scale})", ""]
        for block, columns in self.blocks().items():
            lines += [f"## {block}", ""] if block else []
            lines.append(_pipe([*titles, *[c.title for c in columns]]))
            lines.append(_pipe(["---"] * len(titles) + ["---:"] * len(columns)))
            lines += [_pipe([*name, *[c.cells[i] for c in columns]]) for i, name in enumerate(names)]
            lines.append("")
        lines += [*[f"- {note}" for note in self.notes], ""]
        return "\n".join(lines)

    def csv(self) -> str:
        titles, names = self._names()
        numbers: dict[str, list[float | None]] = {}
        for column in self.columns:
            numbers |= column.numbers()
        lines: list[list[Any]] = [["key", *titles, *numbers]]
        for i, (key, name) in enumerate(zip(self.keys, names, strict=True)):
            row = [(title, values[i]) for title, values in numbers.items()]
            lines.append([key, *name, *["" if v is None else _number(title, v) for title, v in row]])
        return _csv(lines)

    def latex(self) -> str:
        def clean(text: str) -> str:
            return "".join(_LATEX.get(mark, mark) for mark in text)

        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(clean, cells)) + " \\\\"

        titles, names = self._names()
        lines = ["% needs \\usepackage{booktabs}", "\\begin{table}\\centering", f"\\caption{{{clean(self.title)}}}"]
        for block, columns in self.blocks().items():
            lines += [f"\\par\\medskip {clean(block)}\\\\[2pt]"] if block else []
            lines.append("\\begin{tabular}{" + "l" * len(titles) + "r" * len(columns) + "}\\toprule")
            lines.append(line([*titles, *[c.title for c in columns]]) + " \\midrule")
            lines += [line([*name, *[c.cells[i] for c in columns]]) for i, name in enumerate(names)]
            lines.append("\\bottomrule\\end{tabular}")
        return "\n".join([*lines, "\\end{table}", ""])

    def write(self, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        texts = {"md": self.markdown(), "csv": self.csv(), "tex": self.latex(), "seeds.csv": self.seeds}
        written = []
        for suffix, text in texts.items():
            if text:
                path = directory / f"{self.name}.{suffix}"
                scratch = directory / f"{path.name}.tmp"
                scratch.write_text(text)
                scratch.replace(path)
                written.append(path)
        return written + [path for table in self.more for path in table.write(directory)]


def _number(title: str, value: float) -> str:
    return f"{value:.6g}" if title.endswith((": spread", ": low", ": high")) else f"{value:.10g}"


def _csv(lines: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def build(spec: Mapping[str, Any], scale: str, rows: Sequence[RowResult], *, extra_notes: Sequence[str] = ()) -> Table:
    """Lay out a table from its config section and the records of its rows.

    Raises:
        ConfigError: as `scores_of`.
    """
    layout, baseline = spec["scales"][scale], spec["baseline"]
    scores = scores_of(layout, {name for row in rows for record in _done(row) for name in record["eval"]})
    ours = [_score_column(rows, score) for score in scores]
    columns = [
        _seeds_column(rows, ours),
        _record_column(rows, "trainable parameters", lambda r: r["parameters"]["trainable"], block=""),
    ]
    for score, column in zip(scores, ours, strict=True):
        columns += [column, *_published_columns(rows, score, column, comparable=scale == "paper")]
    references = [baseline_of(row, rows, baseline) for row in rows]
    labels = list(dict.fromkeys(reference.label for reference in references if reference is not None))
    label = None if not labels else labels[0] if len(labels) == 1 else f"{baseline} of the same group"
    differences: dict[str, list[Difference | None]] = {}
    for score in scores if label is not None else []:
        found = differences[score.title] = [
            None if reference is None else mean_difference(row, reference, score.parts)
            for row, reference in zip(rows, references, strict=True)
        ]
        columns.append(_difference_column(score, found, baseline=baseline, block=f"Paired difference to {label}"))
    several = [s.title for s, c in zip(scores, ours, strict=True) if sum(v is not None for v in c.values) > 1]
    untold = [title for title, found in differences.items() if title in several and not any(found)]
    told = [d for found in differences.values() for d in found if d is not None]
    return Table(
        name=spec["name"],
        scale=scale,
        title=spec["title"],
        labels=[row.label for row in rows],
        keys=[row.key for row in rows],
        columns=[*columns, *_cost_columns(rows)],
        row_title=layout.get("row_title", "method"),
        notes=[*notes_below(spec, scale, rows, scores, [*_interval_notes(told, untold)]), *extra_notes],
        groups=[row.group for row in rows] if any(row.group for row in rows) else [],
        group_title=layout.get("group_title", "model"),
        seeds=_every_seed(rows, scores),
    )


def _every_seed(rows: Sequence[RowResult], scores: Sequence[_Score]) -> str:
    """The value of each metric in each record, in the record's own unit; cells without values have a line as well."""
    shown = dict.fromkeys(part for score in scores for part in score.parts)
    lines: list[list[Any]] = [
        [
            "row",
            "group",
            "method",
            "task",
            "seed",
            "eval",
            "metric",
            "value",
            "stderr",
            "n",
            "status",
            "record",
            "command",
        ]
    ]
    for row in rows:
        values = [(part, one) for part in shown for one in metric_values(row, *part)]
        for record in row.records:
            if record is None:
                lines.append([row.key, row.group, row.label, *[""] * 7, "missing", "", ""])
                continue
            config = record["config"]
            cell = [row.key, row.group, row.label, config.get("task", {}).get("name", ""), config.get("seed", "")]
            mine = [[*part, one.value, one.stderr, one.n] for part, one in values if one.record is record]
            for measured in mine or [[""] * 5]:
                plain = ["" if x is None else f"{x:.10g}" if isinstance(x, float) else x for x in measured]
                lines.append([*cell, *plain, record["status"], record["id"], record["command"]])
    return _csv(lines)


# ---- what stands below a table ----


def notes_below(
    spec: Mapping[str, Any],
    scale: str,
    rows: Sequence[RowResult],
    scores: Sequence[_Score],
    on_intervals: Sequence[str],
) -> list[str]:
    """Setting, what is missing, seeds, recipes, machine, published sources and the command, a sentence or two each."""
    layout = spec["scales"][scale]
    records = [record for row in rows for record in _done(row)]
    return [
        f"Setting: {layout['about']}.",
        *_absence_notes(rows, "cell" if layout.get("arms") else "seed"),
        _seed_note(records),
        *on_intervals,
        *_eval_notes(records),
        *_recipe_notes(records),
        *[f"Machine: {text}." for text in sorted({_machine_line(r) for r in records})],
        *_published_notes(spec, scale, rows, scores),
        f"Made by: `make reproduce-{spec['name']} SCALE={scale}`. Every value with its seed and record: "
        f"`{spec['name']}.seeds.csv`.",
    ]


def _absence_notes(rows: Sequence[RowResult], word: str) -> Iterator[str]:
    """A mean over the cells that are left would hide the others: every one that is not in it is named."""
    for state, said in ((None, "Not run yet"), (FAILED, "Failed"), (DIVERGED, "Diverged, in no mean")):
        lacking = {row.name: sum((r and r["status"]) == state for r in row.records) for row in rows}
        named = [f"{name} ({n} {word}{'s' if n > 1 else ''})" for name, n in lacking.items() if n]
        if named:
            yield f"{said}: {', '.join(named)}."


def _seed_note(records: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({r["config"]["seed"] for r in records if "seed" in r["config"]})
    error = "standard error over test samples"
    spread = f"standard deviation over seeds (of a single value: {error})" if len(seeds) > 1 else error
    return f"Seeds: {', '.join(map(str, seeds)) or 'none'}; ± is the {spread}."


def _interval_notes(differences: Sequence[Difference], untold: Sequence[str]) -> Iterator[str]:
    kinds = dict.fromkeys(d.how for d in differences)
    over = [f"{how} ({DRAWS:,} bootstrap draws)" for how in kinds if how != BY_SEEDS]
    over += ["seeds alone where a record keeps no samples (Student's t)"] if BY_SEEDS in kinds else []
    if differences:
        few = " Few seeds are allowed for as in Student's t." if BY_BOTH in kinds else ""
        few += " One seed: nothing is said of others." if BY_SAMPLES in kinds else ""
        yield (
            "Paired differences: same test samples, same seeds; in brackets their 95 % interval, over "
            f"{'; over '.join(over)}.{few} *: it excludes 0, without correction for the number of comparisons."
        )
    if untold:
        yield (
            f"{', '.join(untold)}: no paired difference, for want of samples in the records and of a second seed, or "
            "of seeds and test samples in common."
        )


def _eval_notes(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for name in sorted({name for r in records for name in r["eval"]}):
        graded = [r for r in records if name in r["eval"]]
        counts = sorted({next(iter(r["eval"][name]["metrics"].values()))["n"] for r in graded})
        generation = graded[0]["config"].get("eval", {}).get(name, {}).get("generation")
        how = "" if generation is None else ", sampled" if generation.get("sampling") else ", greedy decoding"
        found.setdefault(f"{', '.join(map(str, counts))} test samples{how}", []).append(name)
    for said, names in found.items():
        yield f"{', '.join(names)}: {said}."


def _recipe_notes(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How the cells were trained: first what they share, then what follows from the task, then the methods' own."""
    trained = [r for r in records if r["train"] is not None]
    if not trained:
        return
    recipes = [(r["label"], r["config"]["task"]["name"], _recipe(r["config"])) for r in trained]
    tasks = list(dict.fromkeys(task for _, task, _ in recipes))
    shared, of_task, own = [], [], []
    for key in dict.fromkeys(key for *_, recipe in recipes for key in recipe):
        if len({recipe.get(key) for *_, recipe in recipes}) == 1:
            shared.append(key)
        elif len({(task, recipe.get(key)) for _, task, recipe in recipes}) == len(tasks):
            of_task.append(key)
        else:
            own.append(key)

    def grouped(keys: Sequence[str], name: Callable[[str, str], str]) -> str:
        names: dict[Hashable, dict[str, None]] = {}
        for label, task, recipe in recipes:
            said = ", ".join(recipe[key] for key in keys if key in recipe)
            names.setdefault(said, {})[name(label, task)] = None
        return "; ".join(f"{', '.join(who)}: {said}" for said, who in names.items())

    same = ", ".join(recipes[0][2][key] for key in shared)
    yield f"Training on {', '.join(tasks)}: {same}." + (
        f" {grouped(of_task, lambda _, task: task)}." if of_task else ""
    )
    if own:
        # a method may have another setting for each task
        apart = len({(label, *(recipe.get(key) for key in own)) for label, _, recipe in recipes})
        one_each = apart == len({label for label, *_ in recipes})
        yield f"{grouped(own, lambda label, task: label if one_each else f'{label} on {task}')}."


def _recipe(config: Mapping[str, Any]) -> dict[str, str]:
    method, trainer, n = config["method"], config["trainer"], config["task"]["n"]
    alpha = {"alpha": f"α {method['alpha']}"} if "alpha" in method else {}
    return alpha | {
        "lr": f"lr {trainer['lr']:g}",
        "batch": f"batch {trainer['batch_size']}",
        "length": f"{trainer['max_steps']} steps" if trainer["max_steps"] > 0 else f"{trainer['epochs']:g} epoch(s)",
        "n": f"{'all' if n is None else f'{n:,}'} examples",
        "precision": trainer["precision"],
    }


def _published_notes(
    spec: Mapping[str, Any], scale: str, rows: Sequence[RowResult], scores: Sequence[_Score]
) -> Iterator[str]:
    sources: dict[str, dict[str, None]] = {}
    for score in scores:
        for row in rows:
            if found := row.published.get(score.published):
                sources.setdefault(f"{found['source']} [{found['confidence']}]", {})[score.title] = None
    if not sources:
        return
    told = "; ".join(f"{source}: {', '.join(titles)}" for source, titles in sources.items())
    apart = (
        ""
        if scale == "paper"
        else " They are of the papers' models and data: nothing at this scale compares with them."
    )
    yield f"Published numbers: {told} ({_CONFIDENCE}).{apart}"
    if note := spec.get("published", {}).get("note"):
        yield " ".join(note.split())


def _machine_line(record: Mapping[str, Any]) -> str:
    m, v = record["machine"], record["versions"]
    where = m["gpu"] or f"{m['cpu']} ({m['cpu_capability']}), {m['threads']} threads"
    return f"{where}, torch {v['torch']}, transformers {v['transformers']}, peft {v['peft']}"
