"""Batches in which every row has an adapter of its own: as one at a time, for PEFT's ``adapter_names``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from kronlab.adapters import CdkaConfig, adapter_layers
from kronlab.adapters.base import BASE_NAME
from kronlab.errors import ConfigError

MakeConfig = Callable[..., Any]
Fill = Callable[..., nn.Module]
NAMES = ["one", BASE_NAME, "two", "one", "two"]


def two_adapters(tiny: Any, make_config: MakeConfig, fill: Fill, **settings: Any) -> Any:
    """Adapters one and two, of other sizes and another λ, in float64."""
    settings = {"task_type": tiny.task, **settings}
    model = get_peft_model(tiny.model(dtype=torch.float64), make_config(**settings), adapter_name="one")
    model.add_adapter("two", make_config(**{"r": 2, "alpha": 5, **settings}))
    return fill(model).to(torch.float64).eval()


def inputs(tiny: Any, rows: int = len(NAMES)) -> dict[str, Tensor]:
    """Rows of different length, padded on the left."""
    ids = torch.arange(rows * 6).view(rows, 6) % 37 + 3
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
    more = {"decoder_input_ids": ids[:, :3]} if tiny.task == "SEQ_2_SEQ_LM" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def one_at_a_time(model: Any, batch: dict[str, Tensor], names: list[str]) -> Tensor:
    rows = []
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        if name == BASE_NAME:
            with model.disable_adapter():
                rows.append(model(**row).logits)
        else:
            model.set_adapter(name)
            rows.append(model(**row).logits)
    model.set_adapter("one")
    return torch.cat(rows)


@torch.no_grad()
def test_mixed_batch_is_one_at_a_time(tiny: Any, make_config: MakeConfig, fill: Fill) -> None:
    """In every architecture, with padding; the names in any order, and with one name alone."""
    kept = {"modules_to_save": ["classifier", "pre_classifier"]} if tiny.task == "SEQ_CLS" else {}
    model, batch = two_adapters(tiny, make_config, fill, **kept), inputs(tiny)
    for name, parameter in model.named_parameters():
        if "modules_to_save.two" in name:
            parameter.mul_(1.5)
    expected = one_at_a_time(model, batch, NAMES)
    assert not torch.allclose(expected, one_at_a_time(model, batch, ["one"] * 5), atol=1e-3)
    mixed = model(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-10)
    together = ["one", "one", "two", "two", "two"]
    torch.testing.assert_close(
        model(**batch, adapter_names=together).logits, one_at_a_time(model, batch, together), rtol=0, atol=1e-10
    )
    model.set_adapter("two")
    alone = model(**batch).logits
    model.set_adapter("one")
    assert torch.equal(model(**batch, adapter_names=["two"] * 5).logits, alone)
    assert not torch.equal(model(**batch).logits, alone), "the names are forgotten after the call"


@torch.no_grad()
@pytest.mark.parametrize("path", ["factored", "lora", "dense"])
def test_mixed_batch_of_each_path_and_precision(llama: Any, make_config: MakeConfig, fill: Fill, path: str) -> None:
    model, batch = two_adapters(llama, make_config, fill, path=path), inputs(llama)
    exact = one_at_a_time(model, batch, NAMES)
    torch.testing.assert_close(model(**batch, adapter_names=NAMES).logits, exact, rtol=0, atol=1e-10)
    model.float()
    torch.testing.assert_close(model(**batch, adapter_names=NAMES).logits, exact.float(), rtol=0, atol=1e-4)
    for parameter in model.get_base_model().parameters():  # adapters in float32 beside a base in 16 bits
        parameter.data = parameter.data.bfloat16()
    for _, layer in adapter_layers(model):
        for name in ("one", "two"):
            for factor in layer.factors(name).values():
                factor.data = factor.data.float()
    torch.testing.assert_close(
        model(**batch, adapter_names=NAMES).logits, one_at_a_time(model, batch, NAMES), rtol=2e-2, atol=2e-2
    )


@torch.no_grad()
def test_mixed_batch_on_an_embedding(llama: Any, make_config: MakeConfig, fill: Fill) -> None:
    model, batch = two_adapters(llama, make_config, fill, target_modules=["embed_tokens", "q_proj"]), inputs(llama)
    mixed = model(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, one_at_a_time(model, batch, NAMES), rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_mixed_generation(request: Any, make_config: MakeConfig, fill: Fill, name: str, how: dict[str, int]) -> None:
    tiny = request.getfixturevalue(name)
    model, batch = two_adapters(tiny, make_config, fill), inputs(tiny)
    batch.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **how}
    mixed = model.generate(**batch, adapter_names=NAMES, **settings)
    each = mixed.view(len(NAMES), -1, mixed.shape[1])
    for i, adapter in enumerate(NAMES):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        assert torch.equal(each[i], model.generate(**row, adapter_names=[adapter], **settings)), adapter


@torch.no_grad()
def test_agrees_with_pefts_lora(llama: Any, fill: Fill) -> None:
    """PEFT mixes LoRA; CDKA of r1 = r2 = 1 is LoRA."""
    sizes = {"r1": 1, "r2": 1, "r": 3, "scaling": "lora", "alpha": 6, "task_type": llama.task}
    ours = get_peft_model(llama.model(), CdkaConfig(**sizes), "one")
    theirs = get_peft_model(llama.model(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"), "one")
    ours.add_adapter("two", CdkaConfig(**sizes))
    theirs.add_adapter("two", LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    fill(ours).eval()
    theirs.eval()
    lora = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    for name, parameter in ours.named_parameters():
        if "cdka_" in name:
            stem, adapter = name.rsplit(".", 1)
            lora[f"{stem.replace('cdka_', 'lora_')}.{adapter}.weight"].copy_(parameter)
    batch = inputs(llama)
    torch.testing.assert_close(
        ours(**batch, adapter_names=NAMES).logits, theirs(**batch, adapter_names=NAMES).logits, rtol=0, atol=1e-4
    )


def test_what_cannot_be_mixed_is_one_clear_line(llama: Any, make_config: MakeConfig, fill: Fill) -> None:
    model, batch = two_adapters(llama, make_config, fill), inputs(llama)
    plain = model(**batch).logits
    with pytest.raises(ConfigError, match="'three' is not loaded; there are one, two"):
        model(**batch, adapter_names=["one", "three", "one", "one", "one"])
    with pytest.raises(ConfigError, match="3 names for 5 rows"):
        model(**batch, adapter_names=["one", "two", "one"])
    assert torch.equal(model(**batch).logits, plain), "nothing is left behind"
    with pytest.raises(ConfigError, match=r"model.eval\(\) first"):
        model.train()(**batch, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ConfigError, match="not merged"):
        model(**batch, adapter_names=NAMES)
    model.unmerge_adapter()
    model.add_adapter("whole", make_config(task_type=llama.task, modules_to_save=["norm"]))
    model.eval()
    with pytest.raises(ConfigError, match="norm is trained in full by some adapters and not by 'one'"):
        model(**batch, adapter_names=["one", "whole", "one", "one", "one"])
