"""Count before training: parameters, bytes, ranks, predicted alignment, a memory estimate. Nothing is downloaded."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from torch import nn

from kronlab import methods, models
from kronlab.adapters import adapter_layers
from kronlab.errors import ConfigError
from kronlab.moved_base import moves_base

_BYTES = {"bf16": 2, "fp32": 4}
_ADAM_BYTES = 16  # fp32 weight, gradient and AdamW's two moments of one trainable parameter


@dataclass(frozen=True)
class Size:
    """What memory and time follow from.

    Attributes:
        trainable, base: parameters that are trained, and of the model without an adapter (tied weights once).
        hidden, depth, vocabulary: of the model; depth counts encoder and decoder layers.
        generates: whether it has logits over the vocabulary.
    """

    trainable: int
    base: int
    hidden: int
    depth: int
    vocabulary: int
    generates: bool


def lora_alignment(r: int, d_in: int) -> float:
    """Predicted cosine of LoRA's first update with the full gradient: CDKA's finite form at r1 = r2 = 1.

    sqrt(r / (r + d_in)); for r much smaller than d_in this is sqrt(r / d_in).
    """
    return math.sqrt(r / (r + d_in))


def _adapted(network: nn.Module) -> list[dict[str, Any]]:
    """One entry for each adapted layer: name, d_in, d_out, max_rank, alignment (None: no prediction), parameters."""
    found = []
    ours = dict(adapter_layers(network))
    for name, layer in ours.items():
        found.append(
            {
                "name": name,
                "d_in": layer.in_features,
                "d_out": layer.out_features,
                "max_rank": layer.max_rank(),
                "alignment": layer.predicted_alignment(),
                "parameters": sum(p.numel() for p in layer.parameters() if p.requires_grad),
            }
        )
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer) and name not in ours:
            adapter: Any = module
            d_in, d_out, rank = adapter.in_features, adapter.out_features, _rank(adapter)
            from_random = isinstance(module, LoraLayer) and not isinstance(module, AdaLoraLayer)
            found.append(
                {
                    "name": name,
                    "d_in": d_in,
                    "d_out": d_out,
                    "max_rank": None if rank is None else min(rank, d_in, d_out),
                    "alignment": lora_alignment(adapter.r["default"], d_in) if from_random else None,
                    "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
                }
            )
    return found


def _rank(layer: Any) -> int | None:
    """The largest rank that the factors of one of PEFT's layers allow ΔW; None: of a kind not known here."""
    if isinstance(layer, LoraLayer | VeraLayer):
        return int(layer.r["default"])
    if isinstance(layer, LoKrLayer):  # the rank of a Kronecker product is the product of the ranks
        return math.prod(
            min(*whole["default"].shape) if "default" in whole else layer.r["default"]
            for whole in (layer.lokr_w1, layer.lokr_w2)
        )
    return None


def make_plan(
    model: Mapping[str, Any],
    method: Mapping[str, Any],
    *,
    precision: str = "bf16",
    batch_size: int = 1,
    length: int = 1024,
    gradient_checkpointing: bool = False,
) -> dict[str, Any]:
    """Attach `method` to `model` on the meta device and count.

    Returns a dictionary with, among others: trainable_params, total_params (tied weights once, adapters included),
    trainable_share, adapter_bytes (fp32, as saved), max_rank and predicted_alignment (mean over adapted layers,
    weighted by their size, and per kind), memory_bytes (an estimate: weights, trainable state, activations, logits).

    Raises:
        ConfigError: a method or model setting that does not fit.
    """
    if precision not in _BYTES:
        raise ConfigError(f"precision={precision!r}; use bf16 or fp32")
    method = methods.with_budget(model, method)
    network = models.build_on_meta(model)
    base_total = models.count_parameters(network)[1]
    with torch.device("meta"):
        network = methods.attach(network, model, method)
    trainable, total = models.count_parameters(network)
    layers = _adapted(network)
    if moves_base(method):
        layers = [layer | {"alignment": None} for layer in layers]  # the prediction is for B = 0 and a random A
    kinds = _by_kind(layers)
    return {
        "model": model["name"],
        "method": methods.label(method),
        "trainable_params": trainable,
        "total_params": total,
        "base_params": base_total,
        "trainable_share": trainable / base_total,
        "adapter_bytes": 4 * trainable if method["name"] != "none" else 0,
        "adapted_layers": len(layers),
        "max_rank": _weighted(layers, "max_rank"),
        "predicted_alignment": _weighted(layers, "alignment"),
        "by_kind": kinds,
        "memory_bytes": training_memory(
            _size(network, model, trainable, base_total),
            precision=precision,
            batch=batch_size,
            length=length,
            checkpointing=gradient_checkpointing,
        ),
    }


def _weighted(layers: list[dict[str, Any]], key: str) -> float | None:
    known = [layer for layer in layers if layer[key] is not None]
    size = sum(layer["d_in"] * layer["d_out"] for layer in known)
    return sum(layer[key] * layer["d_in"] * layer["d_out"] for layer in known) / size if size else None


def _by_kind(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers of the same leaf name and shape together."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for layer in layers:
        groups[layer["name"].rpartition(".")[2], layer["d_in"], layer["d_out"]].append(layer)
    return [
        {
            "kind": kind,
            "layers": len(group),
            "d_in": d_in,
            "d_out": d_out,
            "params_each": group[0]["parameters"],
            "max_rank": group[0]["max_rank"],
            "predicted_alignment": group[0]["alignment"],
        }
        for (kind, d_in, d_out), group in groups.items()
    ]


def measure(model: Mapping[str, Any], method: Mapping[str, Any]) -> Size:
    """Attach `method` to `model` on the meta device and count; `make_plan` tells more, and takes longer.

    Raises:
        ConfigError: a method or model setting that does not fit.
    """
    network = models.build_on_meta(model)
    base = models.count_parameters(network)[1]
    with torch.device("meta"):
        adapted = methods.attach(network, model, method)
    return _size(adapted, model, models.count_parameters(adapted)[0], base)


def _size(network: nn.Module, model: Mapping[str, Any], trainable: int, base: int) -> Size:
    config: Any = network.config
    return Size(
        trainable=trainable,
        base=base,
        hidden=config.hidden_size,
        depth=int(getattr(config, "num_hidden_layers", 0)) + int(getattr(config, "num_decoder_layers", 0) or 0),
        vocabulary=getattr(config, "vocab_size", 0),  # an image model has none
        generates=model["architecture"] in ("causal_lm", "seq2seq_lm"),
    )


def training_memory(size: Size, *, precision: str, batch: int, length: int, checkpointing: bool) -> dict[str, int]:
    """An estimate of training memory on one device.

    Activations after Korthikanti et al. (arXiv 2205.05198), eq. 2 without the attention matrix (which fused attention
    does not keep): 34 bytes x tokens x hidden size a layer in 16 bit; with checkpointing 2 a layer and one whole layer.
    Logits: one copy in the base's precision and two in fp32 for every token. Measured peaks are in the records.
    """
    tokens, width = batch * length, _BYTES[precision] / 2
    layer = 34 * tokens * size.hidden * width
    activations = size.depth * 2 * tokens * size.hidden * width + layer if checkpointing else size.depth * layer
    logits = tokens * size.vocabulary * (_BYTES[precision] + 8) if size.generates else 0
    parts = {
        "weights": int(size.base * _BYTES[precision]),
        "trainable_state": size.trainable * _ADAM_BYTES,
        "activations": int(activations),
        "logits": int(logits),
    }
    return parts | {"total": sum(parts.values())}


def plan_budget(model: Mapping[str, Any], method: Mapping[str, Any], budget: int | str) -> dict[str, Any]:
    """The method's designs within a budget on this model, best first; see `kronlab.adapters.design.design`.

    Raises:
        ConfigError: the method has no design rules, or the budget is wrong or too small.
    """
    found = methods.designs(model, method, budget)
    return {
        "model": model["name"],
        "method": method["name"],
        "budget": budget,
        "designs": [{"label": methods.label({**method, **d.components}), **d.as_dict()} for d in found],
    }


def render_budget(plan: Mapping[str, Any], form: str, *, most: int = 12) -> str:
    """`json`: one object on one line, with all designs; `text`: a table of the first `most`.

    Raises:
        ConfigError: another format.
    """
    if form == "json":
        return json.dumps(plan)
    if form != "text":
        raise ConfigError(f"format={form!r}; use text or json")
    lines = [
        f"{plan['method']} on {plan['model']} within {plan['budget']}: {len(plan['designs'])} designs, best first",
        f"  {'design':<20}{'parameters':>14}{'of budget':>11}{'alignment':>11}{'max rank':>10}"
        f"{'FLOPs/token':>14}{'MiB':>8}  rule",
    ]
    for row in plan["designs"][:most]:
        name = ", ".join(f"{key}={value}" for key, value in row["components"].items())
        lines.append(
            f"  {name:<20}{row['parameters']:>14,}{row['share']:>11.1%}{row['alignment']:>11.4f}"
            f"{row['max_rank']:>10,.1f}{row['flops_per_token']:>14,}{row['bytes'] / 2**20:>8,.1f}"
            f"  {'yes' if row['by_rule'] else 'no'}"
        )
    return "\n".join(lines)


def as_text(plan: Mapping[str, Any], *, by_kind: bool = True) -> str:
    """A plan for people."""
    rank, alignment = plan["max_rank"], plan["predicted_alignment"]
    lines = [
        f"{plan['method']} on {plan['model']}",
        f"  trainable parameters  {plan['trainable_params']:>15,}  ({100 * plan['trainable_share']:.3f} % of the base)",
        f"  total parameters      {plan['total_params']:>15,}",
        f"  adapter file (fp32)   {plan['adapter_bytes'] / 2**20:>13,.1f} MiB",
        f"  adapted layers        {plan['adapted_layers']:>15,}",
        f"  max rank of dW        {'' if rank is None else f'{rank:,.1f}':>15}  (mean over layers, weighted by size)",
        f"  predicted alignment   {'unknown' if alignment is None else f'{alignment:.4f}':>15}  (full gradient)",
        f"  training memory       {plan['memory_bytes']['total'] / 2**30:>13,.1f} GiB  (estimate)",
    ]
    if by_kind and plan["by_kind"]:
        lines.append(
            f"  {'kind':<12}{'layers':>7}{'d_in':>8}{'d_out':>8}{'params each':>13}{'max rank':>10}{'alignment':>11}"
        )
        for row in plan["by_kind"]:
            cosine = "" if row["predicted_alignment"] is None else f"{row['predicted_alignment']:.4f}"
            lines.append(
                f"  {row['kind']:<12}{row['layers']:>7}{row['d_in']:>8}{row['d_out']:>8}{row['params_each']:>13,}"
                f"{'' if row['max_rank'] is None else row['max_rank']:>10}{cosine:>11}"
            )
    return "\n".join(lines)


def render(plan: Mapping[str, Any], form: str, *, by_kind: bool = True) -> str:
    """`json`: one object on one line; `text`: a table.

    Raises:
        ConfigError: another format.
    """
    if form == "json":
        return json.dumps(plan)
    if form == "text":
        return as_text(plan, by_kind=by_kind)
    raise ConfigError(f"format={form!r}; use text or json")
