"""Table 12, part two: how an adapter's update lies to that of full fine-tuning along training, beyond the first step.

<results>/align/<scale>/<name>-training.json               the record, the only source of table, figure and verdict
<results>/checkpoints/align/<scale>/<name>-training.jsonl  one line for each run measured here, not for git
<results>/checkpoints/<train_id>/trail/<step>.safetensors  the trained weights of steps 1, 2, 4, 8, ... and the last

Full fine-tuning and every adapter are ordinary cells with the same data, batch order and number of steps; only method
and learning rate differ. In every adapted linear and at every kept step, with ΔW the adapter's update and ΔW_f that of
full fine-tuning, in float64:

    cosine        ⟨ΔW, ΔW_f⟩ / (‖ΔW‖ ‖ΔW_f‖)
    share         cosine², the part of ‖ΔW_f‖² that lies along ΔW
    left, right   ‖U_kᵀ U'_k‖_F² / k of the k leading left (right) singular vectors of ΔW and ΔW_f: φ(i = j = k) of the
                  LoRA paper (arXiv 2106.09685, section 7.2); k/d for random subspaces of d dimensions
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kronlab import methods, models, runs
from kronlab.adapters.base import KronLinear
from kronlab.align import SCHEMA, Layer, Point, journal_path, make_point, read_record, record_path
from kronlab.cell import Cell, compose_config, digest, make_cell
from kronlab.errors import CheckpointError, ConfigError, KronlabError
from kronlab.experiment import base_model, run_cell, typed_command
from kronlab.progress import bar
from kronlab.report.alignment_training import training_table
from kronlab.report.tables import Table
from kronlab.runs import Store
from kronlab.train import trail_file, trail_steps

log = logging.getLogger(__name__)
RANK = 8
"""k, where neither the layer nor the adapter's rank is smaller."""
FULL = "full"  # the row of full fine-tuning
METRICS = ("cosine", "share", "left", "right", "norm")
_DIGITS = 6

# ------------------------------------------------------------------------------------------------- two matrices


def leading(delta: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading singular vectors of ΔW (m, n): left (m, k), right (n, k)."""
    u, _, v = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :k], v[:k].T


def overlap(ours: Tensor, theirs: Tensor) -> float:
    """‖UᵀU'‖_F² / k of two orthonormal bases (d, k): 1 for one subspace, 0 for orthogonal ones, k/d by chance."""
    return float((ours.T @ theirs).square().sum()) / ours.shape[1]


def compare(delta: Tensor, full: Tensor, of_full: tuple[Tensor, Tensor], k: int) -> dict[str, float]:
    """`METRICS` of an update against that of full fine-tuning; all 0 where either does not move.

    Args:
        delta, full: (m, n), float64.
        of_full: `leading` of `full`, at least k of each.
    """
    norm, reference = float(torch.linalg.vector_norm(delta)), float(torch.linalg.vector_norm(full))
    if norm == 0 or reference == 0:
        return dict.fromkeys(METRICS, 0.0) | {"norm": norm}
    cosine = float((delta * full).sum()) / (norm * reference)
    left, right = (overlap(a, b[:, :k]) for a, b in zip(leading(delta, k), of_full, strict=True))
    return {"cosine": cosine, "share": cosine**2, "left": left, "right": right, "norm": norm}


# ---------------------------------------------------------------------------------------------------- planning


class TrainingPlan:
    """The cells to train and the layers to compare, known before any weights are loaded.

    Args:
        spec: a table config of kind `align` whose scale has a section `training`.
        results: directory of all results.
        extra: further overrides of every cell.

    Raises:
        ConfigError: a setting that does not fit; DimensionError: a grid point that does not fit a layer.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        scale: str,
        results: str | Path,
        *,
        extra: Sequence[str] = (),
        force: bool = False,
        reuse: str = "local",
        weights_needed: bool = True,
    ) -> None:
        layout = spec["scales"][scale]["training"]
        keys = list(layout["rows"])
        unknown = [key for key in keys if key not in spec["rows"]]
        if unknown:
            raise ConfigError(f"training.rows={unknown}: no such grid point; known are {', '.join(spec['rows'])}")
        if any(override.startswith("method") for override in extra):
            raise ConfigError("extra: method is no setting of an alignment, its adapters are the rows; leave it away")
        self.scale, self.seeds = scale, list(layout["seeds"])
        asked = [f"results.dir={json.dumps(str(results))}", f"results.reuse={reuse}", f"force={str(force).lower()}"]

        def cells(row: str, method: Sequence[str]) -> list[Cell]:
            own = layout.get("row_overrides", {}).get(row, [])
            chosen = [f"scale={scale}", *layout["common"], *method, *own, *asked, "runtime.trail=true", *extra]
            config, found = compose_config(chosen), []
            for seed in self.seeds:  # composed once: that takes longer than all the rest of planning
                config.seed = seed
                found.append(make_cell(config, weights_needed=weights_needed))
            return found

        self.cells = {FULL: cells(FULL, [f"method={FULL}"])}
        self.model = self.cells[FULL][0].config["model"]
        config: Any = models.build_config(self.model)
        hidden = config.get_text_config().hidden_size
        self.points = {key: make_point(key, spec["rows"][key], hidden) for key in keys}
        self.cells |= {key: cells(key, _method(point)) for key, point in self.points.items()}
        self.layers = [
            Layer(_plain_name(name), module.in_features, module.out_features)
            for name, module in _adapted(self.attached(keys[0]))
        ]
        for point in self.points.values():
            for layer in self.layers:
                point.components(layer)
        self._check()

    def _check(self) -> None:
        """That the runs are comparable, and that the first step moves."""
        of_full = self.cells[FULL][0].science
        for row, cells in self.cells.items():
            science = cells[0].science
            if _apart_from_lr(science) != _apart_from_lr(of_full):
                raise ConfigError(
                    f"training.row_overrides.{row}: runs that are compared differ in method and trainer.lr alone; "
                    "move the rest to training.common"
                )
        if of_full["trainer"]["precision"] != "fp32":
            raise ConfigError(
                "trainer.precision=bf16: the small steps of full fine-tuning are lost in it; use trainer.precision=fp32"
            )
        if of_full["trainer"]["warmup_ratio"] > 0:
            raise ConfigError(
                f"trainer.warmup_ratio={of_full['trainer']['warmup_ratio']}: the first step of a warm-up does not move "
                "the weights; use trainer.warmup_ratio=0"
            )

    def attached(self, row: str) -> nn.Module:
        """The model with the adapter of a row, on the meta device."""
        with torch.device("meta"):
            return methods.attach(models.build_on_meta(self.model), self.model, self.cells[row][0].config["method"])

    def rank(self, row: str, layer: Layer) -> int:
        """k of the subspaces that are compared."""
        return min(RANK, self.points[row].components(layer).max_rank())

    def run_key(self, row: str, at: int) -> str:
        """What makes two measurements of the run of a row at seed number `at` the same one."""
        names = [layer.name for layer in self.layers]
        return digest([SCHEMA, RANK, self.cells[row][at].train_id, self.cells[FULL][at].train_id, names])

    @cached_property
    def key(self) -> str:
        """What makes two records the same one."""
        ids = {row: [cell.id for cell in cells] for row, cells in self.cells.items()}
        return digest([ids, [self.run_key(row, at) for row in self.cells for at in range(len(self.seeds))]])


def _method(point: Point) -> list[str]:
    return [f"method={point.method}", *(f"method.{size}={value}" for size, value in point.sizes.items())]


def _apart_from_lr(science: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: science[key] for key in ("model", "task", "seed", "eval")}
    return kept | {"trainer": {key: value for key, value in science["trainer"].items() if key != "lr"}}


def _adapted(network: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every layer with an adapter, ours or PEFT's LoRA."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, KronLinear | LoraLayer)]


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


# ------------------------------------------------------------------------------------------------------ running


def run_training(
    spec: Mapping[str, Any],
    scale: str,
    *,
    results: str | Path,
    dry_run: bool = False,
    render_only: bool = False,
    force: bool = False,
    reuse: str = "local",
    extra: Sequence[str] = (),
) -> Table | None:
    """Train and measure what is missing, write record, table and figure; None where the scale has no such part.

    Args:
        spec: a table config of kind `align`.
        reuse: "local": only what was trained and measured in this results directory counts; "any": a record by git too.

    Raises:
        KronlabError: a cell cannot be run, or has diverged. CheckpointError: the record or kept weights cannot be read.
    """
    name = f"{spec['name']}-training"
    if "training" not in spec["scales"][scale]:
        log.info("%s: no part along training at scale %s", spec["name"], scale)
        return None
    before = read_record(results, scale, name)
    if render_only:
        if before is None:
            log.info("%s: nothing has been measured at scale %s yet", name, scale)
            return None
        return write_results(spec, scale, before, results)
    plan = TrainingPlan(
        spec, scale, results, extra=extra, force=force and not dry_run, reuse=reuse, weights_needed=not dry_run
    )
    journal = journal_path(results, scale, name)
    if force and not dry_run:
        journal.unlink(missing_ok=True)
    current = before is not None and before["key"] == plan.key and not force
    measured = {} if force else {line["key"]: line for line in runs.read_jsonl(journal)}
    pairs = [(row, at) for row in plan.cells for at in range(len(plan.seeds))]
    missing = [pair for pair in pairs if plan.run_key(*pair) not in measured]
    if current and reuse == "any":
        missing = []
    log.info("%s at scale %s: %d runs, %d measured", name, scale, len(pairs), len(pairs) - len(missing))
    if dry_run:
        for row, at in pairs:
            state = "missing" if (row, at) in missing else "done   "
            log.info("  %s %s  %s", state, plan.cells[row][at].id, plan.cells[row][at].name)
        return None
    if missing or not current:
        records = _run_cells(plan, results)
        for line in _measure(plan, missing, records, Path(results), journal):
            measured[line["key"]] = line
        before = _record(plan, {pair: measured[plan.run_key(*pair)] for pair in pairs}, records, name)
        runs.write_json(record_path(results, scale, name), before)
        log.info("wrote %s", record_path(results, scale, name))
    assert before is not None
    return write_results(spec, scale, before, results)


def write_results(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any], results: str | Path) -> Table:
    """Write the table and the figure from the record alone."""
    from kronlab.report.alignment_training_figure import training_figure  # matplotlib is slow to import
    from kronlab.report.figures import write_figure

    results = Path(results)
    table = training_table(spec, scale, record)
    written = table.write(results / "tables" / scale)
    written += write_figure(training_figure(record), results / "figures" / scale, record["name"])
    for path in written:
        log.info("wrote %s", path)
    log.info("\n%s", table.markdown())
    return table


def _run_cells(plan: TrainingPlan, results: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The record of every cell, each with its trail.

    Raises:
        KronlabError: a cell has diverged.
    """
    store = Store(results)
    records: dict[str, list[dict[str, Any]]] = {}
    cells = [(row, cell) for row, cells in plan.cells.items() for cell in cells]
    for number, (row, cell) in enumerate(cells, start=1):
        log.info("[%d/%d]", number, len(cells))
        record = run_cell(cell)
        if record["status"] == runs.DONE and not _has_trail(store.checkpoints(cell.train_id), record):
            log.info("%s: trained again, its steps were not kept", cell.name)
            record = run_cell(replace(cell, config=cell.config | {"force": True}))
        if record["status"] != runs.DONE:
            raise KronlabError(f"{cell.name}: {record['error']} (training.row_overrides.{row} in configs/table)")
        records.setdefault(row, []).append(record)
    return records


def _has_trail(directory: Path, record: Mapping[str, Any]) -> bool:
    return all(trail_file(directory, step).is_file() for step in trail_steps(record["train"]["steps"]))


# ---------------------------------------------------------------------------------------------------- measuring


def _measure(
    plan: TrainingPlan,
    missing: Sequence[tuple[str, int]],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    results: Path,
    journal: Path,
) -> Iterator[dict[str, Any]]:
    """A line for each missing run, kept in the journal before it is given."""
    if not missing:
        return
    runtime = plan.cells[FULL][0].config["runtime"]
    journal.parent.mkdir(parents=True, exist_ok=True)
    runs.write_jsonl(journal, runs.read_jsonl(journal))  # drops a line that a kill cut short
    base = _base_weights(plan)
    with bar(total=len(missing), done=0, what="along training", unit="run", show=runtime["progress"]) as shown:
        for at in sorted({at for _, at in missing}):
            steps = trail_steps(records[FULL][at]["train"]["steps"])
            full = FullUpdates(Store(results).checkpoints(plan.cells[FULL][at].train_id), base, steps)
            for row in [row for row, where in missing if where == at]:
                folder = Store(results).checkpoints(plan.cells[row][at].train_id)
                line = {"key": plan.run_key(row, at), "row": row, "seed": plan.seeds[at]}
                line |= _norms(plan, full) if row == FULL else measure_run(plan, row, folder, full)
                with journal.open("a") as file:
                    file.write(json.dumps(line, allow_nan=False) + "\n")
                shown.update()
                yield line


def _base_weights(plan: TrainingPlan) -> dict[str, Tensor]:
    """W (d_out, d_in) of every adapted layer before training, as training begins with it."""
    model = base_model(plan.cells[FULL][0])
    network, _ = models.load(model, dtype=torch.float32, source=model["source"])
    return {layer.name: network.get_parameter(f"{layer.name}.weight").detach() for layer in plan.layers}


class FullUpdates:
    """ΔW of full fine-tuning in every layer at every kept step, with its leading singular vectors.

    Args:
        directory: the checkpoints of the cell.
        base: weights before training by layer.
    """

    def __init__(self, directory: Path, base: Mapping[str, Tensor], steps: Sequence[int]) -> None:
        self.directory, self.base, self.steps = directory, base, list(steps)
        self._vectors: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def delta(self, layer: Layer, step: int) -> Tensor:
        """(d_out, d_in), float64.

        Raises:
            CheckpointError: the kept weights cannot be read.
        """
        path = trail_file(self.directory, step)
        try:
            with safe_open(path, framework="pt") as file:
                after = file.get_tensor(f"{layer.name}.weight")
        except Exception as error:  # safetensors has types of its own
            raise _unreadable(path, error) from error
        return after.double() - self.base[layer.name].double()

    def leading(self, layer: Layer, step: int, delta: Tensor) -> tuple[Tensor, Tensor]:
        """`RANK` leading vectors of its `delta`; taken once."""
        if (layer.name, step) not in self._vectors:
            self._vectors[layer.name, step] = leading(delta, RANK)
        return self._vectors[layer.name, step]


def adapter_updates(plan: TrainingPlan, row: str, directory: Path, step: int) -> dict[str, Tensor]:
    """ΔW (d_out, d_in), float64, of every layer of an adapter at a kept step; no base weights are needed.

    Raises:
        CheckpointError: the kept weights cannot be read, or are not the adapter's.
    """
    network = plan.attached(row)
    path = trail_file(directory, step)
    try:
        kept = {name: tensor.double() for name, tensor in load_file(path).items()}
        lacking = {name for name, p in network.named_parameters() if p.requires_grad} ^ kept.keys()
        if lacking:
            raise ValueError(f"{len(lacking)} tensors too few or too many, such as {min(lacking)}")
        network.load_state_dict(kept, strict=False, assign=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    return {_plain_name(name): layer.get_delta_weight("default").detach() for name, layer in _adapted(network)}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"{path} cannot be read ({reason}); delete {path.parents[1]} and type the command again")


def measure_run(plan: TrainingPlan, row: str, directory: Path, full: FullUpdates) -> dict[str, Any]:
    """A run's section of the record: `METRICS` by kind of layer at every kept step, and all cosines of both ends.

    Args:
        directory: the checkpoints of the adapter's cell.
        full: of the same seed.
    """
    found: dict[str, list[dict[str, float]]] = {layer.name: [] for layer in plan.layers}
    for step in full.steps:
        updates = adapter_updates(plan, row, directory, step)
        for layer in plan.layers:
            delta = full.delta(layer, step)
            vectors = full.leading(layer, step, delta)
            found[layer.name].append(compare(updates[layer.name], delta, vectors, plan.rank(row, layer)))
    ends = {which: [round(found[layer.name][at]["cosine"], _DIGITS) for layer in plan.layers]
            for which, at in (("first", 0), ("last", -1))}  # fmt: skip
    return {"kinds": _by_kind(plan, found, METRICS), "ends": ends}


def _norms(plan: TrainingPlan, full: FullUpdates) -> dict[str, Any]:
    found = {
        layer.name: [{"norm": float(torch.linalg.vector_norm(full.delta(layer, step)))} for step in full.steps]
        for layer in plan.layers
    }
    return {"kinds": _by_kind(plan, found, ("norm",))}


def _by_kind(
    plan: TrainingPlan, found: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Means over the layers of a kind: kind -> metric -> one number a step."""
    kinds: dict[str, list[str]] = {}
    for layer in plan.layers:
        kinds.setdefault(layer.kind, []).append(layer.name)
    return {
        kind: {
            metric: [
                float(f"{sum(step[metric] for step in steps) / len(names):.{_DIGITS}g}")
                for steps in zip(*(found[name] for name in names), strict=True)
            ]
            for metric in metrics
        }
        for kind, names in kinds.items()
    }


def _record(
    plan: TrainingPlan,
    lines: Mapping[tuple[str, int], Mapping[str, Any]],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    name: str,
) -> dict[str, Any]:
    science = plan.cells[FULL][0].science
    rows = {}
    for row, cells in plan.cells.items():
        sections = [dict(lines[row, at]) for at in range(len(plan.seeds))]
        rows[row] = {
            "label": cells[0].config["method"]["label"] if row == FULL else plan.points[row].label,
            "lr": cells[0].config["trainer"]["lr"],
            "parameters": records[row][0]["parameters"]["trainable"],
            "cells": [cell.id for cell in cells],
            "nll": [_held_out_loss(record) for record in records[row]],
            "kinds": {} if row == FULL else _beforehand(plan, row),
            "seeds": [{key: s[key] for key in ("kinds", "ends") if key in s} for s in sections],
        }
    return {
        "schema": SCHEMA,
        "name": name,
        "scale": plan.scale,
        "key": plan.key,
        "command": typed_command(),
        "versions": runs.versions(),
        "git": runs.git_state(),
        "machine": runs.machine(),
        "weights": records[FULL][0]["weights"],
        "settings": {
            "model": science["model"],
            "task": science["task"],
            "trainer": {key: value for key, value in science["trainer"].items() if key != "lr"},
            "seeds": plan.seeds,
            "rank": RANK,
        },
        "steps": trail_steps(records[FULL][0]["train"]["steps"]),
        "layers": [layer.kind for layer in plan.layers],
        "rows": rows,
    }


def _beforehand(plan: TrainingPlan, row: str) -> dict[str, dict[str, float]]:
    """What is known of an adapter without training it, by kind of layer: the formula's cosine, overlaps by chance."""
    return {
        layer.kind: {
            "predicted": plan.points[row].components(layer).predicted_alignment(),
            "chance_left": plan.rank(row, layer) / layer.d_out,
            "chance_right": plan.rank(row, layer) / layer.d_in,
        }
        for layer in plan.layers
    }


def _held_out_loss(record: Mapping[str, Any]) -> float | None:
    metric = next(iter(record["eval"].values()))["metrics"].get("nll_per_token")
    return None if metric is None else float(metric["value"])
