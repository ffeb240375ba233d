"""How a script ends: a user's mistake is one line on stderr and exit status 2, an interruption says how to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from kronlab.errors import KronlabError

T = TypeVar("T")


def run_main(work: Callable[[], T]) -> T:
    """Run `work`; turn a KronlabError into its own words and exit status 2, Ctrl-C into 130."""
    try:
        return work()
    except KronlabError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
