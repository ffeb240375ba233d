"""How a script ends: a user's mistake is one line on stderr and exit status 2, an interruption says how to go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from kronlab import processes
from kronlab.cell import explain
from kronlab.errors import KronlabError

T = TypeVar("T")
_failed_jobs = 0  # of the sweep that this process runs


def start(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function; what Hydra refuses (an unknown key, option or syntax) is one line and status 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its own lines and leaves with status 1
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if processes.is_first():  # all refuse the same
            print(f"error: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    if _failed_jobs:
        if processes.is_first():
            print(f"error: {_failed_jobs} of the sweep's jobs failed, see above", file=sys.stderr)
        raise SystemExit(2)


def run_main(work: Callable[[], T]) -> T | None:
    """Run `work`; turn a KronlabError into its own words and exit status 2, Ctrl-C into 130.

    In a sweep (`-m`) the other jobs still run, and `start` leaves with status 2 behind the last one: else a cell that
    cannot run would keep all cells after it from ever being trained.
    """
    global _failed_jobs
    try:
        return processes.led(work)
    except KronlabError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        lost = isinstance(error, processes.ProcessError)
        if not lost and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            _failed_jobs += 1
            return None
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if processes.is_first():
            print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
