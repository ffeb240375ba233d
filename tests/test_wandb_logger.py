"""`logger=wandb`: one run per cell with every step once, also of a cell that was stopped; W&B away stops nothing."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kronlab import wandb_logger
from kronlab.cell import Cell
from kronlab.errors import ConfigError
from kronlab.experiment import run_cell
from kronlab.runs import Store, read_jsonl
from wandb_files import offline_runs

wandb = pytest.importorskip("wandb", reason="the logger is optional: wandb is not installed")

SHORT = ["trainer.max_steps=4", "runtime.save_every=2", "eval_n=4", "eval.chain_sum.generation.max_new_tokens=8"]
KEY = "k" * 40


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody is logged in, and no process of W&B's is left behind."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(wandb_logger, "_offline_since", [])
    yield
    wandb.teardown()


@pytest.fixture
def logged(make: Callable[..., Cell]) -> Callable[..., Cell]:
    return lambda *overrides: make(*SHORT, "logger=wandb", *overrides)


def losses(cell: Cell) -> list[dict[str, Any]]:
    return read_jsonl(Store(cell.config["results"]["dir"]).folder(cell.scale, cell.id) / "loss.jsonl")


class Stopped(BaseException):
    """As Ctrl-C: nothing of the cell's is tidied up."""


def behind_step(step: int, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `do` when a step has been logged."""
    told = wandb_logger.LiveRun.step

    def telling(self: wandb_logger.LiveRun, line: Any) -> None:
        told(self, line)
        if line["step"] == step:
            do()

    monkeypatch.setattr(wandb_logger.LiveRun, "step", telling)


def stop() -> None:
    raise Stopped


def test_a_run_for_each_cell_with_its_losses_and_scores(logged: Callable[..., Cell], tmp_path: Path) -> None:
    cells = [logged("method=cdka", "seed=1"), logged("method=none")]
    records = [run_cell(cell) for cell in cells]
    trained, base = (next(r for r in offline_runs(tmp_path) if r.id == cell.id) for cell in cells)

    assert (trained.group, trained.job_type, trained.project) == ("chain_sum", "train", "kronlab")
    assert {"paper:CDKA", "method:cdka", "model:tiny_llama", "task:chain_sum", "seed:1"} <= set(trained.tags)
    assert trained.config.items() >= cells[0].science.items()
    assert trained.config["cell"]["label"] == records[0]["label"]
    lines = losses(cells[0])
    assert trained.steps == [line["step"] for line in lines] == [1, 2, 3, 4]
    for row, line in zip(trained.history, lines, strict=True):
        assert (row["train/loss"], row["train/lr"]) == (line["loss"], line["lr"])
        assert row["train/tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
    scores = records[0]["eval"]["chain_sum"]["metrics"]
    assert trained.summary["chain_sum/nll_per_token"] == scores["nll_per_token"]["value"]
    assert trained.summary["parameters/trainable"] == records[0]["parameters"]["trainable"]
    assert trained.summary["training/tokens_per_s"] == records[0]["train"]["tokens_per_s"]
    assert trained.summary["train/loss"] == lines[-1]["loss"]
    assert (trained.summary["status"], trained.exit_code) == ("done", 0)

    assert (base.job_type, base.history) == ("grade", [])
    assert "baseline" in base.tags
    assert base.summary["status"] == "done"


def test_a_stopped_cell_goes_on_in_its_run_with_every_step_once(
    logged: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = logged("method=lora")
    with monkeypatch.context() as patch:
        behind_step(3, stop, patch)  # behind the checkpoint of step 2, so step 3 is done again
        with pytest.raises(Stopped):
            run_cell(cell)
    (cut,) = offline_runs(tmp_path)
    assert (cut.id, cut.steps) == (cell.id, [1, 2, 3])
    run_cell(cell)
    (whole,) = offline_runs(tmp_path)  # one directory: two would be uploaded one over the other
    assert (whole.id, whole.steps, whole.summary["status"]) == (cell.id, [1, 2, 3, 4], "done")
    assert [row["train/loss"] for row in whole.history] == [line["loss"] for line in losses(cell)]


def test_a_cell_that_finds_its_weights_has_the_losses_of_their_training(
    logged: Callable[..., Cell], tmp_path: Path
) -> None:
    run_cell(logged("method=lora"))
    other = logged("method=lora", "eval_n=3")
    run_cell(other)
    run = next(run for run in offline_runs(tmp_path) if run.id == other.id)
    assert run.steps == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("override", "status", "exit_code"),
    [("trainer.lr=1e30", "diverged", 0), ("trainer.schedule=reduce_lr_on_plateau", "failed", 1)],
)
def test_what_did_not_work_out_is_said(
    logged: Callable[..., Cell], tmp_path: Path, override: str, status: str, exit_code: int
) -> None:
    cell = logged("method=lora", override, "trainer.max_steps=30")
    with pytest.raises(ValueError) if status == "failed" else nullcontext():
        run_cell(cell)
    (run,) = offline_runs(tmp_path)
    assert (run.summary["status"], run.exit_code) == (status, exit_code)
    assert len(run.summary["error"].splitlines()) == 1


def test_wandb_absent_is_one_line(
    logged: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        assert run_cell(logged("logger.mode=online"))["status"] == "done"
    (said,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert "going on without it" in said


@pytest.mark.parametrize("key", [None, KEY])
def test_not_logged_in_or_server_down_logs_offline_and_says_so_once(
    logged: Callable[..., Cell],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key: str | None,
) -> None:
    with socket.socket() as closed:  # a port that nobody listens at
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        with caplog.at_level(logging.WARNING):
            for seed in (0, 1):
                assert run_cell(logged("logger.mode=online", f"seed={seed}"))["status"] == "done"
    (said,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert ("does not answer" if key else "not logged in") in said
    assert [run.steps for run in offline_runs(tmp_path)] == [[1, 2, 3, 4]] * 2


def test_wandb_lost_on_the_way_is_one_line(
    logged: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    behind_step(2, wandb.teardown, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert run_cell(logged())["status"] == "done"
    (said,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert "going on without it" in said


def test_the_logger_is_no_part_of_the_cell(make: Callable[..., Cell]) -> None:
    plain, online = make(*SHORT), make(*SHORT, "logger=wandb", "logger.mode=online", "logger.group=mine")
    assert (plain.id, plain.train_id) == (online.id, online.train_id)


def test_a_mode_that_is_none_is_refused_before_anything_runs(make: Callable[..., Cell]) -> None:
    with pytest.raises(ConfigError, match=r"logger\.mode='disabled'"):
        make("logger=wandb", "logger.mode=disabled")
