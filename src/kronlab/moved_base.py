"""LoRA that does not start at zero (PiSSA, LoRA-GA): W - s·B0·A0 is frozen in the place of W, A and B start at A0, B0.

The function is the base model's at the start, and ΔW = s·(B·A - B0·A0) ever after. Neither an SVD nor a gradient comes
out alike to the last bit on every machine, so the start is drawn once and kept: a resume moves a fresh base by the kept
factors. What training leaves behind is an ordinary LoRA of rank 2r with the factors [A; A0] and [B, -B0], which has the
same function on the base as it was published, wherever it is loaded.

Tensors are named as PEFT saves them: `<module>.lora_A.weight` (r, d_in), `<module>.lora_B.weight` (d_out, r).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kronlab.errors import ConfigError

_A, _B = ".lora_A.weight", ".lora_B.weight"


def moves_base(method: Mapping[str, Any]) -> bool:
    """Whether the method's start takes something out of the base weight."""
    return method["name"] == "lora" and method.get("init") is not None


def lora_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with a LoRA, by the name that PEFT saves it under."""
    from peft.tuners.lora import LoraLayer

    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def pissa_start(network: nn.Module, init: str) -> dict[str, Tensor]:
    """A0, B0 of every layer: √(S/s) shared between the r leading singular vectors of W, by PEFT's `pissa_init`.

    Args:
        init: `pissa`, or `pissa_niter_<n>` for n subspace iterations instead of the whole SVD.

    Raises:
        ConfigError: a rank above a layer's dimensions, or a weight that another module shares.
    """
    start: dict[str, Tensor] = {}
    for name, layer in _checked(network, vectors=1):
        weight = layer.get_base_layer().weight
        before = weight.data
        layer.pissa_init("default", init)
        weight.data = before  # PEFT has put another tensor there; `move` is the one way of moving
        start |= {name + _A: layer.lora_A["default"].weight.detach().clone()}
        start |= {name + _B: layer.lora_B["default"].weight.detach().clone()}
    return start


def lora_ga_start(network: nn.Module, gradients: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """A0 = c·V[:r]ᵀ, B0 = c·U[:, r:2r] with G = U·S·Vᵀ and c = d_out^¼/√γ (arXiv 2407.05000, algorithm 1).

    Args:
        gradients: G (d_out, d_in) of every layer, by `lora_layers`' names; only its directions count.

    Raises:
        ConfigError: a rank above half a layer's dimensions, or a weight that another module shares.
    """
    start: dict[str, Tensor] = {}
    for name, layer in _checked(network, vectors=2):
        gradient, r = gradients[name].float(), layer.r["default"]
        u, _, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)  # as the authors do
        scale = len(gradient) ** 0.25 / math.sqrt(gamma)
        start |= {name + _A: scale * v[:, :r].T.contiguous(), name + _B: scale * u[:, r : 2 * r].contiguous()}
    return start


def _checked(network: nn.Module, *, vectors: int) -> Iterator[tuple[str, Any]]:
    """The layers, each of which can give `vectors`·r singular vectors and has its weight for itself."""
    users = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for name, layer in lora_layers(network):
        if users[id(layer.get_base_layer().weight)] > 1:
            raise ConfigError(
                f"method.init: the start of {name} would change the modules that share its weight; "
                "leave it out of method.target_modules and method.lm_head"
            )
        most = min(layer.in_features, layer.out_features) // vectors
        if layer.r["default"] > most:
            raise ConfigError(f"method.r={layer.r['default']}: {name} has singular vectors for at most r={most}")
        yield name, layer


@torch.no_grad()
def move(network: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Set A, B of every layer to the start, and take s·B0·A0 out of a base weight that has not been moved before."""
    for name, layer in lora_layers(network):
        a, b, weight = start[name + _A], start[name + _B], layer.get_base_layer().weight
        taken = layer.scaling["default"] * (b @ a)
        weight.copy_(weight.float() - (taken.T if layer.fan_in_fan_out else taken))
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)


def save_as_lora(network: Any, start: Mapping[str, Tensor], folder: Path) -> None:
    """Save a trained adapter as a LoRA of rank 2r for the base as it was; its scale s is the same."""
    network.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, first in start.items():
        pair = [tensors[name], first] if name.endswith(_A) else [tensors[name], -first]
        tensors[name] = torch.cat(pair, dim=0 if name.endswith(_A) else 1)
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    factor = math.sqrt(2) if config["use_rslora"] else 2  # s is alpha/√r or alpha/r
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    config["rank_pattern"] = {key: 2 * r for key, r in (config["rank_pattern"] or {}).items()}
    config["alpha_pattern"] = {key: factor * alpha for key, alpha in (config["alpha_pattern"] or {}).items()}
    path.write_text(json.dumps(config, indent=2) + "\n")


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `save_as_lora` has put together: the trained tensors, and the start."""
    trained, start = dict(tensors), {}
    for name, tensor in tensors.items():
        if name.endswith(_A):
            trained[name], start[name] = tensor.chunk(2)
        elif name.endswith(_B):
            trained[name], minus = tensor.chunk(2, dim=1)
            start[name] = -minus
    return trained, start
