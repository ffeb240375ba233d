"""How a script ends: the user's mistakes in one line each, an interruption with the way on, nothing lost."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kronlab import cell, interrupt
from kronlab.cli import run_main
from kronlab.errors import ConfigError, KronlabError

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments],
        env=environment, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite under nohup has it ignored
    )  # fmt: skip


def records(results: Path) -> dict[str, dict[str, str]]:
    return {r["label"]: r for r in (json.loads(p.read_text()) for p in results.glob("runs/smoke/*.json"))}


def test_the_value_of_the_work_comes_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda: 7) == 7
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (KronlabError("one thing"), 2, ["error: one thing"]),
        (ConfigError("a=1: wrong\nb=2: wrong"), 2, ["error: a=1: wrong", "error: b=2: wrong"]),
        (KeyboardInterrupt(), 130, ["stopped; the same command goes on from here"]),
    ],
)
def test_errors_become_lines_and_a_status(
    error: BaseException, status: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(work)
    assert caught.value.code == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == lines


def test_a_bug_is_not_dressed_as_a_users_mistake() -> None:
    def work() -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        run_main(work)


@pytest.mark.parametrize(
    ("name", "override", "line"),
    [
        ("train", "method.rr=3", "error: method.rr: unknown key; did you mean 'r'?"),
        ("train", "method=cdkaa", "error: method=cdkaa: no such option; did you mean 'cdka'?"),
        ("plan", "batch.sizes=3", "error: batch.sizes: unknown key; did you mean 'size'?"),
        ("tables", "table=table99", "error: table=table99: no such option; did you mean 'table"),
        ("tables", "extra=[seed=1]", "error: extra=[seed=1]: not an override"),
    ],
)
def test_what_hydra_refuses_is_one_line_of_ours(
    name: str, override: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as `start` sets it; here it is also taken back
    monkeypatch.setattr(sys, "argv", [f"{name}.py", override])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(line)


def test_a_sweep_goes_on_behind_a_cell_that_cannot_run_and_trains_each_cell_once(tmp_path: Path) -> None:
    """r2=7 divides no dimension of the tiny model: its failure is one line and one record, and r2=8 still runs."""
    arguments = ["-m", "scale=smoke", "method=cdka", "method.r2=7,8", "runtime.save_every=2,3"]  # each cell twice
    process = script("train", *arguments, "runtime.progress=false", f"results.dir={tmp_path}/r", cwd=tmp_path)
    try:
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 2
    expected = (
        "model.layers.0.self_attn.q_proj: r2=7 does not divide d_in=32; the nearest that do: 4 or 8 "
        '(set r2, or r2_pattern for this module, or on_indivisible="fit")'
    )
    told, again, last = err.splitlines()
    assert told == f"error: {expected}"
    assert re.fullmatch(r"failed: CDKA \(2,7,4\), .*, seed 0 \[[0-9a-f]{12}\]: " + re.escape(expected), again)
    assert last.startswith("error: 1 of the sweep's 2 cells failed; the same command with retry_failed=true tries")
    assert "sweep of 2 cells: 1 failed, 1 done" in out
    assert out.count("failed before, not tried again") == 1
    made = records(tmp_path / "r")
    assert {label: r["status"] for label, r in made.items()} == {"CDKA (2,7,4)": "failed", "CDKA (2,8,4)": "done"}
    assert made["CDKA (2,7,4)"]["error"] == expected
    assert "DimensionError: " in made["CDKA (2,7,4)"]["traceback"]
    assert out.count("CDKA (2,8,4), tiny_llama on chain_sum, seed 0: running as") == 1
    assert out.count("CDKA (2,8,4), tiny_llama on chain_sum, seed 0: done before, skipped") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r"], "nothing is left in the working directory"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("train", ["scale=smoke"]), ("train", ["-m", "scale=smoke", "seed=0,1"]), ("tables", ["table_scale=smoke"])],
    ids=["train", "sweep", "table"],
)
def test_a_results_directory_that_cannot_be_written_is_one_line(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file, where root cannot write either."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, f"results.dir={tmp_path}/file/r"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/file")
    assert line.endswith("cannot be written (Not a directory); make it writable, or choose another results.dir")


def test_ctrl_c_says_how_to_go_on_and_leaves_no_record(tmp_path: Path) -> None:
    process = script(
        "train", "scale=smoke", "trainer.max_steps=100000", "runtime.progress=false", f"results.dir={tmp_path}",
        cwd=tmp_path,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("checkpoints/*/loss.jsonl")) and process.poll() is None:
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.05)
        time.sleep(0.3)  # a few steps
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, err
    said = r"stopped by SIGINT at train (\d+)/100000 of CDKA .*; the same command goes on from here"
    found = re.fullmatch(said, err.splitlines()[-1])
    assert found, err
    assert [path.name for path in tmp_path.glob("checkpoints/*/checkpoint-*")] == [f"checkpoint-{found[1]}"]
    assert records(tmp_path) == {}


@pytest.mark.parametrize("guarded", [False, True])
def test_a_signal_while_a_config_is_composed_stops_behind_it(monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    """Raised inside, it comes out of Hydra as another error once in thirty times."""
    whole, finished = cell._compose, []

    def struck(overrides: tuple[str, ...], name: str) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        finished.append(whole(overrides, name))
        return finished[0]

    monkeypatch.setattr(cell, "_compose", struck)

    def compose_in_a_cell() -> None:
        with interrupt.guarded():
            assert cell.compose_config(["scale=smoke"]).scale == "smoke"
            assert interrupt.pending()

    with pytest.raises(interrupt.Interrupted, match="stopped by SIGTERM"), interrupt.listening():
        compose_in_a_cell() if guarded else cell.compose_config(["scale=smoke"])
    assert len(finished) == 1
    assert not interrupt.pending()


def test_an_error_that_took_the_place_of_a_stop_is_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    def masked() -> None:
        try:
            try:
                raise interrupt.Interrupted(signal.SIGTERM)
            finally:
                raise KeyError("defaults")
        except KeyError as error:
            raise ConfigError("defaults: not there yet") from error

    with pytest.raises(SystemExit) as left:
        run_main(masked)
    assert left.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command goes on from here\n"
