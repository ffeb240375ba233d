"""Sweeps in other processes: the records of one after another, no cell twice, stopped jobs go on, losses are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from hydra_plugins.kronlab_launchers import plain
from kronlab.cell import CONFIG_DIR, Cell
from kronlab.errors import ConfigError
from kronlab.experiment import run_cell
from kronlab.launch import submitit_executor
from kronlab.runs import read_jsonl

pytestmark = pytest.mark.timeout(1000)
PATIENCE_S = 900  # every process imports torch first; on a busy machine that takes minutes
ROOT = Path(__file__).resolve().parents[1]
CELLS = ("scale=smoke", "method=cdka", "method.r2=7,8", "runtime.progress=false", "runtime.threads=1")
LONG = ("scale=smoke", "method=lora", "runtime.progress=false", "runtime.threads=1", "trainer.max_steps=40")
LAUNCHERS = {
    "joblib": (),
    "submitit_local": ("hydra.launcher.parameters.timeout_min=10",),
    "ray": ("hydra.launcher.init.num_cpus=2",),
}
NEEDS = {"joblib": "joblib", "submitit_local": "submitit", "ray": "ray"}


def sweep(*arguments: str, results: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["RAY_worker_niceness"] = "0"  # 15 otherwise: whatever else runs would go before
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *arguments, f"results.dir={results}"],
        env=environment, cwd=results.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite under nohup has it ignored
        start_new_session=True,
    )  # fmt: skip


def made(results: Path) -> list[Path]:
    return sorted(results.glob("runs/smoke/*.json"))


def numbers(results: Path) -> dict[str, Any]:
    """What each cell of a results directory has come to: scores and the loss of every step, without times."""
    found = {}
    for path in made(results):
        record = json.loads(path.read_text())
        scores = {name: section["metrics"] for name, section in record.get("eval", {}).items()}
        losses = [(line["step"], line["loss"]) for line in read_jsonl(path.with_suffix("") / "loss.jsonl")]
        found[record["id"]] = (record["status"], record["error"], scores, losses)
    return found


def until(there: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What `there` finds, as soon as it finds something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := there()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.05)
    return found


def training(results: Path) -> int | None:
    """The process that trains a cell and has done a step."""
    if not list(results.glob("checkpoints/*/loss.jsonl")):
        return None
    for path in sorted(results.glob("checkpoints/running/smoke-*/*.json")):
        text = path.read_text()
        if text:
            holder = json.loads(text)
            if (holder["stage"] or "").startswith("train "):
                return int(holder["pid"])
    return None


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of Hydra's own launcher."""
    results = tmp_path_factory.mktemp("basic") / "r"
    process = sweep(*CELLS, results=results)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, err
    return numbers(results)


@pytest.fixture(params=list(LAUNCHERS))
def launcher(request: pytest.FixtureRequest) -> tuple[str, ...]:
    pytest.importorskip(NEEDS[request.param], reason=f"an optional extra: {NEEDS[request.param]}")
    return (f"hydra/launcher={request.param}", *LAUNCHERS[request.param])


@pytest.mark.slow
def test_the_records_are_those_of_one_after_another(
    launcher: tuple[str, ...], one_by_one: dict[str, Any], tmp_path: Path
) -> None:
    """Each cell stands in the sweep twice and is trained once; the one that cannot run is told, with status 2."""
    results = tmp_path / "r"
    process = sweep(*launcher, *CELLS, "runtime.save_every=2,3", results=results)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, err
    assert "sweep of 2 cells: 1 failed, 1 done" in out
    assert "error: 1 of the sweep's 2 cells failed" in err
    assert numbers(results) == one_by_one
    said = out + "".join(path.read_text() for path in results.glob("hydra/submitit/*/*.out"))
    assert said.count("CDKA (2,8,4), tiny_llama on chain_sum, seed 0: running as") == 1
    commands = {json.loads(path.read_text())["command"].partition(" scale=")[0] for path in made(results)}
    assert commands == {f"python scripts/train.py -m {launcher[0]}"}, "what was typed"
    assert list(results.glob("checkpoints/sweeps/*")) == []


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path, make: Callable[..., Cell]) -> None:
    """SIGUSR2, as Slurm sends it: a checkpoint, then the same job again, to the losses of a run left alone."""
    pytest.importorskip("submitit", reason="an optional extra: submitit")
    results = tmp_path / "r"
    process = sweep("hydra/launcher=submitit_local", *LONG, "seed=0", results=results)
    os.kill(until(lambda: training(results), process), signal.SIGUSR2)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    (log,) = results.glob("hydra/submitit/*/*.out")
    said = log.read_text()
    assert said.count(": running as") == 2
    assert "Requeued job" in said
    assert "resuming from checkpoint-" in said.partition("Requeued job")[2]
    alone = tmp_path / "alone"
    run_cell(make(*LONG, "seed=0", results=alone))
    assert numbers(results) == numbers(alone)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_ctrl_c_stops_the_jobs_with_a_checkpoint(launcher: tuple[str, ...], tmp_path: Path) -> None:
    results = tmp_path / "r"
    process = sweep(*launcher, *LONG, "trainer.max_steps=100000", "seed=0,1,2", results=results)
    until(lambda: training(results), process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith("the same command goes on from here")
    assert list(results.glob("checkpoints/*/checkpoint-*"))
    assert made(results) == []


@pytest.mark.slow
def test_a_killed_process_takes_no_cell_along(tmp_path: Path) -> None:
    """joblib gives up the whole pool then; what it had begun, and what it had not, is run all the same."""
    results = tmp_path / "r"
    process = sweep("hydra/launcher=joblib", *LONG, "seed=0,1,2", results=results)
    os.kill(until(lambda: training(results), process), signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "sweep of 3 cells: 3 done" in out
    assert [json.loads(path.read_text())["train"]["steps"] for path in made(results)] == [40] * 3


def test_one_process_is_no_pool(tmp_path: Path) -> None:
    process = sweep("hydra/launcher=joblib", "hydra.launcher.n_jobs=1", *CELLS, results=tmp_path / "r")
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    told = "error: hydra.launcher.n_jobs=1: must be at least 2; hydra/launcher=basic takes one by one"
    assert err.splitlines() == [told]


def test_slurm_is_asked_for_signal_and_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The submission file of the shipped settings; without Slurm it is one line."""
    pytest.importorskip("submitit", reason="an optional extra: submitit")
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("config", ["hydra/launcher=submitit_slurm", "scale=smoke"], return_hydra_config=True)
    settings = composed.hydra.launcher
    parameters = plain(settings.parameters)
    folder = str(tmp_path / "%j")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match='hydra/launcher=submitit_slurm: Could not detect "srun"'):
        submitit_executor("slurm", folder, settings.max_num_timeout, parameters)
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.touch(0o755)
    monkeypatch.setenv("PATH", str(srun.parent))
    executor = submitit_executor("slurm", folder, settings.max_num_timeout, parameters)
    text = executor._executor._make_submission_file_text("command", "uid")
    lines = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    wanted = {"requeue", "signal=USR2@120", "time=240", "gpus-per-node=1", "cpus-per-task=8", "open-mode=append"}
    assert wanted <= lines
    with pytest.raises(ConfigError, match=r"hydra/launcher=submitit_slurm: .*slurm_partitoin"):
        submitit_executor("slurm", folder, 1, {"slurm_partitoin": "a"})
