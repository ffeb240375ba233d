"""Base layers whose weight is quantised: bitsandbytes' 8-bit and 4-bit linears are adapted, all others refused.

An adapter does not mind what its base layer computes with, so training and inference need nothing of this module.
Merging does: W + ΔW has to be rounded to the base's few bits again, and what is lost there is measured.
bitsandbytes is imported only once such a layer is met.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronlab.errors import DimensionError, KronlabError

_BNB_WEIGHTS = {"Int8Params": 8, "Params4bit": 4}
_BLOCK = 64  # values of a 4-bit weight that share a scale
_OUTLIER = 6.0  # of LLM.int8(): what an input must reach for its column to be multiplied in 16 bits
# Words in the class or package names of quantised layers that are no nn.Linear: GPTQModel, AutoAWQ, HQQ, AQLM, ...
_FOREIGN = ("quant", "gptq", "awq", "wqlinear", "hqq", "aqlm", "eetq", "spqr", "vptq", "marlin", "fp8", "bitlinear")

_4bit_merge_allowed: ContextVar[bool] = ContextVar("kronlab_4bit_merge_allowed", default=False)


class QuantisedMergeError(KronlabError, ValueError):
    """Merging would round W + ΔW to 4 bits."""


@dataclass(frozen=True)
class MergeError:
    """What rounding the merged weight V = W + ΔW to the base's bits has cost; V' is the weight that was stored.

    W is the base weight as the quantised layer holds it, so its own quantisation error does not count here.
    """

    max_abs: float  # max |V' - V|
    relative: float  # ‖V' - V‖ / ‖V‖, Frobenius
    of_update: float  # ‖V' - V‖ / ‖ΔW‖: from 1 on, more noise has come in than the adapter brought


@contextmanager
def allow_4bit_merge() -> Iterator[None]:
    """Within this context adapters may be merged into 4-bit weights; see :class:`QuantisedMergeError`."""
    token = _4bit_merge_allowed.set(True)
    try:
        yield
    finally:
        _4bit_merge_allowed.reset(token)


def bits_of(layer: nn.Module) -> int | None:
    """8 or 4 for a bitsandbytes linear, None for a layer whose weight is not one of bitsandbytes'."""
    return _BNB_WEIGHTS.get(type(getattr(layer, "weight", None)).__name__)


def refusal(layer: nn.Module) -> str | None:
    """Why a quantised layer cannot be adapted and what to do; None where it can, or is not quantised at all."""
    weight: Any = getattr(layer, "weight", None)
    bits = bits_of(layer)
    if bits == 8 and getattr(weight, "has_fp16_weights", False):
        return "keeps float weights beside the 8-bit ones; load the model with llm_int8_has_fp16_weight=False"
    if bits is not None and weight.is_floating_point() and not weight.is_meta:
        return "has not been quantised yet; move the model to its device before attaching the adapter"
    if bits is None and is_foreign(layer):
        return (
            "is quantised in a format that is not supported; load the model in 16 or 32 bits, or with bitsandbytes in "
            "8 or 4 (transformers.BitsAndBytesConfig)"
        )
    return None


def is_foreign(layer: nn.Module) -> bool:
    """Whether a layer is quantised by something else than bitsandbytes: GPTQ, AWQ, HQQ, torchao, ..."""
    if bits_of(layer) is not None:
        return False
    if hasattr(layer, "qweight") or hasattr(layer, "W_q"):
        return True
    weight = getattr(layer, "weight", None)
    kind = type(layer)
    if isinstance(weight, Tensor):
        packed = not weight.is_floating_point() or weight.dtype.itemsize < 2
        return packed or type(weight).__module__.startswith("torchao.") or "bitsandbytes" in kind.__module__
    return any(word in f"{kind.__module__}.{kind.__qualname__}".lower() for word in _FOREIGN)


def check_4bit_merge(name: str, layer: nn.Module) -> None:
    """Raise QuantisedMergeError for a 4-bit layer outside of :func:`allow_4bit_merge`."""
    if bits_of(layer) == 4 and not _4bit_merge_allowed.get():
        raise QuantisedMergeError(
            f"{name}: merging would round the adapted weight to 4 bits, which can lose most of the update; use the "
            "adapter unmerged, or merge it into the model loaded in 16 bits, or force it: with kronlab.adapters."
            "allow_4bit_merge()"
        )


def quantise_(model: nn.Module, bits: int, *, keep: Collection[str] = (), device: torch.device | str = "cpu") -> int:
    """Put bitsandbytes' layers in the place of a model's ``nn.Linear``: 8 bits LLM.int8(), 4 bits NF4.

    8 bits (arXiv 2208.07339): one scale a row; columns of the input that reach 6 are multiplied in 16 bits.
    4 bits (QLoRA, arXiv 2305.14314): blocks of 64 values, their scales quantised once more; computed in the input's
    dtype. Biases and everything that is no ``nn.Linear`` stay as they are.

    Args:
        model: changed in place and marked as PEFT wants it (``is_loaded_in_8bit`` or ``is_loaded_in_4bit``).
        keep: names of linear layers that stay.
        device: where the weights are quantised, and lie then. One layer is converted at a time.

    Returns:
        How many layers were replaced.

    Raises:
        DimensionError: 4 bits, and an input dimension that is no multiple of 64: on a CPU bitsandbytes (0.50) unpacks
            such a weight with the scales of other blocks, without a word. Nothing has been changed then.
    """
    import bitsandbytes.nn

    bnb: Any = bitsandbytes.nn
    layers = [(n, layer) for n, layer in model.named_modules() if type(layer) is nn.Linear and n not in keep]
    for name, layer in layers:
        if bits == 4 and layer.in_features % _BLOCK:
            raise DimensionError(
                f"{name}: d_in={layer.in_features} is no multiple of {_BLOCK}, the block of 4-bit weights; use 8 bits"
            )
    for name, layer in layers:
        sizes = (layer.in_features, layer.out_features)
        new: Any
        with torch.device("meta"):  # its own weight is not needed
            if bits == 8:
                new = bnb.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=_OUTLIER)
            else:
                new = bnb.Linear4bit(*sizes, bias=False, quant_type="nf4", compress_statistics=True)
                # Else some CPUs would round the scales once more in the first forward in eval mode, and so what is
                # graded would not be what was trained.
                new.support_avx512bf16_for_cpu = False
        weight = layer.weight.detach().cpu()
        if bits == 8:
            new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
        else:
            how = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.uint8}
            new.weight = bnb.Params4bit(weight, requires_grad=False, module=new, **how).to(device)
        if layer.bias is not None:  # bitsandbytes casts it in place, and the model's copies may share it
            new.bias = nn.Parameter(layer.bias.detach().clone().to(device), requires_grad=layer.bias.requires_grad)
        new.train(layer.training)
        model.set_submodule(name, new)
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return len(layers)


def dequantise(layer: Any) -> Tensor:
    """The weight (d_out, d_in) that a bitsandbytes linear stands for, in float32."""
    import bitsandbytes.functional as bnb

    weight = layer.weight
    if bits_of(layer) == 8:
        # The row scales lie on the weight until the first forward, then on the layer's state.
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return bnb.int8_vectorwise_dequant(weight.data, scales.to(weight.device)).float()
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        # On a CPU with AVX512-BF16 a forward without gradients repacks the weight in place; bitsandbytes' own way
        # back, which it takes on saving too.
        layer.state_dict()
    return bnb.dequantize_4bit(weight.data, weight.quant_state).float()


def quantised_like(layer: Any, weight: Tensor) -> nn.Parameter:
    """``weight`` (d_out, d_in) as a parameter of the layer's own format, on its device."""
    import bitsandbytes.nn

    bnb: Any = bitsandbytes.nn
    old = layer.weight
    if bits_of(layer) == 8:
        return bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)
    return bnb.Params4bit(
        weight.to(old.quant_state.dtype).cpu(),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to(old.device)


def kept(layer: Any) -> nn.Parameter:
    """The layer's weight as something that :func:`restore_` can put back."""
    weight = layer.weight
    if bits_of(layer) == 8 and weight.SCB is None:  # the first forward has moved the row scales to the state
        weight.CB, weight.SCB = weight.data, layer.state.SCB
    return weight


def restore_(layer: Any, weight: nn.Parameter) -> None:
    """Put a weight from :func:`kept` back, on the device where the layer lies now."""
    layer.weight = weight.to(layer.weight.device)
    if bits_of(layer) == 4:
        layer.quant_state = layer.weight.quant_state


def measure(stored: Tensor, exact: Tensor, delta: Tensor) -> MergeError:
    """The error of a stored weight against exact = W + ΔW, all (d_out, d_in)."""
    difference = stored - exact
    lost = float(difference.norm())
    return MergeError(
        max_abs=float(difference.abs().max()),
        relative=lost / max(float(exact.norm()), torch.finfo(torch.float32).tiny),
        of_update=lost / max(float(delta.norm()), torch.finfo(torch.float32).tiny),
    )
