"""Kronecker adapters as PEFT tuners; importing this package makes PEFT know the methods CDKA and KRON_LORA.

``kron`` is the operator on plain tensors, ``base`` what the two tuners share, ``cdka`` and ``kron_lora`` the
methods, ``lora_export`` their way to stacks that only know LoRA, ``peft_hook`` the one place that touches
PEFT's internals.
"""

from __future__ import annotations

from kronlab.adapters.base import (
    BrokenAdapterError,
    KronConfig,
    KronEmbedding,
    KronLinear,
    TiedWeightError,
    UnsupportedLayerError,
    adapter_layers,
)
from kronlab.adapters.cdka import (
    CdkaComponents,
    CdkaConfig,
    CdkaLinear,
    CdkaModel,
    load_authors_state_dict,
    to_authors_state_dict,
)
from kronlab.adapters.kron_lora import (
    KronLoraComponents,
    KronLoraConfig,
    KronLoraLinear,
    KronLoraModel,
    default_d_a2,
)
from kronlab.adapters.lora_export import export_lora, lora_factors
from kronlab.adapters.peft_hook import register
from kronlab.adapters.quantize import QuantisedAdapter, load_quantised, quantize_adapter, save_packed
from kronlab.adapters.quantized_base import MergeError, QuantisedMergeError, allow_4bit_merge
from kronlab.adapters.swap import swap_weights

register("cdka", CdkaConfig, CdkaModel, prefix="cdka_")
register("kron_lora", KronLoraConfig, KronLoraModel, prefix="kron_lora_")

__all__ = [
    "BrokenAdapterError",
    "CdkaComponents",
    "CdkaConfig",
    "CdkaLinear",
    "CdkaModel",
    "KronConfig",
    "KronEmbedding",
    "KronLinear",
    "KronLoraComponents",
    "KronLoraConfig",
    "KronLoraLinear",
    "KronLoraModel",
    "MergeError",
    "QuantisedAdapter",
    "QuantisedMergeError",
    "TiedWeightError",
    "UnsupportedLayerError",
    "adapter_layers",
    "allow_4bit_merge",
    "default_d_a2",
    "export_lora",
    "load_authors_state_dict",
    "load_quantised",
    "lora_factors",
    "quantize_adapter",
    "save_packed",
    "swap_weights",
    "to_authors_state_dict",
]
