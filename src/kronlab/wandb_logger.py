"""`logger=wandb`: a cell's run in Weights & Biases while it runs. Whatever W&B does, the cell goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kronlab.report.wandb_mirror import Target, close_run, open_run, point, require_server, view
from kronlab.runs import read_jsonl

log = logging.getLogger(__name__)
_offline_since: list[str] = []  # why this process does not log online although it was asked to


def start(cell: Mapping[str, Any], frame: Mapping[str, Any]) -> LiveRun:
    """The W&B run of a cell that begins; one that does nothing where the config says no logger.

    Args:
        cell: the cell's whole config.
        frame: what its record says before anything runs.
    """
    logger = cell["logger"]
    if logger["name"] != "wandb":
        return LiveRun(None)
    try:
        target = Target(logger["project"], logger["entity"], _mode(logger["mode"]), Path(cell["results"]["dir"]))
        return LiveRun(open_run(view(frame, group=logger["group"]), target, resume=not cell["force"], live=True))
    except Exception as error:  # of W&B's many kinds; none of them is a reason to train nothing
        _lost(error)
        return LiveRun(None)


def _mode(asked: str) -> str:
    """Online only where there is somebody to talk to; a process asks once, not again for every cell."""
    if asked == "online" and not _offline_since:
        try:
            require_server()
        except ImportError:
            raise  # then there is nothing to log offline with either
        except Exception as error:
            _offline_since.append(str(error))
            log.warning("W&B: %s; logging offline, `wandb sync` uploads it later", error)
    return "offline" if _offline_since else asked


class LiveRun:
    """A W&B run, or nothing; an error of W&B's is told once, and turns it into nothing."""

    def __init__(self, run: Any) -> None:
        self._run = run
        # a run that the server had goes on behind its last step; what an earlier sitting logged is not logged again
        self._next = run.step if run is not None else 0

    def step(self, line: Mapping[str, Any]) -> None:
        """Log a line of `loss.jsonl`; one whose step was logged before is passed over."""
        if line["step"] >= self._next:
            self._safely(lambda run: run.log(point(line), step=line["step"], commit=True))
            self._next = line["step"] + 1

    def finish(self, record: Mapping[str, Any], losses: Path) -> None:
        """Log the steps that are in `losses` and were done without us, then scores and state; close the run."""
        for line in read_jsonl(losses):
            self.step(line)
        self._safely(lambda run: close_run(run, record, link=None))
        self._run = None

    def leave(self) -> None:
        """Close the run of a cell that has not ended, for it was stopped or is run elsewhere; a finished one stays."""
        self._safely(lambda run: run.finish())
        self._run = None

    def _safely(self, tell: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            tell(self._run)
        except Exception as error:
            self._run = None
            _lost(error)


def _lost(error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    log.warning("W&B: %s; going on without it, `make wandb-push` adds the cell later", reason)
