"""Grade an answer that need not be a number: the words after the answer marker, compared as text.

For generated tasks whose answers are words or lists ("yes", "3, 1, 2"); where gold is a number, use
kronlab.evals.gsm8k.
"""

from __future__ import annotations

import re
from typing import Final

GRADER_VERSION: Final = "1"
_MARKER: Final = re.compile(r"#{4,}")
_ANSWER_IS: Final = re.compile(r"\banswer[^\S\n]+is\b[^\S\n]*:?", re.IGNORECASE)


def extract(completion: str) -> str | None:
    """The line after the first ``####`` (without one: after the first "answer is") in normal form, or None.

    Normal form: case folded, blanks collapsed, quotes and emphasis around it and a final full stop taken off.
    """
    marker = _MARKER.search(completion) or _ANSWER_IS.search(completion)
    if marker is None:
        return None
    line, *_ = completion[marker.end() :].splitlines() or [""]
    return normal_form(line) or None


def grade(completion: str, gold: str) -> bool:
    """Whether the answer in ``completion`` is ``gold`` in normal form; no marker, or no answer, is wrong."""
    answer = extract(completion)
    return answer is not None and answer == normal_form(gold)


def normal_form(text: str) -> str:
    """``text`` case folded, blanks collapsed, without the quotes, ``*`` and full stop around it."""
    return " ".join(text.casefold().split()).rstrip(".").strip("*`\"' ").rstrip(".")
