"""Signals that ask a run to stop: SIGINT (Ctrl-C), SIGTERM and SIGUSR2 (a scheduler that wants the machine back).

While a cell runs (`guarded`) the first signal is only noted. The trainer looks between optimizer steps, writes a
checkpoint and stops; grading looks between batches, whose rows are on disk. The second signal stops at once, and so
does the first one elsewhere. Either way the same command goes on from there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

_pending: int | None = None  # the signal that was noted
_depth = 0  # of `guarded` blocks
_held = 0  # depth of `held` blocks
_listening = False
_where = ""
_abandoned: Exception | None = None


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the work; nothing is lost. A launcher may catch it to queue the job again.

    Like Ctrl-C it is no `Exception`: what mends failures must let it pass.

    Attributes:
        signum: the signal.
        where: what was being done, "" if nothing had begun.
        work: the cell that was running, "" if none was.
    """

    work = ""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(signum, where)
        self.signum, self.where = signum, where

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where else ""
        of = f" of {self.work}" if self.work else ""
        return f"stopped by {signal.Signals(self.signum).name}{at}{of}; the same command goes on from here"

    @property
    def status(self) -> int:
        """The exit status by the shell's custom: 130, 143 or 140."""
        return 128 + self.signum


def at(where: str) -> None:
    """Say what is being done, for the message of a stop and for who waits; "": nothing.

    Raises:
        Exception: what `abandon` was given.
    """
    global _where
    _where = where
    if _abandoned is not None:
        raise _abandoned


def abandon(reason: Exception | None) -> None:
    """Let the next `at` raise this, without a checkpoint: the work is another process's now. None: take it back."""
    global _abandoned
    _abandoned = reason


def where() -> str:
    """What is being done."""
    return _where


def pending() -> bool:
    """Whether a signal was noted that nobody has acted upon."""
    return _pending is not None


def ask(signum: int) -> None:
    """Note a signal that another process of the same work has had, unless this one has had its own."""
    global _pending
    _pending = signum if _pending is None else _pending


def check() -> None:
    """Stop here if a signal was noted.

    Raises:
        Interrupted: it was.
    """
    if _pending is not None:
        raise Interrupted(_pending, _where)


@contextmanager
def listening() -> Iterator[None]:
    """Turn the signals into `Interrupted` within the block. A signal that is ignored, as under nohup, stays so.

    Python hands signals to its main thread alone; in another one this does nothing.
    """
    global _listening, _pending
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, _note)
    _listening = True
    try:
        yield
    finally:
        _listening, _pending = False, None
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def guarded() -> Iterator[None]:
    """Within the block the first signal is only noted; at its end one that was noted stops the work."""
    global _depth
    with listening():
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
        check()


@contextmanager
def held() -> Iterator[None]:
    """Keep a signal off the block, which is short; behind it the work stops, in a guarded block as that one does.

    For code of others that an exception between any two lines puts in disorder: what Hydra's and OmegaConf's clean-up
    raises then takes the place of `Interrupted`.
    """
    global _held
    with listening():
        _held += 1
        try:
            yield
        finally:
            _held -= 1
        if not _held and not _depth:
            check()


def behind(error: BaseException) -> Interrupted | None:
    """The stop during whose handling an error was raised, if there was one."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if isinstance(one, Interrupted):
            return one
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            left += [one.__cause__, one.__context__]
    return None


def _note(signum: int, frame: FrameType | None) -> None:
    global _pending
    if not _held and (_depth == 0 or _pending is not None):
        raise Interrupted(signum, _where)
    if _pending is not None:
        return
    _pending = signum
    if not _depth:
        return
    name = signal.Signals(signum).name
    os.write(2, f"{name}: stopping at the next step; once more stops at once\n".encode())  # print may be under way
