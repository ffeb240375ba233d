"""What is measured: a case is one setting (part, precision, sizes) in which all its peers are measured interleaved.

Parts:
    step    a whole training step of a model, all linear layers adapted: forward, backward, AdamW
    memory  the peak memory of such steps, each peer in a process of its own
    layer   forward and backward of one linear layer, shapes of several models
    trainer whole trainings, beside plain transformers.Trainer (`kronlab.bench.trainers`)
    generate greedy decoding of an eval's prompts, beside a loop and lm-eval's HFLM (`kronlab.bench.generating`)
    bank    many adapters of one base: bytes, switching, batches that mix them (`kronlab.bench.bank`)

Precision "bf16" means what the trainer does: base weights in bf16, adapters in fp32, autocast.
Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn

from kronlab import models
from kronlab.bench.bank import serve_beside
from kronlab.bench.generating import generate_beside
from kronlab.bench.measure import (
    Times,
    count_flops,
    in_fresh_process,
    interleaved,
    noted_paths,
    repeats_for,
    saved_bytes,
)
from kronlab.bench.peers import ONE_LINEAR_MODEL, OneLinear, Peer, Shape, count_shapes, make_peers
from kronlab.bench.trainers import train_once
from kronlab.cell import compose_config
from kronlab.encode import IGNORED, SupervisedHead
from kronlab.errors import ConfigError
from kronlab.experiment import DTYPES
from kronlab.runs import PeakMemory

MEMORY_STEPS = 2  # the first makes the optimizer's state


@dataclass(frozen=True)
class Case:
    """One setting to measure.

    Attributes:
        part: one of `PARTS`.
        about: for people.
        settings: all that determines what is measured, as plain data; part, dtype, peers and sizes among it.
        work: its size in FLOPs at the precision's speed, all peers and rounds together: what the bar counts.
    """

    part: str
    about: str
    settings: dict[str, Any]
    work: float

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings["dtype"]]


def plan_cases(
    rows: Mapping[str, Mapping[str, Any]],
    layout: Mapping[str, Any],
    *,
    parts: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    rounds: int | None = None,
) -> list[Case]:
    """All cases of a scale, the baseline's first.

    Args:
        rows: the peers that there are, by key.
        layout: the scale's section of the table config.
        parts, peers, dtypes: a subset; None for all that the layout names.
        rounds: instead of the layout's.

    Raises:
        ConfigError: an unknown part, peer or precision.
    """
    _known("what", parts or (), PARTS)
    _known("peers", peers or (), rows)
    _known("dtypes", dtypes or (), DTYPES)
    cases = []
    for part in parts or layout["parts"]:
        if part not in layout:
            raise ConfigError(f"what={part}: this scale has no section {part}")
        there = layout[part].get("dtypes", layout["dtypes"])
        wanted = [dtype for dtype in there if dtypes is None or dtype in dtypes]
        for section, dtype in itertools.product(PARTS[part].sections(layout[part]), wanted):
            named = section.get("peers", layout["peers"])
            chosen = {key: rows[key] for key in named if peers is None or key in peers}
            common = section | {"part": part, "dtype": dtype, "peers": chosen}
            if rounds is not None and part in ("step", "layer", "bank"):
                common["rounds"] = rounds
            if chosen:
                cases.append(PARTS[part].case(common, layout))
    return cases


def _known(what: str, asked: Sequence[str], there: Any) -> None:
    unknown = [key for key in asked if key not in there]
    if unknown:
        raise ConfigError(f"{what}: {', '.join(map(repr, unknown))} not known; use some of {', '.join(there)}")


def measure(case: Case, done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
    """Measure a case; `done` is told of its progress in shares that sum to 1.

    Returns:
        What was measured, by peer: `label`; `absent` with the reason, or the part's own fields.
    """
    part = PARTS[case.part]
    if isinstance(part, WholePart):
        return part.run(case, done)
    peers = make_peers(case.settings["peers"], list(case.settings["peers"]), _shapes(case))
    found = part.run(case, [p for p in peers if not p.absent], done)
    return {p.key: {"label": p.label, **({"absent": p.absent} if p.absent else found[p.key])} for p in peers}


# ---- the whole step


def _model_config(name: str) -> dict[str, Any]:
    config = compose_config([f"model={name}"], name="plan").model
    return {str(key): config[key] for key in config}


def _shapes(case: Case) -> Counter[Shape]:
    if case.part == "layer":
        return Counter([tuple(case.settings["shape"])])  # type: ignore[list-item]
    return count_shapes(models.build_on_meta(_model_config(case.settings["model"])))


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """bf16: as the trainer runs; fp32: nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def sharing_weights(base: nn.Module) -> nn.Module:
    """A copy of a frozen network whose modules are new and whose weights are the same tensors."""
    return copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})


def random_batch(vocabulary: int, rows: int, length: int, supervised: float, *, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens (B, T) without padding, whose last `supervised` share carries loss."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=draw)
    labels = ids.clone()
    labels[:, : length - round(supervised * length)] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class TrainingStep:
    """forward, backward, AdamW on one batch, again and again; the loss is the trainer's."""

    def __init__(self, network: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.network, self.batch, self.dtype = network.train(), batch, dtype
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        self._head = SupervisedHead(network, causal=True)

    def loss(self) -> Tensor:
        with autocast(self.dtype):
            nll, _ = self._head.token_nll(self.network, self.batch)
            return nll.mean()

    def __call__(self) -> None:
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _sizes(trained: Sequence[nn.Parameter]) -> dict[str, int]:
    return {
        "trainable": sum(p.numel() for p in trained),
        "adapter_bytes": sum(p.numel() * p.element_size() for p in trained),
    }


def _rounded(times: Times) -> dict[str, list[float]]:
    return {key: [float(f"{t:.6g}") for t in values] for key, values in vars(times).items()}


class StepPart:
    """Settings: model, batch {rows, length}, supervised (share of the tokens that carry loss), rounds."""

    def sections(self, layout: Mapping[str, Any]) -> list[dict[str, Any]]:
        common = {key: value for key, value in layout.items() if key != "batches"}
        return [common | dict(batch) for batch in layout["batches"]]

    def case(self, section: dict[str, Any], layout: Mapping[str, Any]) -> Case:
        settings = section | {"model": layout["model"]}
        flops = step_flops(settings) * len(settings["peers"]) * self.passes(settings)
        about = f"{settings['part']}, {settings['model']}, {settings['rows']}x{settings['length']}, {settings['dtype']}"
        return Case(settings["part"], about, settings, flops * _SLOWNESS[settings["dtype"]])

    def passes(self, settings: Mapping[str, Any]) -> int:
        """Steps of one peer: those that are timed, the one whose FLOPs are counted, and about one more."""
        return int(settings["rounds"]) + 2

    def run(self, case: Case, peers: Sequence[Peer], done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
        settings = case.settings
        model = _model_config(settings["model"])
        base, _ = models.load(model, dtype=case.dtype)
        batch = random_batch(base.config.vocab_size, settings["rows"], settings["length"], settings["supervised"])
        tokens = batch["input_ids"].numel()
        share = 1 / (len(peers) * self.passes(settings))
        steps, found = {}, {}
        for peer in peers:
            step = TrainingStep(_attached(base, model, peer), batch, case.dtype)
            with noted_paths() as paths:
                saved = saved_bytes(step.loss, step.network)
            found[peer.key] = _sizes(step.trained) | {
                "saved_bytes": saved,
                "flops_per_token": round(count_flops(step) / tokens),
                "paths": dict(paths),
            }
            steps[peer.key] = step
            gc.collect()  # what has counted holds the graph in a cycle: gigabytes
            done(2 * share)
        times = interleaved(steps, rounds=settings["rounds"], after_each=lambda _: done(share))
        return {key: found[key] | _rounded(times[key]) for key in steps}


def _attached(base: nn.Module, model: Mapping[str, Any], peer: Peer) -> nn.Module:
    torch.manual_seed(0)
    return peer.attach(sharing_weights(base), model)


class MemoryPart(StepPart):
    """Settings as for `step`; no rounds: the high-water mark of two steps, and what the process held before them."""

    def passes(self, settings: Mapping[str, Any]) -> int:
        return MEMORY_STEPS

    def case(self, section: dict[str, Any], layout: Mapping[str, Any]) -> Case:
        case = super().case(section, layout)
        return replace(case, work=case.work + _SECONDS_TO_START * _FLOPS_PER_S * len(section["peers"]))

    def run(self, case: Case, peers: Sequence[Peer], done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
        found = {}
        for peer in peers:
            found[peer.key] = in_fresh_process(peak_memory, case.settings, peer.key, torch.get_num_threads())
            done(1 / len(peers))
        return found


def peak_memory(settings: dict[str, Any], key: str, threads: int) -> dict[str, Any]:
    """Memory of two training steps of one peer, measured in the process that calls this.

    Returns:
        peak_memory_bytes: the high-water mark of the resident set, None where the system cannot tell;
        resident_bytes: the resident set before the steps (interpreter, packages, weights, adapter).
    """
    torch.set_num_threads(threads)
    model = _model_config(settings["model"])
    base, _ = models.load(model, dtype=DTYPES[settings["dtype"]])
    (peer,) = make_peers(settings["peers"], [key], count_shapes(base))
    torch.manual_seed(0)
    network = peer.attach(base, model)
    batch = random_batch(base.config.vocab_size, settings["rows"], settings["length"], settings["supervised"])
    step = TrainingStep(network, batch, DTYPES[settings["dtype"]])
    before = psutil.Process().memory_info().rss
    with PeakMemory() as memory:
        for _ in range(MEMORY_STEPS):
            step()
    return {"peak_memory_bytes": memory.bytes, "resident_bytes": before}


# ---- one layer


class LayerPart:
    """Settings: family, hidden_size, shape [d_in, d_out], tokens, rounds, min_seconds (of a round)."""

    def sections(self, layout: Mapping[str, Any]) -> list[dict[str, Any]]:
        common = {key: value for key, value in layout.items() if key not in ("families", "tokens")}
        return [
            common | {"family": family, "hidden_size": sizes["hidden_size"], "shape": list(shape), "tokens": tokens}
            for family, sizes in layout["families"].items()
            for shape in sizes["shapes"]
            for tokens in layout["tokens"]
        ]

    def case(self, section: dict[str, Any], layout: Mapping[str, Any]) -> Case:
        d_in, d_out = section["shape"]
        once = 4 * d_in * d_out * section["tokens"] * _SLOWNESS[section["dtype"]]
        work = max(2 * once, section["min_seconds"] * _FLOPS_PER_S) * len(section["peers"]) * (section["rounds"] + 1)
        about = f"layer, {section['family']} {d_in}→{d_out}, {section['tokens']} tokens, {section['dtype']}"
        return Case("layer", about, section, work)

    def run(self, case: Case, peers: Sequence[Peer], done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
        settings = case.settings
        d_in, d_out = settings["shape"]
        torch.manual_seed(0)
        one = OneLinear(d_in, d_out, hidden_size=settings["hidden_size"]).to(case.dtype).requires_grad_(False)
        x = torch.randn(settings["tokens"], d_in, dtype=case.dtype, requires_grad=True)
        gradient = torch.randn(settings["tokens"], d_out, dtype=case.dtype)
        share = 1 / (len(peers) * (settings["rounds"] + 1))
        passes, found, repeats = {}, {}, {}
        for peer in peers:
            network = _attached(one, ONE_LINEAR_MODEL, peer).train()
            once = LayerPass(network, x, gradient, case.dtype)
            with noted_paths() as paths:
                saved = saved_bytes(once.forward, network)
            found[peer.key] = _sizes(once.trained) | {
                "saved_bytes": saved,
                "flops_per_token": round(count_flops(once) / settings["tokens"]),
                "paths": dict(paths),
            }
            repeats[peer.key] = repeats_for(once, settings["min_seconds"])
            passes[peer.key] = once
            done(share)
        times = interleaved(passes, rounds=settings["rounds"], repeats=repeats, after_each=lambda _: done(share))
        return {key: found[key] | _rounded(times[key]) for key in passes}


class LayerPass:
    """Forward and backward of one layer on x (T, d_in), with gradients of the input and of what is trained."""

    def __init__(self, network: nn.Module, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> None:
        # the adapted layer itself, out of the wrappers that PEFT puts round a model
        inner: Any = network.get_base_model() if isinstance(network, PeftModel) else network
        self.layer, self.x, self.gradient, self.dtype = inner.linear, x, gradient, dtype
        self.trained = [p for p in network.parameters() if p.requires_grad]

    def forward(self) -> Tensor:
        with autocast(self.dtype):
            return self.layer(self.x)

    def __call__(self) -> None:
        self.forward().backward(self.gradient)
        for tensor in (self.x, *self.trained):
            tensor.grad = None


# ---- whole trainings and decodings, whose peers are no adapters


class WholePart:
    """A part that runs its peers itself, each as a whole."""

    def sections(self, layout: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(layout)]

    def case(self, section: dict[str, Any], layout: Mapping[str, Any]) -> Case:
        raise NotImplementedError

    def run(self, case: Case, done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
        raise NotImplementedError


class TrainerPart(WholePart):
    """Settings: overrides (of the cell that is trained), tokens (of a step, about), model; its peers are trainings."""

    def case(self, section: dict[str, Any], layout: Mapping[str, Any]) -> Case:
        settings = section | {"model": layout["model"]}
        sizes = {"rows": 1, "length": section["tokens"], "supervised": 1.0, "model": layout["model"]}
        work = step_flops(sizes) * _SLOWNESS[section["dtype"]] * section["steps"] * len(section["peers"])
        return Case("trainer", f"trainer, {layout['model']}, {section['steps']} steps", settings, work)

    def run(self, case: Case, done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
        settings = case.settings
        overrides = [f"model={settings['model']}", *settings["overrides"], f"trainer.max_steps={settings['steps']}"]
        found = {}
        for key, run in settings["peers"].items():
            found[key] = train_once(run, overrides)
            done(1 / len(settings["peers"]))
        return found


class GeneratePart(WholePart):
    """Settings: as `kronlab.bench.generating.generate_beside` takes them, and tokens (of a prompt, about), model."""

    def case(self, section: dict[str, Any], layout: Mapping[str, Any]) -> Case:
        settings = section | {"model": layout["model"]}
        length = section["tokens"] + section["max_new_tokens"]
        sizes = {"rows": 1, "length": length, "supervised": 1.0, "model": layout["model"]}
        # forward alone is a third of a step, and decoding is some five times slower than reading
        once = step_flops(sizes) * _SLOWNESS[section["dtype"]] * section["samples"] * 5 / 3
        shares = sum(peer.get("share", 1) for peer in section["peers"].values())
        return Case("generate", f"generate, {layout['model']}", settings, once * section["rounds"] * shares)

    def run(self, case: Case, done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
        overrides = [f"model={case.settings['model']}", *case.settings["overrides"]]
        return generate_beside(case.settings | {"overrides": overrides}, done)


class BankPart(WholePart):
    """Settings: tasks, rows and length of a batch, rounds, model; its peers serve the tasks."""

    def sections(self, layout: Mapping[str, Any]) -> list[dict[str, Any]]:
        common = {key: value for key, value in layout.items() if key != "tasks"}
        return [common | {"tasks": tasks} for tasks in layout["tasks"]]

    def case(self, section: dict[str, Any], layout: Mapping[str, Any]) -> Case:
        settings = section | {"model": layout["model"]}
        once = step_flops(settings | {"supervised": 1.0}) * _SLOWNESS[section["dtype"]] / 3  # forward alone
        adding = 0.1 * section["tasks"] * _FLOPS_PER_S
        work = (2 * once * (section["rounds"] + 2) + adding) * len(section["peers"])
        return Case("bank", f"bank, {layout['model']}, {section['tasks']} tasks, {section['dtype']}", settings, work)

    def run(self, case: Case, done: Callable[[float], object]) -> dict[str, dict[str, Any]]:
        settings = case.settings
        if settings["tasks"] <= settings["rows"]:
            raise ConfigError(f"bank: {settings['tasks']} tasks for {settings['rows']} rows; give more tasks than rows")
        model = _model_config(settings["model"])
        base, _ = models.load(model, dtype=case.dtype)
        batch = random_batch(base.config.vocab_size, settings["rows"], settings["length"], 1.0)
        del batch["labels"]
        peers = make_peers(settings["peers"], list(settings["peers"]), _shapes(case))
        served = {peer.key: (settings["peers"][peer.key]["kind"], peer) for peer in peers}
        return serve_beside(served, partial(sharing_weights, base), model, batch, settings, done)


PARTS: dict[str, StepPart | LayerPart | WholePart] = {
    "step": StepPart(),
    "memory": MemoryPart(),
    "layer": LayerPart(),
    "trainer": TrainerPart(),
    "generate": GeneratePart(),
    "bank": BankPart(),
}


# ---- how long it takes, roughly

_FLOPS_PER_S = 1e11  # of one modern core in fp32; only the proportions between cases matter to the bar
_SLOWNESS = {"fp32": 1.0, "bf16": 0.4}
_SECONDS_TO_START = 5  # a process of its own, with the model loaded


def step_flops(settings: Mapping[str, Any]) -> float:
    """FLOPs of forward and input gradient of the frozen weights, twice: what everything else comes to, about."""
    model = _model_config(settings["model"])
    network = models.build_on_meta(model)
    linear = sum(n * d_in * d_out for (d_in, d_out), n in count_shapes(network).items())
    head = network.config.vocab_size * network.config.hidden_size * settings["supervised"]
    return 2 * 4 * (linear + head) * settings["rows"] * settings["length"]
