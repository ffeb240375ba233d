"""The process that compares two LaTeX expressions for `kronlab.evals.math`, so that the caller can kill it.

Started as a file, not as a module: it imports math-verify and SymPy and nothing of kronlab, and is ready within a
second. One request is one JSON line ``[gold, answer]`` (LaTeX); the reply is one JSON line: true or false, or null
where either cannot be parsed. It ends when its standard input does.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import signal
import sys

MEMORY_LIMIT_BYTES = 4 << 30  # of address space; a tower of powers asks for more and gets a MemoryError


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):  # a scheduler sends them to every process; the caller decides
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable()
    sys.set_int_max_str_digits(20_000)

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, I, MatrixBase
    from sympy.core.random import seed

    # units=False: math-verify takes the t of 4t for a unit; ours are off already
    looks = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    latex = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=looks),)

    def imaginary(expression: Basic | MatrixBase) -> Basic | MatrixBase:
        """The letter i is the imaginary unit; math-verify leaves it a variable, for which i*i is not -1."""
        letters = {symbol: I for symbol in expression.free_symbols if symbol.name == "i"}
        return expression.xreplace(letters) if letters else expression

    def equal(gold: str, answer: str) -> bool | None:
        # The limits of math-verify are alarms of the main thread, which do not stop a loop in C: the caller's do.
        sides = [
            parse(f"\\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None)
            for text in (gold, answer)
        ]
        if not all(sides):
            return None
        sides = [[imaginary(expression) for expression in side] for side in sides]
        return bool(verify(*sides, allow_set_relation_comp=True, timeout_seconds=None))

    print("ready", flush=True)
    for line in sys.stdin:
        random.seed(0)  # SymPy guesses with random points: the same ones for every pair, whatever came before
        seed(0)
        try:
            verdict = equal(*json.loads(line))
        except (Exception, RecursionError, MemoryError):
            verdict = None
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
