"""The record store: whole files or none, unknown as null, what a number can depend on."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kronlab import runs
from kronlab.errors import CheckpointError
from kronlab.runs import PeakMemory, Store, write_json

SRC = Path(__file__).resolve().parents[1] / "src"


def record(cell_id: str = "abc", **more: Any) -> dict[str, Any]:
    return {"id": cell_id, "scale": "smoke", "status": runs.DONE, **more}


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.read("smoke", "abc") is None
    assert not store.is_done("smoke", "abc")
    path = store.write(record(value=[1.5, None, "α"]))
    assert path == tmp_path / "runs" / "smoke" / "abc.json"
    assert store.read("smoke", "abc") == record(value=[1.5, None, "α"])
    assert os.stat(path).st_mode & 0o777 == 0o644, "readable by others, unlike a temporary file"


@pytest.mark.parametrize(("status", "done"), [(runs.DONE, True), (runs.DIVERGED, True), (runs.FAILED, False)])
def test_a_failed_cell_is_not_done(tmp_path: Path, status: str, done: bool) -> None:
    store = Store(tmp_path)
    store.write(record() | {"status": status})
    assert store.is_done("smoke", "abc") is done


def test_records_are_listed_by_id_and_leftovers_are_not_records(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("b", "a", "c"):
        store.write(record(name))
    (tmp_path / "runs" / "smoke" / ".a.json.x7").write_text("{")  # what a killed writer leaves
    assert [r["id"] for r in store.records("smoke")] == ["a", "b", "c"]
    assert list(store.records("paper")) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}], ids=["nan", "inf", "no JSON"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"long": list(range(10_000)), "bad": bad})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def write_for_ever(path: Path) -> None:
    for i in itertools.count(1):
        write_json(path, {"value": i, "padding": [i] * 20000})


def test_a_reader_beside_a_writer_and_after_its_kill_finds_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"value": 0, "padding": []})
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,), daemon=True)
    writer.start()
    deadline = time.monotonic() + 20
    while json.loads(path.read_text())["value"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)  # every read in this loop is a reader beside the writer
    writer.kill()
    writer.join()
    found = json.loads(path.read_text())
    assert found["value"] >= 3
    assert found["padding"] == [found["value"]] * 20000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"id": "abc", "stat', "not a whole record"),
        ("", "not a whole record"),
        ("[]", "not a whole record"),
        ('{"status": "done"}', "not a whole record"),
        ('{"id": "xyz", "status": "done"}', "holds id xyz"),
        ('{"id": "abc"}', "'status'"),
        ('{"id": "abc", "status": "?"}', "status is '?'"),
        ("\udcff", "not a whole record"),
    ],
)
def test_a_corrupt_record_is_one_line_with_the_way_out(tmp_path: Path, text: str, reason: str) -> None:
    path = Store(tmp_path).record_path("smoke", "abc")
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert not Store(tmp_path).is_done("smoke", "abc"), "the cell is to be run again"
    with pytest.raises(CheckpointError) as caught:
        Store(tmp_path).read("smoke", "abc")
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "delete it" in message
    assert len(message.splitlines()) == 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory can be reset on Linux only")
def test_peak_memory_sees_a_passing_allocation_and_forgets_it_after() -> None:
    size = 200 * 2**20
    with PeakMemory() as quiet:
        pass
    with PeakMemory() as busy:
        block = np.ones(size, dtype=np.uint8)
        del block
        gc.collect()
    with PeakMemory() as after:
        pass
    assert quiet.bytes is not None
    assert busy.bytes is not None
    assert after.bytes is not None
    assert busy.bytes - quiet.bytes == pytest.approx(size, rel=0.1)
    assert busy.bytes - after.bytes > 0.8 * size


def test_git_state_is_the_commit_of_this_checkout() -> None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SRC, capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip("not a git checkout")
    state = runs.git_state()
    assert state["commit"] == asked.stdout.strip()
    assert state["dirty"] in (True, False)


def test_git_state_outside_of_git_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module as it is installed somewhere without a repository."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    shutil.copy(runs.__file__, tmp_path / "runs.py")
    spec = importlib.util.spec_from_file_location("runs_elsewhere", tmp_path / "runs.py")
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.git_state() == {"commit": None, "dirty": None}


def test_versions_and_machine_tell_what_a_number_depends_on() -> None:
    import peft
    import torch
    import transformers

    found = runs.versions()
    assert found["python"] == sys.version.split()[0]
    assert (found["torch"], found["transformers"], found["peft"]) == (
        torch.__version__,
        transformers.__version__,
        peft.__version__,
    )
    machine = runs.machine()
    assert machine["threads"] == torch.get_num_threads()
    assert machine["memory_bytes"] > 2**28
    assert str(Path.home()) not in json.dumps(machine)
