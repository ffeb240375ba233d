"""`make status`: every cell in one state, read from records and leases alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kronlab import interrupt, lease
from kronlab.cell import Cell, compose_config
from kronlab.errors import ConfigError
from kronlab.experiment import run_cell
from kronlab.reproduce import reproduce
from kronlab.runs import FAILED, Store
from kronlab.sequence import plain
from kronlab.status import Entry, gather, left, render

ROOT = Path(__file__).resolve().parents[1]


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_states_of_a_directory(make: Callable[..., Cell], tmp_path: Path) -> None:
    short = ["method=none", "eval_n=4", "eval.chain_sum.generation.max_new_tokens=4"]
    done = make(*short)
    record = run_cell(done)
    store = Store(tmp_path)
    store.write(record | {"id": "bad", "status": FAILED, "error": "two\nlines", "name": "a bad one"})
    store.record_path("smoke", "torn").write_text('{"id"')
    gone = store.running() / "smoke-gone" / "1.json"
    gone.parent.mkdir(parents=True)
    fields = vars(lease.Holder.read(lease.Lease(gone.parent, "a dead one")._text().encode()))
    gone.write_text(json.dumps(fields | {"start": 0}))
    before = stamps(tmp_path)
    found = {entry.id: entry for entry in gather(tmp_path)}
    assert stamps(tmp_path) == before, "nothing is written"
    assert {name: entry.state for name, entry in found.items()} == {
        done.id: "done", "bad": "failed", "torn": "corrupt", "gone": "stale",
    }  # fmt: skip
    assert (found["bad"].name, found["bad"].note) == ("a bad one", "two lines")
    assert found["gone"].name == "a dead one"
    with lease.held(store.running() / "smoke-live", "a live one", wait=False):
        interrupt.at("train 12/96")
        (live,) = [entry for entry in gather(tmp_path) if entry.id == "live"]
    interrupt.at("")
    assert live.state == "running"
    assert live.beat_s is not None
    text = render([live, *found.values()], "text", results="r", eta=False).splitlines()
    assert text[0] == "r: 5 cells: 1 running, 1 stale, 1 failed, 1 corrupt, 1 done"
    assert done.id not in "".join(text)


def test_a_table_knows_what_is_missing_and_how_long_it_takes(tmp_path: Path) -> None:
    spec = plain(compose_config(["table=table6"], name="tables").table)
    layout = spec["scales"]["smoke"]
    layout["rows"], layout["seeds"] = layout["rows"][:2], [0, 1]
    layout["common"] = [*layout["common"], "runtime.progress=false", "runtime.threads=1"]
    assert {entry.state for entry in gather(tmp_path, table=spec, scale="smoke")} == {"missing"}
    layout["seeds"] = [0]
    reproduce(spec, scale="smoke", results_dir=str(tmp_path))
    layout["seeds"] = [0, 1]
    entries = gather(tmp_path, table=spec, scale="smoke")
    states = [entry.state for entry in entries]
    assert states.count("done") == states.count("missing") > 0
    seconds, unknown = left(entries)
    assert seconds is not None
    assert seconds > 0
    assert unknown == 0
    head = render(entries, "text", results="r", eta=True).splitlines()[0]
    assert head.endswith("left, one after another")
    told = json.loads(render(entries, "json", results="r", eta=True))
    assert told["counts"] == {"missing": states.count("missing"), "done": states.count("done")}
    with pytest.raises(ConfigError, match="table_scale is needed"):
        gather(tmp_path, table=spec)


def test_what_is_not_known_is_said() -> None:
    entries = [Entry("a", "mini", "A", "missing", seconds=60.0), Entry("b", "mini", "B", "missing")]
    head = render(entries, "text", results="r", eta=True).splitlines()[0]
    assert head == "r: 2 cells: 2 missing; about 60 s left, and 1 of unknown time, one after another"
    assert "time left unknown" in render(entries[1:], "text", results="r", eta=True)
    with pytest.raises(ConfigError, match="format='xml'"):
        render(entries, "xml", results="r", eta=True)


def test_the_command_prints_json_alone_and_writes_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "status.py"), "table=table2", "table_scale=smoke", "format=json",
         f"results.dir={tmp_path}/none"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"missing": 6}
    assert list(tmp_path.iterdir()) == []
