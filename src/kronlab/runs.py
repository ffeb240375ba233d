"""The record store: one JSON file per cell, the only source of every table, figure and claim.

<results>/runs/<scale>/<id>.json            the record
<results>/runs/<scale>/<id>/<eval>/samples.jsonl    every graded sample with its raw completion
<results>/runs/<scale>/<id>/loss.jsonl      the loss of every step
<results>/checkpoints/<train_id>/           trained adapters, not for git
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import kronlab
from kronlab import processes
from kronlab.errors import CheckpointError

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
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a whole record ({error}); delete it and run the cell again"
            ) from error
        return dict(record)

    def _made_here(self, scale: str, cell_id: str) -> Path:
        # beside the checkpoints, so not in git: a clone has our records and none of these marks
        return self.results / "checkpoints" / "made_here" / f"{scale}-{cell_id}"

    def is_done(self, scale: str, cell_id: str, *, reuse: str = "local") -> bool:
        """Whether a cell need not be run.

        A record that came with a clone is somebody else's measurement; to reproduce it means to make it again. So by
        default only records made in this results directory count; `reuse="any"` takes every record.
        """
        record = self.read(scale, cell_id)
        if record is None or record["status"] not in (DONE, DIVERGED):
            return False
        return reuse == "any" or self._made_here(scale, cell_id).exists()

    def begin(self, scale: str, cell_id: str, *, afresh: bool = False) -> None:
        """Make ready to run a cell: samples are kept if an earlier run here has left them, and removed otherwise."""
        mark = self._made_here(scale, cell_id)
        if afresh or not mark.exists():
            shutil.rmtree(self.folder(scale, cell_id), ignore_errors=True)
        mark.parent.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            self.record_path(scale, cell_id).unlink(missing_ok=True)  # of another machine; git has it
        mark.touch()

    def write(self, record: Mapping[str, Any]) -> Path:
        """Write a record so that a reader sees the old file or the new one, never a part."""
        path = self.record_path(record["scale"], record["id"])
        mark = self._made_here(record["scale"], record["id"])
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        write_json(path, record)
        return path

    def records(self, scale: str) -> Iterator[dict[str, Any]]:
        """All records of a scale, in the order of their ids."""
        for path in sorted((self.results / "runs" / scale).glob("*.json")):
            record = self.read(scale, path.stem)
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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, up to one that a kill cut short; an absent file has none."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def write_jsonl(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scratch.replace(path)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a number can depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "kronlab": kronlab.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state() -> dict[str, Any]:
    """Commit of this checkout and whether tracked source differs from it; nulls outside of git."""

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
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
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
                    self.bytes = int(line.split()[1]) * 1024
