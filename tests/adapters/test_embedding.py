"""Adapters on embeddings: rows gathered from the factors are those of the dense ΔW; tied weights stay consistent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from kronlab.adapters import (
    CdkaConfig,
    KronEmbedding,
    KronLoraConfig,
    TiedWeightError,
    UnsupportedLayerError,
    adapter_layers,
)
from kronlab.adapters.kron import cdka_delta, kron_lora_delta
from kronlab.adapters.lookup import cdka_lookup, kron_lora_lookup

MakeConfig = Callable[..., Any]
Fill = Callable[..., nn.Module]
TARGETS = {"llama": "embed_tokens", "gpt2": "wte", "distilbert": "word_embeddings"}
CLOSE = {"rtol": 0, "atol": 2e-5}


def f64(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3)])
def test_lookups_are_columns_of_the_dense_delta(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cdka = (f64(2 * 3, 6), f64(5, 4 * 3))  # r1=2, r2=4, r=3: d_in 24, d_out 10
    kron_lora = (f64(3, 4), f64(5, 2), f64(2, 6))  # d_in 24, d_out 15
    ids = torch.randint(24, shape)
    for rows, delta, factors in (
        (cdka_lookup(ids, *cdka, 3, 0.7), cdka_delta(*cdka, 3, 0.7), cdka),
        (kron_lora_lookup(ids, *kron_lora, 0.7), kron_lora_delta(*kron_lora, 0.7), kron_lora),
    ):
        expected = delta.T[ids]
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)
        weight = torch.randn_like(expected)
        for ours, theirs in zip(
            torch.autograd.grad((rows * weight).sum(), factors),
            torch.autograd.grad((expected * weight).sum(), factors),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", list(TARGETS))
def test_an_adapted_embedding_through_peft(
    architecture: str, request: pytest.FixtureRequest, make_config: MakeConfig, fill: Fill, tmp_path: Path
) -> None:
    tiny = request.getfixturevalue(architecture)
    target = TARGETS[architecture]
    settings = {"tie_word_embeddings": False, "untie": True} if architecture == "gpt2" else {}
    config = make_config(target_modules=[target], task_type=tiny.task)
    model = fill(get_peft_model(tiny.model(**settings), config)).eval()
    layers = list(adapter_layers(model))
    assert layers
    assert all(isinstance(layer, KronEmbedding) for _, layer in layers)
    logits = tiny.logits(model)

    base = tiny.model(**settings)
    for name, layer in layers:
        table = base.get_submodule(name.removeprefix("base_model.model.")).weight
        delta = layer.get_delta_weight("default")
        assert delta.shape == table.shape == (40, 32)
        with torch.no_grad():
            table += delta
    if architecture != "distilbert":  # its head is drawn anew
        torch.testing.assert_close(logits, tiny.logits(base), **CLOSE)

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.model(**settings), str(tmp_path)).eval()
    assert torch.equal(tiny.logits(loaded), logits)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(tiny.logits(model), logits, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(tiny.logits(model), logits, **CLOSE)
    tiny.logits(model.train()).square().mean().backward()
    for _, layer in layers:
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in layer.factors("default").values())
    merged = model.eval().merge_and_unload()
    assert not any(isinstance(m, KronEmbedding) for m in merged.modules())
    torch.testing.assert_close(tiny.logits(merged), logits, **CLOSE)


def test_sizes_follow_the_one_hot_layer(llama: Any) -> None:
    model = get_peft_model(llama.model(), CdkaConfig(r1=2, r2=8, r=3, target_modules=["embed_tokens"]))
    ((_, layer),) = adapter_layers(model)
    assert (layer.in_features, layer.out_features) == (40, 32)
    assert layer.component_shapes() == {"A": (3, 2, 5), "B": (3, 16, 8)}
    model = get_peft_model(llama.model(), KronLoraConfig(r=3, d_a1=5, d_a2=2, target_modules=["embed_tokens"]))
    ((_, layer),) = adapter_layers(model)
    assert layer.component_shapes() == {"A": (2, 5), "B1": (16, 3), "B2": (3, 8)}


def test_embedding_beside_linears_in_bf16_and_a_scaled_embedding(
    llama: Any, make_config: MakeConfig, fill: Fill
) -> None:
    class Scaled(nn.Embedding):
        """As Gemma's: the rows are multiplied in forward."""

        embed_scale = torch.tensor(3.0)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale.to(self.weight.dtype)

    base = llama.model()
    table = Scaled(40, 32)
    base.model.embed_tokens = table
    model = fill(get_peft_model(base, make_config(target_modules=["embed_tokens", "q_proj"]))).eval()
    logits = llama.logits(model)
    torch.testing.assert_close(llama.logits(model.merge_and_unload()), logits, rtol=0, atol=1e-4)

    half = fill(get_peft_model(llama.model(dtype=torch.bfloat16), make_config(target_modules=["embed_tokens"])))
    layer = half.base_model.model.model.embed_tokens
    ids = torch.arange(12)
    rows = layer(ids)
    exact = layer.base_layer.weight[ids].float() + layer.get_delta_weight("default")[ids]
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, exact.bfloat16())  # one rounding
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(ids).float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tied_weight_trains_and_refuses_to_merge(
    llama: Any, make_config: MakeConfig, fill: Fill, target: str
) -> None:
    base = llama.model(tie_word_embeddings=True)
    model = fill(get_peft_model(base, make_config(target_modules=[target], task_type="CAUSAL_LM"))).eval()
    weight = base.lm_head.weight
    assert weight is base.model.embed_tokens.weight
    before, logits = weight.detach().clone(), llama.logits(model)
    logits.square().mean().backward()
    assert weight.grad is None
    other = {"embed_tokens": "lm_head", "lm_head": r"model\.embed_tokens"}[target]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TiedWeightError, match=f"{target}: merging would change {other} too"):
            merge()
    assert torch.equal(weight, before)
    assert torch.equal(llama.logits(model), logits)
    # Only the adapted side moved: with the weight untied by hand, the same ΔW on that side alone.
    untied = llama.model(tie_word_embeddings=True, untie=True)
    ((name, layer),) = adapter_layers(model)
    with torch.no_grad():
        untied.get_submodule(name.removeprefix("base_model.model.")).weight += layer.get_delta_weight("default")
    torch.testing.assert_close(llama.logits(untied), logits, **CLOSE)


def test_both_sides_of_a_tied_weight(llama: Any, make_config: MakeConfig, fill: Fill) -> None:
    config = make_config(target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    model = fill(get_peft_model(llama.model(tie_word_embeddings=True), config)).eval()
    assert len(list(adapter_layers(model))) == 2  # each its own ΔW
    with pytest.raises(TiedWeightError, match="share one weight; untie it before attaching"):
        model.merge_and_unload()


def test_the_table_that_t5_does_not_call_is_refused_and_those_that_it_calls_are_not(
    t5: Any, make_config: MakeConfig, fill: Fill
) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"^shared: .* but encoder\.embed_tokens, decoder\.embed_tokens,"):
        get_peft_model(t5.model(), make_config(target_modules=["shared"]))
    model = fill(get_peft_model(t5.model(), make_config(target_modules=["embed_tokens"]))).eval()
    base = t5.model()
    for name, layer in adapter_layers(model):
        table = base.get_submodule(name.removeprefix("base_model.model."))
        table.weight = nn.Parameter(table.weight + layer.get_delta_weight("default"))
    torch.testing.assert_close(t5.logits(model), t5.logits(base), **CLOSE)


def test_a_module_with_several_names_is_refused(make_config: MakeConfig) -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8)), "b": nn.Sequential()})
    model["b"].append(model["a"][0])
    with pytest.raises(UnsupportedLayerError, match=r"^a\.0: the same module is also b\.0, where an adapter on a\.0"):
        get_peft_model(model, make_config(target_modules=["0"]))
    model = nn.Sequential(nn.Linear(8, 8))
    model.append(model[0])
    with pytest.raises(UnsupportedLayerError, match=r"^0: the same module is also 1, where an adapter on 0"):
        get_peft_model(model, make_config(target_modules=["0"]))
