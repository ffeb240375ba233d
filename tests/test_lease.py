"""Leases: one holder at any time, the dead are found without comparing clocks, of many takers one wins."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kronlab import interrupt, lease
from kronlab.errors import Busy, CheckpointError
from kronlab.lease import Holder, Lease, held, newest, running

FORK = multiprocessing.get_context("fork")


def start(work: Callable[..., None], *arguments: Any) -> Any:
    process = FORK.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def write(folder: Path, number: int, **changes: Any) -> Path:
    """A lease as another process would have it: by default one on another machine."""
    fields = dict.fromkeys(Holder.__dataclass_fields__) | {
        "host": "elsewhere", "place": "another boot", "pid": 7, "start": 1, "stage": "train 3/9", "beat": 0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number}.json"
    path.write_text(json.dumps(fields | changes))
    return path


def hold_for_ever(folder: Path, ready: Any) -> None:
    assert Lease(folder, "work").take() is None
    ready.set()
    signal.pause()


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A lease whose holder was killed."""
    ready = FORK.Event()
    process = start(hold_for_ever, tmp_path / "work", ready)
    assert ready.wait(60)
    process.kill()
    process.join()
    return tmp_path / "work"


def test_a_lease_is_held_given_back_and_taken_again(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    for number in (1, 2, 3):
        with held(folder, "my cell", wait=False):
            interrupt.at("train 1/2")
            (found,) = running(tmp_path)
            assert (found[0], found[1].what, found[1].pid, found[2]) == ("work", "my cell", os.getpid(), True)
            with pytest.raises(Busy, match=rf"^other: runs elsewhere, by process {os.getpid()} on "):
                held(folder, "other", wait=False).__enter__()
        assert running(tmp_path) == []
        assert [path.name for path in folder.iterdir()] == [f"{number}.json"], "the highest number stays, empty"
        assert newest(folder) == (number, b"")
    interrupt.at("")


def test_the_beat_tells_the_stage_and_release_is_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with held(tmp_path / "work", "cell", wait=False):
        interrupt.at("grade gsm8k 8/16")
        beats = set()
        while len(beats) < 3:
            beats.add(running(tmp_path)[0][1].beat)
        assert running(tmp_path)[0][1].stage == "grade gsm8k 8/16"
    assert newest(tmp_path / "work") == (1, b"")
    interrupt.at("")


def enter_in_turn(folder: Path, inside: Path, log: Path, times: int) -> None:
    for _ in range(times):
        with held(folder, "work", wait=True):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another process is inside
            with log.open("a") as file:
                file.write(f"{os.getpid()}\n")
            inside.unlink()


def test_many_processes_are_never_inside_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_POLL_S", 0.002)
    arguments = tmp_path / "work", tmp_path / "inside", tmp_path / "log", 12
    processes = [start(enter_in_turn, *arguments) for _ in range(6)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 6
    lines = (tmp_path / "log").read_text().split()
    assert len(lines) == 72
    assert len(set(lines)) == 6


def take_at_once(folder: Path, go: Any, done: Any, answers: Any) -> None:
    go.wait()
    answers.put(Lease(folder, "work").take() is None)
    done.wait()  # the winner stays alive until all have answered


def test_of_many_that_find_the_holder_dead_one_takes_over(killed: Path) -> None:
    for _ in range(5):
        go, done, answers = FORK.Event(), FORK.Event(), FORK.Queue()
        processes = [start(take_at_once, killed, go, done, answers) for _ in range(6)]
        go.set()
        won = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.kill()  # so the next round finds a dead holder again
            process.join()
        assert sorted(won) == [False] * 5 + [True]


def test_a_killed_holder_is_taken_over_at_once(killed: Path) -> None:
    with held(killed, "work", wait=False):
        found = newest(killed)
        assert found is not None
        assert (found[0], Holder.read(found[1]).pid) == (2, os.getpid())


def test_a_process_with_the_number_of_the_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """This very process has that number, and has started at another time than the holder."""
    mine = Holder.read(Lease(tmp_path / "x", "x")._text().encode())
    assert mine.alive is True
    write(tmp_path / "work", 4, place=mine.place, pid=mine.pid, start=(mine.start or 0) - 1)
    with held(tmp_path / "work", "work", wait=False):
        assert (newest(tmp_path / "work") or (0,))[0] == 5


def test_a_holder_that_was_not_waited_for_by_its_parent_is_dead(tmp_path: Path) -> None:
    ready = FORK.Event()
    process = start(hold_for_ever, tmp_path / "work", ready)
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
    assert Lease(tmp_path / "work", "work").take() is None
    process.join()


@pytest.mark.parametrize("garbage", [False, True], ids=["other machine", "unreadable"])
def test_elsewhere_silence_by_the_observers_clock_decides(
    tmp_path: Path, garbage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    # no wall clock in it: nothing may be decided by one
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    path = write(tmp_path / "work", 1)
    if garbage:
        path.write_bytes(b"\xff{")
    mine = Lease(tmp_path / "work", "work", stale_after=60)
    assert mine.take() is not None
    clock[0] += 59
    assert mine.take() is not None
    write(tmp_path / "work", 1, beat=1)  # a sign of life, whatever time it is there
    clock[0] += 59
    assert mine.take() is not None
    clock[0] += 59
    assert mine.take() is not None
    clock[0] += 1.5
    assert mine.take() is None
    mine.release()


def test_a_slow_taker_gives_way(tmp_path: Path) -> None:
    """It has seen 1 dead; meanwhile 2 was taken and given back, and 3 taken."""
    write(tmp_path / "work", 3)
    slow = Lease(tmp_path / "work", "work")
    assert not slow._create(2)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["3.json"]


def test_a_holder_that_was_taken_for_dead_stops_and_leaves_the_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with held(tmp_path / "work", "cell", wait=False) as mine:
        mine.check()
        write(tmp_path / "work", 2)
        with pytest.raises(Busy, match="taken over by process 7 on elsewhere, which is at train 3/9"):
            mine.check()

        def train() -> None:
            while True:  # until the beat has found out
                interrupt.at("train 4/9")

        with pytest.raises(Busy, match="taken over"):
            train()
    found = newest(tmp_path / "work")
    assert found is not None
    assert (found[0], Holder.read(found[1]).host) == (2, "elsewhere")
    interrupt.at("")  # nothing is left behind


def test_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written \(Not a directory\).*another results.dir") as caught:
        held(tmp_path / "file" / "running", "cell", wait=True).__enter__()
    assert len(str(caught.value).splitlines()) == 1
