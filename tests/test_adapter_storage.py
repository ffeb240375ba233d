"""Adapters graded as they would be stored: what shares training, what is measured, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kronlab import models
from kronlab.adapters.quantize import FORMATS, QuantisedAdapter, load_quantised, quantize_adapter
from kronlab.cell import Cell, compose_config, make_cell
from kronlab.errors import ConfigError
from kronlab.experiment import run_cell
from kronlab.runs import Store

Build = Callable[..., tuple[torch.nn.Module, object]]
SHORT = ["trainer.max_steps=2", "eval_n=4", "eval.chain_sum.generation.max_new_tokens=4", "trainer.lr=0.1"]


def planned(*overrides: str) -> Cell:
    return make_cell(compose_config(["scale=smoke", *overrides]), weights_needed=False)


# ---- identity


def test_the_stored_form_changes_the_id_and_not_the_training() -> None:
    plain = planned("method=cdka")
    assert "adapter_storage" not in plain.science
    forms = ["bits=16", "bits=8", "bits=4", "kind=int4"]
    cells = [planned("method=cdka", f"adapter_storage.{form}") for form in forms]
    cells.append(planned("method=cdka", "adapter_storage.bits=8", "adapter_storage.group_size=32"))
    assert len({cell.id for cell in [plain, *cells]}) == 6
    assert {cell.train_id for cell in cells} == {plain.train_id}
    assert cells[2].name.endswith("seed 0, stored as nf4")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["bits=8"], ["kind=int8"]),
        (["bits=4"], ["bits=4", "kind=nf4"]),
        (["bits=16"], ["kind=fp16", "group_size=64"]),
        ([], ["group_size=32"]),  # without bits it says nothing
    ],
)
def test_the_same_form_written_otherwise_is_the_same_cell(one: list[str], other: list[str]) -> None:
    cells = [planned(*[f"adapter_storage.{setting}" for setting in form]) for form in (one, other)]
    assert cells[0].id == cells[1].id


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["bits=3"], "adapter_storage.bits=3: must be 16, 8 or 4, or null"),
        (["bits=8", "kind=nf4"], "adapter_storage: bits=8 with kind='nf4' is unknown"),
        (["kind=fp4"], "adapter_storage.kind='fp4': must be one of fp16, int8, nf4, int4, or null"),
        (["bits=4", "group_size=7"], "adapter_storage: group_size=7 is not a positive even number"),
    ],
)
def test_an_unknown_form_is_refused_before_anything_runs(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*[f"adapter_storage.{setting}" for setting in overrides])
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("method", ["none", "full"])
def test_what_has_no_adapter_cannot_be_stored(method: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter_storage.kind='int8': method={method} has no adapter"):
        planned(f"method={method}", "adapter_storage.bits=8")


# ---- the error of the update


@pytest.mark.parametrize("method", ["lora", "cdka", "kron_lora", "krona"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_error_is_that_of_the_update(build: Build, method: str, kind: str) -> None:
    """Against dense matrices of all layers, formed before and after."""
    network, _ = build(f"method={method}", randomise=0.1)

    def updates() -> list[torch.Tensor]:
        with torch.no_grad():
            return [m.get_delta_weight("default").clone() for m in network.modules() if hasattr(m, "get_delta_weight")]

    before = updates()
    assert len(before) == 14
    error = load_quantised(network, quantize_adapter(network, FORMATS[kind], kind=kind))
    after = updates()
    lost = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    assert error == pytest.approx((lost / sum(float(b.square().sum()) for b in before)) ** 0.5, rel=1e-5)
    assert (1e-3 < error < 0.03) if kind == "int8" else (0.03 < error < 0.3)


def test_an_adapter_that_changes_nothing_has_no_error(build: Build) -> None:
    network, _ = build("method=lora")
    assert load_quantised(network, quantize_adapter(network, 8)) is None


def test_a_start_is_stored_too(build: Build) -> None:
    """An offset is part of the checkpoint, so its rounding is part of the error."""
    network, _ = build("method=cdka", "method.init=svd")
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.std())
    before = quantize_adapter(network, 16).state_dict()
    assert any("start" in name for name in before)
    error = load_quantised(network, quantize_adapter(network, 4))
    assert error is not None
    assert error > 1, "an update of about a hundredth between two roundings of nine hundredths"


# ---- a cell


@pytest.mark.parametrize("method", ["lora", "cdka", "kron_lora"])
def test_cells_of_all_forms_train_once_and_say_what_they_stored(
    make: Callable[..., Cell], tmp_path: Path, method: str
) -> None:
    plain = run_cell(make(f"method={method}", *SHORT))
    assert "storage" not in plain
    final = Store(tmp_path).final(plain["train_id"])
    stamp = (final / "train.json").stat().st_mtime_ns
    found = {kind: run_cell(make(f"method={method}", f"adapter_storage.kind={kind}", *SHORT)) for kind in FORMATS}
    assert (final / "train.json").stat().st_mtime_ns == stamp
    assert {record["train_id"] for record in found.values()} == {plain["train_id"]}
    for kind, record in found.items():
        storage = record["storage"]
        assert record["config"]["adapter_storage"] == {"bits": FORMATS[kind], "kind": kind, "group_size": 64}
        path = Store(tmp_path).checkpoints(record["train_id"]) / f"stored-{kind}-64.safetensors"
        assert storage["file_bytes"] == path.stat().st_size > storage["stored_bytes"]
        assert storage["stored_bytes"] == QuantisedAdapter.load(path).stored_bytes
        assert storage["bits_per_parameter"] == 8 * storage["stored_bytes"] / record["parameters"]["trainable"]
        assert record["parameters"] == plain["parameters"], "what was trained, not what was stored"
    errors = [found[kind]["storage"]["delta_error"] for kind in ("fp16", "int8", "int4")]
    assert 0 < errors[0] < 1e-3 < errors[1] < 0.05 < errors[2] < 0.5
    sizes = [found[kind]["storage"]["file_bytes"] for kind in ("fp16", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2]
    # what is graded is what was stored: the further from the trained adapter, the coarser
    nll = {kind: record["eval"]["chain_sum"]["samples"]["nll"] for kind, record in found.items()}
    exact = plain["eval"]["chain_sum"]["samples"]["nll"]
    distance = {kind: sum(abs(a - b) for a, b in zip(nll[kind], exact, strict=True)) for kind in nll}
    assert distance["fp16"] < distance["int8"] < distance["int4"]


def test_a_finished_adapter_can_be_stored(make: Callable[..., Cell], tmp_path: Path) -> None:
    trained = make("method=cdka", *SHORT)
    run_cell(trained)
    again = make(
        "method=adapter", f"method.path={Store(tmp_path).final(trained.train_id)}", "adapter_storage.bits=4", *SHORT
    )
    direct = make("method=cdka", "adapter_storage.bits=4", *SHORT)
    one, other = run_cell(again), run_cell(direct)
    assert one["storage"] == other["storage"]
    assert one["eval"]["chain_sum"]["samples"] == other["eval"]["chain_sum"]["samples"]


def test_a_head_trained_in_full_is_stored_with_the_adapter(make: Callable[..., Cell]) -> None:
    network, _ = models.load(make("model=tiny_llama").config["model"], dtype=torch.float32)
    adapted = get_peft_model(network, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    kept = next(name for name in quantize_adapter(adapted, 8).tensors if "lm_head" in name)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    packed = quantize_adapter(adapted, 4)
    load_quantised(adapted, packed)
    now = next(p for n, p in adapted.named_parameters() if "modules_to_save" in n)
    assert torch.equal(now, packed.state_dict()[kept])
