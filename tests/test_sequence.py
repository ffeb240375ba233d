"""Tasks one after another: what such a cell is, what its stages share, and that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kronlab import experiment
from kronlab.cell import CONFIG_DIR, Cell, compose_config, make_cell
from kronlab.errors import ConfigError
from kronlab.experiment import run_cell
from kronlab.runs import Store, read_jsonl
from kronlab.train import Journal

TRAIN_SCRIPT = CONFIG_DIR.parent / "scripts" / "train.py"
GCD = "eval.reasoning_gym.source.dataset=gcd"
SHORT = [
    "eval_n=4",
    "eval.chain_sum.generation.max_new_tokens=4",
    "eval.reasoning_gym.generation.max_new_tokens=4",
    GCD,
]
BOTH, REVERSED = "sequence=[chain_sum,reasoning_gym]", "sequence=[reasoning_gym,chain_sum]"


def planned(*overrides: str) -> Cell:
    return make_cell(compose_config(["scale=smoke", "method=cdka", *overrides]), weights_needed=False)


def weights(cell: Cell) -> dict[str, torch.Tensor]:
    folder = Store(cell.config["results"]["dir"]).final(cell.train_id)
    return load_file(next(folder.glob("*model.safetensors")))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


# ---- what the cell is


def test_stages_are_the_cells_of_their_tasks() -> None:
    cell = planned(BOTH, *SHORT)
    first, second = planned("task=chain_sum", "eval_n=4"), planned("task=reasoning_gym", GCD, "eval_n=4")
    assert cell.before is not None
    assert cell.before.train_id == first.train_id
    assert cell.before.before is None
    assert cell.config["task"] == second.config["task"]
    assert cell.config["after"] == [first.config["task"]]
    assert list(cell.config["eval"]) == ["chain_sum", "reasoning_gym"], "graded on every task"
    assert all(section["n"] == 4 for section in cell.config["eval"].values())
    assert cell.train_id not in (first.train_id, second.train_id)
    assert cell.name == "CDKA (2,8,4), tiny_llama on chain_sum then reasoning_gym, seed 0"


def test_sizes_hold_for_every_stage() -> None:
    smoke, more = planned(BOTH, GCD), planned(BOTH, GCD, "task.n=12")
    for cell, n in ((smoke, 24), (more, 12)):
        assert [task["n"] for task in [*cell.config["after"], cell.config["task"]]] == [n, n]
    assert more.before is not None
    assert more.before.train_id == planned("task=chain_sum", "task.n=12").train_id


def test_order_and_length_make_another_cell() -> None:
    three = planned("sequence=[chain_sum,reasoning_gym,chain_sum]", *SHORT)
    cells = [planned(BOTH, *SHORT), planned(REVERSED, *SHORT), three]
    assert len({cell.id for cell in cells}) == len({cell.train_id for cell in cells}) == 3
    assert three.before is not None
    assert three.before.train_id == cells[0].train_id
    assert three.before.before is not None
    assert three.before.before.train_id == planned("task=chain_sum").train_id
    assert list(three.config["eval"]) == ["chain_sum", "reasoning_gym"]


def test_a_sequence_of_one_is_its_task() -> None:
    plain, written = planned("task=chain_sum"), planned("sequence=[chain_sum]")
    assert (written.id, written.train_id, written.before) == (plain.id, plain.train_id, None)
    assert "after" not in plain.science
    assert "adapter_storage" not in plain.science


def test_the_base_model_has_no_order() -> None:
    cells = [planned("method=none", sequence, *SHORT) for sequence in (BOTH, REVERSED)]
    assert cells[0].id == cells[1].id
    assert cells[0].before is None
    assert list(cells[1].config["eval"]) == ["reasoning_gym", "chain_sum"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["sequence=[]"], "sequence=[]: must be a list of tasks, such as [arc_challenge,arc_easy], or null"),
        (["sequence=chain_sum"], "sequence='chain_sum': must be a list of tasks"),
        (["sequence=[chain_sum,3]"], "sequence=['chain_sum', 3]: must be a list of tasks"),
        (["sequence=[chain_sum,chain_sun]"], "task=chain_sun: no such option; did you mean 'chain_sum'?"),
        ([BOTH, GCD, "task=chain_sum"], "task=chain_sum beside sequence=chain_sum,reasoning_gym: a sequence names"),
        ([BOTH], "eval.reasoning_gym.source.dataset: Missing mandatory value"),
        ([BOTH, GCD, "eval.boolq.n=3"], "eval.boolq: unknown key"),
        (["sequence=[glue_cola,chain_sum]"], "glue_cola and chain_sum bring different trainer settings"),
        ([BOTH, GCD, "task.n=0"], "task.n=0: must be a whole number of at least 1"),
        (["sequence=[chain_sum,none]"], "task='none': must be a task with training data, or method=none"),
    ],
)
def test_a_sequence_that_cannot_be_is_told_in_words(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*overrides)
    assert line in str(caught.value)
    assert len(set(str(caught.value).splitlines())) == 1


# ---- what is trained


@dataclass
class Start:
    """What a training was given."""

    task: str
    weights: dict[str, torch.Tensor]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Start]:
    """Every training that runs, with the trainable weights that it begins with."""
    seen: list[Start] = []
    plain_train = experiment.train

    def spy(network: torch.nn.Module, rows: Any, *arguments: Any, **named: Any) -> Any:
        begun = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
        seen.append(Start(named["run_name"].partition(" on ")[2].partition(",")[0], begun))
        return plain_train(network, rows, *arguments, **named)

    monkeypatch.setattr(experiment, "train", spy)
    return seen


@pytest.fixture
def short(make: Callable[..., Cell]) -> Callable[..., Cell]:
    """Three steps; overrides of an eval that the tasks lack are left out."""

    def short(*overrides: str, **named: Any) -> Cell:
        text = " ".join(overrides)
        fast = [o for o in SHORT if "reasoning_gym" not in o or "reasoning_gym" in text]
        fast = [o for o in fast if "chain_sum" not in o or "task=reasoning_gym" not in text]
        return make("trainer.max_steps=3", *fast, *overrides, **named)

    return short


@pytest.mark.parametrize("method", ["lora", "cdka", "kron_lora", "krona", "full"])
def test_a_stage_starts_from_the_weights_of_the_one_before(
    short: Callable[..., Cell], starts: list[Start], method: str
) -> None:
    first, cell = short(f"method={method}"), short(f"method={method}", BOTH)
    run_cell(first)
    record = run_cell(cell)
    assert [start.task for start in starts] == ["chain_sum", "chain_sum then reasoning_gym"], "stage one is shared"
    untrained, begun = (start.weights for start in starts)
    finished = weights(first)
    # PEFT leaves the adapter's name out of a checkpoint
    begun = {name.replace(".default", ""): value for name, value in begun.items()}
    assert_same({name: begun[name] for name in finished}, finished)
    assert any(not torch.equal(value, begun[name.replace(".default", "")]) for name, value in untrained.items())
    assert any(not torch.equal(value, finished[name]) for name, value in weights(cell).items()), "stage two trains"

    store = Store(cell.config["results"]["dir"])
    lines = [read_jsonl(store.folder("smoke", c.id) / "loss.jsonl") for c in (first, cell)]
    assert [line["lr"] for line in lines[0]] == [line["lr"] for line in lines[1]], "the schedule begins again"
    assert [line["step"] for line in lines[1]] == [1, 2, 3]
    (stage,) = record["train"]["stages_before"]
    assert (stage["task"], stage["train_id"], stage["steps"]) == ("chain_sum", first.train_id, 3)
    assert "stages_before" not in json.loads((store.final(first.train_id) / "train.json").read_text())
    assert set(record["eval"]) == {"chain_sum", "reasoning_gym"}
    assert all(result["metrics"]["nll_per_token"]["n"] == 4 for result in record["eval"].values())


def test_a_stage_that_nobody_has_trained_is_trained_without_a_record(
    short: Callable[..., Cell], starts: list[Start], tmp_path: Path
) -> None:
    """The other way round than above: the sequence first, then the cell that its first stage is."""
    cell, first = short("method=lora", BOTH), short("method=lora")
    run_cell(cell)
    assert [start.task for start in starts] == ["chain_sum", "chain_sum then reasoning_gym"]
    assert [path.stem for path in (tmp_path / "runs" / "smoke").glob("*.json")] == [cell.id]
    assert [path.name for path in (tmp_path / "runs" / "smoke").iterdir() if path.is_dir()] == [cell.id]
    record = run_cell(first)
    assert len(starts) == 2
    assert record["train"]["steps"] == 3
    other = short("method=lora", results=tmp_path / "other")
    run_cell(other)
    assert_same(weights(first), weights(other))


def test_a_chain_of_three_is_graded_on_every_task(short: Callable[..., Cell], starts: list[Start]) -> None:
    cell = short("method=kron_lora", "sequence=[chain_sum,reasoning_gym,chain_sum]")
    record = run_cell(cell)
    assert len(starts) == 3
    assert set(record["eval"]) == {"chain_sum", "reasoning_gym"}
    stages = record["train"]["stages_before"]
    assert [stage["task"] for stage in stages] == ["chain_sum", "reasoning_gym"]
    assert cell.before is not None
    assert cell.before.before is not None
    assert [stage["train_id"] for stage in stages] == [cell.before.before.train_id, cell.before.train_id]
    assert all("stages_before" not in stage for stage in stages)


@pytest.mark.parametrize(("stage", "step"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_interrupted_in_any_stage_it_ends_with_the_same_bits(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stage: int, step: int
) -> None:
    whole = short(f"method={method}", BOTH, results=tmp_path / "whole")
    expected = run_cell(whole)
    cut = short(f"method={method}", BOTH, "runtime.save_every=1", results=tmp_path / "cut")
    assert cut.id == whole.id
    plain_end, begun = Journal.on_step_end, []

    def stop(self: Journal, args: Any, state: Any, control: Any, **named: Any) -> None:
        plain_end(self, args, state, control, **named)
        begun.extend([1] if state.global_step == 1 else [])
        if (len(begun), state.global_step) == (stage, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run_cell(cut)
    store = Store(tmp_path / "cut")
    assert cut.before is not None
    assert (store.final(cut.before.train_id) / "train.json").is_file() == (stage == 2)
    assert not (store.final(cut.train_id) / "train.json").is_file()
    record = run_cell(cut)
    assert_same(weights(cut), weights(whole))
    for name, result in expected["eval"].items():
        assert record["eval"][name]["samples"] == result["samples"]


def test_once_trained_the_stages_before_are_not_needed(short: Callable[..., Cell], starts: list[Start]) -> None:
    cell = short("method=lora", BOTH)
    record = run_cell(cell)
    store = Store(cell.config["results"]["dir"])
    assert cell.before is not None
    shutil.rmtree(store.checkpoints(cell.before.train_id))
    store.record_path(cell.scale, cell.id).unlink()
    again = run_cell(cell)
    assert len(starts) == 2
    assert again["train"] == record["train"]


def test_a_start_from_the_gradient_is_made_once(
    short: Callable[..., Cell], caplog: pytest.LogCaptureFixture, starts: list[Start]
) -> None:
    caplog.set_level("INFO", "kronlab.experiment")
    run_cell(short("method=cdka", "method.init=gradient", BOTH))
    assert len(starts) == 2
    assert len([text for text in caplog.messages if "started from the gradient" in text]) == 1


def test_divergence_says_in_which_task(short: Callable[..., Cell]) -> None:
    record = run_cell(short("method=full", BOTH, "trainer.lr=1e30", "trainer.warmup_ratio=0"))
    assert record["status"] == "diverged"
    assert record["error"].startswith("the chain_sum training loss is not finite at step")


def test_typed_on_the_command_line_and_swept(tmp_path: Path) -> None:
    typed = [
        sys.executable, str(TRAIN_SCRIPT), "-m", "scale=smoke", "method=lora", f"{BOTH},[reasoning_gym,chain_sum]",
        f"++{GCD}", "eval_n=2", "trainer.max_steps=1", "runtime.progress=false", f"results.dir={tmp_path}",
        "++eval.chain_sum.generation.max_new_tokens=2", "++eval.reasoning_gym.generation.max_new_tokens=2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIG_DIR.parent / "src")}
    done = subprocess.run(typed, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "smoke").glob("*.json")]
    orders = {(record["config"]["after"][0]["name"], record["config"]["task"]["name"]) for record in records}
    assert orders == {("chain_sum", "reasoning_gym"), ("reasoning_gym", "chain_sum")}
    same = planned(
        "method=lora", BOTH, GCD, "eval_n=2", "trainer.max_steps=1", "eval.chain_sum.generation.max_new_tokens=2",
        "eval.reasoning_gym.generation.max_new_tokens=2",
    )  # fmt: skip
    assert same.id in {record["id"] for record in records}, "a table and a command line mean the same cell"
