"""A cell end to end: every method on every kind of model, what its record holds, and what a second start does."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from kronlab import models
from kronlab.cell import CONFIG_DIR, Cell
from kronlab.encode import encode
from kronlab.errors import CheckpointError, ConfigError, DataError
from kronlab.experiment import _examples, run_cell, summary
from kronlab.generate import CompletionScorer, ready_to_grade
from kronlab.runs import Store, read_jsonl

METHODS = sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml") if path.stem != "adapter")
SHORT = ["trainer.max_steps=2", "eval_n=4", "eval.chain_sum.generation.max_new_tokens=8"]
TRAIN_SCRIPT = CONFIG_DIR.parent / "scripts" / "train.py"


@pytest.fixture
def short(make: Callable[..., Cell]) -> Callable[..., Cell]:
    """A cell of two steps and four graded examples."""
    return lambda *overrides, **named: make(*SHORT, *overrides, **named)


def record_file(cell: Cell) -> Path:
    return Store(cell.config["results"]["dir"]).record_path(cell.scale, cell.id)


def final_of(cell: Cell) -> Path:
    return Store(cell.config["results"]["dir"]).checkpoints(cell.train_id) / "final"


@pytest.mark.parametrize(
    ("model", "method"),
    [(model, method) for model in ("tiny_llama", "tiny_mistral") for method in METHODS]
    + [("tiny_t5", "lora"), ("tiny_t5", "cdka")],
)
def test_every_method_from_config_to_record(short: Callable[..., Cell], model: str, method: str) -> None:
    cell = short(f"model={model}", f"method={method}")
    record = run_cell(cell)
    assert json.loads(record_file(cell).read_text()).items() > record.items()  # what is returned is what is on disk
    assert (record["status"], record["error"], record["scale"]) == ("done", None, "smoke")
    assert (record["id"], record["train_id"], record["config"]) == (cell.id, cell.train_id, cell.science)
    assert record["name"] == cell.name

    network, _ = models.load(cell.config["model"], dtype=torch.float32)
    base = models.count_parameters(network)[1]
    count = record["parameters"]
    if method == "none":
        assert (count["trainable"], count["total"], count["adapter_bytes"]) == (0, base, 0)
    elif method == "full":
        assert (count["trainable"], count["total"], count["adapter_bytes"]) == (base, base, 4 * base)
    else:
        assert 0 < count["trainable"] < base
        constants = 2 * 7 if method == "adalora" else 0  # the rank of each layer, which PEFT counts as a parameter
        assert count["total"] == base + count["trainable"] + constants
        assert count["adapter_bytes"] == 4 * count["trainable"]

    result = record["eval"]["chain_sum"]
    assert set(result["metrics"]) == {"exact_match", "nll_per_token", "finished"}
    for metric in result["metrics"].values():
        assert metric["n"] == 4
        assert metric["stderr"] is not None
    assert 4 < result["metrics"]["nll_per_token"]["value"] < 7  # a random model over 260 tokens: log 260 = 5.6
    folder = Store(cell.config["results"]["dir"]).folder("smoke", cell.id)
    rows = read_jsonl(folder / "chain_sum" / "samples.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(result["samples"]["id"])
    if method == "none":
        assert record["train"] is None
    else:
        train = record["train"]
        assert (train["steps"], train["examples"], train["data_examples"]) == (2, 16, 24)
        assert min(train["tokens"], train["supervised_tokens"]) > 0
        assert train["seconds"] > 0
        assert train["tokens_per_s"] > 0
        peak = train["peak_memory_bytes"]
        assert peak is None or peak > 10**8  # an interpreter with torch in it
        assert len(read_jsonl(folder / "loss.jsonl")) == 2


def test_record_says_where_it_was_made(short: Callable[..., Cell]) -> None:
    record = run_cell(short("method=none"))
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"transformers", "peft", "numpy", "kronlab"} <= set(record["versions"])
    assert record["git"]["commit"] is None or re.fullmatch("[0-9a-f]{40}", record["git"]["commit"])
    assert record["git"]["dirty"] in (None, True, False)
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["machine"]["memory_bytes"] > 2**28
    assert record["started"] <= record["finished"]
    assert record["weights"] == "random:0"
    assert record["eval_peak_memory_bytes"] is None or record["eval_peak_memory_bytes"] > 10**8
    assert str(Path.home()) not in json.dumps(record["config"])


def test_record_says_the_threads_that_computed_it(short: Callable[..., Cell]) -> None:
    """The last bit depends on them; set by the cell, after the process had another number."""
    torch.set_num_threads(2)
    assert run_cell(short("method=none", "runtime.threads=1"))["machine"]["threads"] == 1


# ---- twice, forced, shared, failed


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_done_cell_is_skipped_and_nothing_is_touched(short: Callable[..., Cell], tmp_path: Path) -> None:
    cell = short("method=cdka")
    first = run_cell(cell)
    before = stamps(tmp_path)
    assert run_cell(cell) == first
    assert stamps(tmp_path) == before


def test_record_that_came_with_a_clone_is_made_again(short: Callable[..., Cell], tmp_path: Path) -> None:
    cell = short("method=lora")
    first = run_cell(cell)
    store = Store(cell.config["results"]["dir"])
    shutil.rmtree(store.results / "checkpoints")  # not in git: what a clone brings are the records and the samples
    foreign = first | {"started": "2000-01-01T00:00:00+00:00"}
    record_file(cell).write_text(json.dumps(foreign))
    samples = store.folder(cell.scale, cell.id) / "chain_sum" / "samples.jsonl"
    rows = read_jsonl(samples)
    samples.write_text("".join(json.dumps(row | {"completion": "not made here"}) + "\n" for row in rows))
    assert run_cell(short("method=lora", "results.reuse=any")) == foreign
    again = run_cell(cell)
    assert again["started"] != foreign["started"]
    assert again["train"]["final_loss"] == first["train"]["final_loss"]
    assert [row["completion"] for row in read_jsonl(samples)] == [row["completion"] for row in rows]
    assert run_cell(cell) == again  # from here on it is ours


def test_force_does_it_again_with_the_same_numbers(short: Callable[..., Cell]) -> None:
    cell = short("method=cdka")
    first = run_cell(cell)
    before = stamps(final_of(cell))
    second = run_cell(short("method=cdka", "force=true"))
    assert stamps(final_of(cell)) != before
    assert second["id"] == first["id"]
    assert second["eval"]["chain_sum"]["samples"] == first["eval"]["chain_sum"]["samples"]
    assert second["train"]["final_loss"] == first["train"]["final_loss"]


@pytest.mark.parametrize("force", ["false", "true"])
def test_dry_run_does_nothing(short: Callable[..., Cell], tmp_path: Path, force: str) -> None:
    cell = short("method=cdka")
    assert run_cell(short("method=cdka", "dry_run=true"))["status"] == "planned"
    assert not stamps(tmp_path)
    run_cell(cell)
    before = stamps(tmp_path)
    run_cell(short("method=cdka", "dry_run=true", f"force={force}"))
    assert stamps(tmp_path) == before


@pytest.mark.parametrize("method", ["cdka", "full", "lora_ga"])
def test_cells_that_differ_in_grading_alone_share_the_training(short: Callable[..., Cell], method: str) -> None:
    one, two = short(f"method={method}"), short(f"method={method}", "eval_n=6")
    assert one.id != two.id
    assert one.train_id == two.train_id
    first = run_cell(one)
    before = stamps(final_of(one))
    second = run_cell(two)
    assert stamps(final_of(two)) == before
    assert second["train"] == first["train"]
    # the weights it took are those that were trained: the samples that both grade agree
    wanted, found = (record["eval"]["chain_sum"]["samples"] for record in (first, second))
    shared = dict(zip(found["id"], found["nll"], strict=True))
    assert [shared[i] for i in wanted["id"]] == pytest.approx(wanted["nll"], abs=2e-3)  # other batches, other padding
    untrained = run_cell(short("method=none"))["eval"]["chain_sum"]["samples"]["nll"]
    assert wanted["nll"] != pytest.approx(untrained, abs=2e-2)
    for cell in (one, two):
        folder = Store(cell.config["results"]["dir"]).folder("smoke", cell.id)
        assert len(read_jsonl(folder / "loss.jsonl")) == 2


def test_failure_leaves_a_record_and_is_tried_again(make: Callable[..., Cell], tmp_path: Path) -> None:
    """A data set that is not there the first time, and is the second."""
    data = tmp_path / "data"
    fast = ["trainer.max_steps=2", "eval_n=4", "eval.gsm8k.generation.max_new_tokens=8", "task.n=8"]
    cell = make("task=gsm8k", f"data.dir={data}", "eval.gsm8k.source.hub=null", *fast)
    with pytest.raises(DataError, match="gsm8k"):
        run_cell(cell)
    record = json.loads(record_file(cell).read_text())
    assert record["status"] == "failed"
    assert "gsm8k" in record["error"]
    assert "\n" not in record["error"]
    assert summary(record).startswith("failed: ")
    row = '{"question": "What is %d + 1?", "answer": "%d + 1 = %d\\n#### %d"}\n'
    for split in ("train", "test"):
        path = data / "gsm8k" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(row % (i, i, i + 1, i + 1) for i in range(9)))
    assert run_cell(cell)["status"] == "done"
    assert json.loads(record_file(cell).read_text())["status"] == "done"


def test_unforeseen_failure_leaves_its_traceback(short: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    from kronlab import experiment

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(experiment, "score", broken)
    cell = short("method=none")
    with pytest.raises(ZeroDivisionError):
        run_cell(cell)
    record = json.loads(record_file(cell).read_text())
    assert record["status"] == "failed"
    assert record["error"] == "ZeroDivisionError: of all things"
    assert "Traceback" in record["traceback"]
    assert 'File "src/kronlab/experiment.py"' in record["traceback"], "no path of this machine"


def test_diverged_cell_is_a_result(short: Callable[..., Cell]) -> None:
    cell = short("method=full", "trainer.lr=1e30", "trainer.warmup_ratio=0", "trainer.max_steps=4")
    record = run_cell(cell)
    assert record["status"] == "diverged"
    assert "not finite at step" in record["error"]
    before = record_file(cell).stat().st_mtime_ns
    assert run_cell(cell) == record
    assert record_file(cell).stat().st_mtime_ns == before


def test_weights_that_blow_up_in_the_last_step_are_a_divergence_too(short: Callable[..., Cell]) -> None:
    """The loss of every step was finite; only grading sees that the model is not."""
    cell = short("method=full", "trainer.lr=1e14", "trainer.warmup_ratio=0", "trainer.max_steps=1")
    record = run_cell(cell)
    assert record["status"] == "diverged"
    assert "held-out loss is not finite" in record["error"]
    assert Store(cell.config["results"]["dir"]).read(cell.scale, cell.id) == record


def test_classification_model_is_one_clear_error(short: Callable[..., Cell]) -> None:
    cell = short("model=tiny_deberta", "method=lora")
    with pytest.raises(ConfigError, match=r"tiny_deberta is a sequence_classification model.*choose") as caught:
        run_cell(cell)
    assert "\n" not in str(caught.value)


# ---- the weights that are left


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("none", "full", "rslora", "lora_plus")])
def test_final_weights_load_with_peft_and_give_the_recorded_numbers(
    short: Callable[..., Cell], model: str, method: str
) -> None:
    cell = short(f"model={model}", f"method={method}", "trainer.lr=0.1")
    recorded = run_cell(cell)["eval"]["chain_sum"]["samples"]
    base, tokenizer = models.load(cell.config["model"], dtype=torch.float32)
    network = PeftModel.from_pretrained(base, final_of(cell))
    ready_to_grade(network, torch.float32)
    examples = _examples(cell.config, cell.config["eval"]["chain_sum"])
    by_id = {example.id: example for example in examples}
    scorer = CompletionScorer(network, tokenizer, causal=model != "tiny_t5")
    scores = scorer.score([by_id[i] for i in recorded["id"]], max_length=256)
    assert [nll for nll, _ in scores] == pytest.approx(recorded["nll"], abs=2e-3)  # sums over about 30 tokens, fp32
    with network.disable_adapter():
        without = scorer.score([by_id[i] for i in recorded["id"]], max_length=256)
    assert [nll for nll, _ in without] != pytest.approx(recorded["nll"], abs=2e-2)  # and they are not the base's


def test_broken_final_weights_are_one_clear_line(short: Callable[..., Cell]) -> None:
    cell = short("method=cdka")
    run_cell(cell)
    record_file(cell).unlink()
    (final_of(cell) / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"final cannot be loaded .*delete it and run the cell again"):
        run_cell(cell)


def test_training_set_is_what_the_task_says(short: Callable[..., Cell]) -> None:
    """Prompt and completion of the first example, as the model reads them."""
    cell = short()
    example = _examples(cell.config, cell.config["task"])[0]
    row = encode(example, models.byte_tokenizer(), causal=True, max_length=256)
    text = bytes(row.input_ids[:-1]).decode()
    assert re.fullmatch(r"Q: [-+ \d=]+\nA: [-+ \d=;]+\n#### -?\d+", text.replace("?", "").replace(" =\n", "\n"))
    supervised = bytes(label for label in row.labels[:-1] if label >= 0).decode()
    assert text.endswith(supervised)
    assert supervised.endswith(f"#### {example.gold}")


# ---- the outer world


def test_logger_is_off_by_default(short: Callable[..., Cell], tmp_path: Path) -> None:
    run_cell(short("method=cdka"))
    assert not list(tmp_path.rglob("*wandb*"))


def test_multirun_typed_twice_trains_each_cell_once(tmp_path: Path) -> None:
    typed = [
        sys.executable, str(TRAIN_SCRIPT), "-m", "scale=smoke", "method=cdka", "method.r1=1,2", "method.r2=2,8",
        "method.r=1,4", "seed=0,1", *SHORT, "task.n=8", "trainer.max_steps=1", "runtime.progress=false",
        f"results.dir={tmp_path}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIG_DIR.parent / "src")}
    environment.pop("KRONLAB_DATA", None)

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(typed, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)

    first = start()
    assert first.returncode == 0, first.stderr
    files = sorted((tmp_path / "runs" / "smoke").glob("*.json"))
    records = [json.loads(path.read_text()) for path in files]
    assert len(records) == 16
    assert {record["status"] for record in records} == {"done"}
    settings = {
        (m["r1"], m["r2"], m["r"], record["config"]["seed"]) for record in records for m in [record["config"]["method"]]
    }
    assert settings == {(r1, r2, r, seed) for r1 in (1, 2) for r2 in (2, 8) for r in (1, 4) for seed in (0, 1)}
    before = stamps(tmp_path / "runs") | stamps(tmp_path / "checkpoints")
    second = start()
    assert second.returncode == 0, second.stderr
    assert (second.stdout + second.stderr).count("done before, skipped") == 16
    assert stamps(tmp_path / "runs") | stamps(tmp_path / "checkpoints") == before


@pytest.mark.parametrize("method", ["cdka", "kron_lora"])
def test_a_start_from_the_gradient_trains_and_resumes_like_any_other(
    short: Callable[..., Cell], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kronlab.experiment")
    record = run_cell(short("model=tiny_llama", f"method={method}", "method.init=gradient"))
    assert record["status"] == "done"
    assert math.isfinite(record["train"]["final_loss"])
    (said,) = [text for text in caplog.messages if "started from the gradient of 8 examples" in text]
    assert float(said.rpartition(" ")[2]) > 0.2
    assert short(f"method={method}", "method.init=gradient", "method.init_batches=4").id != record["id"]
