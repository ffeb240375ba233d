"""A table from records: Markdown to read, CSV to compute with, LaTeX to cite. Reads records only.

A cell of the table is the mean over seeds; with one seed its spread is the standard error over test samples. What is
not known (a published number nobody could read, a peak memory that the system does not tell) is left empty.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kronlab.runs import DIVERGED, DONE, FAILED

_GIB = 2**30
_LATEX = {mark: f"\\{mark}" for mark in "&%_#${}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "·": "$\\cdot$",
    "√": "$\\surd$",
}


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


@dataclass(frozen=True)
class Column:
    """A column of the written table, value and spread as text for each row, and as a number for CSV."""

    title: str
    cells: list[str]
    values: list[float | None] = field(default_factory=list)
    spreads: list[float | None] = field(default_factory=list)


def paired_difference(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[float, float] | None:
    """Mean difference of NLL per token on the same samples, and the half-width of its 95 % interval (normal, 1.96 SE).

    Both arguments are an eval section of a record. None where the two were not graded on the same samples.
    """
    a, b = ours["samples"], baseline["samples"]
    if ours["data_sha"] != baseline["data_sha"] or a["id"] != b["id"] or len(a["id"]) < 2:
        return None
    tokens = sum(a["nll_tokens"])
    differences = [x - y for x, y in zip(a["nll"], b["nll"], strict=True)]
    mean = math.fsum(differences) / tokens
    n = len(differences)
    residuals = [d - mean * t for d, t in zip(differences, a["nll_tokens"], strict=True)]
    error = math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / tokens
    return mean, 1.96 * error


def _done(row: RowResult) -> list[Mapping[str, Any]]:
    return [r for r in row.records if r is not None and r["status"] == DONE]


def _over_seeds(values: Sequence[float], errors: Sequence[float | None]) -> tuple[float, float | None]:
    """Mean over seeds, and the standard deviation over seeds; with one seed, the standard error over samples."""
    if len(values) == 1:
        return values[0], errors[0]
    return statistics.fmean(values), statistics.stdev(values)


def metric_column(rows: Sequence[RowResult], spec: Mapping[str, Any]) -> Column:
    """One metric of one eval over all rows, in percent for rates, in nats per token for likelihoods."""
    rate = not spec["metric"].startswith("nll")
    factor, digits = (100.0, 1) if rate else (1.0, 3)
    cells: list[str] = []
    values: list[float | None] = []
    spreads: list[float | None] = []
    for row in rows:
        found = [
            r["eval"][spec["eval"]]["metrics"].get(spec["metric"]) for r in _done(row) if spec["eval"] in r["eval"]
        ]
        found = [m for m in found if m is not None]
        if not found:
            states = {r["status"] for r in row.records if r is not None}
            cells.append(next((state for state in (DIVERGED, FAILED) if state in states), ""))
            values.append(None)
            spreads.append(None)
            continue
        value, spread = _over_seeds([m["value"] for m in found], [m["stderr"] for m in found])
        values.append(value * factor)
        spreads.append(None if spread is None else spread * factor)
        text = f"{value * factor:.{digits}f}"
        cells.append(text if spread is None else f"{text} ± {spread * factor:.{digits}f}")
    return Column(spec["title"] + (" (%)" if rate else " (nats/token)"), cells, values, spreads)


def difference_column(rows: Sequence[RowResult], spec: Mapping[str, Any], baseline: str) -> Column:
    """Paired NLL difference to the baseline row at the first seed that both have."""
    # by seed; a base model has no seed and is compared with the first
    references = {r["config"].get("seed"): r for row in rows if row.key == baseline for r in _done(row)}
    cells: list[str] = []
    values: list[float | None] = []
    spreads: list[float | None] = []
    for row in rows:
        pair = None
        mine = next((r for r in _done(row) if "seed" not in r["config"] or r["config"]["seed"] in references), None)
        if references and mine is not None and row.key != baseline:
            reference = references.get(mine["config"].get("seed"), next(iter(references.values())))
            sections = [record["eval"].get(spec["eval"]) for record in (mine, reference)]
            if None not in sections:
                pair = paired_difference(sections[0], sections[1])
        cells.append("" if pair is None else f"{pair[0]:+.3f} ± {pair[1]:.3f}")
        values.append(None if pair is None else pair[0])
        spreads.append(None if pair is None else pair[1])
    return Column(f"{spec['title']}: difference to {baseline}, paired, 95 %", cells, values, spreads)


def _cost_columns(rows: Sequence[RowResult]) -> list[Column]:
    def column(title: str, get: Any, digits: int = 0) -> Column:
        values: list[float | None] = []
        for row in rows:
            found = [get(r) for r in _done(row)]
            found = [v for v in found if v is not None]
            values.append(statistics.fmean(found) if found else None)
        return Column(title, ["" if v is None else f"{v:,.{digits}f}" for v in values], values)

    def train(key: str, scale: float = 1.0) -> Any:
        return lambda r: None if r["train"] is None or r["train"][key] is None else r["train"][key] / scale

    return [
        column("trainable parameters", lambda r: r["parameters"]["trainable"]),
        column("training time (s)", train("seconds")),
        column("tokens/s", train("tokens_per_s")),
        column("peak memory, training (GiB)", train("peak_memory_bytes", _GIB), 2),
        column("final training loss", train("final_loss"), 3),
    ]


@dataclass(frozen=True)
class Table:
    """A finished table; `write` puts it into a directory as `<name>.md`, `.csv` and `.tex`."""

    name: str
    scale: str
    title: str
    labels: list[str]
    columns: list[Column]
    notes: list[str]
    keys: list[str]
    row_title: str = "method"

    def markdown(self) -> str:
        head = [self.row_title, *[c.title for c in self.columns]]
        lines = [
            f"# {self.title} ({self.name}, scale {self.scale})",
            "",
            _pipe(head),
            _pipe(["---"] + ["---:"] * len(self.columns)),
        ]
        for i, label in enumerate(self.labels):
            lines.append(_pipe([label, *[c.cells[i] for c in self.columns]]))
        lines += ["", *[f"- {note}" for note in self.notes], ""]
        return "\n".join(lines)

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = ["key", self.row_title]
        for c in self.columns:
            head += [c.title, f"{c.title}: spread"] if any(s is not None for s in c.spreads) else [c.title]
        writer.writerow(head)
        for i, (key, label) in enumerate(zip(self.keys, self.labels, strict=True)):
            row: list[Any] = [key, label]
            for c in self.columns:
                row.append("" if c.values[i] is None else f"{c.values[i]:.10g}")
                if any(s is not None for s in c.spreads):
                    row.append("" if c.spreads[i] is None else f"{c.spreads[i]:.6g}")
            writer.writerow(row)
        return out.getvalue()

    def latex(self) -> str:
        def clean(text: str) -> str:
            return "".join(_LATEX.get(mark, mark) for mark in text)

        lines = [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}\\centering",
            f"\\caption{{{clean(self.title)}}}",
            "\\begin{tabular}{l" + "r" * len(self.columns) + "}\\toprule",
            " & ".join(clean(t) for t in [self.row_title, *[c.title for c in self.columns]]) + " \\\\ \\midrule",
        ]
        for i, label in enumerate(self.labels):
            lines.append(" & ".join(clean(t) for t in [label, *[c.cells[i] for c in self.columns]]) + " \\\\")
        return "\n".join([*lines, "\\bottomrule\\end{tabular}", "\\end{table}", ""])

    def write(self, directory: Path) -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        written = []
        for suffix, text in (("md", self.markdown()), ("csv", self.csv()), ("tex", self.latex())):
            path = directory / f"{self.name}.{suffix}"
            scratch = path.with_suffix(f".{suffix}.tmp")
            scratch.write_text(text)
            scratch.replace(path)
            written.append(path)
        return written


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def build(spec: Mapping[str, Any], scale: str, rows: Sequence[RowResult], *, extra_notes: Sequence[str] = ()) -> Table:
    """Lay out a table from its config section and the records of its rows."""
    layout = spec["scales"][scale]
    columns: list[Column] = []
    published = spec.get("published")
    if published and any(row.published for row in rows):
        read = [next(iter(row.published.values()), None) for row in rows]
        values: list[float | None] = [None if found is None else float(found["value"]) for found in read]
        cells = ["" if found is None else f"{found['value']:.2f} [{found['confidence']}]" for found in read]
        columns.append(Column(f"{published['title']} ({published['unit']})", cells, values))
    present = {name for row in rows for record in _done(row) for name in record["eval"]}
    for column in layout["columns"]:
        if column["eval"] not in present and column["eval"] in layout.get("optional_evals", []):
            continue
        columns.append(metric_column(rows, column))
        if column["metric"] == "nll_per_token":
            columns.append(difference_column(rows, column, spec["baseline"]))
    columns += _cost_columns(rows)
    return Table(
        name=spec["name"],
        scale=scale,
        title=spec["title"],
        labels=[row.label for row in rows],
        keys=[row.key for row in rows],
        columns=columns,
        notes=[*_notes(spec, layout, rows), *extra_notes],
    )


def _notes(spec: Mapping[str, Any], layout: Mapping[str, Any], rows: Sequence[RowResult]) -> list[str]:
    records = [record for row in rows for record in _done(row)]
    notes = [f"Setting: {layout['about']}."]
    # A mean over the seeds that are left would hide the others: every one that is not in it is named.
    for state, said in ((None, "Not run yet"), (FAILED, "Failed"), (DIVERGED, "Diverged, in no mean")):
        lacking = {row.label: sum((r and r["status"]) == state for r in row.records) for row in rows}
        named = [f"{label} ({n} seed{'s' if n > 1 else ''})" for label, n in lacking.items() if n]
        if named:
            notes.append(f"{said}: {', '.join(named)}.")
    seeds = sorted({r["config"]["seed"] for r in records if "seed" in r["config"]})
    spread = "standard deviation over seeds" if len(seeds) > 1 else "standard error over test samples"
    notes.append(
        f"Seeds: {', '.join(map(str, seeds)) or 'none'}; ± is the {spread}, for paired differences 95 % (1.96 SE)."
    )
    for name in sorted({name for r in records for name in r["eval"]}):
        counts = sorted({r["eval"][name]["metrics"]["exact_match"]["n"] for r in records if name in r["eval"]})
        notes.append(f"{name}: {', '.join(map(str, counts))} test samples, greedy decoding.")
    recipes = {r["label"]: _recipe(r["config"]) for r in records if r["train"] is not None}
    notes += [f"{label}: {recipe}." for label, recipe in recipes.items()]
    notes += [f"Machine: {text}." for text in sorted({_machine_line(r) for r in records})]
    if spec.get("published") and any(row.published for row in rows):
        notes.append(" ".join(spec["published"]["note"].split()))
    notes.append(f"Made by: `make reproduce-{spec['name']} SCALE={records[0]['scale'] if records else '...'}`.")
    return notes


def _recipe(config: Mapping[str, Any]) -> str:
    method, trainer = config["method"], config["trainer"]
    length = f"{trainer['max_steps']} steps" if trainer["max_steps"] > 0 else f"{trainer['epochs']} epoch(s)"
    alpha = f"α {method['alpha']}, " if "alpha" in method else ""
    n = config["task"]["n"]
    return (
        f"{alpha}lr {trainer['lr']:g}, batch {trainer['batch_size']}, {length}, "
        f"{'all' if n is None else n} examples of {config['task']['name']}, {trainer['precision']}"
    )


def _machine_line(record: Mapping[str, Any]) -> str:
    m, v = record["machine"], record["versions"]
    where = m["gpu"] or f"{m['cpu']} ({m['cpu_capability']}), {m['threads']} threads"
    return f"{where}, torch {v['torch']}, transformers {v['transformers']}, peft {v['peft']}"
