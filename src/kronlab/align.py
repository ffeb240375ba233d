"""Table 12: how far an adapter's first step goes along the gradient of full fine-tuning, on a real model and batches.

<results>/align/<scale>/<name>.json              the record, the only source of tables, figure and verdict
<results>/checkpoints/align/<scale>/<name>.jsonl one line for each layer measured here, not for git

The full gradient of every targeted linear is taken once (fp32, on the CPU, summed over all supervised tokens of the
batches); every grid point is then a draw of random factors and two small products (:mod:`kronlab.adapters.alignment`).
Draws depend on layer, grid point and seed alone, so a killed run goes on to the same numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kronlab import methods, models, runs
from kronlab.adapters import CdkaComponents, CdkaConfig, KronLoraConfig, adapter_layers, default_d_a2
from kronlab.adapters.alignment import (
    AlignedComponents,
    arrange,
    asymptotic_alignment,
    first_step,
    random_factors,
    spanned,
)
from kronlab.adapters.init import layer_gradients
from kronlab.cell import compose_config, digest, make_cell
from kronlab.data import fingerprint, load_examples
from kronlab.encode import IGNORED, SupervisedHead, collate, encode
from kronlab.errors import ConfigError
from kronlab.experiment import typed_command
from kronlab.progress import bar
from kronlab.report.alignment import alignment_table, kinds_table
from kronlab.report.tables import Table

log = logging.getLogger(__name__)
SCHEMA = 1
_DIGITS = 6  # of a cosine in the record; what the last bits of the gradient leave certain


@dataclass(frozen=True)
class Layer:
    """A targeted linear layer."""

    name: str
    d_in: int
    d_out: int

    @property
    def kind(self) -> str:
        """Its name within a block, e.g. q_proj."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Point:
    """One adapter of the grid; `sizes` as its method's config names them, all of them numbers."""

    method: str
    sizes: Mapping[str, Any]

    @property
    def label(self) -> str:
        s = self.sizes
        if self.method == "kron_lora":
            return f"Kron-LoRA r={s['r']}, A {s['d_a2']}x{s['d_a1']}"
        return f"LoRA r={s['r']}" if self.method == "lora" else f"CDKA ({s['r1']},{s['r2']},{s['r']})"

    def components(self, layer: Layer) -> AlignedComponents:
        """Its sizes in a layer.

        Raises:
            DimensionError: they do not divide the layer's dimensions.
        """
        if self.method == "kron_lora":
            return KronLoraConfig(**self.sizes).components_for(layer.name, layer.d_in, layer.d_out)
        if self.method == "cdka":
            return CdkaConfig(**self.sizes).components_for(layer.name, layer.d_in, layer.d_out)
        return CdkaComponents(layer.d_in, layer.d_out, r1=1, r2=1, r=self.sizes["r"])


_SIZES = {"lora": ("r",), "cdka": ("r1", "r2", "r"), "kron_lora": ("r", "d_a1", "d_a2")}


def make_point(key: str, row: Mapping[str, Any], hidden_size: int) -> Point:
    """A grid point from its row in the table's config.

    Raises:
        ConfigError: an unknown method, or sizes that it does not have.
    """
    method, sizes = row.get("method"), {name: value for name, value in row.items() if name != "method"}
    if method not in _SIZES:
        raise ConfigError(f"rows.{key}.method={method!r} is not known; use one of {', '.join(_SIZES)}")
    if sorted(sizes) != sorted(_SIZES[method]):
        raise ConfigError(f"rows.{key}: {method} takes {', '.join(_SIZES[method])} and was given {', '.join(sizes)}")
    if method == "kron_lora" and sizes["d_a2"] is None:
        sizes["d_a2"] = default_d_a2(hidden_size)
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"rows.{key}.{name}={value!r}: must be a whole number of at least 1")
    return Point(method, {name: sizes[name] for name in _SIZES[method]})


class Plan:
    """What is to be measured, known before any weights are loaded.

    Args:
        layout: the scale's section of a table config of kind `align`.
        rows: all grid points by key.
        extra: further overrides of the cell that names model, data and runtime.
        keys, seeds, batches: instead of the layout's.

    Raises:
        ConfigError: a setting that does not fit; DimensionError: a grid point that does not fit a layer.
    """

    def __init__(
        self,
        rows: Mapping[str, Any],
        layout: Mapping[str, Any],
        *,
        extra: Sequence[str] = (),
        keys: Sequence[str] | None = None,
        seeds: int | None = None,
        batches: int | None = None,
        weights_needed: bool = True,
    ) -> None:
        cell = make_cell(compose_config([*layout["overrides"], *extra]), weights_needed=weights_needed)
        self.config = cell.config
        self.model = cell.config["model"]
        if self.model["architecture"] not in ("causal_lm", "seq2seq_lm"):
            raise ConfigError(
                f"model {self.model['name']} is a {self.model['architecture']} model, and alignment takes language "
                "models; choose another model= or model.architecture="
            )
        if self.config["method"]["name"] != "cdka":
            raise ConfigError("extra: method is no setting of an alignment, its adapters are the rows; leave it away")
        self.seeds, self.batches = seeds or layout["seeds"], batches or layout["batches"]
        self.batch_size = layout["batch_size"]
        keys = list(keys or layout.get("rows") or rows)
        unknown = [key for key in keys if key not in rows]
        if unknown:
            raise ConfigError(f"rows={unknown}: no such grid point; known are {', '.join(rows)}")
        with torch.device("meta"):
            network = self.attach(models.build_on_meta(self.model))
        model_config: Any = network.config
        hidden = model_config.get_text_config().hidden_size
        self.points = {key: make_point(key, rows[key], hidden) for key in keys}
        self.layers = [
            Layer(_plain_name(name), layer.in_features, layer.out_features) for name, layer in adapter_layers(network)
        ]
        for layer in self.layers:
            for point in self.points.values():
                point.components(layer)
        self.task = cell.science["task"] | {"n": self.batches * self.batch_size}
        self.settings = {
            "model": cell.science["model"],
            "task": self.task,
            "data_seed": cell.science["seed"],
            "precision": "fp32",
            "batches": self.batches,
            "batch_size": self.batch_size,
            "seeds": self.seeds,
            "points": {key: {"method": p.method, **p.sizes} for key, p in self.points.items()},
        }

    @cached_property
    def key(self) -> str:
        """What makes two measurements the same one."""
        return digest({"schema": SCHEMA, **self.settings})

    def attach(self, network: nn.Module) -> nn.Module:
        """The network with the smallest adapter there is: it names the targeted layers, and is off for the gradient."""
        smallest = {"r1": 1, "r2": 1, "r": 1, "budget": None, "init": "kaiming"}
        return methods.attach(network, self.model, self.config["method"] | smallest)


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def run_align(
    spec: Mapping[str, Any],
    scale: str,
    *,
    name: str,
    results: str | Path,
    dry_run: bool = False,
    render_only: bool = False,
    force: bool = False,
    reuse: str = "local",
    **subset: Any,
) -> Table | None:
    """Measure the layers that are missing, write record, tables and figure; return the table.

    Args:
        spec: a table config of kind `align`.
        name: of the record; the spec's own for its table, another for a part of it.
        reuse: "local": only layers measured in this results directory count; "any": a record that came by git too.
        subset: `extra`, `keys`, `seeds`, `batches` of `Plan`.

    Raises:
        ConfigError: a setting that does not fit; `render_only` where nothing has been measured.
        CheckpointError: the record cannot be read.
    """
    if render_only:
        record = read_record(results, scale, name)
        if record is None:
            raise ConfigError(f"{name}: nothing has been measured at scale {scale} yet; leave render_only away")
        return write_results(spec, scale, record, results)
    plan = Plan(spec["rows"], spec["scales"][scale], weights_needed=not dry_run, **subset)
    journal = journal_path(results, scale, name)
    if force and not dry_run:
        journal.unlink(missing_ok=True)
    before = read_record(results, scale, name)
    done = {} if force else _measured_before(plan, journal, before if reuse == "any" else None)
    missing = [layer for layer in plan.layers if layer.name not in done]
    log.info(
        "%s at scale %s: %d grid points x %d seeds in %d layers, %d done",
        name, scale, len(plan.points), plan.seeds, len(plan.layers), len(plan.layers) - len(missing),
    )  # fmt: skip
    if dry_run:
        for point in plan.points.values():
            log.info("  %s", point.label)
        return None
    if missing or before is None or before["key"] != plan.key:
        for line in _measure(plan, missing, journal):
            done[line["layer"]["name"]] = line
        record = _record(plan, [done[layer.name] for layer in plan.layers], scale, name)
        runs.write_json(record_path(results, scale, name), record)
        log.info("wrote %s", record_path(results, scale, name))
    else:
        record = before
    return write_results(spec, scale, record, results)


def write_results(spec: Mapping[str, Any], scale: str, record: Mapping[str, Any], results: str | Path) -> Table:
    """Write the tables and the figure from the record alone."""
    from kronlab.report.figures import alignment_figure, write_figure  # matplotlib is slow to import

    results, name = Path(results), record["name"]
    beside = results / "align" / scale
    tables, figures = (results / kind / scale if name == spec["name"] else beside for kind in ("tables", "figures"))
    table = alignment_table(spec, scale, record)
    written = table.write(tables) + kinds_table(scale, record).write(beside)
    written += write_figure(alignment_figure(record), figures, name)
    for path in written:
        log.info("wrote %s", path)
    log.info("\n%s", table.markdown())
    return table


def record_path(results: str | Path, scale: str, name: str) -> Path:
    return Path(results) / "align" / scale / f"{name}.json"


def journal_path(results: str | Path, scale: str, name: str) -> Path:
    return Path(results) / "checkpoints" / "align" / scale / f"{name}.jsonl"


def read_record(results: str | Path, scale: str, name: str) -> dict[str, Any] | None:
    """The record of a measurement, or None.

    Raises:
        CheckpointError: the file is there and is not a record.
    """
    return runs.read_measurement(record_path(results, scale, name), schema=SCHEMA, part="layers")


def _measured_before(plan: Plan, journal: Path, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The journal's lines of this very plan by layer, and those of a record that may be used again."""
    lines = [line for line in runs.read_jsonl(journal) if line["key"] == plan.key]
    if record is not None and record["key"] == plan.key:
        lines += [{"key": plan.key, "batches": record["batches"], "layer": layer} for layer in record["layers"]]
    return {line["layer"]["name"]: line for line in lines}


# ------------------------------------------------------------------------------------------------- measuring


def _measure(plan: Plan, missing: Sequence[Layer], journal: Path) -> Iterator[dict[str, Any]]:
    """A line for each missing layer, kept in the journal before it is given."""
    if not missing:
        return
    runtime = plan.config["runtime"]
    if runtime["threads"]:
        torch.set_num_threads(runtime["threads"])
    gradients, batches = _full_gradients(plan, missing)
    journal.parent.mkdir(parents=True, exist_ok=True)
    runs.write_jsonl(journal, runs.read_jsonl(journal))  # drops a line that a kill cut short
    done = len(plan.layers) - len(missing)
    with bar(total=len(plan.layers), done=done, what="alignment", unit="layer", show=runtime["progress"]) as shown:
        for layer in missing:
            line = {"key": plan.key, "batches": batches, "layer": measure_layer(plan, layer, gradients.pop(layer.name))}
            with journal.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            shown.update()
            yield line


def _full_gradients(plan: Plan, wanted: Sequence[Layer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The summed gradients of the wanted layers, and what the batches were."""
    network, tokenizer = models.load(plan.model, dtype=torch.float32, source=plan.model["source"])
    examples = load_examples(
        plan.task["source"], split=plan.task["split"], n=plan.task["n"], seed=plan.config["seed"],
        data_dir=plan.config["data"]["dir"], length_fn=lambda text: len(tokenizer(text)["input_ids"]),
    )  # fmt: skip
    causal = plan.model["architecture"] == "causal_lm"
    read = [encode(e, tokenizer, causal=causal, max_length=plan.task["max_length"]) for e in examples]
    adapted = plan.attach(network)
    head = SupervisedHead(adapted, causal=causal)
    names = {layer.name for layer in wanted}
    layers = {_plain_name(name): layer for name, layer in adapter_layers(adapted) if _plain_name(name) in names}

    show = plan.config["runtime"]["progress"]

    def collated() -> Iterator[dict[str, Tensor]]:
        with bar(total=plan.batches, done=0, what="full gradient", unit="batch", show=show) as shown:
            for at in range(0, len(read), plan.batch_size):
                yield collate(read[at : at + plan.batch_size], pad_id=tokenizer.pad_token_id)
                shown.update()

    # the sum over tokens, not the mean of each batch: every supervised token counts alike, as in training
    gradients = layer_gradients(adapted, layers, collated(), lambda model, batch: head.losses(model, batch).sum())
    tokens = sum(label != IGNORED for row in read for label in row.labels)
    return gradients, {"data_sha": fingerprint(examples), "examples": len(read), "supervised_tokens": tokens}


def measure_layer(plan: Plan, layer: Layer, gradient: Tensor) -> dict[str, Any]:
    """The layer's section of the record: cosines of every grid point, one for each seed.

    Args:
        gradient: (d_out, d_in).
    """
    cosines = {}
    for key, point in plan.points.items():
        c = point.components(layer)
        arranged = arrange(gradient, c)
        steps = [first_step(arranged, spanned(random_factors(c, seed), c)) for seed in _seeds(plan, layer, key)]
        cosines[key] = {
            "sgd": [round(step.sgd, _DIGITS) for step in steps],
            "adamw": [round(step.adamw, _DIGITS) for step in steps],
        }
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    return {
        "name": layer.name,
        "kind": layer.kind,
        "d_in": layer.d_in,
        "d_out": layer.d_out,
        "gradient_norm": norm,
        "cosines": cosines,
    }


def _seeds(plan: Plan, layer: Layer, key: str) -> list[int]:
    """Independent draws for every layer and grid point, whatever else is measured beside it."""
    point = plan.settings["points"][key]
    return [int(digest([layer.name, point, seed]), 16) for seed in range(plan.seeds)]


def _record(plan: Plan, lines: Sequence[Mapping[str, Any]], scale: str, name: str) -> dict[str, Any]:
    shapes = {(layer.d_in, layer.d_out): layer for layer in plan.layers}
    return {
        "schema": SCHEMA,
        "name": name,
        "scale": scale,
        "key": plan.key,
        "command": typed_command(),
        "versions": runs.versions(),
        "git": runs.git_state(),
        "machine": runs.machine(),
        "weights": models.fingerprint(plan.model, plan.model["source"]),
        "settings": plan.settings,
        "batches": lines[0]["batches"],
        "labels": {key: point.label for key, point in plan.points.items()},
        "shapes": [_predictions(plan, layer) for layer in shapes.values()],
        "layers": [line["layer"] for line in lines],
    }


def _predictions(plan: Plan, layer: Layer) -> dict[str, Any]:
    """What the formulas say of a layer of this shape, and what an adapter of it has to train."""
    found = {}
    for key, point in plan.points.items():
        c = point.components(layer)
        found[key] = {
            "asymptotic": asymptotic_alignment(c),
            "finite": c.predicted_alignment(),
            "parameters": sum(torch.Size(shape).numel() for shape in c.shapes().values()),
        }
    return {"d_in": layer.d_in, "d_out": layer.d_out, "points": found}
