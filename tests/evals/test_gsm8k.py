"""The GSM8K grader against hostile text, against the real gold answers, and as properties."""

from __future__ import annotations

import json
import os
import re
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronlab.errors import ConfigError, DataError
from kronlab.evals import exact
from kronlab.evals.gsm8k import extract, grade, normal_form, parse_number

DATA = os.environ.get("KRONLAB_DATA")
needs_data = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "gsm8k" / "test.jsonl").is_file(),
    reason="needs gsm8k/test.jsonl under KRONLAB_DATA",
)

# completion -> what strict reads (None: no answer)
STRICT = [
    # the plain form, and blanks
    ("#### 18", "18"),
    ("####18", "18"),
    ("so 9 * 2 = 18.\n#### 18\n", "18"),
    ("#### \t 18   ", "18"),
    ("#### 007", "7"),
    ("##### 18", "18"),
    ("#### 0", "0"),
    ("#### -0", "0"),
    # thousands
    ("#### 1,080", "1080"),
    ("#### 109,200,000", "109200000"),
    ("#### 1,234.50", "1234.5"),
    ("#### 1,23,4", None),
    ("#### 12,34", None),
    ("#### 1,2345", None),
    ("#### 1234,567", None),
    ("#### 0,123", None),
    ("#### 12,5", None),
    ("#### 1_000", None),
    ("#### 1'000", None),
    ("#### 1.234.567", None),
    # signs
    ("#### -3", "-3"),
    ("#### - 3", "-3"),
    ("#### +3", "3"),
    ("#### \u22123", "-3"),
    ("#### \u20133", "-3"),
    ("#### \uff0d3", "-3"),
    ("#### --3", None),
    ("#### +-3", None),
    ("#### \u20143", None),  # an em dash is punctuation
    # currency, percent, units, full stops, emphasis
    ("#### $18", "18"),
    ("#### $ 18.00", "18"),
    ("#### $-3", "-3"),
    ("#### -$3", "-3"),
    ("#### -$-3", None),
    ("#### \u20ac1,000", "1000"),
    ("#### 50%", "50"),
    ("#### 12 apples.", "12"),
    ("#### 12apples", "12"),
    ("#### 12 m2", "12"),
    ("#### 12.", "12"),
    ("#### 12. ", "12"),
    ("#### 12, as shown", "12"),
    ("#### **18**", "18"),
    ("#### 18 (eighteen)", "18"),
    ("#### 18 - that is all", "18"),
    # decimals, fractions, exponents
    ("#### 5.0", "5"),
    ("#### 5.25", "5.25"),
    ("#### .5", "0.5"),
    ("#### -.5", "-0.5"),
    ("#### 3/4", "0.75"),
    ("#### -2/6", "-1/3"),
    ("#### 10 / 5 boxes", "2"),
    ("#### 3/0", None),
    ("#### 3/4/5", None),
    ("#### 3/4.5", None),
    ("#### 1 3/4", None),
    ("#### 1.2e3", "1200"),
    ("#### 5E-1", "0.5"),
    ("#### 1e999999999", None),
    ("#### 5eggs", "5"),
    # more than one number: no answer
    ("#### 12 34", None),
    ("#### 12-14", None),
    ("#### 12 or 13", None),
    ("#### 12 to 14", None),
    ("#### 5 + 3 = 8", None),
    ("#### 5 * 3", None),
    ("#### 3:45", None),
    ("#### 1, 2, 3", None),
    ("#### 0x1F", None),
    ("#### 5\u00b2", None),
    ("#### 5\u00bd", None),
    ("#### \u00bd", None),
    # digits of other scripts, invisible characters
    ("#### \u0661\u0662", "12"),
    ("#### \uff11\uff12\uff0c\uff10\uff10\uff10", "12000"),
    ("\uff03\uff03\uff03\uff03 5", "5"),
    ("####\u00a05", "5"),
    ("#### \u200b5", "5"),
    ("#### \u4e94", None),  # the ideograph five is no digit
    # several answers: the first line counts, and nothing mends it
    ("#### 5\n#### 6", "5"),
    ("#### 5\n\nQ: and then?\nA: #### 6", "5"),
    ("#### 5 #### 6", "5"),
    ("####\n#### 6", None),
    ("#### x\n#### 6", None),
    ("The answer is 4\n#### 5", "5"),
    ("#### 120\nThe answer is: 120", "120"),
    # truncated, empty, no marker
    ("", None),
    ("####", None),
    ("#### ", None),
    ("#### $", None),
    ("#### -", None),
    ("####\n5", None),
    ("### 5", None),
    ("# # # # 5", None),
    ("so she has 18 eggs left", None),
    ("18", None),
    ("#### five", None),
    ("#### (5)", None),
    ("#### x = 5", None),
    ("#### \\boxed{5}", None),
    # the other marker
    ("The answer is 18.", "18"),
    ("The answer is: $1,018", "1018"),
    ("so the ANSWER IS -4 degrees", "-4"),
    ("The answer is 5. The answer is 6.", "5"),
    ("The answer is not 5", None),
    ("The answer is\n5", None),
    ("The answer isn't 5", None),
    ("The answer was 5", None),
]


@pytest.mark.parametrize(("completion", "answer"), STRICT)
def test_strict_reads(completion: str, answer: str | None) -> None:
    assert extract(completion) == answer
    if answer is not None:
        assert grade(completion, answer)
        assert not grade(completion, normal_form(Fraction(answer) + 1))
    else:  # whatever a lenient reader might have taken from it is not accepted either
        assert not any(
            grade(completion, gold) for gold in ["0", "3", "5", "6", "12", "18", *re.findall(r"[0-9]+", completion)]
        )


def test_table_is_large_and_without_duplicates() -> None:
    assert len({c for c, _ in STRICT}) == len(STRICT) >= 60


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("#### 1234", "1,234", True),
        ("#### 1,234", "1234.0", True),
        (
            "#### 1,500",
            "1,234",
            False,
        ),  # both begin with 1: the rule that stops at the comma takes them for equal
        ("#### 10", "-10", False),
        ("", "-10", False),
        ("#### 0.333", "1/3", False),
        ("#### 0.75", "3/4", True),
        ("#### 0.1", "0.10000000000000001", False),  # equal as floats
        ("#### 9007199254740993", "9007199254740992", False),  # equal as floats
        ("#### " + "9" * 900, "9" * 900, True),
        ("#### " + "9" * 900, "9" * 899 + "8", False),
        ("#### " + "9" * 6000, "9", False),
        ("#### 18", "Janet sells 16 - 7 = 9.\n#### 18", True),
    ],
)
def test_strict_verdicts(completion: str, gold: str, verdict: bool) -> None:
    assert grade(completion, gold) is verdict


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("#### 18", "18", True),
        ("#### 1,234", "1,500", True),  # stops at the comma
        ("#### 2125", "2,125", False),
        ("#### -5", "0", True),  # a sign is a miss, a miss is 0
        ("no answer", "-10", True),
        ("no answer", "10", False),
        ("####\n\n 7", "7", True),
        ("#### 5.9", "5", True),
        ("#### $5", "5", False),
        ("#### 5\n#### 6", "5", True),
        ("The answer is 5", "5", False),
        ("#### " + "9" * 6000, "9", False),
    ],
)
def test_paper_verdicts_faults_included(completion: str, gold: str, verdict: bool) -> None:
    assert grade(completion, gold, "paper") is verdict


def test_paper_extract() -> None:
    assert extract("#### 0012,5", "paper") == "12"
    assert extract("#### -5", "paper") is None
    assert extract("#### " + "9" * 6000, "paper") == "9" * 6000


def test_bad_arguments_are_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"unknown grader 'lenient': choose one of strict, paper"):
        grade("#### 5", "5", "lenient")
    with pytest.raises(DataError, match=r"gold answer 'five' is not a number: .*exact"):
        grade("#### 5", "five")
    with pytest.raises(DataError, match="is not a number"):
        grade("#### 5", "")


@pytest.mark.parametrize(
    "text",
    [
        " " * 20_000,
        "* " * 10_000,
        "- " * 10_000,
        "5" + " ," * 10_000,
        "5" + "*" * 30_000,
        "9" * 20_000,
        "$ " * 9_999,
    ],
)
def test_degenerate_text_is_read_in_no_time(text: str) -> None:
    start = time.perf_counter()
    assert extract("#### " + text + "y") in (None, "5")
    assert time.perf_counter() - start < 1.0  # a backtracking pattern would take minutes


@needs_data
def test_all_real_gold_answers_are_read_right() -> None:
    misread = []
    rows = [json.loads(line) for line in (Path(DATA or "") / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 1319
    for i, row in enumerate(rows):
        gold = row["answer"].split("#### ")[1]
        value = Decimal(gold.replace(",", ""))  # independent of the grader: these are plain or grouped integers
        assert extract(row["answer"]) == str(value), (i, gold)
        assert grade(row["answer"], gold)
        assert grade(f"#### {value}", row["answer"])
        if extract(row["answer"], "paper") != str(value):
            misread.append((i, gold))
    assert misread == MISREAD_BY_PAPER


@needs_data
def test_paper_takes_no_answer_for_right_on_two_problems() -> None:
    lines = (Path(DATA or "") / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    golds = [json.loads(line)["answer"].split("#### ")[1] for line in lines]
    assert [i for i, gold in enumerate(golds) if grade("I do not know.", gold, "paper")] == [489, 1113]
    assert not any(grade("I do not know.", gold) for gold in golds)


# (line of test.jsonl counted from 0, gold): 14 with commas, 2 negative
MISREAD_BY_PAPER = [
    (146, "2,125"),
    (201, "114,200"),
    (230, "276,000"),
    (249, "5,600"),
    (489, "-10"),
    (505, "1,600"),
    (610, "65,960"),
    (611, "1,450,000"),
    (640, "43,500"),
    (642, "10,800"),
    (819, "6,250"),
    (829, "14,000"),
    (997, "6,600"),
    (1009, "1,875"),
    (1113, "-3"),
    (1206, "40,000"),
]


# ---- properties ----

_SIGN = st.sampled_from(["", "-", "\u2212", "- "])
_CURRENCY = st.sampled_from(["", "$", "\u20ac"])
_SUFFIX = st.sampled_from(["", ".", "%", " apples", " dollars.", "\n\nQ: 7 + 8?\nA: #### 15", "\n#### 99"])
_MARKER = st.sampled_from(["#### ", "####", "She has 3 + 4 = 7.\n#### ", "The answer is ", "the answer is: "])


@given(st.integers(0, 10**15), st.integers(0, 6), _SIGN, _CURRENCY, st.booleans(), _MARKER, _SUFFIX)
def test_any_number_in_any_style_is_read_back(
    digits: int, places: int, sign: str, currency: str, commas: bool, marker: str, suffix: str
) -> None:
    value = Decimal(digits).scaleb(-places)
    written = f"{value:,f}" if commas else f"{value:f}"
    if "####" not in marker and "####" in suffix:
        suffix = ""  # a later #### is the answer, by rule 1
    completion = f"{marker}{sign}{currency}{written}{suffix}"
    expected = -Fraction(value) if sign else Fraction(value)
    assert extract(completion) == normal_form(expected)
    assert grade(completion, str(expected))
    assert not grade(completion, str(expected + 1))


@given(st.fractions(max_denominator=10**6))
def test_normal_form_is_read_back(value: Fraction) -> None:
    assert parse_number(normal_form(value)) == value
    assert parse_number(f"{value.numerator}/{value.denominator}") == value


@given(st.text(max_size=200))
def test_any_text_gets_a_verdict(text: str) -> None:
    for completion in (text, "#### " + text, "The answer is " + text):
        answer = extract(completion)
        assert answer is None or grade(completion, answer)
        assert isinstance(grade(completion, "1,234", "paper"), bool)


@given(st.text(st.characters(exclude_characters="#"), max_size=60).filter(lambda t: "answer" not in t.casefold()))
def test_without_a_marker_there_is_no_answer(text: str) -> None:
    assert extract(text) is None or "\uff03" in text


# ---- the grader for words ----


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("#### Yes", "yes", True),
        ("#### 3, 1,  2.\nQ:", "3, 1, 2", True),
        ('The answer is: "blue".', "Blue", True),
        ("#### no\n#### yes", "yes", False),
        ("#### yes and no", "yes", False),
        ("yes", "yes", False),
        ("####", "", False),
        ("#### ", "yes", False),
    ],
)
def test_exact(completion: str, gold: str, verdict: bool) -> None:
    assert exact.grade(completion, gold) is verdict
