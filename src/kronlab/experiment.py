"""The one road of a cell: model -> method -> data -> train -> grade -> record. Every stop can be killed and resumed."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import logging
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronlab import interrupt, lease, methods, models, moved_base, processes, runs, wandb_logger
from kronlab.adapters import QuantisedAdapter, load_quantised, quantize_adapter
from kronlab.adapters.init import gradient_init_, layer_gradients
from kronlab.cell import RECORD_SCHEMA, Cell
from kronlab.classification import ClassificationHead, encode_image, encode_sentences
from kronlab.data import Example, class_labels, few_shot, fingerprint, load_examples
from kronlab.encode import Encoded, Objective, SupervisedHead, collate, encode
from kronlab.errors import Busy, CheckpointError, ConfigError, KronlabError, ModelError
from kronlab.evals.harness import Subject
from kronlab.evals.registry import harness_of
from kronlab.evaluate import evaluate, score
from kronlab.generate import ready_to_grade
from kronlab.multiple_choice import MultipleChoiceHead, encode_question
from kronlab.runs import Store
from kronlab.train import COMPLETE, Diverged, OnStep, TrainReport, damage, mark_whole, newest_checkpoint, train

log = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run_cell(cell: Cell, *, wait: bool | None = None, weights: bool = False) -> dict[str, Any]:
    """Run a cell, or return its record if it is done; whatever had been finished before is used again.

    No two processes run a cell, or do a training that several cells share, at once (`kronlab.lease`).

    Args:
        wait: for a process that runs it, or its training, already; None: as `runtime.wait` says.
        weights: whether the trained weights are wanted too; a record without them does not count then.

    Raises:
        Busy: another process runs it, and `wait` is false; nothing was done.
        Interrupted: a signal asked for it; the same call goes on from there.
        CheckpointError: nothing can be written; there is no record then.
        KronlabError: with a record of status "failed" left behind, so that the failure is not lost.
    """
    config = cell.config
    processes.check_led()
    _check_sharing(config)
    store = Store(config["results"]["dir"])
    done = None if config["force"] else _done(cell, store, weights=weights)
    if done is not None:
        log.info("%s: done before, skipped (%s)", cell.name, store.record_path(cell.scale, cell.id))
        return done
    if config["dry_run"]:
        log.info("%s: would run as %s", cell.name, cell.id)
        return {"id": cell.id, "status": "planned", "scale": cell.scale}
    wait = bool(config["runtime"]["wait"]) if wait is None else wait
    try:
        with interrupt.guarded(), _leased(cell, store, f"{cell.scale}-{cell.id}", wait=wait) as held:
            done = None if config["force"] else _done(cell, store, weights=weights)
            if done is not None:
                log.info("%s: done meanwhile by another process", cell.name)
                return done
            return _run(cell, store, held, wait=wait)
    except interrupt.Interrupted as stop:
        stop.work = stop.work or cell.name
        raise
    finally:
        interrupt.at("")


def _done(cell: Cell, store: Store, *, weights: bool) -> dict[str, Any] | None:
    """The record of a cell that need not be run."""
    if weights and not (store.final(cell.train_id) / models.TRAINING).is_file():
        return None
    if not store.is_done(cell.scale, cell.id, reuse=cell.config["results"]["reuse"]):
        return None
    return store.read(cell.scale, cell.id)


def _leased(cell: Cell, store: Store, work: str, *, wait: bool) -> AbstractContextManager[lease.Lease]:
    stale_after = float(cell.config["runtime"]["stale_after"])
    return lease.held(store.running() / work, cell.name, wait=wait, stale_after=stale_after)


def _training(cell: Cell, store: Store, *, wait: bool) -> AbstractContextManager[lease.Lease]:
    """The lease of everything below `checkpoints/<train_id>`, which cells share."""
    return _leased(cell, store, f"train-{cell.train_id}", wait=wait)


def _run(cell: Cell, store: Store, held: lease.Lease, *, wait: bool) -> dict[str, Any]:
    """Run a cell whose lease is `held`; its record."""
    config = cell.config
    interrupt.at("start")
    record, mirror = None, wandb_logger.LiveRun(None)
    losses = store.checkpoints(cell.train_id) / "loss.jsonl"
    try:
        if config["force"]:
            with _training(cell, store, wait=wait):
                shutil.rmtree(store.checkpoints(cell.train_id), ignore_errors=True)
        store.set_aside(cell.scale, cell.id)
        store.begin(cell.scale, cell.id, afresh=config["force"])
        _prepare_process(config["runtime"])  # before the record notes the number of threads
        log.info("%s: running as %s", cell.name, cell.id)
        record = _frame(cell)
        mirror = wandb_logger.start(config, record)
        try:
            record |= _train_and_grade(cell, store, wait=wait, on_step=mirror.step)
        except Diverged as diverged:
            log.warning("%s: %s", cell.name, diverged)
            record |= {"status": runs.DIVERGED, "error": str(diverged)}
        held.check()
        path = store.write(record)
        mirror.finish(record, losses)
    except Busy:
        raise
    except Exception as error:
        refused = runs.refused_by_disk(error)
        if refused is not None:  # no fault of the cell's, and a record of it might not find room either
            raise refused from error
        if record is not None:
            record |= _failure(error)
            store.write(record)
            mirror.finish(record, losses)
        raise
    finally:
        mirror.leave()
        _give_back_memory()
    log.info("%s: %s -> %s", cell.name, summary(record), path)
    return record


def _failure(error: Exception) -> dict[str, Any]:
    """What the record of a failed cell has of it: one line, and where it came from."""
    reason = " ".join(str(error).split())
    if not isinstance(error, KronlabError):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    for folder in (str(Path(runs.__file__).resolve().parents[2]), sys.prefix, str(Path.home())):
        trace = trace.replace(f"{folder}/", "")  # no paths of this machine
    return {"status": runs.FAILED, "error": reason, "traceback": trace}


def _frame(cell: Cell) -> dict[str, Any]:
    """The fields of a record that are known before anything runs."""
    return {
        "schema": RECORD_SCHEMA,
        "id": cell.id,
        "train_id": cell.train_id,
        "scale": cell.scale,
        "name": cell.name,
        "label": methods.label(cell.config["method"]),
        "status": runs.DONE,
        "error": None,
        "config": cell.science,
        "command": typed_command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": runs.versions(),
        "git": runs.git_state(),
        "machine": runs.machine(),
    }


def typed_command() -> str:
    """What was typed, without the settings that only say where files lie on this machine."""
    script = Path(sys.argv[0])
    where = ("results.", "data.dir", "runtime.", "hydra.", "model.directory", "publish.")
    typed = [argument for argument in sys.argv[1:] if not argument.lstrip("+~").startswith(where)]
    return " ".join(["python", f"{script.parent.name}/{script.name}", *typed])


def _train_and_grade(cell: Cell, store: Store, *, wait: bool, on_step: OnStep) -> dict[str, Any]:
    config = cell.config
    _check_architecture(config)
    precision = DTYPES[config["trainer"]["precision"]]
    with ExitStack() as training:
        if methods.trains(config["method"]) or config["adapter_storage"]:
            training.enter_context(_training(cell, store, wait=wait))  # before anything is loaded: it may be put off
        _train_stages_before(cell, store, wait=wait)
        model = base_model(cell, wait=wait)
        interrupt.at("load the model")
        network, tokenizer = _network(cell, model)
        trainable, total = models.count_parameters(network)
        fields: dict[str, Any] = {
            "parameters": {"trainable": trainable, "total": total, "adapter_bytes": _adapter_bytes(network)},
            "weights": models.fingerprint(model, model["source"]),
            "train": None,
        }
        if methods.trains(config["method"]):
            fields["train"], network = _train(cell, store, network, tokenizer, on_step=on_step)
            _keep_losses(cell, store, fields["train"]["steps"])
        if config["adapter_storage"]:
            fields["storage"] = _through_storage(network, config["adapter_storage"], store.checkpoints(cell.train_id))
    network.to(_device(config["runtime"]))
    ready_to_grade(network, precision)
    folder = store.folder(cell.scale, cell.id)
    subject = Subject(network, tokenizer, config["model"]["architecture"] == "causal_lm")
    evals = {}
    with runs.PeakMemory(beside=models.kept_bytes()) as memory:
        for name, settings in config["eval"].items():
            examples = _graded_examples(config, settings)
            path = folder / name / "samples.jsonl"
            rows = evaluate(subject, examples, settings, path=path, progress=config["runtime"]["progress"])
            evals[name] = score(rows, examples, settings)
            if not all(math.isfinite(metric["value"]) for metric in evals[name]["metrics"].values()):
                if fields["train"] is not None:
                    raise Diverged(fields["train"]["steps"], "held-out")
                broken = config["model"]["name"]
                raise ModelError(f"model {broken}: its loss on {name} is not finite; try trainer.precision=fp32")
    fields["eval"] = evals
    fields["eval_peak_memory_bytes"] = memory.bytes
    fields["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return fields


def base_model(cell: Cell, *, wait: bool | None = None) -> dict[str, Any]:
    """The model section of a cell as `models.load` takes it; a base model that a cell makes is made first, once.

    Its weights lie under the same results directory as everything else of the cell. An interrupted
    pre-training goes on.

    Args:
        wait: as for `run_cell`.

    Raises:
        ModelError: the pre-training has diverged.
        KronlabError: it has failed; of them `Busy`: another process does it.
    """
    model = dict(cell.config["model"])
    if cell.pretraining is None:
        return model
    maker = cell.pretraining
    store = Store(maker.config["results"]["dir"])
    final = store.checkpoints(maker.train_id) / "final"
    if not (final / models.TRAINING).is_file():
        log.info("%s: its weights are made first, by %s", model["name"], maker.name)
        record = run_cell(maker, wait=wait, weights=True)  # its record alone, as git brings it, does not help here
        if record["status"] != runs.DONE:
            raise ModelError(f"model {model['name']}: its pre-training has {record['status']}: {record['error']}")
    _check_weights(final)
    return model | {"source": "directory", "directory": str(final)}


def _network(cell: Cell, model: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The base model (`base_model`) with the method attached, as it is before training, and the tokenizer."""
    config = cell.config
    precision = DTYPES[config["trainer"]["precision"]]
    network, tokenizer = models.load_again(model, dtype=precision, source=model["source"], head=_head(config))
    models.quantise(network, model.get("quantization"), device=_device(config["runtime"]))
    transformers.set_seed(config["seed"])  # the adapters' initialisation; the batch order has its own generator
    return methods.attach(network, config["model"], config["method"]), tokenizer


def _check_architecture(config: dict[str, Any]) -> None:
    name, architecture = config["model"]["name"], config["model"]["architecture"]
    for which, settings in config["eval"].items():
        harness = harness_of(settings)
        if architecture not in harness.architectures:
            raise ConfigError(
                f"model {name} is a {architecture} model; eval {which} grades {' or '.join(harness.architectures)}: "
                "choose another model or task, or another model.architecture"
            )


def _head(config: dict[str, Any]) -> models.Head | None:
    """The head that the evals, and the task if anything is trained, ask for.

    Raises:
        ConfigError: they do not agree on the classes.
    """
    training = methods.trains(config["method"])
    if config["model"]["architecture"] == "multiple_choice":  # one score for each choice
        return models.Head(labels=(), seed=config["seed"] if training else 0)
    if config["model"]["architecture"] not in models.CLASSIFIERS:
        return None
    asking = {f"eval {name}": settings for name, settings in config["eval"].items()}
    if training:
        asking |= {f"task {task['name']}": task for task in [*(config.get("after") or []), config["task"]]}
    found = {name: class_labels(section["source"]) for name, section in asking.items()}
    if len(set(found.values())) > 1:
        told = "; ".join(f"{name}: {', '.join(labels) or 'a score'}" for name, labels in found.items())
        raise ConfigError(
            f"one head cannot serve tasks of different classes ({told}); grade them in cells of their own"
        )
    # the base model is one cell for every seed
    return models.Head(labels=next(iter(found.values())), seed=config["seed"] if training else 0)


def _road(config: dict[str, Any], network: nn.Module, tokenizer: Any) -> tuple[Callable[[Example], Encoded], Objective]:
    """How a model of this architecture reads an example, and what its training minimises."""
    architecture, max_length = config["model"]["architecture"], config["task"]["max_length"]
    if architecture in models.CLASSIFIERS:
        head = ClassificationHead(network, regression=not class_labels(config["task"]["source"]))
        if architecture == "image_classification":
            return encode_image, head
        return partial(encode_sentences, tokenizer=tokenizer, max_length=max_length), head
    if architecture == "multiple_choice":
        return partial(encode_question, tokenizer=tokenizer, max_length=max_length), MultipleChoiceHead(network)
    causal = architecture == "causal_lm"
    read = partial(encode, tokenizer=tokenizer, causal=causal, max_length=max_length)
    return read, SupervisedHead(network, causal=causal, rows_at_once=config["trainer"]["loss_rows"])


def _examples(config: dict[str, Any], section: dict[str, Any], length_fn: Any = None) -> list[Example]:
    return load_examples(
        section["source"],
        split=section["split"],
        n=section["n"],
        seed=config["seed"],
        data_dir=config["data"]["dir"],
        length_fn=length_fn,
    )


def _graded_examples(config: dict[str, Any], settings: dict[str, Any]) -> list[Example]:
    """The examples of an eval, each prompt behind the same solved ones where `shots` asks for them."""
    examples = _examples(config, settings)
    if not settings.get("shots"):
        return examples
    shots = settings["shots"]
    solved = load_examples(  # the same for every method and seed
        settings["source"], split=shots["split"], n=shots["n"], seed=0, data_dir=config["data"]["dir"]
    )
    return few_shot(examples, solved, separator=shots["separator"])


def _train_stages_before(cell: Cell, store: Store, *, wait: bool) -> None:
    """Train what a sequence has before the cell's own task, unless its weights, or the cell's, are there.

    Every stage has a network of its own: what an optimizer or a hook leaves in one must not depend on where a run was
    interrupted.
    """
    before = cell.before
    if before is None or any((store.final(c.train_id) / models.TRAINING).is_file() for c in (cell, before)):
        return
    with _training(before, store, wait=wait):
        if (store.final(before.train_id) / models.TRAINING).is_file():
            return  # another process has done it meanwhile
        _train_stages_before(before, store, wait=wait)
        log.info("%s: first %s", cell.name, before.name)
        try:
            _train(before, store, *_network(before, base_model(before, wait=wait)))
        except Diverged as diverged:
            raise Diverged(diverged.step, f"{before.config['task']['name']} training") from diverged


def _train(
    cell: Cell, store: Store, network: nn.Module, tokenizer: Any, *, on_step: OnStep | None = None
) -> tuple[dict[str, Any], nn.Module]:
    """Train, or load the weights that an earlier run of the same `train_id` has left.

    Returns:
        the record's section, and the trained network: `network`, or another one where training has split it.
    """
    method, folder = cell.config["method"], store.checkpoints(cell.train_id)
    final = store.final(cell.train_id)
    if (final / models.TRAINING).is_file():
        log.info("taking the weights trained before (%s)", final)
        _load_weights(network, final, moved=moved_base.moves_base(method))
        return dict(json.loads((final / models.TRAINING).read_text())), network
    examples, rows, objective = _lessons(cell, network, tokenizer)
    start = None
    with runs.PeakMemory(beside=models.kept_bytes()) as memory:
        first = [collate([row], pad_id=tokenizer.pad_token_id) for row in rows[: method.get("init_batches", 0)]]
        if cell.before is not None:
            start = _load_weights(network, store.final(cell.before.train_id), moved=moved_base.moves_base(method))
        elif method.get("init") == "gradient":
            _start_from_gradient(network, first, objective)
        elif moved_base.moves_base(method):
            start = _move_base(network, folder, method, first, objective)
        fit = partial(_fit, cell, store, network, tokenizer, rows, objective, on_step=on_step)
        report, weights = processes.together(fit, partial(_take_part, cell))
    section = _train_section(report, memory.bytes, fingerprint(examples), len(examples))
    if cell.before is not None:
        section["stages_before"] = _stages_before(cell.before, store)
    if weights is not None:
        network = _put_together(cell, weights, start)
    _save_weights(network, tokenizer, final, section, start)
    return section, network


def _lessons(cell: Cell, network: nn.Module, tokenizer: Any) -> tuple[list[Example], list[Encoded], Objective]:
    """What a cell is trained on: its examples, their rows, and the loss."""
    examples = _examples(cell.config, cell.config["task"], length_fn=lambda text: len(tokenizer(text)["input_ids"]))
    read, objective = _road(cell.config, network, tokenizer)
    return examples, _rows(cell.config, tokenizer, examples, read), objective


# how the cell before read its examples, and each of them by its id: for a process of many cells
_read: tuple[object, dict[str, tuple[Example, Encoded]]] | None = None


def _rows(
    config: dict[str, Any], tokenizer: Any, examples: list[Example], read: Callable[[Example], Encoded]
) -> list[Encoded]:
    """The examples as `read` gives them; those that the cell before had, with the same tokenizer, are read already."""
    global _read
    origin = models.origin(tokenizer)
    if origin is None:
        _read = None
        return [read(example) for example in examples]
    key = (origin, config["model"]["architecture"], config["task"]["max_length"])
    known = _read[1] if _read is not None and _read[0] == key else {}
    _read = None  # what is of no use goes before more is made
    rows = []
    for example in examples:
        before, row = known.get(example.id, (None, None))
        rows.append(row if row is not None and before == example else read(example))
    _read = key, {example.id: (example, row) for example, row in zip(examples, rows, strict=True)}
    return rows


def _fit(
    cell: Cell, store: Store, network: nn.Module, tokenizer: Any, rows: Sequence[Encoded], objective: Objective, *,
    on_step: OnStep | None = None,
) -> tuple[TrainReport, dict[str, Tensor] | None]:  # fmt: skip
    """Train the network from where it stands; of several processes, each does it.

    Returns:
        the report, and the trained parameters if the processes have split them.
    """
    config = cell.config
    processes.meet()  # some had a model to load
    report = train(
        network, rows, config["trainer"], directory=store.checkpoints(cell.train_id), seed=config["seed"],
        pad_id=tokenizer.pad_token_id, objective=objective,
        runtime=config["runtime"] | {"device": _device(config["runtime"])},
        hooks=methods.hooks(network, config["method"]), on_step=on_step, run_name=f"{cell.name} [{cell.id}]",
    )  # fmt: skip
    return report, processes.whole_trained(network) if processes.sharded() else None


def _take_part(cell: Cell) -> None:
    """What the other processes do while process 0 trains a cell; they take the weights that it starts from."""
    with interrupt.guarded():  # a signal to all processes must not end this one before they have agreed to stop
        _prepare_process(cell.config["runtime"])
        network, tokenizer = _network(cell, base_model(cell))
        _, rows, objective = _lessons(cell, network, tokenizer)
        _fit(cell, Store(cell.config["results"]["dir"]), network, tokenizer, rows, objective)


def _put_together(cell: Cell, weights: dict[str, Tensor], start: dict[str, Tensor] | None) -> nn.Module:
    """The trained network in one process, from parameters that several had split."""
    network, _ = _network(cell, base_model(cell))
    if start is not None:
        moved_base.move(network, start)
    unknown = network.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    return network


def _check_sharing(config: dict[str, Any]) -> None:
    """Raise ConfigError for what cannot be trained where the processes split the parameters."""
    if not processes.sharded() or not methods.trains(config["method"]):
        return
    if config["method"]["name"] == "adalora":
        raise ConfigError("method=adalora ranks whole factors, which FSDP splits; use configs/accelerate/ddp.yaml")
    for key, off in (("loss_rows", None), ("compile", False)):
        if config["trainer"][key] != off:
            raise ConfigError(f"trainer.{key}={config['trainer'][key]} does not go with FSDP; leave it {off}")


def _stages_before(last: Cell, store: Store) -> list[dict[str, Any]]:
    """For each stage that has been trained up to `last`: its task, its train_id and what its training took."""
    section = dict(json.loads((store.final(last.train_id) / models.TRAINING).read_text()))
    earlier = section.pop("stages_before", [])
    return [*earlier, {"task": last.config["task"]["name"], "train_id": last.train_id} | section]


def _keep_losses(cell: Cell, store: Store, steps: int) -> None:
    """The loss curve belongs to the record, the checkpoint does not.

    Raises:
        CheckpointError: it has not as many steps as were trained.
    """
    kept = store.checkpoints(cell.train_id) / "loss.jsonl"
    lines = runs.read_jsonl(kept)
    if len(lines) != steps:
        raise CheckpointError(
            f"{kept} holds {len(lines)} whole lines and the training had {steps} steps; delete {kept.parent} and run "
            "the cell again"
        )
    runs.write_jsonl(store.folder(cell.scale, cell.id) / "loss.jsonl", lines)


def _through_storage(network: nn.Module, form: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Store the adapter in few bits, load it from that file, and return the record's section about it."""
    folder.mkdir(parents=True, exist_ok=True)  # an adapter that was not trained here has none yet
    path = folder / f"stored-{form['kind']}-{form['group_size']}.safetensors"
    quantize_adapter(network, form["bits"], kind=form["kind"], group_size=form["group_size"]).save(path)
    stored = QuantisedAdapter.load(path)
    error = load_quantised(network, stored)
    section = form | {
        "file_bytes": path.stat().st_size,
        "stored_bytes": stored.stored_bytes,
        "bits_per_parameter": stored.bits_per_parameter,
        "delta_error": error,
    }
    log.info("stored as %s: %s bytes, relative error of dW %s", form["kind"], f"{section['file_bytes']:,}", error)
    return section


def _mean_loss(objective: Objective) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    return lambda model, batch: objective.losses(model, batch).mean()


def _start_from_gradient(network: nn.Module, batches: Sequence[dict[str, Tensor]], objective: Objective) -> None:
    """Start the adapter from the gradient of the first rows, each a batch of its own, as the authors do."""
    cosines = gradient_init_(network, batches, _mean_loss(objective))
    mean = sum(cosines.values()) / len(cosines)
    log.info(
        "started from the gradient of %d examples: the first step's mean cosine with it is %.2f", len(batches), mean
    )


def _move_base(
    network: nn.Module,
    folder: Path,
    method: dict[str, Any],
    batches: Sequence[dict[str, Tensor]],
    objective: Objective,
) -> dict[str, Tensor]:
    """Start a method of `kronlab.moved_base`; the start is drawn once and kept in `folder`, and returned.

    Raises:
        ConfigError: a rank or a layer that the start cannot be had for.
        CheckpointError: training has begun, and its start is lost or cannot be read.
    """
    file = folder / "start.safetensors"
    mend = f"delete {folder} and run the cell again"
    if not file.is_file():
        if newest_checkpoint(folder) is not None:
            raise CheckpointError(f"{file} is missing, the checkpoints beside it mean nothing without it; {mend}")
        if method["init"] == "lora_ga":
            layers = dict(moved_base.lora_layers(network))
            gradients = layer_gradients(network, layers, batches, _mean_loss(objective))
            start = moved_base.lora_ga_start(network, gradients, method["gamma"])
        else:
            start = moved_base.pissa_start(network, method["init"])
        scratch = file.with_suffix(".part")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(start, scratch)
        scratch.rename(file)
    try:
        start = load_file(file)
        moved_base.move(network, start)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({' '.join(str(error).split())}); {mend}") from error
    return start


def _train_section(report: TrainReport, peak: int | None, data_sha: str, examples: int) -> dict[str, Any]:
    return asdict(report) | {
        "seconds": round(report.seconds, 2),
        "tokens_per_s": round(report.tokens_per_s, 1),
        "peak_memory_bytes": peak,
        "data_sha": data_sha,
        "data_examples": examples,
    }


def _save_weights(
    network: nn.Module, tokenizer: Any, final: Path, section: dict[str, Any], start: dict[str, Tensor] | None = None
) -> None:
    """Save what was trained; the folder appears under its name only when it is whole.

    A fully trained network is saved with its tokenizer, so that the folder is a model like any other. With a `start` of
    `kronlab.moved_base`, what is saved is for the base as it was before.
    """
    scratch = final.with_name("final.part")
    shutil.rmtree(scratch, ignore_errors=True)
    if start is None:
        network.save_pretrained(scratch)  # type: ignore[operator]
    else:
        moved_base.save_as_lora(network, start, scratch)
    if isinstance(network, PreTrainedModel):
        tokenizer.save_pretrained(scratch)
    (scratch / models.TRAINING).write_text(json.dumps(section, indent=1) + "\n")
    mark_whole(scratch)
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)


def _check_weights(final: Path) -> None:
    """Refuse weights whose files are not as `_save_weights` has written them; older ones have no marker to tell.

    Raises:
        CheckpointError: a file is missing, cut or changed.
    """
    found = damage(final) if (final / COMPLETE).is_file() else None
    if found is not None:
        raise CheckpointError(f"{final} cannot be loaded ({found}); delete it and run the cell again")


def _load_weights(network: nn.Module, final: Path, *, moved: bool = False) -> dict[str, Tensor] | None:
    """Load what `_save_weights` has saved; a tensor too few, too many or of another shape is a CheckpointError.

    `moved`: it was saved with a start, which the base is moved by first, and which is returned.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from safetensors.torch import load_model

    _check_weights(final)
    start = None
    try:
        if isinstance(network, PeftModel):
            given = load_peft_weights(str(final), device="cpu")
            if moved:
                given, start = moved_base.split(given)
            missing = get_peft_model_state_dict(network, save_embedding_layers=False).keys() - given.keys()
            if missing:  # PEFT would go on with the values that these have now
                raise ValueError(f"it lacks {len(missing)} tensors, such as {min(missing)}")
            if start is not None:
                moved_base.move(network, start)
            unknown = set_peft_model_state_dict(network, given).unexpected_keys
            if unknown:
                raise ValueError(f"it has {len(unknown)} unknown tensors, such as {min(unknown)}")
        else:
            load_model(network, final / "model.safetensors", strict=True)  # a tied weight counts under either name
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{final} cannot be loaded ({reason}); delete it and run the cell again") from error
    return start


def _device(runtime: dict[str, Any]) -> str:
    if runtime["device"] == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(runtime["device"])


@cache
def _settle() -> None:
    """Keep what is imported out of later garbage collections: it stays, and looking at it takes 0.4 s each time."""
    gc.collect()
    gc.freeze()


def _give_back_memory() -> None:
    """Free what the trainer's rings of references hold, and what glibc keeps of it: the next cell's peak is its own."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _prepare_process(runtime: dict[str, Any]) -> None:
    _settle()
    if runtime["threads"]:
        torch.set_num_threads(int(runtime["threads"]))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of its own: one for each checkpoint of a fully trained model


def _adapter_bytes(network: nn.Module) -> int:
    """Bytes of the trainable weights as they are saved."""
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)


def summary(record: dict[str, Any]) -> str:
    """The scores of a record in one line."""
    if record["status"] != runs.DONE:
        return f"{record['status']}: {record['error']}"
    parts = []
    for name, result in record["eval"].items():
        metrics = result["metrics"]
        headline, metric = next(iter(metrics.items()))
        said = headline.replace("exact_match", "").replace("_", " ")
        text = f"{name} {said + ' ' if said else ''}{100 * metric['value']:.1f} % (n={metric['n']})"
        if "nll_per_token" in metrics:
            text += f", NLL {metrics['nll_per_token']['value']:.3f}"
        parts.append(text)
    return "; ".join(parts)
