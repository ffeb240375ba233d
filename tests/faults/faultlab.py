"""The pieces of the fault campaign: commands in processes that can be killed, and what must hold after each of them.

A command runs in a child that is forked from a process which has imported everything, and executes the very script that
a user types (`scripts/tables.py`, `scripts/train.py`) in a process group of its own. So a start costs a second instead
of ten, and a hundred kills fit into minutes; what is killed is a real process, by a real SIGKILL. `Command.full` starts
the interpreter anew instead.

An audit hook in the child reports what it does to files below its results directory, and can kill its own group before
the n-th such operation: the moments that a kill at a random time hardly ever meets.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kronlab import lease
from kronlab.runs import Store, read_jsonl

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCALE = "smoke"
SEEDS = "0,1"  # of the whole table; the quick form has one
DEADLINE_S = 420.0  # of one command, on a busy machine: longer is a hang
_OPERATIONS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
_WRITES = set("wax+")
# What a second measurement may give another value; all else in records, samples and losses must be the same.
_OF_TIME = {
    *("seconds", "tokens_per_s", "peak_memory_bytes", "eval_peak_memory_bytes"),
    *("started", "finished", "git", "command", "machine", "seal", "crc"),
}
LEFT_OUT = ("training time (s)", "tokens/s", "peak memory, training (GiB)", "command")
"""The columns of a table that are not compared: times, memory, and what was typed (a table or a sweep)."""


# ---- commands


@dataclass
class Ended:
    """How a command has ended.

    Attributes:
        status: the exit status; -n: died of signal n.
        injected: whether the fault came before its end.
        events: what it did, a letter and a name each: S an optimizer step, T a finished training, R a record.
    """

    status: int
    out: str
    err: str
    seconds: float
    injected: bool
    events: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """A script with its arguments, as typed in the repository's root."""

    script: str
    arguments: tuple[str, ...]
    results: Path
    data: Path
    full: bool = False  # an interpreter of its own
    environment: tuple[tuple[str, str], ...] = ()

    def start(self, *, die_at: int | None = None, within: Callable[[], None] | None = None) -> Running:
        """Start it; `die_at`: SIGKILL its process group before the n-th file operation; `within`: called first."""
        return Running(self, die_at, within)

    def run(self, **named: Any) -> Ended:
        """Start it and wait for its end."""
        return self.start(**named).wait()


def table(results: Path, data: Path, name: str = "faults", *more: str, **named: Any) -> Command:
    """What `make reproduce-table...` runs, with a table of the campaign."""
    arguments = ("--config-dir", "tests/faults/conf", f"table={name}", f"table_scale={SCALE}", f"results.dir={results}")
    if name == "faults":
        more = (f"table.scales.{SCALE}.seeds=[{SEEDS}]", *more)
    return Command("scripts/tables.py", (*arguments, *more), results, data, **named)


def sweep(results: Path, data: Path, **named: Any) -> Command:
    """A Hydra sweep over two cells of the table, at each seed."""
    fixed = ("scale=smoke", "model=tiny_llama", "task=chain_sum", "eval.chain_sum.generation.batch_size=4")
    runtime = ("runtime.save_every=3", "runtime.stale_after=3", "runtime.threads=1", "runtime.progress=false")
    arguments = (
        "-m",
        *fixed,
        "trainer.max_steps=12",
        *runtime,
        "method=lora,cdka",
        f"seed={SEEDS}",
        f"results.dir={results}",
    )
    return Command("scripts/train.py", arguments, results, data, **named)


class Running:
    """A command under way."""

    def __init__(self, command: Command, die_at: int | None, within: Callable[[], None] | None) -> None:
        self.command = command
        self.logs = command.data.with_name("logs")  # on no disk that is made full
        self.logs.mkdir(exist_ok=True)
        self.name = f"{time.monotonic_ns()}"
        self.started = time.monotonic()
        self.injected = False
        self._die_at = die_at
        self._status: int | None = None
        if command.full:
            self.pid = self._spawn()
        else:
            self.pid = os.fork()
            if self.pid == 0:
                self._child(within)

    def _log(self, kind: str) -> Path:
        return self.logs / f"{self.name}.{kind}"

    def _environment(self) -> dict[str, str]:
        mine = {"KRONLAB_DATA": str(self.command.data), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return mine | dict(self.command.environment)

    def _spawn(self) -> int:
        with self._log("out").open("w") as out, self._log("err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, self.command.script, *self.command.arguments],
                cwd=ROOT, stdout=out, stderr=err, start_new_session=True, env=os.environ | self._environment(),
            )  # fmt: skip
        process.returncode = 0  # waited for here, by number
        return process.pid

    def _child(self, within: Callable[[], None] | None) -> None:
        status = 1
        try:
            os.setsid()
            for number, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(self._log(kind), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.environ.update(self._environment())
            os.chdir(ROOT)
            events = os.open(self._log("events"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if within is not None:
                within()
            sys.addaudithook(_Reporter(self.command.results, events, self._die_at))
            sys.argv = [self.command.script, *self.command.arguments]
            runpy.run_path(self.command.script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def ended(self) -> bool:
        """Whether it is over."""
        if self._status is None:
            pid, raw = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(raw)
        return self._status is not None

    def inject(self, number: int, *, after: float = 0.0, when: Callable[[], bool] = lambda: True) -> None:
        """Send a signal after so many seconds and once `when` holds: SIGKILL to the group, others to its leader."""
        while not self.ended() and not (time.monotonic() - self.started >= after and when()):
            if time.monotonic() - self.started > DEADLINE_S:
                return
            time.sleep(0.002)
        while not self.ended() and os.getpgid(self.pid) != self.pid:  # it has just been forked
            time.sleep(0.002)
        if not self.ended():
            self.injected = True
            (os.killpg if number == signal.SIGKILL else os.kill)(self.pid, number)

    def wait(self) -> Ended:
        while not self.ended():
            if time.monotonic() - self.started > DEADLINE_S:
                os.killpg(self.pid, signal.SIGKILL)
                raise Violation(
                    f"{self.command.script} did not end within {DEADLINE_S:g} s:\n{self._text('err')[-2000:]}"
                )
            time.sleep(0.005)
        assert self._status is not None
        events = [(line[0], line[2:]) for line in self._text("events").splitlines()]
        injected = self.injected or ("K", "") in [(kind, "") for kind, _ in events]
        seconds = time.monotonic() - self.started
        return Ended(self._status, self._text("out"), self._text("err"), seconds, injected, events)

    def _text(self, kind: str) -> str:
        path = self._log(kind)
        return path.read_text(errors="replace") if path.exists() else ""


class _Reporter:
    """The audit hook of a child."""

    def __init__(self, results: Path, log: int, die_at: int | None) -> None:
        self.results, self.log, self.left = str(results), log, die_at

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.fspath(arguments[1] if event in ("os.rename", "os.link") else arguments[0])
        if not isinstance(path, str) or not path.startswith(self.results):
            return
        mode = arguments[1] if event == "open" else ""
        writes = bool(_WRITES & set(mode)) if mode is not None else bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event == "open" and not writes:
            return
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.write(self.log, f"K {event} {path[len(self.results) :]}\n".encode())
                os.killpg(0, signal.SIGKILL)
        told = self._told(event, Path(path), str(mode))
        if told:
            os.write(self.log, f"{told}\n".encode())

    def _told(self, event: str, path: Path, mode: str) -> str:
        if event == "os.rename" and path.name == "final":
            return f"T {path.parent.name}"
        if event == "os.rename" and path.suffix == ".json" and path.parent.name == SCALE:
            return f"R {path.stem}"
        if event == "open" and mode == "a" and path.name == "loss.jsonl" and path.parent.parent.name == "checkpoints":
            return f"S {path.parent.name}"
        return ""


# ---- what must hold


class Violation(AssertionError):
    """A promise that was broken."""


def plain(value: Any) -> Any:
    """A record, a sample or a line of a loss curve without what is of time and place."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in _OF_TIME}
    return [plain(part) for part in value] if isinstance(value, list) else value


def without_cost(path: Path) -> str:
    """A written table without the cells of `LEFT_OUT`, all else as it is."""
    text = path.read_text()
    if path.suffix == ".csv":
        return _blank([row for row in csv.reader(io.StringIO(text))])
    split = "|" if path.suffix == ".md" else "&"
    blocks: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        cells = [cell.strip().removesuffix("\\\\").removesuffix("\\\\ \\midrule").strip() for cell in line.split(split)]
        if len(cells) < 2:
            blocks.append([[line]])
        else:
            if len(blocks[-1]) == 1 and len(blocks[-1][0]) == 1:
                blocks.append([])
            blocks[-1].append(cells)
    return "\n".join(_blank(block) for block in blocks)


def _blank(rows: list[list[str]]) -> str:
    hidden = {i for i, title in enumerate(rows[0]) if title in LEFT_OUT} if rows else set()
    return "\n".join(
        "\t".join("·" if i in hidden and n else cell for i, cell in enumerate(row)) for n, row in enumerate(rows)
    )


def _numbers(path: Path) -> list[Any]:
    """A JSON-lines file without what is of time, in the order of its ids or steps."""
    return sorted((plain(line) for line in read_jsonl(path)), key=lambda line: str(line.get("id", line.get("step"))))


def _digest(folder: Path) -> dict[str, str]:
    """Hashes of trained weights."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@dataclass(frozen=True)
class Outcome:
    """All that a finished results directory says, without times."""

    records: Mapping[str, Any]
    lines: Mapping[str, Any]  # samples and losses, by path
    weights: Mapping[str, Any]  # by train_id
    tables: Mapping[str, str]

    @classmethod
    def of(cls, results: Path) -> Outcome:
        runs = results / "runs" / SCALE
        return cls(
            {path.stem: plain(json.loads(path.read_text())) for path in sorted(runs.glob("*.json"))},
            {str(path.relative_to(runs)): _numbers(path) for path in sorted(runs.rglob("*.jsonl"))},
            {path.parent.name: _digest(path) for path in sorted((results / "checkpoints").glob("*/final"))},
            {path.name: without_cost(path) for path in sorted((results / "tables" / SCALE).glob("*.*"))},
        )

    def same_as(self, reference: Outcome, *, part: bool = False) -> None:
        """Raise `Violation` where it differs; `part`: it may have less."""
        for what in ("records", "lines", "weights", "tables"):
            mine, theirs = getattr(self, what), getattr(reference, what)
            if what == "tables" and part:
                continue
            if not part and mine.keys() != theirs.keys():
                raise Violation(f"{what} differ: {sorted(mine.keys() ^ theirs.keys())}")
            for key, value in mine.items():
                if key not in theirs:
                    raise Violation(f"{what}: {key} should not be there")
                if value != theirs[key]:
                    raise Violation(
                        f"{what}: {key} is not as undisturbed: {str(value)[:300]} / {str(theirs[key])[:300]}"
                    )


class Ledger:
    """What one results directory has been seen to hold; it must stay, and must not be made twice."""

    def __init__(self, results: Path, reference: Outcome) -> None:
        self.results, self.reference = results, reference
        self.records: dict[str, bytes] = {}
        self.finals: dict[str, int] = {}
        self.trained: Counter[str] = Counter()
        self.recorded: Counter[str] = Counter()
        self.steps = 0
        self.checks = 0

    def look(self, ended: Iterable[Ended]) -> None:
        """After processes have ended: nothing that was finished is lost or changed, and no number is wrong.

        Raises:
            Violation: something is.
        """
        for one in ended:
            self._count(one)
            if "Traceback" in one.err:
                raise Violation(f"a traceback instead of a message:\n{one.err[-3000:]}")
        store = Store(self.results)
        found = {}
        for path in sorted((self.results / "runs" / SCALE).glob("*.json")):
            found[path.stem] = path.read_bytes()
            record = store.read(SCALE, path.stem)  # whole, or an error
            if record is None or record["status"] != "done":
                raise Violation(f"{path.name} is {record and record['status']}: {record and record['error']}")
            if plain(record) != self.reference.records.get(path.stem):
                raise Violation(f"{path.name} has other numbers than undisturbed")
        for cell, raw in self.records.items():
            if found.get(cell) != raw:
                raise Violation(f"the finished record {cell} was {'changed' if cell in found else 'lost'}")
            self.checks += 1
        self.records = found
        finals = {
            path.parent.parent.name: path.stat().st_ino for path in self.results.glob("checkpoints/*/final/train.json")
        }
        for training, inode in self.finals.items():
            if finals.get(training) != inode:
                raise Violation(
                    f"the finished training {training} was {'done again' if training in finals else 'lost'}"
                )
        self.finals = finals

    def _count(self, ended: Ended) -> None:
        for kind, name in ended.events:
            self.steps += kind == "S"
            if kind == "T":
                self.trained[name] += 1
            elif kind == "R":
                self.recorded[name] += 1

    def finish(self, *, killed: bool) -> None:
        """Behind the last command: all is as undisturbed, and was made once.

        Args:
            killed: a process that dies between telling of a rename and doing it may have told it in vain, once.

        Raises:
            Violation: it is not.
        """
        Outcome.of(self.results).same_as(self.reference)
        for what, counts in (("training", self.trained), ("record", self.recorded)):
            twice = [name for name, count in counts.items() if count > 1 + killed]
            if twice or sum(counts.values()) > len(counts) + killed:
                raise Violation(f"made twice: {what} of {twice or counts}")
        held = lease.running(Store(self.results).running())
        if held:
            raise Violation(f"leases are still held: {held}")
        litter = [str(p) for p in (self.results / "runs").rglob(".*") if p.is_file()]
        if litter:
            raise Violation(f"scratch files were left behind: {litter}")


def copy_of(results: Path, name: str) -> Path:
    """A copy beside it, which starts with the same history."""
    copy = results.with_name(name)
    shutil.copytree(results, copy)
    return copy


# ---- the system


@contextmanager
def own_mounts(target: Path, kind: str, options: str) -> Iterator[None]:
    """Mount a tmpfs (`kind`) on `target`, or make it read-only (`bind`), for this process and its children alone.

    Raises:
        OSError: neither root nor user namespaces are there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, rec, private, remount, read_only, bind = 1 << 28, 1 << 17, 1 << 14, 1 << 18, 32, 1, 4096

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)

    uid, gid = os.getuid(), os.getgid()
    call("unshare", new_user | new_mounts)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    call("mount", None, b"/", None, rec | private, None)
    place = str(target).encode()
    if kind == "tmpfs":
        call("mount", b"none", place, b"tmpfs", 0, options.encode())
    else:
        locked = os.statvfs(target).f_flag & (2 | 4 | 8)  # nosuid, nodev, noexec cannot be taken off
        call("mount", place, place, None, bind, None)
        call("mount", None, place, None, bind | remount | read_only | locked, None)
    try:
        yield
    finally:
        libc.umount2(place, 2)


def grow(target: Path, options: str) -> None:
    """Give a tmpfs of `own_mounts` another size."""
    if ctypes.CDLL(None).mount(None, str(target).encode(), None, 32, options.encode()) != 0:
        raise OSError("the tmpfs cannot be resized")


def apart(work: Callable[[], Any]) -> Any:
    """The result of `work` in a forked process, which may change its mounts; its failure is raised here.

    Raises:
        Violation: as `work`.
        OSError: as `work`.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = {"value": work()}
        except Violation as broken:
            said = {"violation": str(broken)}
        except OSError as refused:
            said = {"refused": str(refused)}
        except BaseException:
            said = {"violation": traceback.format_exc()}
        with os.fdopen(writer, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = json.loads(pipe.read() or '{"violation": "died"}')
    os.waitpid(pid, 0)
    if "violation" in said:
        raise Violation(said["violation"])
    if "refused" in said:
        raise OSError(said["refused"])
    return said["value"]


# ---- damage


def cut(path: Path, draw: random.Random) -> None:
    """Lose the second half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, draw: random.Random) -> None:
    os.truncate(path, 0)


def garbage(path: Path, draw: random.Random) -> None:
    """Random bytes of the same number."""
    path.write_bytes(draw.randbytes(path.stat().st_size))


def flip(path: Path, draw: random.Random) -> None:
    """One bit, anywhere; the size stays."""
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def digit(path: Path, draw: random.Random) -> None:
    """Another digit in a number behind a decimal point: the text stays valid."""
    text = path.read_text()
    places = [match.start(1) for match in re.finditer(r"\.\d*?([1-8])\d", text)]
    at = draw.choice(places)
    path.write_text(text[:at] + str(int(text[at]) + 1) + text[at + 1 :])


def a_line(path: Path, draw: random.Random) -> None:
    """Garbage in place of a line in the middle."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = draw.randbytes(40).replace(b"\n", b" ") + b"\n"
    path.write_bytes(b"".join(lines))


def last_line(path: Path, draw: random.Random) -> None:
    """Lose the last line, to its very end."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))


def gone(path: Path, draw: random.Random) -> None:
    path.unlink()


Damage = Callable[[Path, random.Random], None]


def refusal(ended: Ended) -> str:
    """The one line in which a command says what is wrong.

    Raises:
        Violation: it ended otherwise.
    """
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.status != 2 or "Traceback" in ended.err or not lines:
        raise Violation(f"status {ended.status} without a clear message:\n{ended.err[-1500:]}")
    return lines[0]
