"""The display: bars on a terminal, which is left clean whatever happens; a few plain lines in a log file."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from kronlab import progress

# The module alone, for the whole package takes seconds to import.
PRELUDE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("progress", {str(progress.__file__)!r})
sys.modules["progress"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["progress"])
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"

NESTED = """
import logging, sys, time
from progress import bar, cells
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with cells(2) as outer:
    for cell in range(2):
        outer.update(0, note=f"cell number {cell}")
        with bar(total=3, done=0, what="train", unit="step") as inner:
            for step in range(3):
                time.sleep(0.25)
                inner.update(1, note=f"loss {step}")
                logging.info("said at %d.%d", cell, step)
        outer.update()
"""
RAISES = """
from progress import bar, cells
with cells(2) as outer, bar(total=3, done=0, what="train", unit="step") as inner:
    inner.update()
    raise RuntimeError("it broke")
"""
FORGETS = """
from progress import bar
bar(total=3, done=1, what="train", unit="step").update()
"""
WAITS = """
import sys, time
from progress import bar, cells
try:
    with cells(2) as outer, bar(total=3, done=0, what="train", unit="step") as inner:
        inner.update()
        print("ready")
        time.sleep(60)
except KeyboardInterrupt:
    print("stopped")
"""


def start(program: str, **channels: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "110", "LINES": "30"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    return subprocess.Popen([sys.executable, "-c", PRELUDE + program], env=environment, **channels)


def on_terminal(program: str, *, interrupt: bool = False) -> tuple[int, str]:
    """Exit status and everything that was written to a terminal of its own."""
    here, there = pty.openpty()
    process = start(program, stdin=there, stdout=there, stderr=there)
    os.close(there)
    written = b""
    sent = False
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # Linux's way to say that nobody holds the other end any more
            break
        if not part:
            break
        written += part
        if interrupt and not sent and b"ready" in written:
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(here)
    return process.wait(timeout=60), written.decode()


def screen(written: str, width: int = 200, height: int = 60) -> list[str]:
    """What a terminal shows of `written`: cursor up, carriage return and erase line are what rich's display uses."""
    rows, row, column = [""] * height, 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token.startswith("\x1b"):
            count, kind = token[2:-1], token[-1]
            if kind == "A":
                row -= int(count or 1)
            elif kind == "K":
                rows[row] = "" if count == "2" else rows[row][:column]
        else:
            rows[row] = rows[row].ljust(column)[:column] + token + rows[row][column + len(token) :]
            column += len(token)
    return [text.rstrip() for text in rows if text.strip()]


def test_nested_bars_leave_the_outer_one_and_all_that_was_logged() -> None:
    status, written = on_terminal(NESTED)
    assert status == 0
    shown = screen(written)
    logged = [f"said at {cell}.{step}" for cell in range(2) for step in range(3)]
    assert [line for line in shown if line.startswith("said")] == logged, "a log line was overwritten or doubled"
    assert shown[:-1] == logged, "the inner bars are gone"
    assert re.match(r"cells .*2/2 cells, .*took .*cell number 1", shown[-1])
    assert re.search(r"train .*2/3 steps.*left.*loss 1", CONTROL.sub("", written))
    assert written.count(HIDE) == written.count(SHOW) == 1
    assert written.rindex(SHOW) > written.rindex("cells")


@pytest.mark.parametrize(("program", "said"), [(RAISES, "RuntimeError: it broke"), (FORGETS, "2/3 steps")])
def test_the_terminal_is_left_clean(program: str, said: str) -> None:
    _, written = on_terminal(program)
    assert said in CONTROL.sub("", written)
    assert written.count(HIDE) == written.count(SHOW) == 1


def test_ctrl_c_leaves_the_terminal_clean() -> None:
    status, written = on_terminal(WAITS, interrupt=True)
    assert status == 0
    assert written.count(HIDE) == written.count(SHOW) == 1
    assert screen(written)[-1] == "stopped"
    assert "stopped" in written[written.rindex(SHOW) :]


def test_a_log_file_gets_no_control_characters_and_nothing_of_what_is_quick() -> None:
    process = start(NESTED, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == b""
    assert out.decode().splitlines() == [f"said at {cell}.{step}" for cell in range(2) for step in range(3)]


def test_a_log_file_gets_a_plain_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.bar(total=100, done=20, what="train", unit="step") as shown:
        for step in range(80):
            now += 1.0
            shown.update(note=f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "train: 50/100 steps, 1.0/s, 0:50 left, loss 29",
        "train: 80/100 steps, 1.0/s, 0:20 left, loss 59",
        "train: 100/100 steps, 1.0/s, took 1:20, loss 79",
    ]


def test_what_was_skipped_does_not_count_for_the_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress.cells(10, done=2) as shown:
        shown.update(4, skipped=True)
        now += 120.0
        shown.update()
        assert shown.told(now) == "7/10 cells, 2:00 each, 6:00 left"
        now += 7200.0
        shown.update()
        assert shown.told(now) == "8/10 cells, 1:01:00 each, 2:02:00 left"


def test_only_the_first_process_shows_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with progress.bar(total=2, done=0, what=f"rank {rank}", unit="step") as shown:
            now += 100
            shown.update()
    assert capsys.readouterr().err == "rank 0: 1/2 steps, 1:40 each, 1:40 left\n"
