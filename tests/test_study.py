"""Optuna as a sweeper: trials are cells, a killed study goes on, test data never choose."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kronlab.runs import read_jsonl

optuna = pytest.importorskip("optuna", reason="an optional extra: optuna")

ROOT = Path(__file__).resolve().parents[1]
STUDY = (
    "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.startup=2", "hydra.sweeper.eval=spell",
    "scale=smoke", "method=lora", "task=spell", "eval.spell.generation.max_new_tokens=1", "trainer.max_steps=30",
    "runtime.progress=false", "runtime.threads=1", "trainer.lr=tag(log,interval(1e-4,1e-1))",
)  # fmt: skip
VALIDATION = "eval.spell.split=validation"


def here(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The sweep in this process; its exit status."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as `start` sets it; here it is also taken back
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_killed_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trial is tried again with the same learning rate, from its checkpoint; no other setting is drawn twice."""
    results = tmp_path / "r"
    command = (*STUDY, VALIDATION, "runtime.save_every=5", f"results.dir={results}")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *command],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 900

    def steps() -> int:
        return max((len(read_jsonl(path)) for path in results.glob("checkpoints/*/loss.jsonl")), default=0)

    while steps() < 8 and process.poll() is None:  # its checkpoint of step 5 is whole
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert here(*command, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "resuming from checkpoint-" in out
    storage = f"sqlite:///{results}/studies/study.db"
    study = optuna.load_study(study_name="study", storage=storage)
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == 3
    assert len(study.trials) == 4
    assert study.trials[0].params == done[0].params
    assert len({trial.params["trainer.lr"] for trial in done}) == 3
    records = {path.stem: json.loads(path.read_text()) for path in results.glob("runs/smoke/*.json")}
    assert {trial.user_attrs["record"]: trial.value for trial in done} == {
        name: record["eval"]["spell"]["metrics"]["nll_per_token"]["value"] for name, record in records.items()
    }
    best = min(done, key=lambda trial: trial.value)
    assert out.splitlines()[-2] == f"best: trainer.lr={best.params['trainer.lr']!r}"
    assert out.count("done before, skipped") == 0
    assert here(*command, monkeypatch=monkeypatch) == 0, "there is nothing left to do"
    assert ": running as" not in capsys.readouterr().out
    changed = [*command, "trainer.warmup_ratio=0.5"]
    assert here(*changed, monkeypatch=monkeypatch) == 2, "trials of another experiment"
    assert "it was begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], "error: hydra.sweeper.eval=spell: is on split 'test'; only validation data may choose"),
        (["hydra.sweeper.eval=other", VALIDATION], "error: hydra.sweeper.eval='other': the trials are graded on spell"),
        (["hydra.sweeper.n_trials=0", VALIDATION], "error: hydra.sweeper.n_trials=0: must be a whole number"),
        (["hydra.sweeper.goal=up", VALIDATION], "error: hydra.sweeper.goal='up': must be min or max"),
        (["trainer.lr=0.1", VALIDATION], "error: hydra/sweeper=optuna: nothing to search; give a setting a range"),
        (["trainer.lr=interval(1,0)", VALIDATION], "error: trainer.lr=interval(1,0): "),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    tmp_path: Path,
    changes: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    range_given = any(change.startswith("trainer.lr=") for change in changes)
    command = [word for word in STUDY if not (range_given and word.startswith("trainer.lr="))]
    assert here(*command, *changes, f"results.dir={tmp_path}", monkeypatch=monkeypatch) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(told)
    assert not list(tmp_path.glob("runs/**/*.json"))
