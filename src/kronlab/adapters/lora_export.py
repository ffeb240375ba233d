"""Kronecker adapters as ordinary LoRA checkpoints, so that what serves LoRA serves them, without kronlab.

Both updates are low-rank products in disguise (I_n: identity of size n):

    CDKA       Σᵢ B_i ⊗ A_i = [B_1 ⊗ I_r1, ..., B_r ⊗ I_r1] · [I_r2 ⊗ A_1; ...; I_r2 ⊗ A_r]      rank r·r1·r2
    Kron-LoRA  A ⊗ (B1·B2)  = (I_d_a2 ⊗ B1) · (A ⊗ B2)   where d_a2 <= d_a1                      rank r·d_a2
                            = (A ⊗ B1) · (I_d_a1 ⊗ B2)   otherwise                               rank r·d_a1

by (P ⊗ Q)(R ⊗ S) = PR ⊗ QS. The export is exact; the price is size: the factors are written out with their zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from kronlab.adapters.base import KronConfig, KronLinear, adapter_layers
from kronlab.adapters.cdka import CdkaLinear
from kronlab.adapters.kron_lora import KronLoraLinear
from kronlab.adapters.peft_hook import get_peft_model_state_dict
from kronlab.errors import ConfigError

WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_ROOT = "base_model.model."


def lora_factors(layer: KronLinear, adapter_name: str = "default") -> tuple[Tensor, Tensor]:
    """LoRA factors of one layer's ΔW, λ included: down (R, d_in) and up (d_out, R), up @ down = ΔW exactly.

    Raises:
        TypeError: a layer of neither method.
    """
    factors = {name: weight.detach() for name, weight in layer.factors(adapter_name).items()}
    scale, c = layer.scaling[adapter_name], layer.components[adapter_name]
    if isinstance(layer, CdkaLinear):
        terms_a = [factors["A"][i :: c.r] for i in range(c.r)]  # A_i (r1, d_in/r2)
        terms_b = [factors["B"][:, i :: c.r] for i in range(c.r)]  # B_i (d_out/r1, r2)
        down = torch.cat([torch.kron(torch.eye(c.r2).to(a), a.contiguous()) for a in terms_a])
        up = torch.cat([torch.kron(b.contiguous(), torch.eye(c.r1).to(b)) for b in terms_b], dim=1)
        return down, scale * up
    if isinstance(layer, KronLoraLinear):
        a, b1, b2 = factors["A"], factors["B1"], factors["B2"]
        if c.d_a2 <= c.d_a1:
            return torch.kron(a, b2), scale * torch.kron(torch.eye(c.d_a2).to(b1), b1)
        return torch.kron(torch.eye(c.d_a1).to(b2), b2), scale * torch.kron(a, b1)
    raise TypeError(f"{type(layer).__name__} is neither a CDKA nor a Kron-LoRA layer")


def truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best approximation of up @ down of at most `rank`, and its relative error in the Frobenius norm.

    The singular values come from a matrix of R × R (QR of both factors), never from ΔW itself. Computed in float64.
    The singular values are shared evenly between the two factors.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    total = s.square().sum()
    lost = s[rank:].square().sum()
    error = float((lost / total).sqrt()) if total > 0 else 0.0
    root = s[:rank].sqrt()
    new_up = (q_up @ u[:, :rank]) * root
    new_down = root[:, None] * (vh[:rank] @ q_down.T)
    return new_down.to(down.dtype), new_up.to(up.dtype), error


def export_lora(
    peft_model: nn.Module, directory: str | Path, *, adapter_name: str = "default", rank: int | None = None
) -> dict[str, float]:
    """Write a CDKA or Kron-LoRA adapter as a PEFT LoRA checkpoint with the same function.

    The directory gets `adapter_config.json` (peft_type LORA, scale 1) and `adapter_model.safetensors`, in float32. It
    loads with `PeftModel.from_pretrained` where kronlab is not installed. Modules that were trained in full
    (`modules_to_save`) go along.

    Args:
        peft_model: a model with the adapter attached, merged or not.
        directory: made if it is not there; an export that lies there is replaced.
        rank: keep at most this rank in each layer, by SVD; None is exact.

    Returns:
        Relative error of ΔW (Frobenius) for each module; 0.0 where nothing was cut.

    Raises:
        ConfigError: no such adapter, an adapter with trained biases, or a rank below 1.
    """
    config = getattr(peft_model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, KronConfig):
        known = [name for name, c in getattr(peft_model, "peft_config", {}).items() if isinstance(c, KronConfig)]
        raise ConfigError(
            f"export_lora: the model has no CDKA or Kron-LoRA adapter {adapter_name!r}; it has {known or 'none'}"
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"export_lora: rank={rank} is not a positive whole number")
    if config.bias != "none":
        raise ConfigError(f"export_lora: bias={config.bias!r} trains biases, which the export does not carry")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    conv1d = False
    for path, layer in adapter_layers(peft_model):
        if adapter_name not in layer.components:
            continue
        name = path.removeprefix(_PEFT_ROOT)
        down, up = lora_factors(layer, adapter_name)
        errors[name] = 0.0
        if rank is not None and down.shape[0] > rank:
            down, up, errors[name] = truncate(down, up, rank)
        ranks[name] = down.shape[0]
        conv1d = conv1d or layer.fan_in_fan_out
        tensors[f"{_PEFT_ROOT}{name}.lora_A.weight"] = down.float().cpu().contiguous()
        tensors[f"{_PEFT_ROOT}{name}.lora_B.weight"] = up.float().cpu().contiguous()
    kept = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    factors = tuple(f".{method.prefix}" for method in (CdkaLinear, KronLoraLinear))
    tensors |= {k: v.cpu().contiguous() for k, v in kept.items() if not any(factor in k for factor in factors)}
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    _lora_config(config, ranks, conv1d).save_pretrained(str(target))
    scratch = target / f".{WEIGHTS_FILE}.part"
    save_file(tensors, scratch, metadata={"format": "pt"})
    scratch.replace(target / WEIGHTS_FILE)
    return errors


def _lora_config(config: KronConfig, ranks: dict[str, int], conv1d: bool) -> LoraConfig:
    """r and alpha alike in every layer, so that LoRA's scale alpha/r is 1: λ is in the factors."""
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    settings: dict[str, Any] = {"rank_pattern": others, "alpha_pattern": dict(others)}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        fan_in_fan_out=conv1d,
        inference_mode=True,
        **settings,
    )
