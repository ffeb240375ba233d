"""The record store: one JSON file per cell, the only source of every table, figure and claim.

<results>/runs/<scale>/<id>.json            the record
<results>/runs/<scale>/<id>/<eval>/samples.jsonl    every graded sample with its raw completion
<results>/runs/<scale>/<id>/loss.jsonl      the loss of every step
<results>/checkpoints/<train_id>/           trained adapters, not for git
<results>/checkpoints/running/<work>/       who runs a cell or a training just now (kronlab.lease)
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

import kronlab
from kronlab import processes
from kronlab.errors import CheckpointError

log = logging.getLogger(__name__)

DONE, FAILED, DIVERGED = "done", "failed", "diverged"
_PACKAGES = (
    "kronlab",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "reasoning_gym",
    "tokenizers",
    "numpy",
)


class Store:
    """Records under one results directory."""

    def __init__(self, results: str | Path) -> None:
        self.results = Path(results)

    def record_path(self, scale: str, cell_id: str) -> Path:
        return self.results / "runs" / scale / f"{cell_id}.json"

    def folder(self, scale: str, cell_id: str) -> Path:
        """Samples and loss curve of a cell."""
        return self.results / "runs" / scale / cell_id

    def checkpoints(self, train_id: str) -> Path:
        return self.results / "checkpoints" / train_id

    def final(self, train_id: str) -> Path:
        """The weights that training has ended with; the folder is there only when it is whole."""
        return self.checkpoints(train_id) / "final"

    def read(self, scale: str, cell_id: str) -> dict[str, Any] | None:
        """The record of a cell, or None.

        Raises:
            CheckpointError: the file is there and is not a record.
        """
        path = self.record_path(scale, cell_id)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
            if record["id"] != cell_id:
                raise ValueError(f"it holds id {record['id']}")
            if record["status"] not in (DONE, FAILED, DIVERGED):
                raise ValueError(f"its status is {record['status']!r}")
            if SEAL in record and record.pop(SEAL) != _seal(record):
                raise ValueError("its contents do not fit its seal, so they were changed")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a whole record ({error}); delete it and run the cell again"
            ) from error
        return dict(record)

    def running(self) -> Path:
        """The leases of what runs here (`kronlab.lease`)."""
        return self.results / "checkpoints" / "running"

    def check_writable(self) -> None:
        """Refuse a results directory that nothing can be written to, before anything is computed.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            self.running().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.running()) as file:
                file.write(b"room?")
        except OSError as error:
            raise unwritable(error, self.running()) from error

    def set_aside(self, scale: str, cell_id: str) -> None:
        """Rename a record that cannot be read to `.corrupt`, and say so; a good one, and an absent one, stay.

        Only for who holds the cell's lease.
        """
        try:
            self.read(scale, cell_id)
        except CheckpointError as error:
            path = self.record_path(scale, cell_id)
            path.replace(path.with_name(f"{path.name}.corrupt"))
            log.warning("%s; set aside as %s.corrupt, the cell is done again", str(error).partition(";")[0], path.name)

    def _made_here(self, scale: str, cell_id: str) -> Path:
        # beside the checkpoints, so not in git: a clone has our records and none of these marks
        return self.results / "checkpoints" / "made_here" / f"{scale}-{cell_id}"

    def is_done(self, scale: str, cell_id: str, *, reuse: str = "local") -> bool:
        """Whether a cell need not be run.

        A record that came with a clone is somebody else's measurement; to reproduce it means to make it again. So by
        default only records made in this results directory count; `reuse="any"` takes every record. A record that
        cannot be read does not count.
        """
        try:
            record = self.read(scale, cell_id)
        except CheckpointError:
            return False
        if record is None or record["status"] not in (DONE, DIVERGED):
            return False
        return reuse == "any" or self._made_here(scale, cell_id).exists()

    def failure(self, scale: str, cell_id: str) -> dict[str, Any] | None:
        """The record of a cell that has failed in this results directory."""
        try:
            record = self.read(scale, cell_id)
        except CheckpointError:
            return None
        failed = record is not None and record["status"] == FAILED and self._made_here(scale, cell_id).exists()
        return record if failed else None

    def begin(self, scale: str, cell_id: str, *, afresh: bool = False) -> None:
        """Make ready to run a cell: samples are kept if an earlier run here has left them, and removed otherwise."""
        mark = self._made_here(scale, cell_id)
        if afresh or not mark.exists():
            shutil.rmtree(self.folder(scale, cell_id), ignore_errors=True)
        mark.parent.mkdir(parents=True, exist_ok=True)
        path = self.record_path(scale, cell_id)
        if not mark.exists():
            path.unlink(missing_ok=True)  # of another machine; git has it
        for scratch in path.parent.glob(f".{path.name}.*"):  # of a writer that was killed
            scratch.unlink(missing_ok=True)
        mark.touch()

    def write(self, record: Mapping[str, Any]) -> Path:
        """Write a record so that a reader sees the old file or the new one, never a part."""
        path = self.record_path(record["scale"], record["id"])
        mark = self._made_here(record["scale"], record["id"])
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        write_record(path, record)
        return path

    def records(self, scale: str, *, corrupt: Literal["raise", "skip"] = "raise") -> Iterator[dict[str, Any]]:
        """All records of a scale, in the order of their ids.

        Raises:
            CheckpointError: one cannot be read; to skip it is for estimates only.
        """
        for path in sorted((self.results / "runs" / scale).glob("*.json")):
            try:
                record = self.read(scale, path.stem)
            except CheckpointError:
                if corrupt == "raise":
                    raise
                continue
            if record is not None:
                yield record


def read_measurement(path: Path, *, schema: int, part: str) -> dict[str, Any] | None:
    """A record that is made of no cell (a benchmark, an alignment), or None; `part` names the list that it must hold.

    Raises:
        CheckpointError: the file is there and is not a record.
    """
    if not path.is_file():
        return None
    try:
        record = dict(json.loads(path.read_text()))
        if record["schema"] != schema or not isinstance(record[part], list):
            raise ValueError(f"its schema is {record['schema']!r}, {schema} is wanted")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole record ({error}); delete it and measure again") from error
    return record


SEAL = "seal"
"""The field of a record file that tells whether the others are as they were written; older records have none."""


def _seal(record: Mapping[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of a record's canonical JSON."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with its seal, in one step."""
    plain = json.loads(json.dumps(record, allow_nan=False))  # as it will be read: lists for tuples
    write_json(path, plain | {SEAL: _seal(plain)})


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file beside `path`, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


_CHECK = re.compile(rb', "crc": "([0-9a-f]{8})"}$')  # CRC-32 of the line without it


def json_line(line: Mapping[str, Any]) -> str:
    """An object as a line of a JSON-lines file, its last field a checksum that `read_jsonl` takes off again."""
    text = json.dumps(line)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n' if line else "{}\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, up to one that a kill cut short; an absent file has none.

    Behind a line that is no object, or whose checksum is wrong, nothing counts: what has damaged it may have hit
    others. Whoever reads a file to go on from it makes the rest again. Lines without a checksum are taken as they are.
    """
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_bytes().splitlines():
            check = _CHECK.search(text)
            if check:
                text = text[: check.start()] + b"}"
            if check and zlib.crc32(text) != int(check[1], 16):
                break
            try:
                line = json.loads(text)
            except ValueError:  # no JSON, or no UTF-8
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
    return lines


def write_jsonl(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text("".join(map(json_line, lines)))
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def unwritable(error: OSError, path: Path) -> CheckpointError:
    """The one line for a results directory that the system refuses to write to."""
    reason = f"{error.filename or path}: cannot be written ({error.strerror})"
    return CheckpointError(f"{reason}; make it writable, or choose another results.dir")


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# safetensors and torch write in Rust and C++: their errors have no number, only these words
_REFUSAL_WORDS = (*(f"os error {number}" for number in _REFUSALS), "PytorchStreamWriter failed", "iostream error")


def refused_by_disk(error: BaseException) -> CheckpointError | None:
    """The one line that tells of a full, broken or write-protected disk, if `error` comes of one; else None.

    What was written before is whole, for every file is written beside its place and renamed, or cut back by its reader.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _REFUSALS or (number is None and any(word in str(cause) for word in _REFUSAL_WORDS)):
            what = os.strerror(number) if number is not None else " ".join(str(cause).split())[:160]
            where = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else "the results "
            return CheckpointError(f"{where}cannot be written ({what}); make room, then the same command goes on")
        cause = cause.__cause__ or cause.__context__
    return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a number can depend on; None where one is not installed."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "kronlab": kronlab.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state() -> dict[str, Any]:
    """Commit of this checkout and whether tracked source differs from it; nulls outside of git.

    Asked once for a process: the code that runs is the code that it has imported.
    """
    return dict(_git_state())


@cache
def _git_state() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changed = (
        git("status", "--porcelain", "--untracked-files=no", "--", "../../src", "../../configs") if commit else None
    )
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def machine() -> dict[str, Any]:
    """What a time or a last bit can depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


class PeakMemory:
    """Peak memory of a phase: the process's resident set on a CPU, allocated memory on a GPU.

    Linux lets a process reset its own high-water mark, so that cells run one after another in a process are told apart.
    Where that is not possible `bytes` is None: unknown is not a number.

    Args:
        beside: resident bytes that have nothing to do with the phase, and are not counted.
    """

    def __init__(self, *, beside: int = 0) -> None:
        self.bytes: int | None = None
        self._beside = beside
        self._reset = False

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._reset = True
            except OSError:
                self._reset = False
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        elif self._reset:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.bytes = max(0, int(line.split()[1]) * 1024 - self._beside)
