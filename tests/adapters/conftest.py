"""Tiny random models of four architectures, and what the adapter tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kronlab.adapters import CdkaConfig, KronConfig, KronLoraConfig


def _llama(**settings: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **settings}))


def _gpt2(**settings: Any) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=40, **settings))


def _t5(**settings: Any) -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0, **settings}))


def _distilbert(**settings: Any) -> nn.Module:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "num_labels": 3}
    return DistilBertForSequenceClassification(DistilBertConfig(**{**sizes, **settings}))


@dataclass(frozen=True)
class Tiny:
    """One architecture: how to build it, its PEFT task, and its own inputs."""

    build: Callable[..., nn.Module]
    task: str
    linears: int  # how many "all-linear" adapts

    def model(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, untie: bool = False, **settings: Any
    ) -> nn.Module:
        torch.manual_seed(seed)
        model: Any = self.build(**settings).to(dtype).eval()
        if untie:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    def logits(self, model: nn.Module) -> Tensor:
        ids = torch.arange(12).view(2, 6) + 3
        kwargs = {"decoder_input_ids": ids[:, :3]} if self.task == "SEQ_2_SEQ_LM" else {}
        return model(input_ids=ids, **kwargs).logits


TINY = {
    "llama": Tiny(_llama, "CAUSAL_LM", linears=2 * 7),
    "gpt2": Tiny(_gpt2, "CAUSAL_LM", linears=2 * 4),
    "t5": Tiny(_t5, "SEQ_2_SEQ_LM", linears=2 * 6 + 2 * 10),
    "distilbert": Tiny(_distilbert, "SEQ_CLS", linears=2 * 6),  # the head is trained in full
}
CONFIGS: dict[str, Callable[..., KronConfig]] = {
    "cdka": lambda **kw: CdkaConfig(**{"r1": 2, "r2": 4, "r": 3, "alpha": 8, **kw}),
    "kron_lora": lambda **kw: KronLoraConfig(**{"r": 3, "d_a2": 4, "alpha": 8, **kw}),
}


@pytest.fixture(params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each of the four architectures."""
    return TINY[request.param]


@pytest.fixture
def llama() -> Tiny:
    return TINY["llama"]


@pytest.fixture
def gpt2() -> Tiny:
    return TINY["gpt2"]


@pytest.fixture
def t5() -> Tiny:
    return TINY["t5"]


@pytest.fixture
def distilbert() -> Tiny:
    return TINY["distilbert"]


@pytest.fixture(params=list(CONFIGS))
def make_config(request: pytest.FixtureRequest) -> Callable[..., KronConfig]:
    """Each method, as a function of further settings."""
    return CONFIGS[request.param]


@pytest.fixture
def fill() -> Callable[..., nn.Module]:
    """Give every adapter parameter (those whose name has ``part``) random values; the model is returned."""

    def fill(model: nn.Module, seed: int = 1, part: str = "") -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ("cdka_" in name or "kron_lora_" in name) and part in name:
                    values = torch.randn(parameter.shape, generator=generator) * 0.3
                    parameter.copy_(values.to(parameter.dtype))
        return model

    return fill
