"""Started in several processes by `test_processes.py`: runs the cells of a plan one after another, as a sweep would."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from kronlab import processes
from kronlab.cell import Cell, compose_config, make_cell
from kronlab.errors import KronlabError
from kronlab.experiment import run_cell
from kronlab.runs import Store

COMMON = [
    "scale=smoke", "runtime.threads=1", "runtime.progress=false", "runtime.save_every=2", "runtime.keep_checkpoints=9",
    "trainer.epochs=2", "trainer.max_steps=-1", "trainer.warmup_ratio=0", "trainer.batch_size=8",
    "trainer.micro_batch_size=2", "task.n=19", "eval_n=2",
]  # fmt: skip
# 19 examples: the third batch of each epoch has 3, which is one micro-batch and a half, a short one and a blank one


def cell_of(overrides: list[str], results: Path) -> Cell:
    config = compose_config([*COMMON, *overrides])
    config.results.dir = str(results)
    return make_cell(config)


def cut(cell: Cell, step: int) -> None:
    """Bring the folder of a finished cell into the state that a kill behind the checkpoint of `step` leaves."""
    store = Store(cell.config["results"]["dir"])
    store.record_path(cell.scale, cell.id).unlink()
    shutil.rmtree(store.folder(cell.scale, cell.id))
    folder = store.checkpoints(cell.train_id)
    shutil.rmtree(folder / "final")
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            (checkpoint / "COMPLETE").unlink()  # a fragment


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    processes.PATIENCE = datetime.timedelta(seconds=15)
    for job in json.loads(plan.read_text()):
        if job.get("elsewhere") and not processes.is_first():
            os.chdir(plan.parent)  # relative paths lead nowhere here

        def work(job: dict[str, object] = job) -> str:
            overrides, results = list(job["overrides"]), Path(str(job["results"]))  # type: ignore[call-overload]
            cell = cell_of(overrides, results)
            try:
                run_cell(cell)
                if job.get("cut"):
                    done = results.with_name(f"{results.name}-uncut")
                    shutil.copytree(results, done)
                    cut(cell, int(str(job["cut"])))
                    run_cell(cell)
            finally:
                shutil.rmtree(results / "hydra", ignore_errors=True)
            return "done"

        try:
            processes.led(work)
        except KronlabError as error:
            if processes.is_first():
                print(f"told: {error}", flush=True)
            if isinstance(error, processes.ProcessError):
                raise SystemExit(2) from None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
