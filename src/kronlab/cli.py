"""How a script ends: a user's mistake is one line on stderr and exit status 2, an interruption says how to go on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from kronlab import interrupt, processes, runs
from kronlab.cell import check_groups, explain
from kronlab.errors import ConfigError, KronlabError
from kronlab.runs import refused_by_disk

T = TypeVar("T")
# What the clean-up of Hydra and OmegaConf raises where a signal falls between two of its lines.
_MASKS = (HydraException, OmegaConfBaseException, ConfigError, AttributeError, NameError)
_failed_jobs = 0  # of the sweep that this process runs


def start(main: Callable[[], None], *, finish: Callable[[], int] = lambda: 0) -> None:
    """Call a `hydra.main` function; what Hydra refuses (an unknown key, option or syntax) is one line and status 2.

    Args:
        finish: is called behind the last job of a sweep; the exit status (`kronlab.sweep.finish`).
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its own lines and leaves with status 1
    try:
        check_groups(sys.argv[1:])
        with interrupt.listening(), _unmasked():
            main()
            status = processes.led(finish) or 0
    except (HydraException, OmegaConfBaseException) as error:
        if processes.is_first():  # all refuse the same
            print(f"error: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KronlabError as error:  # of a launcher or a sweeper
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        _leave(stop)
    except OSError as error:  # Hydra makes the folder of a sweep; a table is written where a disk may be full
        refused = runs.refused_by_disk(error)
        if refused is None and error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR) and error.filename:
            refused = runs.unwritable(error, Path(error.filename))
        if refused is None:
            raise
        print(f"error: {refused}", file=sys.stderr)
        raise SystemExit(2) from None
    if _failed_jobs and processes.is_first():
        print(f"error: {_failed_jobs} of the sweep's jobs failed, see above", file=sys.stderr)
    if status or _failed_jobs:
        raise SystemExit(status or 2)


def run_main(work: Callable[[], T]) -> T | None:
    """Run `work`; turn a KronlabError into its own words and exit status 2, a signal into 128 and its number.

    A disk that refuses what is written outside of cells (a table, say) is told like a KronlabError.

    In a sweep (`-m`) the other jobs still run, and `start` leaves with status 2 behind the last one. A signal stops the
    whole sweep: `Interrupted` goes through to the launcher and to `start`.
    """
    global _failed_jobs
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        with interrupt.listening(), _unmasked():
            return processes.led(work)
    except (KronlabError, OSError) as error:
        told = error if isinstance(error, KronlabError) else refused_by_disk(error)
        if told is None:
            raise
        for line in str(told).splitlines():
            print(f"error: {line}", file=sys.stderr)
        if in_sweep and not isinstance(error, processes.ProcessError):  # then nothing more can be run
            _failed_jobs += 1
            return None
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        if in_sweep:
            raise
        _leave(stop)


@contextmanager
def _unmasked() -> Iterator[None]:
    """Where an error has taken the place of a stop, raise the stop."""
    try:
        yield
    except _MASKS as error:
        stop = interrupt.behind(error)
        if stop is None:
            raise
        raise stop from None


def _leave(stop: KeyboardInterrupt) -> NoReturn:
    said, status = "stopped; the same command goes on from here", 130
    if isinstance(stop, interrupt.Interrupted):
        said, status = str(stop), stop.status
    if processes.is_first():
        print(said, file=sys.stderr)
    raise SystemExit(status) from None
