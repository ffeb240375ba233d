"""PiSSA and LoRA-GA: the start by its definition, the function that it keeps, what is saved for the original base."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from kronlab.encode import SupervisedHead, collate, encode
from kronlab.errors import CheckpointError, ConfigError
from kronlab.experiment import _load_weights, _move_base, _save_weights
from kronlab.models import byte_tokenizer
from kronlab.moved_base import lora_ga_start, lora_layers, move, pissa_start

METHODS = ["pissa", "lora_ga"]
TOKENS = torch.arange(40).view(2, 20)
A, B = ".lora_A.weight", ".lora_B.weight"


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(TOKENS).logits


@pytest.fixture
def started(build: Callable[..., Any], make: Callable[..., Any], toys: Callable[..., Any], tmp_path: Path) -> Any:
    """A network with a moved base, and its start."""

    def started(*overrides: str, precision: str = "fp32") -> tuple[nn.Module, dict[str, Tensor]]:
        network, tokenizer = build(*overrides, precision=precision)
        rows = [encode(example, tokenizer, causal=True, max_length=64) for example in toys(8)]
        batches = [collate([row], pad_id=tokenizer.pad_token_id) for row in rows]
        method = make(*overrides).config["method"]
        return network, _move_base(network, tmp_path, method, batches, SupervisedHead(network, causal=True))

    return started


@pytest.mark.parametrize(
    "overrides", [["method=pissa"], ["method=pissa", "method.init=pissa_niter_4"], ["method=lora_ga"]]
)
def test_the_start_keeps_the_function_and_moves_the_base(
    started: Any, build: Callable[..., Any], overrides: list[str]
) -> None:
    network, start = started(*overrides)
    base, _ = build("method=none")
    torch.testing.assert_close(logits(network), logits(base), atol=1e-5, rtol=1e-5)
    layers = dict(lora_layers(network))
    assert start.keys() == {name + factor for name in layers for factor in (A, B)}
    for name, layer in layers.items():
        plain = base.get_parameter(name.removeprefix("base_model.model.") + ".weight")
        assert (layer.get_base_layer().weight - plain).norm() > 0.1 * plain.norm()
        assert torch.equal(layer.lora_A["default"].weight, start[name + A])


def test_pissa_takes_the_leading_singular_triplets(build: Callable[..., Any]) -> None:
    network, _ = build("method=pissa")
    before = {name: layer.get_base_layer().weight.clone() for name, layer in lora_layers(network)}
    start = pissa_start(network, "pissa")
    for name, layer in lora_layers(network):
        assert torch.equal(layer.get_base_layer().weight, before[name]), "drawing does not move yet"
    move(network, start)
    for name, layer in lora_layers(network):
        values = torch.linalg.svdvals(before[name])
        rest = torch.linalg.svdvals(layer.get_base_layer().weight)
        torch.testing.assert_close(rest[: len(values) - 8], values[8:], atol=1e-5, rtol=1e-4)
        grams = start[name + A] @ start[name + A].T, start[name + B].T @ start[name + B]
        for gram in grams:  # sqrt(S) on either side; the scale is alpha/r = 1
            torch.testing.assert_close(gram, values[:8].diag(), atol=1e-5, rtol=1e-4)


def test_lora_ga_by_the_definition(build: Callable[..., Any]) -> None:
    """Against a whole SVD, up to signs; a large gradient and a small one give the same start."""
    network, _ = build("method=lora_ga", "method.r=2")
    torch.manual_seed(0)
    gradients = {
        name: torch.linalg.qr(torch.randn(layer.out_features, 8))[0]
        @ torch.tensor([64.0, 32, 16, 8, 4, 2, 1, 0.5]).diag()
        @ torch.linalg.qr(torch.randn(layer.in_features, 8))[0].T
        for name, layer in lora_layers(network)
    }
    start = lora_ga_start(network, gradients, gamma=16)
    for name, gradient in gradients.items():
        u, _, vh = torch.linalg.svd(gradient)
        scale = gradient.shape[0] ** 0.25 / 4
        torch.testing.assert_close(start[name + A].abs(), scale * vh[:2].abs(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(start[name + B].abs(), scale * u[:, 2:4].abs(), atol=1e-4, rtol=1e-4)
    layer = next(layer for _, layer in lora_layers(network))
    assert layer.scaling["default"] == pytest.approx(16 / math.sqrt(2)), "alpha over the root of r"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_and_loaded_on_a_fresh_base_is_the_same_function(
    started: Any, build: Callable[..., Any], tmp_path: Path, method: str, precision: str
) -> None:
    network, start = started(f"method={method}", precision=precision)
    with torch.no_grad():
        for _, layer in lora_layers(network):  # as training does
            layer.lora_A["default"].weight.add_(0.1 * torch.randn_like(layer.lora_A["default"].weight))
            layer.lora_B["default"].weight.add_(0.1 * torch.randn_like(layer.lora_B["default"].weight))
    _save_weights(network, byte_tokenizer(), tmp_path / "final", {}, start)
    again, _ = build(f"method={method}", precision=precision, seed=1)
    _load_weights(again, tmp_path / "final", moved=True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    base, _ = build("method=none", precision=precision)
    plain = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, tmp_path / "final"))
    # in bf16 the frozen W - s B0 A0 was rounded, and on the plain base nothing is
    torch.testing.assert_close(loaded, logits(network), atol=1e-4 if precision == "fp32" else 0.03, rtol=1e-4)
    assert (loaded - plain).abs().max() > 0.1
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (16, True)


def test_ranks_by_pattern_are_doubled_too(started: Any, build: Callable[..., Any], tmp_path: Path) -> None:
    network, start = started(
        "method=pissa", "+method.options.rank_pattern={q_proj: 3}", "+method.options.alpha_pattern={up_proj: 5}"
    )
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B["default"].weight.mul_(1.1)
    _save_weights(network, byte_tokenizer(), tmp_path / "final", {}, start)
    loaded = PeftModel.from_pretrained(build("method=none")[0], tmp_path / "final")
    torch.testing.assert_close(logits(loaded), logits(network), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_drawn_once(started: Any, tmp_path: Path, method: str) -> None:
    _, first = started(f"method={method}")
    stamp = (tmp_path / "start.safetensors").stat().st_mtime_ns
    _, second = started(f"method={method}")
    assert (tmp_path / "start.safetensors").stat().st_mtime_ns == stamp
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert load_file(tmp_path / "start.safetensors").keys() == first.keys()


@pytest.mark.parametrize("damage", ["missing", "cut", "another rank"])
def test_a_start_that_is_lost_is_one_clear_line(started: Any, tmp_path: Path, damage: str) -> None:
    started("method=pissa")
    file = tmp_path / "start.safetensors"
    if damage == "missing":
        file.unlink()
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "checkpoint-3" / "COMPLETE").touch()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    rank = ["method.r=4"] if damage == "another rank" else []
    with pytest.raises(CheckpointError, match=r"start.safetensors .*delete .* and run the cell again") as caught:
        started("method=pissa", *rank)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=pissa", "method.r=17"], r"method.r=17: .*\.[kv]_proj has singular vectors for at most r=16"),
        (["method=lora_ga", "method.r=9"], r"method.r=9: .*\.[kv]_proj has singular vectors for at most r=8"),
        (
            ["method=pissa", "method.lm_head=true", "model.config.tie_word_embeddings=true"],
            r"the start of .*lm_head would change the modules that share its weight",
        ),
    ],
)
def test_a_start_that_cannot_be_had_is_one_clear_line(started: Any, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        started(*overrides)
    assert "\n" not in str(caught.value)
