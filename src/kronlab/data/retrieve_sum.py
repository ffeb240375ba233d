"""Digits hidden in filler, to be found and added up: a generated task of any length.

    prompt      jqw ud3 nbo  te ... x8la rr\\nsum?\\n        ``length`` characters
    completion  #### 11

Filler is random letters and blanks; each digit stands at a random place. Prompts of a length are equally long, and so
are completions: a batch needs no padding.

Settings:
    length: characters of the prompt, which are tokens of the byte tokenizer; at least 64, so that no two are alike.
    facts: how many digits are hidden (2), at most 11.

Every example is drawn from a generator of its own, seeded with split, seed and number: train, validation and test
share none, test and validation are the same for every seed, and a smaller n gives a prefix of a larger one.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any, Final

from kronlab.data import common
from kronlab.data.common import Example, LengthFn
from kronlab.errors import ConfigError

SPLITS: Final = ("train", "validation", "test")
QUESTION: Final = "\nsum?\n"
_LETTERS: Final = string.ascii_lowercase + " " * 5
_SHORTEST: Final = 64
_MOST_FACTS: Final = 11  # their sum has two digits


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None = None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """``n`` generated examples.

    Raises:
        ConfigError: no such split, a length or number of facts out of range, n=null.
    """
    length, facts = _settings(source)
    common.check_split("retrieve_sum", split, SPLITS)
    if n is None:
        raise ConfigError("data source 'retrieve_sum': n=null; generated data has no end, say how many")
    drawn_by = str(seed) if split == "train" else ""
    return [_example(f"{split}{drawn_by}/{i}", length, facts) for i in range(n)]


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`: generated data needs no file."""
    _settings(source)
    common.check_split("retrieve_sum", split, SPLITS)
    return True, "retrieve_sum: generated"


def _settings(source: Mapping[str, Any]) -> tuple[int, int]:
    common.check_keys(source, ("length", "facts"))
    length, facts = source.get("length"), source.get("facts", 2)
    for name, value, least, most in (("length", length, _SHORTEST, None), ("facts", facts, 1, _MOST_FACTS)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
            upper = f" to {most}" if most else " or more"
            raise ConfigError(f"data source 'retrieve_sum': {name}={value!r} must be a whole number, {least}{upper}")
    assert isinstance(length, int)
    return length, facts


def _example(name: str, length: int, facts: int) -> Example:
    draw = random.Random(f"retrieve_sum/{length}/{facts}/{name}")
    text = draw.choices(_LETTERS, k=length - len(QUESTION))
    digits = [draw.randrange(10) for _ in range(facts)]
    for place, digit in zip(draw.sample(range(len(text)), facts), digits, strict=True):
        text[place] = str(digit)
    total = f"{sum(digits):02d}"
    return Example(
        f"retrieve_sum/{length}/{name}", prompt="".join(text) + QUESTION, completion=f"#### {total}", gold=total
    )
