"""Adapters stored in 16, 8 or 4 bits: packed tensors, their exact size, and what the rounding has cost.

Only the stored form is small: to be used, an adapter is unpacked to float32 again. Any PEFT adapter goes through
here, LoRA too, so that methods can be compared at equal bits.

Each tensor is flattened and cut into groups of g elements; a group x has the scale s = max |x| and keeps codes:

    16   float16, no scale                               2 bytes an element
    8    round(127 · x/s), symmetric                     1 byte an element + 4/g
    4    the nearest of 16 levels to x/s                 1/2 byte an element + 4/g

The 4-bit levels are NormalFloat's by default (QLoRA, arXiv 2305.14314, section 3: quantiles of a normal distribution,
with an exact zero), or the integers -7..7 over 7. Scales are float32. A tensor's last group may be short.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kronlab.adapters.peft_hook import (
    BaseTunerLayer,
    PeftConfig,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from kronlab.errors import CheckpointError, ConfigError

__all__ = [
    "FORMATS",
    "PACKED_FILE",
    "PackedTensor",
    "QuantisedAdapter",
    "format_of",
    "load_quantised",
    "nf4_levels",
    "quantize_adapter",
    "save_packed",
]

FORMATS = {"fp16": 16, "int8": 8, "nf4": 4, "int4": 4}
_DEFAULT_FORMAT = {16: "fp16", 8: "int8", 4: "nf4"}
_METADATA = "kronlab_quantised_adapter"
# Beside adapter_config.json. Not the name of PEFT's own file: without kronlab, PEFT would find no tensor that it knows
# in it, and go on with an untrained adapter.
PACKED_FILE = "adapter_quantised.safetensors"


@cache
def nf4_levels() -> Tensor:
    """The 16 levels of NormalFloat-4 in [-1, 1], ascending: 7 negative quantiles, 0 and 8 positive ones.

    The outermost quantile is the mean of those that 15 and 16 equal shares would give: 1 - (1/30 + 1/32)/2.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    positive = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (levels / levels.max()).float()


@cache
def _levels(kind: str) -> Tensor:
    return nf4_levels() if kind == "nf4" else torch.arange(-7, 8).float() / 7


@dataclass(frozen=True)
class PackedTensor:
    """One tensor in its stored form."""

    codes: Tensor  # fp16: the values; int8: (n,) int8; 4 bits: (⌈n/2⌉,) uint8, the first of a pair in the low half
    scales: Tensor | None  # (⌈n/g⌉,) float32; None for fp16
    shape: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales) if t is not None)


@dataclass(frozen=True)
class QuantisedAdapter:
    """A packed adapter; keys are those of its PEFT checkpoint."""

    kind: str
    group_size: int
    tensors: dict[str, PackedTensor]
    errors: dict[str, float]  # ‖unpacked - original‖ / ‖original‖ of each tensor, Frobenius

    @property
    def bits(self) -> int:
        """Bits of a code; scales come on top."""
        return FORMATS[self.kind]

    @property
    def stored_bytes(self) -> int:
        """Exact bytes of all codes and scales; a file's header of names and shapes comes on top."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits, scales included, over the number of parameters."""
        return 8 * self.stored_bytes / sum(torch.Size(t.shape).numel() for t in self.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The unpacked tensors in float32, for ``peft.set_peft_model_state_dict``."""
        return {key: _unpack(tensor, self.kind, self.group_size) for key, tensor in self.tensors.items()}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; its header says format, group size, shapes and errors."""
        target = Path(path)
        arrays = {f"{key}.codes": tensor.codes.contiguous() for key, tensor in self.tensors.items()}
        arrays |= {f"{key}.scales": t.scales for key, t in self.tensors.items() if t.scales is not None}
        header = {
            "kind": self.kind,
            "group_size": self.group_size,
            "shapes": {key: tensor.shape for key, tensor in self.tensors.items()},
            "errors": self.errors,
        }
        scratch = target.with_name(f".{target.name}.part")
        save_file(arrays, scratch, metadata={_METADATA: json.dumps(header)})
        scratch.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> QuantisedAdapter:
        """Read what :meth:`save` has written.

        Raises:
            CheckpointError: no such file, or another kind of file.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})[_METADATA])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            tensors = {
                key: PackedTensor(arrays[f"{key}.codes"], arrays.get(f"{key}.scales"), tuple(shape))
                for key, shape in header["shapes"].items()
            }
        except Exception as error:  # safetensors has its own types, and any part of the header may be absent
            raise CheckpointError(
                f"{path} is no adapter that QuantisedAdapter.save has written ({type(error).__name__}: {error})"
            ) from error
        return cls(header["kind"], header["group_size"], tensors, header["errors"])


def format_of(bits: int | None, kind: str | None = None, group_size: int = 64) -> tuple[int, str] | None:
    """Bits and kind of a stored form, each filled in from the other; None where both are None.

    Raises:
        ConfigError: bits, kind or group size out of range, or bits and kind of different forms.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ConfigError(f"group_size={group_size} is not a positive even number")
    if bits is None and kind is None:
        return None
    known = ", ".join(f"{b} ({name})" for name, b in FORMATS.items())
    form = _DEFAULT_FORMAT.get(bits) if kind is None and bits is not None else kind
    if form not in FORMATS or bits not in (None, FORMATS[form]):
        raise ConfigError(f"bits={bits} with kind={kind!r} is unknown; use {known}")
    return FORMATS[form], form


def quantize_adapter(
    source: nn.Module | Mapping[str, Tensor],
    bits: int | None = None,
    *,
    group_size: int = 64,
    kind: str | None = None,
    adapter_name: str = "default",
) -> QuantisedAdapter:
    """Pack an adapter into ``bits`` bits.

    Args:
        source: a PEFT model, or the tensors of an adapter checkpoint by name.
        bits: 16, 8 or 4; None: those of ``kind``.
        group_size: elements that share a scale; even.
        kind: a key of ``FORMATS``; None takes fp16, int8 or nf4, by the bits.
        adapter_name: which adapter of the model.

    Raises:
        ConfigError: bits, kind or group size out of range, or a tensor that is not finite in this format.
    """
    try:
        form = format_of(bits, kind, group_size)
    except ConfigError as error:
        raise ConfigError(f"quantize_adapter: {error}") from None
    if form is None:
        raise ConfigError("quantize_adapter: give bits or kind")
    kind = form[1]
    given: Mapping[str, Tensor]
    if isinstance(source, nn.Module):
        given = get_peft_model_state_dict(source, adapter_name=adapter_name, save_embedding_layers=False)
    else:
        given = source
    tensors, errors = {}, {}
    for key, value in given.items():
        exact = value.detach().float().cpu()
        packed = _pack(exact, kind, group_size)
        lost = (_unpack(packed, kind, group_size) - exact).norm()
        if not torch.isfinite(lost):
            raise ConfigError(
                f"quantize_adapter: {key} is not finite in {kind}; choose another kind or look at training"
            )
        norm = float(exact.norm())
        tensors[key], errors[key] = packed, float(lost) / norm if norm else 0.0
    return QuantisedAdapter(kind, group_size, tensors, errors)


def save_packed(adapter: QuantisedAdapter, config: PeftConfig, directory: str | Path) -> None:
    """Write a packed adapter with its PEFT config: a folder of ``adapter_config.json`` and ``PACKED_FILE``.

    Where kronlab has been imported, PEFT loads it like any other (``PeftModel.from_pretrained``, ``load_adapter``), and
    so do a bank, ``convert`` and ``compress``; PEFT alone finds no weights there, and says so.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(target))
    adapter.save(target / PACKED_FILE)


def load_quantised(model: nn.Module, adapter: QuantisedAdapter, adapter_name: str = "default") -> float | None:
    """Put the unpacked tensors into a PEFT model, and say what that has done to the update.

    Returns:
        ‖ΔW' - ΔW‖ / ‖ΔW‖ over all adapted layers together, Frobenius, ΔW' after loading; None where ΔW is 0, or the
        method forms none. One layer's matrices exist at a time. Magnitudes (DoRA) are loaded and not counted.
    """
    layers = [
        (module, _own_tensors(module))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
    ]
    set_peft_model_state_dict(model, adapter.state_dict(), adapter_name=adapter_name)
    lost = whole = 0.0
    with torch.no_grad():
        for layer, before in layers:
            now = _own_tensors(layer)
            new = layer.get_delta_weight(adapter_name).double()
            layer.load_state_dict(before, strict=False)
            old = layer.get_delta_weight(adapter_name).double()
            layer.load_state_dict(now, strict=False)
            lost += float((new - old).square().sum())
            whole += float(old.square().sum())
    return (lost / whole) ** 0.5 if whole else None


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of an adapted layer's state without the layer that it wraps."""
    return {key: value.clone() for key, value in layer.state_dict().items() if not key.startswith("base_layer.")}


def _grouped(flat: Tensor, group_size: int) -> Tensor:
    """(n,) -> (⌈n/g⌉, g), zeros at the end."""
    return nn.functional.pad(flat, (0, -len(flat) % group_size)).view(-1, group_size)


def _pack(x: Tensor, kind: str, group_size: int) -> PackedTensor:
    shape = tuple(x.shape)
    if kind == "fp16":
        return PackedTensor(x.half(), None, shape)
    flat = x.reshape(-1)
    groups = _grouped(flat, group_size)
    scales = groups.abs().amax(1)
    units = groups / torch.where(scales > 0, scales, 1)[:, None]  # in [-1, 1]
    if kind == "int8":
        return PackedTensor((units * 127).round().to(torch.int8).view(-1)[: len(flat)].clone(), scales, shape)
    levels = _levels(kind)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(units.view(-1), middles).to(torch.uint8)[: len(flat) + len(flat) % 2]
    low, high = codes.view(-1, 2).unbind(1)
    return PackedTensor(low | (high << 4), scales, shape)


def _unpack(packed: PackedTensor, kind: str, group_size: int) -> Tensor:
    if packed.scales is None:
        return packed.codes.float()
    count = torch.Size(packed.shape).numel()
    if kind == "int8":
        units = packed.codes.float() / 127
    else:
        codes = torch.stack([packed.codes & 15, packed.codes >> 4], dim=1).view(-1)
        units = _levels(kind)[codes.long()]
    values = _grouped(units[:count], group_size) * packed.scales[:, None]
    return values.view(-1)[:count].view(packed.shape)
