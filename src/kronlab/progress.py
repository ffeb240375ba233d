"""One bar for all long work: count, rate and ETA. In a log file it prints a line now and then instead of redrawing."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(*, total: int, done: int, what: str, unit: str, show: bool = True) -> tqdm[Any]:
    """A tqdm bar that starts at `done` of `total`."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        disable=not show,
        dynamic_ncols=True,
        mininterval=0.2 if live else 15.0,
        ascii=None if live else " .",
    )
