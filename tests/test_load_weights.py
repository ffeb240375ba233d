"""The weights that a cell left behind are taken whole or not at all, for every kind of method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kronlab.errors import CheckpointError
from kronlab.experiment import _load_weights, _save_weights
from kronlab.models import byte_tokenizer
from kronlab.train import mark_whole

METHODS = ["cdka", "kron_lora", "lora", "full"]


def weights_file(final: Path) -> Path:
    (file,) = final.glob("*.safetensors")
    return file


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_saved_weights_come_back(build: Callable[..., Any], tmp_path: Path, method: str, model: str) -> None:
    settings = [f"method={method}", f"model={model}"]
    network, _ = build(*settings, randomise=0.1)
    final = tmp_path / "final"
    _save_weights(network, byte_tokenizer(), final, {})
    other, _ = build(*settings, seed=1)
    _load_weights(other, final)
    wanted = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["missing", "unknown", "another shape"])
def test_weights_that_do_not_fit_are_refused(build: Callable[..., Any], tmp_path: Path, method: str, how: str) -> None:
    network, _ = build(f"method={method}")
    final = tmp_path / "final"
    _save_weights(network, byte_tokenizer(), final, {})
    file = weights_file(final)
    tensors = load_file(file)
    key = sorted(tensors)[5]
    if how == "missing":
        del tensors[key]
    elif how == "unknown":
        key = f"{key}.more"
        tensors[key] = torch.zeros(3)
    else:
        tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    mark_whole(final)
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        _load_weights(network, final)
    assert key.removeprefix("base_model.model.").removesuffix(".weight") in str(caught.value)
    assert "\n" not in str(caught.value)
