"""Grade a numeric answer in GSM8K's ``#### N`` format: ``grade(completion, gold, grader="strict") -> bool``.

``strict`` reads the answer a careful person would read, or none. In this order:

1. *Where.* The text after the first ``####``, up to the end of that line. Only if there is no ``####``
   anywhere: the text after the first "answer is", up to the end of that line. The first, because what follows
   the first answer line is a continuation that the model made up (lm-evaluation-harness' strict match reads
   the first as well). No marker: no answer.
2. *What.* The number must come at once: optional emphasis (``*``), sign (``+``, ``-`` and the Unicode minus
   signs and dashes) and currency symbol in either order, then digits of any script, plain or in groups of
   three (``1,234,567``), decimals, an exponent (``1.2e3``), or a fraction of two integers (``3/4``).
3. *What may follow.* A unit, a percent sign (a unit: ``50%`` is 50), a full stop, words. Not another number
   joined to it: ``1,23,4``, ``12 34``, ``12-14``, ``12 or 13``, ``5 + 3 = 8``, ``3:45`` and ``5²`` are no
   answer. Nor are ``12,5`` (decimal comma), ``1 3/4`` (mixed number), ``(3)``, ``½`` and LaTeX.

Values are compared exactly, as fractions: ``5.0`` is 5, ``0.333`` is not ``1/3``.

``paper`` is the rule in the CDKA authors' code, faults included: the regular expression ``####\\s*(\\d+)`` on
completion and gold alike, a miss counting as 0. It stops at a comma and drops signs, so it misreads 16 of the
1,319 gold answers of the test set (14 with commas, 2 negative) and takes a missing answer for right where the
gold is negative. For comparison only.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Final, Literal

from kronlab.errors import ConfigError, DataError

GRADER_VERSION: Final = "1"
"""Raise on any change that can alter a verdict; it goes into every record."""

Grader = Literal["strict", "paper"]
GRADERS: Final[tuple[str, ...]] = ("strict", "paper")

_MAX_DIGITS: Final = 1000  # a longer run of digits is a model stuck in a loop, not an answer
_MAX_EXPONENT: Final = 400

# hyphen, non-breaking hyphen, figure dash, en dash, minus, small and full-width hyphen-minus; an em dash is
# punctuation
_MINUS_SIGNS: Final = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
_ASCII: Final = str.maketrans(
    {c: "-" for c in _MINUS_SIGNS}
    | {
        "\uff0b": "+",
        "\uff0c": ",",
        "\uff0e": ".",
        "\uff03": "#",
        "\uff04": "$",
        "\uff05": "%",
        "\uff0f": "/",
    }
    | {c: "" for c in "\u200b\u200e\u200f\u2060\ufeff"}  # zero-width: invisible, so they cannot be part of an answer
)

_HASHES: Final = re.compile(r"#{4,}")
_ANSWER_IS: Final = re.compile(r"\banswer[^\S\n]+is\b[^\S\n]*:?", re.IGNORECASE)
_NUMBER: Final = re.compile(
    r"""
    [\s*]*
    (?P<sign>[+-]?) \s* [$€£¥₹]? \s* (?P<late_sign>[+-]?)
    (?: (?P<numerator>[0-9]+) \s*/\s* (?P<denominator>[0-9]+) (?![0-9.,]*[0-9])
      | (?P<whole>[1-9][0-9]{0,2}(?:,[0-9]{3})+ | [0-9]+ | (?=\.[0-9]))
        (?P<decimals>\.[0-9]+)?
        (?:[eE](?P<exponent>[+-]?[0-9]+))?
    )
    (?P<rest>.*)
    """,
    re.VERBOSE,
)
# What makes the text behind a number part of another number, a sum, a range, a list or a time.
_JOINED: Final = re.compile(
    r"""
    \s*[)\]*]*\s*
    (?: (?:[-+/x×÷·=<>^:~_'’.,;&%*—] | \b(?:or|and|to|times|plus|minus)\b) \s* )*
    [-+]? \s* [$€£¥₹]? \s* [-+]? \s* \.? [0-9]
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PAPER: Final = re.compile(r"####\s*(\d+)")


def grade(completion: str, gold: str, grader: str = "strict") -> bool:
    """Whether ``completion`` (the model's text alone, without the prompt) gives the answer ``gold``.

    ``gold`` is the number as the dataset writes it (``"1,080"``), or a whole answer text that ends in ``####
    1,080``. ``grader`` is ``"strict"`` or ``"paper"``; the module's docstring defines both.

    Raises:
        DataError: under ``strict``, if ``gold`` is not a number: a fault of the data, never of the model.
        ConfigError: for an unknown grader.
    """
    if _known(grader) == "paper":
        return _paper_value(completion) == _paper_value(gold if "####" in gold else f"#### {gold}")
    expected = _strict_value(gold) if _HASHES.search(_ascii(gold)) else parse_number(gold)
    if expected is None:
        raise DataError(
            f"gold answer {gold!r} is not a number: fix the dataset row, or grade it with kronlab.evals.exact"
        )
    return _strict_value(completion) == expected


def extract(completion: str, grader: str = "strict") -> str | None:
    """The answer that ``grader`` reads in ``completion``, in normal form, or None where it reads none.

    Normal form: an integer (``"-1234"``), a finite decimal without trailing zeros (``"2.5"``), else a reduced
    fraction (``"1/3"``). Under ``paper`` a miss is None here and counts as 0 in `grade`.
    """
    if _known(grader) == "paper":
        match = _PAPER.search(completion)
        return None if match is None else _ascii(match.group(1)).lstrip("0") or "0"
    value = _strict_value(completion)
    return None if value is None else normal_form(value)


def parse_number(text: str) -> Fraction | None:
    """The number that ``text`` begins with, under rules 2 and 3 of ``strict``; None if there is none."""
    # Runs of blanks are collapsed: the patterns allow blanks in many places, and would try every way to share
    # out a run.
    match = _NUMBER.match(" ".join(_ascii(text).split()))
    if match is None or (match["sign"] and match["late_sign"]):
        return None
    rest = match["rest"][:200]
    if _JOINED.match(rest) or (rest and unicodedata.category(rest[0]) == "No"):  # No: ², ½ glued to the number
        return None
    if match.start("rest") > _MAX_DIGITS:
        return None
    if match["numerator"] is not None:
        denominator = int(match["denominator"])
        if denominator == 0:
            return None
        value = Fraction(int(match["numerator"]), denominator)
    else:
        exponent = int(match["exponent"] or 0)
        if abs(exponent) > _MAX_EXPONENT:
            return None
        decimals = (match["decimals"] or ".")[1:]
        digits = match["whole"].replace(",", "") + decimals
        value = Fraction(int(digits)) * Fraction(10) ** (exponent - len(decimals))
    return -value if "-" in (match["sign"], match["late_sign"]) else value


def normal_form(value: Fraction) -> str:
    """``value`` as text: an integer, else a finite decimal if it has one, else a reduced fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        places = max(places, power)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _known(grader: str) -> str:
    if grader not in GRADERS:
        raise ConfigError(f"unknown grader {grader!r}: choose one of {', '.join(GRADERS)}")
    return grader


def _ascii(text: str) -> str:
    """``text`` with every decimal digit, minus sign and full-width mark as its ASCII equal, other characters
    kept.

    Not Unicode normalisation: NFKC would turn ``5²`` into ``52``.
    """
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(_ASCII))


def _strict_value(completion: str) -> Fraction | None:
    text = _ascii(completion)
    marker = _HASHES.search(text) or _ANSWER_IS.search(text)
    if marker is None:
        return None
    line, *_ = text[marker.end() :].splitlines() or [""]
    return parse_number(line)


def _paper_value(text: str) -> int:
    match = _PAPER.search(text)
    return 0 if match is None else _decimal_digits(match.group(1))


def _decimal_digits(digits: str) -> int:
    """int(digits) without the interpreter's limit on the length of the text."""
    value = 0
    for start in range(0, len(digits), 4000):
        chunk = digits[start : start + 4000]
        value = value * 10 ** len(chunk) + int(chunk)
    return value
