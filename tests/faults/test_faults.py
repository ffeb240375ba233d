"""The quick form of the fault campaign, the page that tells of the long form, and the marks that damage is seen by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kronlab.cell import Cell
from kronlab.cli import run_main
from kronlab.errors import CheckpointError
from kronlab.experiment import run_cell
from kronlab.runs import Store, json_line, read_jsonl, write_jsonl
from kronlab.train import COMPLETE, KronTrainer, damage, mark_whole

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORD = ROOT / "results" / "faults" / "campaign.json"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_campaign_breaks_no_promise(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, str(HERE / "campaign.py"), "--quick", "--out", str(out), "--keep", str(tmp_path / "work")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    parts = json.loads(out.read_text())["parts"]
    assert parts["kills"]["kills"] >= 4
    assert parts["damaged"]["files"] >= 2
    may_lack = {"full_disk"}  # mounts of one's own are not allowed everywhere
    assert {name for name, part in parts.items() if part["outcome"] != "held"} <= may_lack


def test_the_page_is_made_from_the_record() -> None:
    sys.path.insert(0, str(HERE))
    try:
        import campaign
    finally:
        sys.path.remove(str(HERE))
    record = json.loads(RECORD.read_text())
    text = campaign.PAGE.read_text()
    assert campaign.page(text, record) == text
    assert set(record["parts"]) <= set(campaign.TITLES)
    assert {part["outcome"] for part in record["parts"].values()} == {"held"}
    assert record["parts"]["kills"]["kills"] >= 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_outside_of_cells_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: Path("/dev/full").write_text("a table"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (
        said
        == "error: the results cannot be written (No space left on device); make room, then the same command goes on\n"
    )


# ---- marks


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "deep" / "c").write_bytes(b"")
    mark_whole(tmp_path)
    assert damage(tmp_path) is None
    return tmp_path


def test_a_marked_folder_tells_every_bit(marked: Path) -> None:
    file = marked / "a b.bin"
    raw = file.read_bytes()
    for at in (0, 100, 255):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        assert damage(marked) == "a b.bin is not as it was written: its hash differs"
    file.write_bytes(raw[:-1])
    assert damage(marked) == "a b.bin has 255 bytes instead of 256"
    file.unlink()
    assert damage(marked) == "a b.bin is missing"


def test_a_marker_that_was_damaged_lets_nothing_through(marked: Path) -> None:
    marker = marked / COMPLETE
    raw = marker.read_bytes()
    for end in range(len(raw) - 1):  # but for the last line's end
        marker.write_bytes(raw[:end])
        assert damage(marked) is not None, raw[:end]
    for at in range(len(raw) - 1):
        marker.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert damage(marked) is not None, raw[:at]


def test_a_marker_of_sizes_alone_is_read_as_before(marked: Path) -> None:
    (marked / COMPLETE).write_text("256 a b.bin\n0 deep/c\n")
    assert damage(marked) is None
    (marked / "deep" / "c").write_bytes(b"x")
    assert damage(marked) == "deep/c has 1 bytes instead of 0"


def test_a_line_tells_every_bit_of_its_values(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [{"id": "a", "nll": 1.25, "text": 'é "crc"'}, {"id": "b", "crc": "00000000"}, {}]
    write_jsonl(path, lines)
    assert read_jsonl(path) == lines
    raw = json_line(lines[0]).encode()
    for at in range(raw.rindex(b', "crc": "')):
        for bit in range(8):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
            assert read_jsonl(path) == [], (at, bit)
    path.write_text('{"id": "old", "nll": 2.5}\n')
    assert read_jsonl(path) == [{"id": "old", "nll": 2.5}], "lines without a checksum are taken as they are"


def test_a_record_tells_that_it_was_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = {"id": "abc", "scale": "smoke", "status": "done", "value": [1.5, None, "α"], "pair": (1, 2)}
    path = store.write(record)
    assert store.read("smoke", "abc") == record | {"pair": [1, 2]}
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(CheckpointError, match=r"not a whole record .*were changed.*delete it"):
        store.read("smoke", "abc")
    assert not store.is_done("smoke", "abc")
    plain = json.loads(path.read_text())
    del plain["seal"]
    path.write_text(json.dumps(plain))
    assert store.read("smoke", "abc") == record | {"value": [1.6, None, "α"], "pair": [1, 2]}


def test_what_a_killed_writer_left_goes_when_the_cell_is_run_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write({"id": "abc", "scale": "smoke", "status": "failed"})
    left, others = path.with_name(".abc.json.x7"), path.with_name(".abd.json.x7")
    left.touch()
    others.touch()
    store.begin("smoke", "abc")
    assert not left.exists()
    assert others.exists(), "another cell's writer may be alive"


def test_a_clock_that_was_set_back_removes_no_new_checkpoint(
    make: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints that seem to be of the future are older all the same: they have fewer steps."""
    cell = make("trainer.max_steps=5", "runtime.save_every=1", "eval_n=2", "eval.chain_sum.generation.max_new_tokens=2")
    save = KronTrainer._save_checkpoint

    def save_by_a_wrong_clock(self: KronTrainer, *arguments: object) -> None:
        save(self, *arguments)  # type: ignore[arg-type]
        stamp = 4102444800 - 86400 * self.state.global_step
        os.utime(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}", (stamp, stamp))

    monkeypatch.setattr(KronTrainer, "_save_checkpoint", save_by_a_wrong_clock)
    assert run_cell(cell)["status"] == "done"
    folder = Store(cell.config["results"]["dir"]).checkpoints(cell.train_id)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
