"""One display for all long work: cells on top, below them what the present cell does, each with its ETA.

On a terminal the bars are drawn by rich and log lines go above them. Elsewhere (a log file, a pipe) a bar is silent for
its first half minute, and then one plain line each half minute.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

REDRAW_S = 0.2  # between two drawings on a terminal
PLAIN_S = 30.0  # between two lines elsewhere


def bar(*, total: int, done: int, what: str, unit: str, show: bool = True) -> Bar:
    """A bar that starts at `done` of `total`; close it, or use it in a `with`. Bars may stand below one another."""
    return Bar(total=total, done=done, what=what, unit=unit, show=show and os.environ.get("RANK", "0") == "0")


def cells(total: int, *, done: int = 0, show: bool = True) -> Bar:
    """The outer bar of a table or a sweep of `total` cells, of which `done` need not be run."""
    return bar(total=total, done=done, what="cells", unit="cell", show=show)


class Bar:
    """What is done of one piece of work.

    Attributes:
        n: how much of `total` is done.
        note: what is said behind the numbers.
    """

    def __init__(self, *, total: int, done: int, what: str, unit: str, show: bool) -> None:
        self.total, self.n, self.what, self.unit = total, done, what, unit
        self.note = ""
        self._worked = 0  # of n, what took the time since `_began`
        self._began = self._told = time.monotonic()
        self._spoke = False
        self._open = show
        self._task = _display.add(self) if show and _is_terminal(sys.stderr) else None

    def update(self, by: int = 1, *, note: str | None = None, skipped: bool = False) -> None:
        """Count `by` more as done; `skipped`: it took no time, so the ETA must not count on it."""
        self.n += by
        self._worked += 0 if skipped else by
        if note is not None:
            self.note = note
        if not self._open:
            return
        now = time.monotonic()
        if self._task is not None:
            _display.draw(self, self._task, now)
        elif now - self._told >= PLAIN_S:
            self._tell(now)

    def close(self) -> None:
        """End the bar; again does nothing. An inner bar vanishes, the last one stays as it stands."""
        if not self._open:
            return
        self._open = False
        if self._task is not None:
            _display.remove(self, self._task)
        elif self._spoke and self.n >= self.total:
            self._tell(time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def told(self, now: float) -> str:
        """Numbers and note: `120/512 steps, 2.1 steps/s, 3:07 left, loss 0.1234`."""
        parts = [f"{self.n}/{self.total} {self.unit}{'' if self.total == 1 or self.unit == '%' else 's'}"]
        took = now - self._began
        if self._worked and took > 0:
            rate = self._worked / took
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{_clock(1 / rate)} each")
            left = max(self.total - self.n, 0)
            parts.append(f"{_clock(left / rate)} left" if left else f"took {_clock(took)}")
        return ", ".join([*parts, self.note] if self.note else parts)

    def _tell(self, now: float) -> None:
        print(f"{self.what}: {self.told(now)}", file=sys.stderr, flush=True)
        self._told, self._spoke = now, True


class _Display:
    """The one region of the terminal in which all open bars are drawn.

    There is no thread: a bar is drawn when it moves. While it is there, log handlers that write to the terminal write
    above it.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._drawn = 0.0
        self._streams: list[tuple[logging.StreamHandler[Any], TextIO]] = []

    def add(self, bar: Bar) -> TaskID:
        if self._progress is None:
            self._start()
        assert self._progress is not None
        task = self._progress.add_task(bar.what, total=bar.total, completed=bar.n, told=bar.told(time.monotonic()))
        self._progress.refresh()
        return task

    def draw(self, bar: Bar, task: TaskID, now: float) -> None:
        if self._progress is not None and (now - self._drawn >= REDRAW_S or bar.n >= bar.total):
            self._drawn = now
            self._progress.update(task, completed=bar.n, told=bar.told(now), refresh=True)

    def remove(self, bar: Bar, task: TaskID) -> None:
        if self._progress is None:
            return
        self._progress.update(task, completed=bar.n, told=bar.told(time.monotonic()))
        if len(self._progress.tasks) > 1:
            self._progress.remove_task(task)
            self._progress.refresh()
        else:
            self.stop()

    def _start(self) -> None:
        out, err = sys.stdout, sys.stderr
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[told]}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            redirect_stdout=_is_terminal(out),
        )
        self._progress.start()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (out, err):
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is out else sys.stderr)

    def stop(self) -> None:
        """Leave the terminal as it was, with the bars above the cursor."""
        if self._progress is None:
            return
        progress, self._progress = self._progress, None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams.clear()
        progress.stop()


_display = _Display()
atexit.register(_display.stop)  # whoever forgot to close a bar leaves no hidden cursor


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _clock(seconds: float) -> str:
    """`0.4 s`, `3:07`, `2:03:07`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
