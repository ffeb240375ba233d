"""Alignment: the formulas against real optimiser steps, the predictions, and a measurement that can be killed."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from peft.tuners.lora import LoraLayer
from torch import Tensor

from kronlab import align
from kronlab.adapters import CdkaComponents, KronLoraComponents, adapter_layers
from kronlab.adapters.alignment import (
    AlignedComponents,
    FirstStep,
    arrange,
    asymptotic_alignment,
    first_step,
    random_factors,
    spanned,
)
from kronlab.adapters.init import layer_gradients
from kronlab.adapters.nearest import rearrange
from kronlab.align import run_align
from kronlab.cell import compose_config
from kronlab.encode import SupervisedHead, collate, encode
from kronlab.errors import CheckpointError, ConfigError, KronlabError
from kronlab.report.alignment import measured, spread_of_draws
from kronlab.reproduce import reproduce

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["runtime.progress=false"]
DATA = Path("checkpoints/align/smoke/table12.jsonl")


def table12() -> dict[str, Any]:
    found = OmegaConf.to_container(compose_config(["table=table12"], name="align").table, resolve=True)
    assert isinstance(found, dict)
    for layout in found["scales"].values():
        layout.pop("training", None)  # part two has tests of its own
    return found  # type: ignore[return-value]


# ---- formulas against the real thing


def adapted_layers(network: Any) -> dict[str, Any]:
    ours = dict(adapter_layers(network))
    return ours or {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}


def components_and_factors(layer: Any) -> tuple[AlignedComponents, dict[str, Tensor]]:
    if isinstance(layer, LoraLayer):
        c = CdkaComponents(layer.in_features, layer.out_features, 1, 1, layer.r["default"])
        return c, {"A": layer.lora_A["default"].weight.detach()}
    return layer.components["default"], {k: v.detach() for k, v in layer.factors("default").items()}


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora", "method.r=3"],
        ["method=cdka", "method.r1=2", "method.r2=8", "method.r=3"],
        ["method=cdka", "method.r1=8", "method.r2=2", "method.r=1"],
        ["method=kron_lora", "method.r=3", "method.d_a1=4", "method.d_a2=2", "method.dropout=0"],
    ],
    ids=" ".join,
)
def test_the_formulas_are_what_real_optimisers_do(
    overrides: list[str], build: Callable[..., Any], toys: Callable[..., Any]
) -> None:
    """ΔW of a real adapter after a real SGD and a real AdamW step on the same loss; fp64, so 1e-5 is rounding."""
    network, tokenizer = build(*overrides)
    network = network.double().eval()
    rows = [encode(example, tokenizer, causal=True, max_length=64) for example in toys(6)]
    batches = [collate(rows[at : at + 3], pad_id=tokenizer.pad_token_id) for at in (0, 3)]
    head = SupervisedHead(network, causal=True)

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return head.losses(model, batch).sum()

    layers = adapted_layers(network)
    assert len(layers) == 14
    gradients = layer_gradients(network, layers, batches, loss)
    start = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimisers = {
        "sgd": torch.optim.SGD(trained, lr=1e-3),
        "adamw": torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1, eps=1e-30),
    }
    for which, optimiser in optimisers.items():
        network.load_state_dict(start, strict=False)
        optimiser.zero_grad()
        for batch in batches:
            loss(network, batch).backward()
        formula = {}
        for name, layer in layers.items():
            c, factors = components_and_factors(layer)
            formula[name] = getattr(first_step(arrange(gradients[name].double(), c), spanned(factors, c)), which)
        optimiser.step()
        for name, layer in layers.items():
            step = layer.get_delta_weight("default").detach().flatten()
            real = -float(torch.cosine_similarity(step, gradients[name].double().flatten(), dim=0))
            assert 0.01 < real < 1
            assert formula[name] == pytest.approx(real, rel=1e-5), f"{which}, {name}"


def test_lora_is_cdka_1_1() -> None:
    gradient = torch.randn(6, 10)
    c = CdkaComponents(10, 6, 1, 1, 3)
    torch.testing.assert_close(arrange(gradient, c), gradient.T)
    a = torch.randn(3, 10)
    torch.testing.assert_close(spanned({"A": a}, c), a.T)


@pytest.mark.parametrize(
    "c", [CdkaComponents(12, 8, 2, 3, 4), KronLoraComponents(12, 8, 3, 2, 4)], ids=lambda c: type(c).__name__
)
def test_arranged_delta_is_v_times_u(c: AlignedComponents) -> None:
    """The table of the module's docstring, against the dense definitions."""
    from kronlab.adapters.kron import cdka_delta, kron_lora_delta

    factors = random_factors(c, 0)
    v = spanned(factors, c)
    if isinstance(c, CdkaComponents):
        b = torch.randn(c.d_out // c.r1, c.r2 * c.r)
        delta, u = cdka_delta(factors["A"], b, c.r), b.reshape(-1, c.r2, c.r).permute(2, 0, 1).reshape(c.r, -1)
        assert torch.equal(arrange(delta, c), rearrange(delta, c.r1, c.d_in // c.r2))
    else:
        b = torch.randn(c.d_b2, c.r)
        delta, u = kron_lora_delta(factors["A"], b, factors["B2"]), b.T
    torch.testing.assert_close(arrange(delta, c), v @ u)


# ---- predictions

POINTS = [
    CdkaComponents(192, 96, 1, 1, 8),
    CdkaComponents(192, 96, 2, 8, 4),
    CdkaComponents(192, 96, 2, 16, 8),
    CdkaComponents(192, 96, 8, 2, 4),
    KronLoraComponents(192, 96, 2, 3, 8),
]


def mean_step(gradient: Tensor, c: AlignedComponents, draws: int) -> FirstStep:
    arranged = arrange(gradient, c)
    steps = [first_step(arranged, spanned(random_factors(c, seed), c)) for seed in range(draws)]
    return FirstStep(*(float(np.mean([getattr(s, key) for s in steps])) for key in ("sgd", "adamw")))


@pytest.mark.parametrize("c", POINTS, ids=str)
def test_a_gradient_of_independent_entries_meets_the_prediction(c: AlignedComponents) -> None:
    torch.manual_seed(0)
    step = mean_step(torch.randn(96, 192), c, draws=40)
    # Kron-LoRA contracts over six blocks only, and so varies more from draw to draw
    assert step.sgd == pytest.approx(c.predicted_alignment(), rel=0.03 if isinstance(c, CdkaComponents) else 0.12)
    assert 0.76 < step.adamw / step.sgd < 0.9, "√(2/π) = 0.80 while r is small against n"
    assert c.predicted_alignment() < asymptotic_alignment(c)


@pytest.mark.parametrize(("r", "expected"), [(1, 0.798), (2, 0.886), (4, 0.940), (8, 0.969)])
def test_a_gradient_along_one_direction_is_met_as_well_but_for_its_luck(r: int, expected: float) -> None:
    """Mean square r/n as for any gradient, so the mean is less: E[χ_r]/√r of it (docs/alignment.md)."""
    torch.manual_seed(0)
    u, w = torch.randn(48, 1), torch.randn(1, 256)
    c = CdkaComponents(256, 48, 1, 1, r)
    assert mean_step(u @ w, c, draws=600).sgd / c.predicted_alignment() == pytest.approx(expected, rel=0.06)


def test_asymptotic_form_and_sizes_that_reach_everything() -> None:
    assert asymptotic_alignment(CdkaComponents(576, 192, 2, 8, 4)) == math.sqrt(4 * 8 / (2 * 576))
    assert asymptotic_alignment(KronLoraComponents(576, 192, 2, 3, 8)) == math.sqrt(8 / (3 * 576))
    whole = CdkaComponents(8, 8, 1, 1, 8)
    v = torch.eye(8)
    assert first_step(arrange(torch.randn(8, 8), whole), v).sgd == pytest.approx(1), "A = I loses nothing"
    assert first_step(torch.zeros(8, 8), v) == FirstStep(0, 0)


def test_draws_are_repeatable_and_leave_the_global_generator_alone() -> None:
    c = POINTS[1]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = random_factors(c, 1), random_factors(c, 1), random_factors(c, 2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first["A"], second["A"])
    assert not torch.equal(first["A"], other["A"])
    assert first["A"].abs().max() <= 1 / math.sqrt(192 / 8), "Kaiming-uniform with a = √5"


# ---- the measurement


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("align")
    torch.set_num_threads(1)
    reproduce(table12(), scale="smoke", results_dir=str(results), extra=QUIET)
    return results


def record_of(results: Path, name: str = "table12") -> dict[str, Any]:
    return json.loads((results / f"align/smoke/{name}.json").read_text())  # type: ignore[no-any-return]


def written(results: Path) -> dict[str, bytes]:
    return {str(p.relative_to(results)): p.read_bytes() for p in sorted(results.rglob("*")) if p.is_file()}


def test_the_table_says_what_the_record_says(made: Path) -> None:
    record = record_of(made)
    spec = table12()
    keys = spec["scales"]["smoke"]["rows"]
    assert list(record["labels"]) == keys
    assert len(record["layers"]) == 14
    assert [layer["kind"] for layer in record["layers"][:3]] == ["q_proj", "k_proj", "v_proj"]
    assert record["batches"]["examples"] == 8
    assert str(made) not in json.dumps(record)
    cosines = measured(record, "cdka_2_8_4", "sgd")
    assert cosines.shape == (14, 2)
    assert ((cosines > 0) & (cosines < 1)).all()
    text = (made / "tables/smoke/table12.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| CDKA (2,8,4) |"))
    assert f"{cosines.mean():.4f} ± {spread_of_draws(cosines):.4f}" in row
    assert "Verdict: the theory of the first step" in text
    assert {p.name for p in (made / "figures/smoke").iterdir()} == {"table12.svg", "table12.png"}
    assert {p.name for p in (made / "align/smoke").iterdir()} == {
        "table12.json", *(f"table12-kinds.{suffix}" for suffix in ("md", "csv", "tex"))
    }  # fmt: skip


def test_the_gradient_is_the_full_one(made: Path) -> None:
    """A layer's norm against plain autograd of the bare model: no adapter in sight."""
    from kronlab import models
    from kronlab.data import load_examples

    record = record_of(made)
    config = align.Plan(table12()["rows"], table12()["scales"]["smoke"]).config
    network, tokenizer = models.load(config["model"], dtype=torch.float32)
    task = record["settings"]["task"]
    examples = load_examples(task["source"], split=task["split"], n=8, seed=0, data_dir=None)
    for example in examples:
        row = encode(example, tokenizer, causal=True, max_length=task["max_length"])
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        logits = network(input_ids=ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100).backward()
    for layer in record["layers"]:
        expected = float(network.get_submodule(layer["name"]).weight.grad.norm())
        assert layer["gradient_norm"] == pytest.approx(expected, rel=1e-4)


def test_typed_again_it_measures_and_writes_nothing_new(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(made)
    monkeypatch.setattr(align, "measure_layer", lambda *_: pytest.fail("measured again"))
    reproduce(table12(), scale="smoke", results_dir=str(made), extra=QUIET)
    assert written(made) == before


def test_a_killed_run_goes_on_to_the_same_numbers(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (made / DATA).read_text().splitlines(keepends=True)
    (tmp_path / DATA).parent.mkdir(parents=True)
    (tmp_path / DATA).write_text("".join(lines[:5]) + lines[5][:80])  # killed in the middle of writing the sixth
    seen = []
    plain = align.measure_layer
    monkeypatch.setattr(align, "measure_layer", lambda p, layer, g: seen.append(layer.name) or plain(p, layer, g))
    reproduce(table12(), scale="smoke", results_dir=str(tmp_path), extra=QUIET)
    whole = record_of(made)
    assert seen == [layer["name"] for layer in whole["layers"][5:]]
    assert record_of(tmp_path)["layers"] == whole["layers"]
    assert len((tmp_path / DATA).read_text().splitlines()) == 14


def test_what_counts_as_measured(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "align/smoke/table12.json"
    path.parent.mkdir(parents=True)
    path.write_bytes((made / "align/smoke/table12.json").read_bytes())

    def done(results: Path, **named: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_align(table12(), "smoke", name="table12", results=results, dry_run=True, **named)
        return caplog.messages[0].rpartition(", ")[2]

    assert done(made) == "14 done"
    assert done(tmp_path) == "0 done", "a record that came with a clone is somebody else's measurement"
    assert done(tmp_path, reuse="any") == "14 done"
    assert done(made, force=True) == "0 done"
    assert done(made, seeds=3) == done(made, batches=1) == done(made, extra=["seed=1"]) == "0 done"
    assert done(made, keys=["lora_8"]) == "0 done"


def test_render_only_gives_the_same_bytes_from_the_record_alone(made: Path, tmp_path: Path) -> None:
    record = tmp_path / "align/smoke/table12.json"
    record.parent.mkdir(parents=True)
    record.write_bytes((made / "align/smoke/table12.json").read_bytes())
    reproduce(table12(), scale="smoke", results_dir=str(tmp_path), render_only=True)
    assert written(tmp_path) == {k: v for k, v in written(made).items() if not k.startswith("checkpoints")}


@pytest.mark.parametrize("scale", list(table12()["scales"]))
def test_dry_run_plans_every_scale_without_weights_or_data(
    scale: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert reproduce(table12(), scale=scale, results_dir=str(tmp_path), dry_run=True) is None
    points = len(table12()["scales"][scale].get("rows") or table12()["rows"])
    assert f"{points} grid points x " in caplog.messages[0]
    assert sum(message.startswith("  ") for message in caplog.messages) == points
    assert list(tmp_path.iterdir()) == []


def test_the_script_measures_a_part_of_the_grid_beside_its_record(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/align.py"), "table_scale=smoke", "rows=[lora_8,cdka_2_8_4]", "seeds=1",
         "name=mine", 'extra=["runtime.progress=false"]', "force=true", f"results.dir={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(record_of(tmp_path, "mine")["labels"]) == ["lora_8", "cdka_2_8_4"]
    assert {p.name for p in (tmp_path / "align/smoke").iterdir()} == {
        *(f"mine.{suffix}" for suffix in ("json", "md", "csv", "tex", "svg", "png")),
        *(f"mine-kinds.{suffix}" for suffix in ("md", "csv", "tex")),
    }
    assert "Verdict: none, the grid has too few points." in done.stdout


def test_what_cannot_be_done_is_one_line(made: Path, tmp_path: Path) -> None:
    def run(*, change: Callable[[dict[str, Any]], Any] = lambda spec: None, **named: Any) -> Callable[[], Any]:
        spec = table12()
        change(spec)
        return lambda: run_align(spec, "smoke", name="x", results=tmp_path, **named)

    def row(**fields: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda spec: spec["rows"].__setitem__("lora_8", fields)

    for call, words in (
        (run(render_only=True), "nothing has been measured at scale smoke yet"),
        (run(keys=["lora_9"]), "rows=['lora_9']: no such grid point; known are lora_1"),
        (
            run(change=row(method="dora", r=8)),
            "rows.lora_8.method='dora' is not known; use one of lora, cdka",
        ),
        (run(change=row(method="lora", r=8, r1=2)), "rows.lora_8: lora takes r and was given r, r1"),
        (run(change=row(method="lora", r=0)), "rows.lora_8.r=0: must be a whole number of at least 1"),
        (run(change=row(method="cdka", r1=2, r2=7, r=1)), "r2=7 does not divide d_in=32"),
        (run(extra=["method=lora"]), "method is no setting of an alignment"),
        (run(extra=["model=tiny_distilbert", "task=glue_sst2"]), "alignment takes language models"),
    ):
        with pytest.raises(KronlabError) as caught:
            call()
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    broken = tmp_path / "align/smoke/x.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"schema": 0}')
    with pytest.raises(CheckpointError, match="is not a whole record"):
        run(render_only=True)()
    with pytest.raises(ConfigError, match="scale='huge' is not known"):
        reproduce(table12(), scale="huge", results_dir=str(tmp_path))
