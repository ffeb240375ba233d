"""Leases: no two processes, on one machine or on shared storage, do the same work at once.

A lease is a directory of numbered files; the highest number counts.

    <results>/checkpoints/running/<work>/7.json    who does the work: host, process, stage, beat; empty: nobody any more

To take it, one writes the number above the highest under its final name, whole, by a hard link, which fails if the name
is there: of several that find the old holder dead, one wins. The highest number is never removed. A taker that was slow
finds a higher number than its own after it has made it, and gives way.

The holder rewrites its file every `BEAT_S` seconds. It is dead if its process is gone, which is seen at once on the
same machine, even if another process has its number by now; elsewhere, if the file has not changed for `stale_after`
seconds of the observer's own monotonic clock: no two clocks are ever compared. A holder that was taken for dead,
because it was stopped for so long, finds the higher number and stops.

The file system must have hard links and atomic renames, and show them to all machines within `stale_after`: local Linux
file systems and NFS do; FAT and most mounts of object stores have no links, which is said in one line.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kronlab import interrupt
from kronlab.errors import Busy
from kronlab.runs import unwritable

log = logging.getLogger(__name__)

BEAT_S = 3.0
STALE_AFTER_S = 120.0  # NFS clients may see a file a minute late
_POLL_S = 0.5
_REMIND_S = 60.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as its file says; None: the file cannot be read, so its holder is known by its beat alone."""

    host: str | None
    place: str | None
    pid: int | None
    start: int | None
    what: str | None
    stage: str | None
    started: str | None
    beat: int | None

    @classmethod
    def read(cls, raw: bytes) -> Holder:
        try:
            found = json.loads(raw)
            return cls(*(found[name] for name in cls.__dataclass_fields__))
        except (ValueError, KeyError, TypeError):
            return cls(*[None] * len(cls.__dataclass_fields__))

    def __str__(self) -> str:
        if self.host is None:
            return "a process that cannot be told"
        return f"process {self.pid} on {self.host}" + (f", which is at {self.stage}" if self.stage else "")

    @property
    def alive(self) -> bool | None:
        """Whether its process is there; None: that cannot be seen from here."""
        if self.pid is None or self.place is None or self.place != this_place():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's, but there
        found = _process(self.pid)
        if found is None:  # hidden, or gone this instant
            return None
        state, start = found
        return state not in "ZX" and start == self.start


@cache
def this_place() -> str | None:
    """What the process numbers of this machine mean something in: its boot and PID namespace; None: cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process(pid: int) -> tuple[str, int] | None:
    """(state, start in clock ticks since boot) of a process; no wall clock is in it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def newest(folder: Path) -> tuple[int, bytes] | None:
    """The highest number of a lease and what its file holds (nothing: released); None: never held."""
    while True:
        try:
            numbers = [int(name[:-5]) for name in os.listdir(folder) if name.endswith(".json") and name[:-5].isdigit()]
        except FileNotFoundError:
            return None
        if not numbers:
            return None
        try:
            return max(numbers), (folder / f"{max(numbers)}.json").read_bytes()
        except FileNotFoundError:
            continue  # a higher one is there now


class Lease:
    """One process's claim on a piece of work; see the module. `held` is the way to use it."""

    def __init__(self, folder: Path, what: str, *, stale_after: float = STALE_AFTER_S) -> None:
        self.folder, self.what, self.stale_after = folder, what, stale_after
        self._number = 0
        self._beat = 0
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._seen: tuple[tuple[int, bytes], float] | None = None  # what the file held, and since when
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> Holder | None:
        """Take the lease: None, or who has it.

        Raises:
            OSError: the file system refuses.
        """
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = newest(self.folder)
            if found is not None and found[1]:
                holder = Holder.read(found[1])
                if not self._dead(holder, found):
                    return holder
                log.info("%s: taken over from %s, which is dead", self.what, holder)
            number = found[0] + 1 if found else 1
            if self._create(number):
                break
        self._number = number
        for path in self.folder.iterdir():
            if path != self._path:
                path.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep_beating, name=f"lease {self.what}", daemon=True)
        self._thread.start()
        return None

    def release(self) -> None:
        """Give it back. The file stays, empty: emptying it takes no space on a full disk."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        interrupt.abandon(None)
        try:
            os.truncate(self._path, 0)
        except OSError as error:  # our process will be seen to be gone
            if not isinstance(error, FileNotFoundError):  # not taken over
                log.warning("%s cannot be released (%s)", self._path, error.strerror)

    def check(self) -> None:
        """Stop if another process has taken over, because this one seemed to be dead.

        Raises:
            Busy: it has.
        """
        found = newest(self.folder)
        if found is None or found[0] != self._number:
            holder = Holder.read(found[1]) if found else "nobody: its files were removed"
            raise Busy(
                f"{self.what}: stopped, for it was taken over by {holder} (this process did not answer for "
                f"{self.stale_after:g} s)"
            )

    @property
    def _path(self) -> Path:
        return self.folder / f"{self._number}.json"

    def _dead(self, holder: Holder, found: tuple[int, bytes]) -> bool:
        if holder.alive is not None:
            return not holder.alive
        now = time.monotonic()
        if self._seen is None or self._seen[0] != found:
            self._seen = found, now
        return now - self._seen[1] >= self.stale_after

    def _text(self) -> str:
        found = _process(os.getpid())
        holder = Holder(
            host=socket.gethostname(),
            place=this_place(),
            pid=os.getpid(),
            start=found[1] if found else None,
            what=self.what,
            stage=interrupt.where(),
            started=self._started,
            beat=self._beat,
        )
        return json.dumps(vars(holder)) + "\n"

    def _create(self, number: int) -> bool:
        """Whether this number is ours now."""
        scratch = self.folder / f".{os.getpid()}-{secrets.token_hex(4)}"
        own = self.folder / f"{number}.json"
        try:
            scratch.write_text(self._text())
            os.link(scratch, own)
        except (FileExistsError, FileNotFoundError):  # another was first; the latter: and has tidied up
            return False
        finally:
            scratch.unlink(missing_ok=True)
        found = newest(self.folder)
        if found is None or found[0] != number:  # we were slow: others have had it since, or have it
            own.unlink(missing_ok=True)
            return False
        return True

    def _keep_beating(self) -> None:
        scratch = self.folder / f".beat-{self._number}"
        while not self._stop.wait(BEAT_S):
            self._beat += 1
            try:
                scratch.write_text(self._text())
                scratch.replace(self._path)
                self.check()
            except Busy as taken:
                interrupt.abandon(taken)
                return
            except OSError:  # a full disk, say: the next beat may go through, and the work itself will tell
                continue


@contextmanager
def held(folder: Path, what: str, *, wait: bool, stale_after: float = STALE_AFTER_S) -> Iterator[Lease]:
    """Hold the lease of `folder` within the block; while another process has it, wait, saying for whom.

    Args:
        what: is done under it, for people.

    Raises:
        Busy: another process has it, and `wait` is False.
        CheckpointError: nothing can be written there.
    """
    lease = Lease(folder, what, stale_after=stale_after)
    _take(lease, wait=wait)
    try:
        yield lease
    finally:
        lease.release()


def _take(lease: Lease, *, wait: bool) -> None:
    told: tuple[int | None, str | None] | None = None
    reminded = 0.0
    while True:
        try:
            holder = lease.take()
        except OSError as error:
            raise unwritable(error, lease.folder) from error
        if holder is None:
            return
        if not wait:
            raise Busy(f"{lease.what}: runs elsewhere, by {holder}")
        now = time.monotonic()
        if told != (holder.pid, holder.host) or now - reminded >= _REMIND_S:
            log.info("%s: waits for %s", lease.what, holder)
            told, reminded = (holder.pid, holder.host), now
        time.sleep(_POLL_S)
        interrupt.check()


def running(folder: Path) -> list[tuple[str, Holder, bool | None, float]]:
    """(work, holder, whether its process is there or None, seconds since its last beat) of all leases that are held.

    The seconds are of this machine's wall clock, for people: nothing is decided by them.
    """
    found: list[tuple[str, Holder, bool | None, float]] = []
    for work in sorted(folder.glob("*")) if folder.is_dir() else []:
        last = newest(work)
        if last is None or not last[1]:
            continue
        try:
            age = time.time() - (work / f"{last[0]}.json").stat().st_mtime
        except FileNotFoundError:
            continue
        holder = Holder.read(last[1])
        found.append((work.name, holder, holder.alive, max(0.0, age)))
    return found
