"""Counting before training: the published parameter counts, exactly, with nothing downloaded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kronlab.cell import compose_config
from kronlab.errors import ConfigError
from kronlab.plan import make_plan, plan_budget, render, render_budget

ROOT = Path(__file__).resolve().parents[1]


def planned(*overrides: str, **arguments: Any) -> dict[str, Any]:
    config = OmegaConf.to_container(compose_config(overrides, name="plan"), resolve=True)
    assert isinstance(config, dict)
    return make_plan(config["model"], config["method"], **arguments)


def cdka(r1: int, r2: int, r: int) -> list[str]:
    return ["method=cdka", f"method.r1={r1}", f"method.r2={r2}", f"method.r={r}"]


ANCHORS = [
    ("llama2_7b", ["method=lora"], 19_988_480),
    ("llama2_7b", cdka(2, 2, 8), 19_988_480),
    ("llama2_7b", cdka(2, 8, 4), 22_896_640),
    ("llama2_7b", cdka(2, 2, 1), 2_498_560),
    ("llama3_1_8b", ["method=lora"], 20_971_520),
    ("llama3_1_8b", cdka(2, 8, 4), 23_265_280),
    ("t5_base", ["method=lora"], 3_244_032),
    ("t5_base", cdka(2, 8, 4), 3_446_784),
    ("distilbert", ["method=kron_lora"], 840_481),
    ("distilbert", ["method=lora", "method.r=16"], 1_918_465),
    ("mistral_7b", ["method=kron_lora", "method.lm_head=true"], 5_708_448),
    ("mistral_7b", ["method=lora", "method.lm_head=true"], 21_260_288),
    ("mistral_7b", ["method=krona", "method.lm_head=true"], 2_284_032),
]
# not published, by hand: 32 blocks of q, k, v, o (4096, 4096), gate, up (4096, 11008), down (11008, 4096)
BY_HAND = [
    ("method=pissa", 19_988_480, 8),
    ("method=lora_ga", 19_988_480, 8),
    ("method=adalora", 12 * 19_988_480 // 8 + 12 * 7 * 32, 12),
    ("method=vera", 32 * (7 * 256 + 5 * 4096 + 2 * 11008), 256),
    # 4096 = 64 x 64, 11008 = 86 x 128; rank 64 x 8 throughout
    ("method=lokr", 32 * (4 * (64 * 64 + 8 * (64 + 64)) + 3 * (64 * 86 + 8 * (64 + 128))), 512),
]


@pytest.mark.parametrize(("model", "overrides", "expected"), ANCHORS, ids=[f"{m}-{' '.join(o)}" for m, o, _ in ANCHORS])
def test_published_counts(model: str, overrides: list[str], expected: int) -> None:
    assert planned(f"model={model}", *overrides)["trainable_params"] == expected


@pytest.mark.parametrize(("override", "parameters", "rank"), BY_HAND)
def test_other_methods_are_counted_too(override: str, parameters: int, rank: int) -> None:
    plan = planned("model=llama2_7b", override)
    assert (plan["trainable_params"], plan["adapted_layers"]) == (parameters, 7 * 32)
    assert (plan["max_rank"], plan["predicted_alignment"]) == (rank, None)
    assert sum(row["layers"] * row["params_each"] for row in plan["by_kind"]) == parameters
    assert f"{parameters:,}" in render(plan, "text")


def test_an_eighth_of_lora_is_exactly_that() -> None:
    """The 12.5 % of the abstract: CDKA (2,2,1) against LoRA r=8, here on a tiny model, above on LLaMA-2-7B."""
    lora = planned("model=tiny_llama", "method=lora")["trainable_params"]
    assert 8 * planned("model=tiny_llama", *cdka(2, 2, 1))["trainable_params"] == lora
    assert 8 * 2_498_560 == 19_988_480


def test_the_rest_of_a_plan_by_hand() -> None:
    """CDKA (2,2,8) on tiny_llama, hidden 32, two blocks."""
    plan = planned(*["model=tiny_llama", *cdka(2, 2, 8)], precision="fp32", batch_size=3, length=10)
    block = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert plan["trainable_params"] == 2 * sum(8 * (2 * i // 2 + 2 * o // 2) for i, o in block)
    base = 2 * 260 * 32 + 2 * (sum(i * o for i, o in block) + 2 * 32) + 32  # embeddings, blocks with norms, last norm
    assert plan["base_params"] == base
    assert plan["total_params"] == base + plan["trainable_params"]
    assert plan["trainable_share"] == plan["trainable_params"] / base
    assert plan["adapter_bytes"] == 4 * plan["trainable_params"]
    assert plan["adapted_layers"] == 14
    ranks = [min(8 * 2 * 2, i, o) for i, o in block]
    sizes = [i * o for i, o in block]
    assert plan["max_rank"] == pytest.approx(sum(a * b for a, b in zip(ranks, sizes, strict=True)) / sum(sizes))
    alignments = [math.sqrt(8 / (8 + 2 * i / 2)) for i, _ in block]
    assert plan["predicted_alignment"] == pytest.approx(
        sum(a * b for a, b in zip(alignments, sizes, strict=True)) / sum(sizes)
    )
    memory = plan["memory_bytes"]
    assert memory["weights"] == 4 * base
    assert memory["trainable_state"] == 16 * plan["trainable_params"]
    assert memory["activations"] == 2 * 34 * 30 * 32 * 2  # layers x 34 bytes x tokens x hidden, twice that in fp32
    assert memory["logits"] == 30 * 260 * (4 + 8)
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")
    by_kind = {(row["kind"], row["d_in"], row["d_out"]): row for row in plan["by_kind"]}
    assert len(by_kind) == 7
    assert by_kind["k_proj", 32, 16]["layers"] == 2
    assert sum(row["layers"] * row["params_each"] for row in plan["by_kind"]) == plan["trainable_params"]


def test_checkpointing_and_bf16_need_less_memory() -> None:
    plain = planned("model=tiny_llama", "method=lora", precision="fp32")["memory_bytes"]
    half = planned("model=tiny_llama", "method=lora", precision="bf16")["memory_bytes"]
    both = planned("model=tiny_llama", "method=lora", precision="bf16", gradient_checkpointing=True)["memory_bytes"]
    assert half["weights"] * 2 == plain["weights"]
    assert half["trainable_state"] == plain["trainable_state"], "adapters stay in fp32"
    assert both["activations"] < half["activations"] < plain["activations"]


def test_methods_without_adapters() -> None:
    full, none = (planned("model=tiny_llama", f"method={name}") for name in ("full", "none"))
    assert full["trainable_params"] == full["total_params"] == full["base_params"]
    assert (none["trainable_params"], none["adapter_bytes"]) == (0, 0)
    for plan in (full, none):
        assert plan["max_rank"] is None, "not an adapter's rank"
        assert "unknown" in render(plan, "text")
        json.loads(render(plan, "json"))


def test_text_and_json_agree() -> None:
    plan = planned("model=tiny_llama", "method=kron_lora")
    assert json.loads(render(plan, "json")) == json.loads(json.dumps(plan))
    assert "\n" not in render(plan, "json")
    text = render(plan, "text")
    assert f"{plan['trainable_params']:,}" in text
    assert text.count("\n") > render(plan, "text", by_kind=False).count("\n")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: render(planned("model=tiny_llama"), "yaml"), "format='yaml'; use text or json"),
        (lambda: planned("model=tiny_llama", precision="int4"), "precision='int4'; use bf16 or fp32"),
        (lambda: planned("model=tiny_llama", "method.r2=7"), "r2=7 does not divide d_in=32"),
        (lambda: planned("model=llama2"), "model=llama2: no such option; did you mean 'llama2_7b'"),
    ],
)
def test_a_fault_is_one_line(work: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        work()
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_budget_lists_designs_best_first() -> None:
    config = OmegaConf.to_container(compose_config(["model=llama2_7b", "method=cdka"], name="plan"), resolve=True)
    assert isinstance(config, dict)
    plan = plan_budget(config["model"], config["method"], "12.5%")
    best = plan["designs"][0]
    assert (best["label"], best["parameters"], best["share"]) == ("CDKA (2,2,1)", 2_498_560, 1.0)
    assert json.loads(render_budget(plan, "json")) == plan
    text = render_budget(plan, "text").splitlines()
    assert len(text) == 2 + len(plan["designs"])
    assert "r1=2, r2=2, r=1" in text[2]
    assert "2,498,560" in text[2]
    resolved = planned("model=llama2_7b", "method=cdka", "method.budget=12.5%")
    for key, planned_key in (
        ("parameters", "trainable_params"),
        ("alignment", "predicted_alignment"),
        ("bytes", "adapter_bytes"),
    ):
        assert best[key] == pytest.approx(resolved[planned_key]), "a design says what the plan says"
    assert best["max_rank"] == pytest.approx(resolved["max_rank"])
    with pytest.raises(ConfigError, match="format='yaml'"):
        render_budget(plan, "yaml")


def test_the_script_prints_one_json_object_and_downloads_nothing(tmp_path: Path) -> None:
    """Without network, cache or log file; notes on components that were fitted go to stderr."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "KRONLAB_CACHE": str(tmp_path / "cache"),
    }
    command = ["model=mistral_7b", "method=kron_lora", "method.lm_head=true", "method.d_a1=3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plan.py"), *command, "method.on_indivisible=fit", "format=json"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["trainable_params"] == 5_708_448, "3 is no divisor; 2 is the nearest"
    assert done.stdout.count("\n") == 1
    assert "d_a1=3 does not divide d_in=4096" in done.stderr
    assert list(tmp_path.iterdir()) == []
