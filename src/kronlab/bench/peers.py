"""The methods that are measured beside each other: each attaches itself to a network, whole model or single layer.

Most are method configs of this project, attached as a cell attaches them. The rest exist only to be compared with: the
frozen base, PEFT's and LyCORIS' LoKr at the baseline's number of parameters, a plain loop over `torch.kron`.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlab import methods, models
from kronlab.cell import compose_config
from kronlab.errors import ConfigError

Shape = tuple[int, int]  # (d_in, d_out)
Attach = Callable[[nn.Module, Mapping[str, Any]], nn.Module]


@dataclass(frozen=True)
class Peer:
    """A method ready to be measured.

    Attributes:
        key: its name in configs and records.
        label: its name in tables.
        attach: (network, model config) -> the network with the method's trainable parameters, all else frozen.
        absent: why it cannot be measured here (a package is not installed), or None.
    """

    key: str
    label: str
    attach: Attach
    absent: str | None = None


def make_peers(rows: Mapping[str, Mapping[str, Any]], keys: list[str], linears: Counter[Shape]) -> list[Peer]:
    """The peers of `keys` from their config rows.

    Args:
        rows: peer key -> {kind, ...}; the kinds are those of `KINDS`.
        linears: the adapted layers of the network, for peers that match the baseline's number of parameters.

    Raises:
        ConfigError: an unknown key or kind.
    """
    peers = []
    for key in keys:
        if key not in rows:
            raise ConfigError(f"peers: {key!r} is not known; use some of {', '.join(rows)}")
        kind = rows[key]["kind"]
        if kind not in KINDS:
            raise ConfigError(f"rows.{key}.kind={kind!r} is not known; use one of {', '.join(KINDS)}")
        peers.append(KINDS[kind](key, rows[key], linears))
    return peers


def adapted_linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every linear layer but the output layer: what `all-linear` means."""
    output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None  # type: ignore[operator]
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            yield name, module


def count_shapes(network: nn.Module) -> Counter[Shape]:
    """How many adapted layers there are of each shape."""
    return Counter((layer.in_features, layer.out_features) for _, layer in adapted_linears(network))


# ---- frozen base and the project's own method configs


def _frozen(network: nn.Module, model: Mapping[str, Any]) -> nn.Module:
    """The limit that no adapter can pass: forward, and backward to the input alone."""
    network.requires_grad_(False)
    if hasattr(network, "get_input_embeddings"):
        embeddings = network.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return network


def _base(key: str, row: Mapping[str, Any], linears: Counter[Shape]) -> Peer:
    return Peer(key, "frozen base", _frozen)


@cache
def _method_config(overrides: tuple[str, ...]) -> dict[str, Any]:
    config = compose_config(["model=tiny_llama", *overrides], name="plan")  # the model only fills in target_modules
    return {str(key): config.method[key] for key in config.method}


def _method(key: str, row: Mapping[str, Any], linears: Counter[Shape]) -> Peer:
    config = _method_config(tuple(row["overrides"]))
    quantization = row.get("quantization")

    def attach(network: nn.Module, model: Mapping[str, Any]) -> nn.Module:
        models.quantise(network, quantization)
        return methods.attach(network, model, config | {"target_modules": model["target_modules"]})

    dropout = f", dropout {config['dropout']:g}" if config["dropout"] else ""
    base = f", {quantization} base" if quantization else ""
    absent = None
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        absent = "bitsandbytes is not installed"
    return Peer(key, methods.label(config) + dropout + base, attach, absent)


def _by_peft(key: str, row: Mapping[str, Any], linears: Counter[Shape]) -> Peer:
    """The same adapter, served by PEFT alone (`kronlab.bench.bank`)."""
    return replace(_method(key, row, linears), label=row["label"])


# ---- LoKr at the baseline's number of parameters


def lokr_parameters(d_in: int, d_out: int, r: int, factor: int) -> int:
    """Trainable parameters of PEFT's LoKr in a layer: W1 (a, b) ⊗ W2 (c, d), with W2 of rank r below max(c, d) / 2."""
    from peft.tuners.lokr.layer import factorization

    (a, c), (b, d) = factorization(d_out, factor), factorization(d_in, factor)
    return a * b + (r * (c + d) if r < max(c, d) / 2 else c * d)


def match_lokr(linears: Counter[Shape], wanted: int) -> tuple[int, int, int]:
    """(r, decompose_factor, parameters) of the PEFT LoKr whose parameters are nearest to `wanted`; ties: smaller ones.

    Searched: ranks to 128 with factors 2, 4, 8, 16, and -1 (near square).
    """

    def total(r: int, factor: int) -> int:
        return sum(n * lokr_parameters(*shape, r, factor) for shape, n in linears.items())

    found = [(abs(total(r, factor) - wanted), factor % 1000, r) for factor in (2, 4, 8, 16, -1) for r in range(1, 129)]
    _, marked, r = min(found)
    factor = -1 if marked == 999 else marked
    return r, factor, total(r, factor)


def lora_parameters(linears: Counter[Shape], r: int) -> int:
    """Trainable parameters of LoRA of rank r: r · (d_in + d_out) a layer."""
    return sum(n * r * sum(shape) for shape, n in linears.items())


def _peft_lokr(key: str, row: Mapping[str, Any], linears: Counter[Shape]) -> Peer:
    r, factor, _ = match_lokr(linears, lora_parameters(linears, row["match_lora_r"]))

    def attach(network: nn.Module, model: Mapping[str, Any]) -> nn.Module:
        from peft import LoKrConfig, get_peft_model

        targets = model["target_modules"]
        targets = targets if isinstance(targets, str) else list(targets)
        with warnings.catch_warnings():
            # PEFT asks transformers by an old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            return get_peft_model(network, LoKrConfig(r=r, alpha=r, decompose_factor=factor, target_modules=targets))

    return Peer(key, f"PEFT LoKr r={r}, factor {factor}", attach)


def _lycoris_lokr(key: str, row: Mapping[str, Any], linears: Counter[Shape]) -> Peer:
    try:
        from lycoris.modules.lokr import LokrModule
    except ImportError:
        return Peer(key, "LyCORIS LoKr", _frozen, absent="lycoris-lora is not installed")
    r, factor, _ = match_lokr(linears, lora_parameters(linears, row["match_lora_r"]))

    def attach(network: nn.Module, model: Mapping[str, Any]) -> nn.Module:
        network.requires_grad_(False)
        added = nn.ModuleList()
        for name, layer in list(adapted_linears(network)):
            adapter = LokrModule(name.replace(".", "_"), layer, lora_dim=r, alpha=r, factor=factor).float()
            adapter.apply_to()  # takes the place of the layer's forward
            added.append(adapter)
        network.lycoris = added
        return network

    return Peer(key, f"LyCORIS LoKr r={r}, factor {factor}", attach)


# ---- what one writes first


class KronLoop(nn.Module):
    """y = W x + ΔW x with ΔW = λ · Σ_{i<r} kron(B_i, A_i) formed anew at every call.

    Factors A (r, r1, d_in/r2) random and B (r, d_out/r1, r2) zero, in float32; λ = α/√(r·r2) with α = 64.
    """

    def __init__(self, base: nn.Linear, r1: int, r2: int, r: int) -> None:
        super().__init__()
        self.base = base
        self.scale = 64 / math.sqrt(r * r2)
        self.A = nn.Parameter(torch.randn(r, r1, base.in_features // r2) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(r, base.out_features // r1, r2))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        delta = sum((torch.kron(b, a) for a, b in zip(self.A, self.B, strict=True)), start=torch.zeros(()))
        return self.base(x) + F.linear(x, self.scale * delta)


def _kron_loop(key: str, row: Mapping[str, Any], linears: Counter[Shape]) -> Peer:
    make = partial(KronLoop, r1=row["r1"], r2=row["r2"], r=row["r"])

    def attach(network: nn.Module, model: Mapping[str, Any]) -> nn.Module:
        network.requires_grad_(False)
        for name, layer in list(adapted_linears(network)):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, make(layer))
        return network

    return Peer(key, f"torch.kron loop ({row['r1']},{row['r2']},{row['r']})", attach)


KINDS: dict[str, Callable[[str, Mapping[str, Any], Counter[Shape]], Peer]] = {
    "base": _base,
    "method": _method,
    "by_peft": _by_peft,
    "peft_lokr": _peft_lokr,
    "lycoris_lokr": _lycoris_lokr,
    "kron_loop": _kron_loop,
}


# ---- a network of one layer


class _HiddenSize:
    """The one thing that a tuner asks of a model's config."""

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size

    def to_dict(self) -> dict[str, Any]:
        return {"hidden_size": self.hidden_size}


class OneLinear(nn.Module):
    """A linear layer (d_in -> d_out) without bias, with the config that methods look at when they are attached."""

    def __init__(self, d_in: int, d_out: int, *, hidden_size: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)
        self.config = _HiddenSize(hidden_size or d_in)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        return self.linear(x)


ONE_LINEAR_MODEL: dict[str, Any] = {"architecture": "one_linear", "modules_to_save": None, "target_modules": ["linear"]}
