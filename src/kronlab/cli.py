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

from kronlab.cell import check_groups, explain
from kronlab.errors import ConfigError, KronlabError

T = TypeVar("T")
_failed_jobs = 0  # of the sweep that this process runs


def start(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function; what Hydra refuses (an unknown key, option or syntax) is one line and status 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints its own lines and leaves with status 1
    try:
        check_groups(sys.argv[1:])
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    if _failed_jobs:
        print(f"error: {_failed_jobs} of the sweep's jobs failed, see above", file=sys.stderr)
        raise SystemExit(2)


def run_main(work: Callable[[], T]) -> T | None:
    """Run `work`; turn a KronlabError into its own words and exit status 2, Ctrl-C into 130.

    In a sweep (`-m`) the other jobs still run, and `start` leaves with status 2 behind the last one: else a cell that
    cannot run would keep all cells after it from ever being trained.
    """
    global _failed_jobs
    try:
        return work()
    except KronlabError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            _failed_jobs += 1
            return None
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
