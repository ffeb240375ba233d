"""Many cells by one command: a Hydra sweep (`-m`), whatever its launcher, or a table.

Cells that are done are skipped, those that run elsewhere are put off to the end, a failure does not stop the others. A
cell that has failed is not tried again by a later sweep without `retry_failed=true`. Each job of a sweep leaves a line
in <results>/checkpoints/sweeps/<sweep>/<job>.json, in whatever process or machine it ran; the process that was started
by the user, the leader, makes the summary and the exit status from these lines.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from kronlab import publish, runs
from kronlab.cell import Cell, make_cell
from kronlab.errors import Busy, KronlabError
from kronlab.experiment import run_cell
from kronlab.processes import ProcessError
from kronlab.runs import Store, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")
VARIABLE = "KRONLAB_SWEEP"  # in the environment of a sweep's jobs: the folder of their lines
_PUT_OFF = "put off"  # until the leader has done the others

_leader: Leader | None = None  # of the sweep that this process was started for


class Leader(Callback):
    """Known to Hydra as a callback (configs/config.yaml), which tells it that a sweep begins."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.put_off: list[tuple[int, Cell]] = []
        self.saw_jobs = False  # in its own process

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global _leader
        token = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder = (Store(config.results.dir).results / "checkpoints" / "sweeps" / token).absolute()
        os.environ[VARIABLE] = str(self.folder)
        _leader = self

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        self.saw_jobs = True


def in_turn(items: Sequence[T], attempt: Callable[[T, bool | None], None]) -> None:
    """Attempt each item without waiting; then those that were `Busy`, waiting for one at a time.

    Args:
        attempt: gets an item and what `run_cell` takes as `wait`; raises `Busy` only for what is to be put off.
    """

    def busy(waiting: Sequence[T]) -> list[T]:
        left = []
        for item in waiting:
            try:
                attempt(item, False)
            except Busy as reason:
                log.info("put off: %s", reason)
                left.append(item)
        return left

    left = busy(items)
    while left:
        attempt(left[0], None)
        left = busy(left[1:])


def run_job(config: DictConfig) -> dict[str, Any] | None:
    """Run the cell of a composed config, by itself or as a job of a sweep; its record, None if it has none yet.

    In a sweep nothing is raised: what goes wrong is told on stderr and in the job's line.

    Raises:
        Interrupted: a signal stops the whole sweep.
        KronlabError: as `make_cell` and `run_cell`, outside of a sweep.
    """
    if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
        return _run(make_cell(config), wait=None)
    number = int(HydraConfig.get().job.num)
    cell = None
    try:
        cell = make_cell(config)
        if not (config.retry_failed or config.force or config.dry_run):
            before = Store(config.results.dir).failure(cell.scale, cell.id)
            if before is not None:
                log.info("%s: failed before, not tried again (retry_failed=true does)", cell.name)
                _note(number, cell, runs.FAILED, str(before["error"]))
                return before
        return _attempt(number, cell, wait=None if _leader is None else False)
    except Busy as busy:
        if _leader is None or cell is None:
            raise
        log.info("put off: %s", busy)
        _leader.put_off.append((number, cell))
        _note(number, cell, _PUT_OFF, str(busy))
    except ProcessError:
        raise
    except Exception as error:  # of making the cell
        _tell(error)
        _note(number, cell, runs.FAILED, one_line(error), name=" ".join(HydraConfig.get().overrides.task))
    return None


def _run(cell: Cell, *, wait: bool | None) -> dict[str, Any]:
    """Run a cell, and publish its adapter if that is asked for; its record."""
    publishing = publish.wanted(cell.config)
    record = run_cell(cell, wait=wait, weights=publishing)
    if publishing and record["status"] != "planned":
        publish.publish(cell, record)
    return record


def _attempt(number: int, cell: Cell, *, wait: bool | None) -> dict[str, Any] | None:
    """Run a cell of a sweep and note what has come of it.

    Raises:
        Busy: another process runs it, and `wait` is False.
    """
    try:
        record = _run(cell, wait=wait)
    except Exception as error:
        if isinstance(error, Busy) and wait is False:
            raise
        _note(number, cell, runs.FAILED, one_line(error))
        if isinstance(error, ProcessError):  # nothing more can be run
            raise
        _tell(error)
        return None
    _note(number, cell, str(record["status"]), record.get("error"))
    return record


def _tell(error: Exception) -> None:
    """On stderr: a user's mistake in its own words, anything else with its traceback."""
    if not isinstance(error, KronlabError):
        traceback.print_exception(error)
    for line in str(error).splitlines() if isinstance(error, KronlabError) else [one_line(error)]:
        print(f"error: {line}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """What went wrong, in one line."""
    reason = " ".join(str(error).split())
    if isinstance(error, KronlabError):
        return reason
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _note(number: int, cell: Cell | None, state: str, reason: str | None, *, name: str = "") -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:  # a launcher whose jobs do not inherit it; their records tell
        return
    line = {"name": cell.name if cell else name, "id": cell.id if cell else None, "state": state, "reason": reason}
    try:
        write_json(Path(folder) / f"{number}.json", line)
    except OSError as error:
        print(f"error: {folder}: cannot be written ({error.strerror}); the summary lacks this job", file=sys.stderr)


def called_off() -> None:
    """The sweep has no job to run after all, and no summary."""
    global _leader
    _leader = None
    os.environ.pop(VARIABLE, None)


def lost(number: int, name: str, reason: str) -> None:
    """Note that a job has ended without telling how: its process was killed, say.

    Args:
        name: its overrides.
    """
    print(f"error: {name}: {reason}", file=sys.stderr)
    if not (Path(os.environ.get(VARIABLE, "")) / f"{number}.json").exists():
        _note(number, None, runs.FAILED, reason, name=name)


def finish() -> int:
    """In the leader, behind the last job: do what was put off, tell how the sweep has ended; the exit status.

    Raises:
        Interrupted: a signal came while cells were still waited for.
    """
    if _leader is None:
        return 0

    def attempt(job: tuple[int, Cell], wait: bool | None) -> None:
        _attempt(*job, wait=wait)

    jobs, _leader.put_off = _leader.put_off, []
    in_turn(jobs, attempt)
    return summarise()


def summarise() -> int:
    """Tell what the sweep's jobs have come to, each cell once; 2 if one has failed. Ends the sweep."""
    global _leader
    leader, _leader = _leader, None
    if leader is None or leader.folder is None:
        return 0
    os.environ.pop(VARIABLE, None)
    lines = [json.loads(path.read_text()) for path in sorted(leader.folder.glob("*.json"), key=lambda p: int(p.stem))]
    shutil.rmtree(leader.folder, ignore_errors=True)
    if not lines and leader.saw_jobs:  # they were no cells, but records to grade again
        return 0
    if not lines:
        print("error: no job of the sweep has told how it ended", file=sys.stderr)
        return 2
    cells = {line["id"] or line["name"]: line for line in lines}
    counts = Counter(line["state"] for line in cells.values())
    log.info("sweep of %d cells: %s", len(cells), ", ".join(f"{n} {state}" for state, n in counts.items()))
    failed = [line for line in cells.values() if line["state"] == runs.FAILED]
    for line in failed:
        mark = f" [{line['id']}]" if line["id"] else ""
        print(f"failed: {line['name']}{mark}: {line['reason']}", file=sys.stderr)
    if failed:
        print(
            f"error: {len(failed)} of the sweep's {len(cells)} cells failed; the same command with retry_failed=true "
            "tries them again, their records have the tracebacks",
            file=sys.stderr,
        )
    return 2 if failed else 0
