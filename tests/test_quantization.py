"""Base weights in 8 and 4 bits: what is quantised and what not, every method on top of it, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kronlab import models
from kronlab.adapters.quantized_base import bits_of, dequantise, quantise_
from kronlab.bench.cases import sharing_weights
from kronlab.cell import Cell, compose_config
from kronlab.errors import ConfigError, DimensionError, ModelError
from kronlab.experiment import run_cell
from kronlab.runs import Store, read_jsonl

pytest.importorskip("bitsandbytes")
QUANTISATIONS = list(models.QUANTISATIONS)
SHORT = ["model=tiny_llama_128", "trainer.max_steps=2", "eval_n=4", "eval.chain_sum.generation.max_new_tokens=4"]


def losses(cell: Cell) -> list[float]:
    folder = Store(cell.config["results"]["dir"]).folder(cell.scale, cell.id)
    return [line["loss"] for line in read_jsonl(folder / "loss.jsonl")]


@pytest.mark.parametrize(
    ("model", "quantization"),
    [("tiny_llama", "8bit"), ("tiny_llama_128", "4bit"), ("tiny_t5", "8bit"), ("tiny_distilbert", "8bit")],
)
def test_linear_layers_are_quantised_and_the_rest_stays(model: str, quantization: str) -> None:
    config: Any = compose_config([f"model={model}"], name="plan").model
    head = models.Head(labels=("no", "yes")) if config.architecture == "sequence_classification" else None
    plain, network = (models.load(config, dtype=torch.float32, head=head)[0] for _ in range(2))
    models.quantise(network, quantization)
    kept = {"lm_head", "wo", "classifier", "pre_classifier"}
    before, found = dict(plain.named_modules()), 0
    for name, module in network.named_modules():
        linear = isinstance(before[name], nn.Linear)
        if linear and name.rpartition(".")[2] not in kept:
            assert bits_of(module) == models.QUANTISATIONS[quantization], name
            error = (dequantise(module) - before[name].weight).norm() / before[name].weight.norm()
            assert error < (0.01 if quantization == "8bit" else 0.12), name
            found += 1
        else:
            assert bits_of(module) is None, name
            for key, value in module.named_parameters(recurse=False):
                assert torch.equal(value, before[name].get_parameter(key)), name
    assert found >= 7
    assert models.count_parameters(network)[1] == models.count_parameters(plain)[1]
    for module in network.modules():
        if bits_of(module) == 4:  # in eval mode as in training
            x = torch.randn(3, module.in_features)
            with torch.no_grad():
                torch.testing.assert_close(module.train()(x), module.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("quantization", QUANTISATIONS)
@pytest.mark.parametrize("method", ["lora", "cdka", "kron_lora", "krona", "lora_plus", "adalora", "vera"])
def test_every_method_that_can_trains_on_it(make: Callable[..., Cell], method: str, quantization: str) -> None:
    cell = make(*SHORT, f"method={method}", f"model.quantization={quantization}")
    plain = make(*SHORT, f"method={method}")
    assert "quantization" not in plain.science["model"]
    assert cell.id != plain.id
    assert f"in {quantization}" in cell.name
    record = run_cell(cell)
    assert record["status"] == "done"
    assert record["weights"].startswith(f"random:0 in {quantization} by bitsandbytes==")
    reference = run_cell(plain)
    assert record["parameters"] == reference["parameters"]
    assert losses(cell) != losses(plain), "the base is another one"
    assert losses(cell) == pytest.approx(losses(plain), abs=0.1)


@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_bf16_and_the_weights_of_an_earlier_run(make: Callable[..., Cell], tmp_path: Path, quantization: str) -> None:
    """What was trained is loaded onto the quantised base and graded alike; a stored adapter goes there too."""
    cell = make(*SHORT, "method=cdka", f"model.quantization={quantization}", "trainer.precision=bf16")
    first = run_cell(cell)
    shutil.rmtree(tmp_path / "runs")
    again = run_cell(cell)
    for part in ("metrics", "samples"):
        assert again["eval"]["chain_sum"][part] == first["eval"]["chain_sum"][part]
    assert again["train"] == first["train"]
    stored = make(
        *SHORT, "method=cdka", f"model.quantization={quantization}", "trainer.precision=bf16", "adapter_storage.bits=8"
    )
    assert stored.train_id == cell.train_id
    assert 0 < run_cell(stored)["storage"]["delta_error"] < 0.02
    base = run_cell(make(*SHORT, "method=none", "task=none", "+eval@eval.chain_sum=chain_sum",
                         f"model.quantization={quantization}"))  # fmt: skip
    assert base["status"] == "done"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["method=full"], "method full trains the base weights themselves"),
        (["method=lokr"], "LoKr takes no quantised layers"),
        (["method=pissa"], "starts inside the base weights"),
        (["method=lora_ga"], "starts inside the base weights"),
        (["method=cdka", "method.init=gradient"], "needs the gradient of the base weights"),
        (["method=dora"], "PEFT's DoRA"),
    ],
)
def test_a_method_that_cannot_is_refused_by_name(make: Callable[..., Cell], overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        make(*overrides, "model.quantization=8bit")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=r"model.quantization='3bit': must be one of 8bit, 4bit, or null"):
        make("model.quantization=3bit")


def test_dimensions_that_bitsandbytes_unpacks_wrongly_are_refused(make: Callable[..., Cell]) -> None:
    with pytest.raises(DimensionError, match="q_proj: d_in=32 is no multiple of 64, the block of 4-bit weights"):
        run_cell(make("model=tiny_llama", "method=cdka", "model.quantization=4bit"))


def test_without_bitsandbytes_it_is_one_clear_line(make: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    cell = make("method=cdka", "model.quantization=8bit")
    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ModelError, match="quantization=8bit needs bitsandbytes: pip install bitsandbytes"):
        models.load_again(cell.config["model"], dtype=torch.float32, source="random")


def test_quantising_a_copy_leaves_what_it_was_copied_from() -> None:
    """A bias too, which bitsandbytes casts in place."""
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    copied = sharing_weights(layers)
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    quantise_(copied, 8)
    copied(torch.randn(3, 64).bfloat16())
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    assert {value.dtype for value in layers.state_dict().values()} == {torch.float32}


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=8))
    with pytest.raises(ModelError, match="has no linear layer that bitsandbytes could quantise"):
        models.quantise(model, "8bit")
