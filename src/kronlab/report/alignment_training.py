"""Table 12, part two, from its record: adapters against full fine-tuning along training, and a verdict.

A value is the mean over all adapted layers, ± the standard deviation over seeds. Intervals: 95 %, 2,000 bootstrap
resamples of seeds and of layers, each by itself; the layers of one model are no independent sample of all models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kronlab.evals.statistics import crossed_interval
from kronlab.report.alignment import Finding, spearman, verdict_line
from kronlab.report.tables import Column, Table

FULL = "full"


def adapters(record: Mapping[str, Any]) -> list[str]:
    """Row keys of all but full fine-tuning."""
    return [row for row in record["rows"] if row != FULL]


def series(record: Mapping[str, Any], row: str, metric: str) -> np.ndarray:
    """Mean over layers (seeds, steps)."""
    weights = np.asarray([record["layers"].count(kind) for kind in _kinds(record)], dtype=float)
    seeds = record["rows"][row]["seeds"]
    found = np.asarray([[seed["kinds"][kind][metric] for kind in _kinds(record)] for seed in seeds])
    return np.average(found, axis=1, weights=weights)


def chance(record: Mapping[str, Any], row: str, side: str) -> float:
    """What random subspaces overlap on average, mean over layers; side: left or right."""
    return float(_of_layers(record, row, f"chance_{side}").mean())


def overlap_over_chance(record: Mapping[str, Any], row: str) -> np.ndarray:
    """Overlap as a multiple of what chance gives, mean of left and right (seeds, steps)."""
    ratios = [series(record, row, side) / chance(record, row, side) for side in ("left", "right")]
    return np.mean(ratios, axis=0)


def _kinds(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(record["layers"]))


def _of_layers(record: Mapping[str, Any], row: str, name: str) -> np.ndarray:
    kinds = record["rows"][row]["kinds"]
    return np.asarray([kinds[kind][name] for kind in record["layers"]])


def _end(record: Mapping[str, Any], row: str, which: str) -> np.ndarray:
    """Cosines of the first or last step (seeds, layers)."""
    return np.asarray([seed["ends"][which] for seed in record["rows"][row]["seeds"]])


# --------------------------------------------------------------------------------------------------- verdict


def findings(record: Mapping[str, Any], wanted: float) -> list[Finding]:
    """Rank correlations over the adapters of cosines with full fine-tuning, and of the formula with them.

    Args:
        wanted: the correlation from which on a claim holds.

    Returns:
        None of fewer than three adapters.
    """
    rows = adapters(record)
    if len(rows) < 3:
        return []
    first, last = (np.stack([_end(record, row, which) for row in rows], axis=-1) for which in ("first", "last"))
    formula = np.broadcast_to(np.stack([_of_layers(record, row, "predicted") for row in rows], axis=-1), first.shape)
    pairs = {
        "rank correlation of the first with the last step's cosine": (first, last),
        "of the formula with the first": (formula, first),
        "of the formula with the last": (formula, last),
    }
    return [_correlation(name, np.stack(pair, axis=-1), wanted) for name, pair in pairs.items()]


def _correlation(name: str, values: np.ndarray, wanted: float) -> Finding:
    """Spearman's over adapters; values: (seeds, layers, adapters, 2)."""

    def statistic(chosen: np.ndarray) -> float:
        means = chosen.mean(axis=(0, 1))
        return spearman(means[:, 0], means[:, 1])

    value = statistic(values)
    low, high = crossed_interval(statistic, values) or (value, value)
    return Finding(name, value, (low, high), None, wanted)


# ------------------------------------------------------------------------------------------------------ table


def training_table(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> Table:
    """One row an adapter, full fine-tuning last: what was predicted, and where the update lies at both ends."""
    keys = [*adapters(record), FULL]
    rows = record["rows"]
    last = record["steps"][-1]

    def measured(title: str, metric: str, at: int, digits: int = 3) -> Column:
        found = [None if key == FULL else series(record, key, metric)[:, at] for key in keys]
        return _over_seeds(title, found, digits)

    def by_chance(side: str) -> Column:
        values = [None if key == FULL else chance(record, key, side) for key in keys]
        return Column(f"{side}, by chance", ["" if v is None else f"{v:.3f}" for v in values], values)

    predicted = [None if key == FULL else float(_of_layers(record, key, "predicted").mean()) for key in keys]
    norms = [series(record, key, "norm")[:, -1] / series(record, FULL, "norm")[:, -1] for key in keys]
    losses = [None if None in rows[key]["nll"] else np.asarray(rows[key]["nll"]) for key in keys]
    columns = [
        Column("trainable parameters", [f"{rows[key]['parameters']:,}" for key in keys],
               [rows[key]["parameters"] for key in keys]),
        Column("lr", [f"{rows[key]['lr']:g}" for key in keys], [rows[key]["lr"] for key in keys]),
        Column("formula, finite form", ["" if v is None else f"{v:.3f}" for v in predicted], predicted),
        measured("cosine, step 1", "cosine", 0),
        measured(f"cosine, step {last}", "cosine", -1),
        measured("cosine², the share of ‖ΔW_full‖²", "share", -1),
        measured("left overlap", "left", -1),
        by_chance("left"),
        measured("right overlap", "right", -1),
        by_chance("right"),
        _over_seeds("‖ΔW‖ / ‖ΔW_full‖", norms, 2),
        _over_seeds("held-out NLL (nats/token)", losses, 3),
    ]  # fmt: skip
    return Table(
        name=record["name"],
        scale=scale,
        title="Updates along training against full fine-tuning's",
        row_title="adapter",
        labels=[rows[key]["label"] for key in keys],
        keys=keys,
        columns=columns,
        notes=_notes(spec, scale, record),
    )


def _over_seeds(title: str, found: Sequence[np.ndarray | None], digits: int) -> Column:
    """Mean over seeds ± their standard deviation; found: one array of seeds for each row."""
    means = [None if f is None else float(f.mean()) for f in found]
    spreads = [None if f is None or len(f) < 2 else float(f.std(ddof=1)) for f in found]
    cells = ["" if m is None else f"{m:.{digits}f}" for m in means]
    cells = [c if s is None else f"{c} ± {s:.{digits}f}" for c, s in zip(cells, spreads, strict=True)]
    return Column(title, cells, means, spreads)


def _notes(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any]) -> list[str]:
    settings, m, v = record["settings"], record["machine"], record["versions"]
    recipe = settings["trainer"]
    return [
        f"Setting: {spec['scales'][scale]['training']['about']}.",
        verdict_line(
            findings(record, spec["verdict"]["training_rank_correlation"]), "the formula's ranking along training"
        ),
        f"Mean over {len(record['layers'])} layers, ± the standard deviation over seeds "
        f"{', '.join(map(str, settings['seeds']))}; overlap: the {settings['rank']} leading singular vectors (fewer "
        f"where the adapter's rank is smaller) after step {record['steps'][-1]}. Intervals: 95 %, bootstrap over seeds "
        "and layers.",
        "The same batches in the same order for all rows, each at its own learning rate (column lr): the full update, "
        "which all are compared with, depends on its own.",
        f"Recipe: {settings['model']['name']} ({record['weights']}), {settings['task']['name']}, batch "
        f"{recipe['batch_size']}, {recipe['optimizer']}, {recipe['schedule']}, no warm-up, {recipe['precision']}.",
        f"Machine: {m['cpu']}, {m['threads']} threads, torch {v['torch']}, transformers {v['transformers']}.",
        f"Made by: `make reproduce-{spec['name']} SCALE={scale}`.",
    ]
