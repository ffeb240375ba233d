"""Estimates: the arithmetic by hand, the pace of records, what is unknown, and the words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kronlab import estimate as module
from kronlab.cell import CONFIG_DIR, Cell, compose_config, make_cell
from kronlab.data import LOADERS, origins
from kronlab.data.commonsense import TASKS
from kronlab.estimate import Pace, assumptions, describe, estimate, gpu_seconds, graded_rows, size_of, training_rows
from kronlab.experiment import run_cell
from kronlab.plan import make_plan
from kronlab.runs import Store


def cell(*overrides: str, results: Path | str = "results") -> Cell:
    return make_cell(compose_config([*overrides, f"results.dir={results}", "data.dir=null"]), weights_needed=False)


MISTRAL = ["scale=paper", "model=mistral_7b", "task=piqa", "method=kron_lora", "method.lm_head=true"]


# ---- sizes


def test_sizes_are_those_of_the_plan() -> None:
    one = cell(*MISTRAL)
    size = size_of(one.config)
    assert (size.trainable, size.base) == (5_708_448, 7_241_732_096)
    plan = make_plan(one.config["model"], one.config["method"], batch_size=8, length=512)
    assert estimate(one).memory_bytes == plan["memory_bytes"]["total"]  # micro-batch 8, rows as long as max_length


def test_the_head_of_the_task_is_counted() -> None:
    two, three = (size_of(cell("scale=small", "model=minilm", f"task=glue_{t}").config) for t in ("rte", "mnli"))
    assert three.trainable - two.trainable == 384 + 1


def test_one_pair_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module.measure
    monkeypatch.setattr(module, "measure", lambda *pair: calls.append(pair) or real(*pair))
    module._counted.cache_clear()
    for seed, task in ((0, "piqa"), (1, "piqa"), (0, "arc_easy")):
        size_of(cell("scale=smoke", "model=tiny_llama", f"task={task}", f"seed={seed}").config)
    size_of(cell("scale=smoke", "model=tiny_llama", "task=piqa", "method=lora").config)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["task=metamathqa"], 100_000),
        (["task=gsm8k"], 7_473),
        (["task=gsm8k", "trainer.epochs=3"], 3 * 7_473),
        (["task=gsm8k", "task.n=50"], 50),
        (["task=gsm8k", "trainer.max_steps=10"], 320),
        (["task=piqa_gen"], 16_113),
        (["task=reasoning_gym", "eval.reasoning_gym.source.dataset=gcd", "task.n=null"], None),
    ],
)
def test_training_rows(overrides: list[str], rows: int | None) -> None:
    assert training_rows(cell("scale=paper", *overrides).config) == rows


# ---- hours


def test_gpu_hours_by_hand() -> None:
    """PIQA: 16,113 rows of 40 tokens in training, 1,838 of 65 read in grading; bf16 at 35 % of 312 TFLOP/s."""
    one = cell(*MISTRAL, "trainer.epochs=30")
    gpu = assumptions()["gpus"]["A100 80 GB"]
    tokens, base, trained = 30 * 16_113 * 40, 7_241_732_096, 5_708_448
    rate = 0.35 * 312e12
    training, grading = tokens * (4 * base + 6 * trained) / rate, 1_838 * 65 * 2 * base / rate
    assert gpu_seconds(one.config, size_of(one.config), gpu) == pytest.approx(training + grading)
    again = cell(*MISTRAL, "trainer.epochs=30", "trainer.gradient_checkpointing=true")
    more = gpu_seconds(again.config, size_of(again.config), gpu)
    assert more == pytest.approx(training + grading + tokens * 2 * base / rate)
    full = cell(*MISTRAL[:3], "method=full", "trainer.epochs=30")
    assert gpu_seconds(full.config, size_of(full.config), gpu) == pytest.approx(tokens * 6 * base / rate + grading)


def test_decoding_reads_the_weights_once_a_step() -> None:
    one = cell("scale=paper", "task=gsm8k", "method=none")
    gpu = assumptions()["gpus"]["A100 80 GB"]
    base = size_of(one.config).base
    reading = 1_319 * 75 * 2 * base / (0.35 * 312e12)
    decoding = 21 * 130 * 2 * base / (0.5 * 2.0e12)  # 21 batches of 64 rows
    assert gpu_seconds(one.config, size_of(one.config), gpu) == pytest.approx(reading + decoding)


def test_what_is_not_known_is_none() -> None:
    unknown = cell("scale=paper", "task=reasoning_gym", "eval.reasoning_gym.source.dataset=gcd")
    assert set(estimate(unknown).seconds.values()) == {None}
    assert set(estimate(cell("scale=mini", "task=gsm8k")).seconds.values()) == {None}


def science(*overrides: str) -> dict[str, Any]:
    return dict(cell("scale=small", *overrides).science)


def record(task: str, method: str, seconds: float, *, examples: int = 100, name: str = "gsm8k") -> dict[str, Any]:
    return {
        "config": science(f"task={task}", f"method={method}"),
        "train": {
            "examples": examples,
            "seconds": seconds,
            "tokens": examples * 50,
            "peak_memory_bytes": round(seconds) * 2**20,
        },
        "eval": {name: {"metrics": {"exact_match": {"n": 10}}, "seconds": 20.0}},
    }


def test_pace_of_records() -> None:
    pace = Pace.of([record("gsm8k", "lora", 100), record("gsm8k", "lora", 300), record("gsm8k", "cdka", 400)])
    gsm8k = ["scale=small", "task=gsm8k", "task.n=50", "eval_n=30"]
    assert pace.seconds(cell(*gsm8k, "method=lora").config) == pytest.approx(50 * 2.0 + 30 * 2.0)
    assert pace.seconds(cell(*gsm8k, "method=kron_lora").config) == pytest.approx(50 * 3.0 + 30 * 2.0)  # the middle one
    assert pace.seconds(cell(*gsm8k, "method=none").config) == pytest.approx(30 * 2.0)
    # another task by its tokens: 300 a row at 0.06 s each; its generating eval is not known
    math = cell("scale=small", "task=math", "task.n=50", "eval_n=30", "method=lora").config
    assert pace.seconds(math) is None
    arc = cell("scale=small", "task=arc_easy", "task.n=50", "eval_n=30", "method=lora").config
    assert pace.seconds(arc) == pytest.approx(50 * 35 * 0.06 + 30 * 60 * 0.06)
    assert Pace.of([]).seconds(arc) is None


def test_memory_is_what_the_same_training_took() -> None:
    pace = Pace.of([record("gsm8k", "lora", 100), record("gsm8k", "lora", 300), record("gsm8k", "cdka", 400)])
    assert pace.peak(science("task=gsm8k", "method=lora", "task.n=5", "seed=3", "trainer.lr=1e-5")) == 300 * 2**20
    for other in ("method.r=3", "task.max_length=9", "trainer.micro_batch_size=1", "trainer.precision=fp32"):
        assert pace.peak(science("task=gsm8k", "method=lora", other)) is None, other
    assert pace.peak(science("task=gsm8k", "method=none")) is None


# ---- in words


def test_a_dry_run_of_7b_models_tells_all(tmp_path: Path) -> None:
    cells = [
        cell("scale=paper", "model=llama2_7b", "task=metamathqa", f"method={method}", f"seed={seed}", results=tmp_path)
        for method in ("full", "lora")
        for seed in (0, 1)
    ]
    text = "\n".join(describe(cells, Store(tmp_path)))
    assert "LoRA r=8, llama2_7b: 19,988,480 trainable parameters (0.297%)" in text
    assert "6,738,415,616 trainable parameters (100.000%)" in text
    assert "(more than one 80 GB GPU), 2 cells" in text
    assert "all: 4 cells" in text
    assert "h on one A100 80 GB or" in text
    assert "weights: meta-llama/Llama-2-7b-hf (Llama 2 Community License; gated" in text
    assert "data: openai/gsm8k (licence: MIT)" in text
    assert "data: meta-math/MetaMathQA (licence: unknown)" in text


def test_done_cells_are_in_no_total_and_their_pace_counts(make: Callable[..., Cell], tmp_path: Path) -> None:
    done, left = (make("task=chain_sum", f"seed={seed}") for seed in (0, 1))
    before = describe([done, left], Store(tmp_path))
    assert "2 cells, time on a CPU unknown" in before[1]
    run_cell(done)
    after = describe([done, left], Store(tmp_path))
    assert "1 cell, " in after[1]
    assert "s on a CPU" in after[1]
    assert " GiB as measured, 1 cell, " in after[1]
    assert "unknown" not in after[1]
    assert not any("weights:" in line or "data:" in line for line in after)  # random, and generated
    run_cell(left)
    assert describe([done, left], Store(tmp_path)) == ["estimate: nothing to run"]


def test_local_files_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 1"}) + "\n")
    source = {"name": "gsm8k"}
    assert origins(source, "test", str(tmp_path)) == {"openai/gsm8k": True}
    assert origins(source, "train", str(tmp_path)) == {"openai/gsm8k": False}
    assert origins({"name": "reasoning_gym", "dataset": "gcd"}, "test", None) == {}
    full = origins({"name": "math", "test_set": "full"}, "test", None)
    assert full == {"math/train_4500.jsonl": False, "math/test_500.jsonl": False}
    one = cell("scale=paper", "task=none", "+eval@eval.math=math", "method=none", results=tmp_path)
    assert any("a local file: no hub set has it" in line for line in describe([one], Store(tmp_path)))


# ---- the file of assumptions


def test_every_name_in_the_file_exists() -> None:
    known = assumptions()
    tasks, evals = ({p.stem for p in (CONFIG_DIR / kind).glob("*.yaml")} for kind in ("task", "eval"))
    assert set(known["tasks"]) <= tasks
    assert set(known["evals"]) <= evals
    for task in TASKS:
        assert {task, f"{task}_head"} <= set(known["tasks"]) & set(known["evals"])
    hubs = {task.hub for task in TASKS.values()}
    for path in (CONFIG_DIR / "eval").glob("*.yaml"):
        source = OmegaConf.to_container(OmegaConf.load(path)).get("source") or {}
        hubs |= {source.get("hub")} if isinstance(source, dict) else set()
    for path in (CONFIG_DIR / "task").glob("*.yaml"):
        source = OmegaConf.to_container(OmegaConf.load(path)).get("source") or {}
        hubs |= {source.get("hub")} if isinstance(source, dict) else set()
    assert set(known["licences"]) <= hubs
    assert graded_rows("hellaswag_gen", {"n": None}) == 10_042


@pytest.mark.parametrize("name", sorted(set(LOADERS) - {"reasoning_gym", "jsonl", "lm_eval", "digits", "retrieve_sum"}))
def test_every_source_of_public_data_says_where_it_is(name: str) -> None:
    settings = {
        "glue": {"task": "rte"},
        "commonsense": {"dataset": "piqa"},
        "mixture": {"parts": {"one": {"source": {"name": "gsm8k"}}}},
    }.get(name, {})
    split = "train" if name in ("metamathqa", "codefeedback") else "test"
    assert origins({"name": name, **settings}, split, None)
