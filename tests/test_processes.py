"""A cell over two processes is the cell of one: losses, weights, record, resume; and a failure of one ends both."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from processes_worker import cell_of, cut
from safetensors.torch import load_file
from torch import Tensor

from kronlab import models, processes
from kronlab.cell import Cell
from kronlab.errors import CheckpointError, ConfigError
from kronlab.experiment import run_cell
from kronlab.runs import Store, read_jsonl
from kronlab.train import Deal, EpochSampler

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("processes_worker.py")
LIMIT_S = 600  # a hang fails; the work itself takes seconds
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
CLASSIFIER = ["model=tiny_llama", "model.architecture=sequence_classification", "task=glue_cola"]
# In fp32. Only what has no dropout can be compared: each process drops out units of its own.
DDP_CASES: dict[str, list[str]] = {
    "cdka": ["method=cdka"],
    "kron_lora": ["method=kron_lora", "method.dropout=0"],
    "adalora": ["method=adalora", "method.dropout=0", "method.t_final=0.1", "method.delta_t=1"],
    "lora_plus": ["method=lora_plus", "method.dropout=0"],
    "pissa": ["method=pissa"],
    "gradient": ["method=cdka", "method.init=gradient"],
    "full_checkpointing": ["method=full", "trainer.gradient_checkpointing=true", "trainer.lr=1e-3"],
    "full_t5": ["model=tiny_t5", "method=full", "trainer.lr=1e-3"],
    "loss_rows": ["method=lora", "method.dropout=0", "trainer.loss_rows=16"],
    "classifier": [*CLASSIFIER, "method=cdka"],
}
FSDP_CASES: dict[str, list[str]] = {
    "cdka": ["method=cdka"],
    "kron_lora": ["method=kron_lora", "method.dropout=0"],
    "lora_plus": ["method=lora_plus", "method.dropout=0"],
    "pissa": ["method=pissa"],
    "full": ["method=full", "trainer.lr=1e-3"],
    "classifier": [*CLASSIFIER, "method=cdka"],
}
BF16 = ["method=cdka", "trainer.precision=bf16"]
DROPOUT = ["method=kron_lora"]  # its published dropout: a resume must take up each process's random numbers
CUT = 3  # the newest checkpoint at or before it is of step 2, in the first epoch


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoLA with made-up sentences."""
    root = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for name in ("train", "dev"):
        path = root / "glue" / "CoLA" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"made\t{i % 2}\t\t{' '.join(draw.choices(['cats', 'run', 'eat'], k=draw.randint(2, 9)))}" for i in range(30)]
        path.write_text("\n".join(rows) + "\n")
    return root


def launch(
    plan: list[dict[str, Any]], folder: Path, *, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the jobs of a plan in two processes over gloo."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER), str(path)]
    return subprocess.run(
        command, env=clean() | (environment or {}), cwd=folder.parent, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip


def clean() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Runs:
    """The same cells in one process and in two; a case is run when it is first asked for."""

    def __init__(self, root: Path, data_dir: Path) -> None:
        self.root, self.data = root, [f"data.dir={data_dir}"]

    def cell(self, overrides: list[str], where: str) -> Cell:
        return cell_of([*overrides, *self.data], self.root / where)

    def one(self, overrides: list[str], where: str) -> Cell:
        """The cell of one process."""
        cell = self.cell(overrides, where)
        run_cell(cell)
        return cell

    def job(self, overrides: list[str], where: str, **more: Any) -> dict[str, Any]:
        return {"overrides": [*overrides, *self.data], "results": str(self.root / where), **more}


def trained(cell: Cell) -> dict[str, Tensor]:
    final = Store(cell.config["results"]["dir"]).final(cell.train_id)
    return load_file(next(final.glob("*.safetensors")))


def losses(cell: Cell) -> list[float]:
    lines = read_jsonl(Store(cell.config["results"]["dir"]).folder(cell.scale, cell.id) / "loss.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def record(cell: Cell) -> dict[str, Any]:
    found = Store(cell.config["results"]["dir"]).read(cell.scale, cell.id)
    assert found is not None
    return found


def assert_like(two: Cell, one: Cell, *, losses_to: float = 1e-6, weights_to: float = 1e-5) -> None:
    """Rounding alone may differ: sums over processes are taken in another order."""
    assert (two.id, two.train_id) == (one.id, one.train_id)
    assert len(losses(one)) == 6
    assert losses(two) == pytest.approx(losses(one), rel=losses_to)
    mine, theirs = trained(two), trained(one)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=weights_to, msg=lambda m, n=name: f"{n}: {m}")
