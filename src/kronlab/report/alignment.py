"""Table 12 from the record of an alignment: measured cosines beside the formulas, by kind of layer, and a verdict.

A measured value is the mean over layers and draws of the random factors. The layers of a model are the units of every
interval: 2,000 bootstrap resamples of layers, 95 % percentile. Layers of one model are no independent sample of all
models, so an interval speaks of this model and these batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kronlab.evals.statistics import bootstrap_metric
from kronlab.report.tables import Column, Table

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
EXPONENTS = {"r2": 0.5, "r1": -0.5, "r": 0.5}
"""Of each size in √(r·r2/(r1·d_in))."""


def measured(record: Mapping[str, Any], key: str, optimiser: str) -> np.ndarray:
    """Cosines of a grid point (layers, seeds); optimiser: sgd or adamw."""
    return np.asarray([layer["cosines"][key][optimiser] for layer in record["layers"]])


def predicted(record: Mapping[str, Any], key: str, form: str) -> np.ndarray:
    """What a formula says of a grid point (layers,); form: asymptotic or finite (or parameters, their number)."""
    shapes = {(shape["d_in"], shape["d_out"]): shape["points"][key][form] for shape in record["shapes"]}
    return np.asarray([shapes[layer["d_in"], layer["d_out"]] for layer in record["layers"]])


def spread_of_draws(cosines: np.ndarray) -> float | None:
    """Standard deviation over the draws within a layer, pooled; None for one draw. cosines: (layers, seeds)."""
    return float(np.sqrt(cosines.var(axis=1, ddof=1).mean())) if cosines.shape[1] > 1 else None


# --------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Finding:
    """One claim of the theory against what was measured.

    Attributes:
        name: what was measured, in words.
        value, interval: with its 95 % bootstrap interval over layers.
        formula: what the finite form gives for the same statistic; None where there is none.
        wanted: the claim holds at or beyond this value, on the side of its sign.
    """

    name: str
    value: float
    interval: tuple[float, float]
    formula: float | None
    wanted: float

    @property
    def verdict(self) -> str:
        """`holds` or `fails` where the whole interval lies on one side of `wanted`, else `undecided`."""
        low, high = sorted(bound * np.sign(self.wanted) for bound in self.interval)
        if low >= abs(self.wanted):
            return HOLDS
        return FAILS if high < abs(self.wanted) else UNDECIDED

    @property
    def text(self) -> str:
        signed = "+.3f" if self.formula is not None else ".3f"
        formula = f", formula {self.formula:{signed}}" if self.formula is not None else ""
        low, high = self.interval
        bound = "at least" if self.wanted > 0 else "at most"
        return (
            f"{self.name} {self.value:{signed}} [{low:{signed}}, {high:{signed}}]{formula}: {self.verdict} "
            f"({bound} {self.wanted:g})"
        )


def findings(record: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[Finding]:
    """Rank correlations over all grid points, and the exponent of each size over those of CDKA and LoRA.

    The exponents are those of the least-squares fit log cos = const + Σ e_s·log s over s in r1, r2, r. What the grid
    cannot tell (a size that does not vary by itself, fewer than three points) is left out.

    Args:
        thresholds: `rank_correlation`, and `exponent` for its size, the sign being the theory's.
    """
    points = record["settings"]["points"]
    found = []
    if len(points) >= 3:
        wanted = thresholds["rank_correlation"]
        for how, name in (("sgd", "rank correlation"), ("adamw", "rank correlation, AdamW")):
            found.append(_finding(record, list(points), name, how, _rank_correlation, wanted))
    ours = [key for key, point in points.items() if point["method"] != "kron_lora"]
    sizes = {name: np.log([points[key].get(name, 1) for key in ours]) for name in EXPONENTS}  # LoRA has r1 = r2 = 1
    varying = [name for name, logs in sizes.items() if len(set(logs)) > 1]
    design = np.stack([np.ones(len(ours)), *[sizes[name] for name in varying]], axis=1)
    if len(ours) <= design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        return found
    finite = np.stack([predicted(record, key, "finite") for key in ours], axis=1)
    for name, row in zip(varying, np.linalg.pinv(design)[1:], strict=True):  # without the constant's
        wanted = float(np.copysign(thresholds["exponent"], EXPONENTS[name]))

        def exponent(cosines: np.ndarray, _: np.ndarray, row: np.ndarray = row) -> float:
            return float(row @ np.log(cosines.mean(axis=0)))

        found.append(_finding(record, ours, f"exponent of {name}", "sgd", exponent, wanted, exponent(finite, finite)))
    return found


def _finding(
    record: Mapping[str, Any],
    keys: Sequence[str],
    name: str,
    how: str,
    statistic: Callable[[np.ndarray, np.ndarray], float],
    wanted: float,
    formula: float | None = None,
) -> Finding:
    """`statistic` of measured and predicted cosines (layers, points) of the grid points `keys`."""
    cosines = np.stack([measured(record, key, how).mean(axis=1) for key in keys], axis=1)
    finite = np.stack([predicted(record, key, "finite") for key in keys], axis=1)
    metric = bootstrap_metric(statistic, cosines, finite)
    low, high = metric["ci95"] or (metric["value"], metric["value"])
    return Finding(name, metric["value"], (low, high), formula, wanted)


def _rank_correlation(cosines: np.ndarray, finite: np.ndarray) -> float:
    """Spearman's, of the means over layers of every grid point."""
    return spearman(cosines.mean(axis=0), finite.mean(axis=0))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two series; ties share their mean rank."""
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(np.stack([a, b]), axis=1))[0, 1])


def verdict_line(found: Sequence[Finding], claim: str = "the theory of the first step") -> str:
    """All findings in one line, behind what they come to: the claim fails where one fails."""
    if not found:
        return "Verdict: none, the grid has too few points."
    verdicts = {finding.verdict for finding in found}
    overall = next(verdict for verdict in (FAILS, UNDECIDED, HOLDS) if verdict in verdicts)
    return f"Verdict: {claim} {overall}: {'; '.join(finding.text for finding in found)}."


# ---------------------------------------------------------------------------------------------------- tables


def alignment_table(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> Table:
    """One row a grid point: parameters, both formulas, the measured first steps, all averaged over layers."""
    labels: Mapping[str, str] = record["labels"]
    keys = list(labels)
    finite = [float(predicted(record, key, "finite").mean()) for key in keys]
    steps = {how: [measured(record, key, how) for key in keys] for how in ("sgd", "adamw")}
    sgd = [float(cosines.mean()) for cosines in steps["sgd"]]
    columns = [
        _column("trainable parameters", [int(predicted(record, key, "parameters").sum()) for key in keys], "{:,}"),
        _column(
            "predicted √(r·r2/(r1·d_in))",
            [float(predicted(record, key, "asymptotic").mean()) for key in keys],
            "{:.4f}",
        ),
        _column("predicted, finite form", finite, "{:.4f}"),
        _measured_column("measured, gradient descent", steps["sgd"]),
        _column("measured / finite form", [m / p for m, p in zip(sgd, finite, strict=True)], "{:.3f}"),
        _measured_column("measured, AdamW", steps["adamw"]),
    ]
    baseline = spec["baseline"]
    if baseline in labels:
        reference = sgd[keys.index(baseline)]
        ratios = [value / reference if reference else None for value in sgd]
        columns.append(_column(f"gradient descent / {labels[baseline]}", ratios, "{:.2f}"))
    return Table(
        name=record["name"],
        scale=scale,
        title=spec["title"],
        row_title="adapter",
        labels=[labels[key] for key in keys],
        keys=keys,
        columns=columns,
        notes=_notes(spec, scale, record),
    )


def kinds_table(scale: str, record: Mapping[str, Any]) -> Table:
    """One row a grid point, one column a kind of layer: measured cosine of the gradient-descent step / finite form."""
    keys = list(record["labels"])
    columns = []
    for (kind, d_in, d_out), chosen in layers_by_kind(record).items():
        ratios = [
            float(measured(record, key, "sgd")[chosen].mean() / predicted(record, key, "finite")[chosen].mean())
            for key in keys
        ]
        columns.append(_column(f"{kind} {d_in}x{d_out} ({len(chosen)})", ratios, "{:.3f}"))
    return Table(
        name=f"{record['name']}-kinds",
        scale=scale,
        title="First step by kind of layer (d_in x d_out, how many): measured cosine / finite form",
        row_title="adapter",
        labels=list(record["labels"].values()),
        keys=keys,
        columns=columns,
        notes=[_data_note(record), _machine_note(record)],
    )


def layers_by_kind(record: Mapping[str, Any]) -> dict[tuple[str, int, int], list[int]]:
    """Places in `layers` of each (kind, d_in, d_out), in the order of the model."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for place, layer in enumerate(record["layers"]):
        found.setdefault((layer["kind"], layer["d_in"], layer["d_out"]), []).append(place)
    return found


def _column(title: str, values: Sequence[float | None], form: str) -> Column:
    return Column(title, ["" if value is None else form.format(value) for value in values], list(values))


def _measured_column(title: str, cosines: Sequence[np.ndarray]) -> Column:
    means, spreads = [float(c.mean()) for c in cosines], [spread_of_draws(c) for c in cosines]
    cells = [f"{m:.4f}" if s is None else f"{m:.4f} ± {s:.4f}" for m, s in zip(means, spreads, strict=True)]
    return Column(title, cells, list(means), spreads)


def _notes(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> list[str]:
    made_by = f"make reproduce-{spec['name']} SCALE={scale}" if record["name"] == spec["name"] else record["command"]
    settings = record["settings"]
    return [
        f"Setting: {spec['scales'][scale]['about']}.",
        verdict_line(findings(record, spec["verdict"])),
        "Cosine of the first step's ΔW with the descent direction of full fine-tuning, mean over "
        f"{len(record['layers'])} layers and {settings['seeds']} draws of the random factors; ± is the standard "
        "deviation over draws within a layer. For Kron-LoRA the first formula reads √(r/(d_A2·d_in)). "
        "AdamW: ε left out.",
        "Exponents: least squares of log cosine on log r1, log r2, log r over all CDKA and LoRA rows; intervals: 95 %, "
        "bootstrap over layers.",
        _data_note(record),
        _machine_note(record),
        f"Made by: `{made_by}`.",
    ]


def _data_note(record: Mapping[str, Any]) -> str:
    settings, batches = record["settings"], record["batches"]
    task, tokens = settings["task"]["name"], batches["supervised_tokens"]
    return (
        f"Gradient: {settings['model']['name']} ({record['weights']}) in {settings['precision']}, "
        f"{batches['examples']} examples of {task} with {tokens:,} supervised tokens."
    )


def _machine_note(record: Mapping[str, Any]) -> str:
    m, v = record["machine"], record["versions"]
    return f"Machine: {m['cpu']}, {m['threads']} threads, torch {v['torch']}, transformers {v['transformers']}."
