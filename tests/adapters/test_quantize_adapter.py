"""Adapters stored in 16, 8 and 4 bits: levels, error bounds, exact sizes and the way through a file."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from kronlab.adapters import CdkaConfig, KronLoraConfig, checkpoint
from kronlab.adapters.convert import convert
from kronlab.adapters.peft_hook import get_peft_model_state_dict
from kronlab.adapters.quantize import (
    FORMATS,
    PACKED_FILE,
    QuantisedAdapter,
    nf4_levels,
    quantize_adapter,
    save_packed,
)
from kronlab.errors import CheckpointError, ConfigError


def test_nf4_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(nf4_levels(), functional.get_4bit_type("nf4", device="cpu").data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (3, 43), (16, 8)])
def test_error_size_and_values(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 1e-3
    g = 16
    adapter = quantize_adapter({"w": x}, FORMATS[kind], kind=kind, group_size=g)
    back = adapter.state_dict()["w"]
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    assert adapter.errors["w"] == pytest.approx(float((back - x).norm() / x.norm()))

    n, groups = x.numel(), -(-x.numel() // g)
    sizes = {16: 2 * n, 8: n + 4 * groups, 4: -(-n // 2) + 4 * groups}
    assert adapter.stored_bytes == sizes[adapter.bits]
    assert adapter.bits_per_parameter == pytest.approx(8 * adapter.stored_bytes / n)

    # Half the widest gap between levels, times the largest of the group, bounds the error of an element.
    widest = {"fp16": 2**-10, "int8": 1 / 127, "int4": 1 / 7, "nf4": float(nf4_levels().diff().max())}[kind]
    for at in range(0, n, g):
        part, stored = x.reshape(-1)[at : at + g], back.reshape(-1)[at : at + g]
        largest = part.abs().max()
        assert (stored - part).abs().max() <= widest / 2 * largest * 1.001
        if kind != "fp16":
            assert torch.isclose(stored[part.abs().argmax()].abs(), largest) or kind == "nf4"


def test_zeros_stay_zero_and_nothing_leaks_between_groups() -> None:
    x = torch.cat([torch.zeros(16), torch.full((16,), 1e-6), torch.full((16,), 5.0), torch.tensor([-2.0])])
    for kind, bits in FORMATS.items():
        back = quantize_adapter({"w": x}, bits, kind=kind, group_size=16).state_dict()["w"]
        assert torch.equal(back[:16], x[:16])
        # A full scale is exact; 1e-6 is among fp16's subnormals, 6e-8 apart.
        torch.testing.assert_close(back, x, rtol=1e-6, atol=3e-8 if kind == "fp16" else 0)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_an_adapter_of_a_model_through_a_file(
    llama: Any, make_config: Callable[..., Any], fill: Callable[..., nn.Module], tmp_path: Path, kind: str
) -> None:
    model = fill(get_peft_model(llama.model(), make_config(task_type="CAUSAL_LM"))).eval()
    logits = llama.logits(model)
    adapter = quantize_adapter(model, FORMATS[kind], kind=kind)
    assert adapter.tensors.keys() == get_peft_model_state_dict(model).keys()
    file = tmp_path / "adapter.safetensors"
    adapter.save(file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + adapter.stored_bytes
    again = QuantisedAdapter.load(file)
    assert (again.kind, again.group_size, again.errors) == (kind, 64, adapter.errors)
    assert again.stored_bytes == adapter.stored_bytes
    for key, value in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    set_peft_model_state_dict(model, again.state_dict())
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, adapter.state_dict()[key])
    assert not torch.equal(llama.logits(model), logits)


def test_fewer_bits_lose_more_and_lora_goes_the_same_way(llama: Any, make_config: Callable[..., Any]) -> None:
    for config in (make_config(), LoraConfig(r=3, target_modules="all-linear")):
        model = get_peft_model(llama.model(), config)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        packed = [quantize_adapter(model, bits) for bits in (16, 8, 4)]
        errors = [sum(p.errors.values()) / len(p.errors) for p in packed]
        assert errors[0] < 1e-3 < errors[1] < 2e-2 < errors[2] < 0.15
        assert packed[0].stored_bytes > packed[1].stored_bytes > packed[2].stored_bytes
        # NormalFloat is made for normal values.
        uniform = quantize_adapter(model, 4, kind="int4")
        assert sum(packed[2].errors.values()) < sum(uniform.errors.values())


def test_what_cannot_be_packed_is_one_line(tmp_path: Path) -> None:
    x = {"w": torch.ones(4)}
    for arguments, message in (
        ({"bits": 3}, "bits=3 with kind=None is unknown"),
        ({"bits": 8, "kind": "nf4"}, "bits=8 with kind='nf4' is unknown"),
        ({"bits": 4, "group_size": 7}, "group_size=7 is not a positive even number"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize_adapter(x, **arguments)
    for value, bits in ((1e6, 16), (float("nan"), 8), (float("inf"), 4)):
        with pytest.raises(ConfigError, match="w is not finite in"):
            quantize_adapter({"w": torch.tensor([1.0, value])}, bits)
    save_file(x, tmp_path / "other.safetensors")
    for path in (tmp_path / "other.safetensors", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=f"{path} is no adapter"):
            QuantisedAdapter.load(path)


# ---- folders that PEFT loads


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("method", ["lora", "cdka", "kron_lora"])
def test_peft_loads_a_packed_folder(
    llama: Any, fill: Callable[..., nn.Module], tmp_path: Path, method: str, kind: str
) -> None:
    config: Any = {
        "lora": lambda: LoraConfig(r=3, target_modules="all-linear", modules_to_save=["norm"]),
        "cdka": lambda: CdkaConfig(r1=2, r2=4, r=3, modules_to_save=["norm"]),
        "kron_lora": lambda: KronLoraConfig(r=3, d_a2=4, modules_to_save=["norm"]),
    }[method]()
    config.task_type = "CAUSAL_LM"
    model: Any = fill(get_peft_model(llama.model(), config))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    packed = quantize_adapter(model, kind=kind)
    save_packed(packed, model.peft_config["default"], tmp_path / "packed")
    assert sorted(file.name for file in (tmp_path / "packed").iterdir()) == ["adapter_config.json", PACKED_FILE]
    set_peft_model_state_dict(model, packed.state_dict())
    expected = llama.logits(model.eval())
    loaded = PeftModel.from_pretrained(llama.model(), str(tmp_path / "packed")).eval()
    assert torch.equal(llama.logits(loaded), expected)
    loaded.load_adapter(str(tmp_path / "packed"), adapter_name="again")
    loaded.set_adapter("again")
    assert torch.equal(llama.logits(loaded.eval()), expected)

    # Converted to LoRA from the files alone; and PEFT's own folder, if there is one, goes first.
    convert(tmp_path / "packed", "lora", tmp_path / "lora")
    as_lora = PeftModel.from_pretrained(llama.model(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(llama.logits(as_lora), expected, rtol=0, atol=1e-4)
    for parameter in model.parameters():
        parameter.mul_(1.01)
    model.save_pretrained(str(tmp_path / "packed"))
    both = PeftModel.from_pretrained(llama.model(), str(tmp_path / "packed")).eval()
    assert not torch.equal(llama.logits(both), expected)


def test_what_peft_says_of_a_packed_folder(
    llama: Any, make_config: Callable[..., Any], fill: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """A damaged or unfitting one is an error by kronlab; without kronlab there are no weights, which is one too."""
    model: Any = fill(get_peft_model(llama.model(), make_config(task_type="CAUSAL_LM")))
    save_packed(quantize_adapter(model, 4), model.peft_config["default"], tmp_path)
    with pytest.raises(CheckpointError, match="the checkpoint has unknown"):
        PeftModel.from_pretrained(llama.model(num_hidden_layers=1), str(tmp_path))
    script = (
        "import json, sys, torch\nfrom peft import LoraConfig, PeftModel\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "LoraConfig(target_modules='all-linear').save_pretrained(sys.argv[1])\n"
        "sizes = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'vocab_size': 40}\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))\n"
        "PeftModel.from_pretrained(model, sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr.splitlines()[-1]
    (tmp_path / PACKED_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"is no adapter that QuantisedAdapter\.save has written"):
        PeftModel.from_pretrained(llama.model(), str(tmp_path))


def test_hooking_in_again_changes_nothing() -> None:
    before = peft.peft_model.load_peft_weights
    importlib.reload(checkpoint)
    assert peft.peft_model.load_peft_weights is not before
    assert peft.peft_model.load_peft_weights.kronlab_plain is before.kronlab_plain
    assert not hasattr(before.kronlab_plain, "kronlab_plain")
