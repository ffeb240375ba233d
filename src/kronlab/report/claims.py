"""Claims and what the records say of them: the verdict of every test, then of every claim. Reads records only.

A test supports a claim where the whole interval of its effect lies in the region that it gives, contradicts it where
the interval lies wholly outside, and leaves it undecided else (docs/claims.md).
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kronlab.report.claim_tests import (
    KINDS,
    NOT_RUN,
    UNDECIDED,
    VERDICTS,
    Absent,
    Effect,
    Evidence,
    Settled,
    faults_of,
    joined,
)

EXACT: Final = "exact"
"""The scale of a test that needs no records: a computation with one right answer."""
_DIGITS: Final = 6  # significant ones of a number in the files


# ------------------------------------------------------------------------------------------------------------- configs

_CLAIM: Final = frozenset({"paper", "claim", "source", "confidence", "test", "evidence"})


def evidence_of(claim: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tests of a claim, each with what they have in common; `at_least` is 1 where it is not said."""
    return [{"at_least": 1, **claim.get("test", {}), **own} for own in claim["evidence"]]


def rows_of(test: Mapping[str, Any]) -> set[str] | None:
    """The keys of the rows that a test names; None where it looks among all."""
    if "axis" in test:
        return set(test["rows"]) if "rows" in test else None
    sides = [test[side] for side in ("ours", "theirs") if side in test]
    return {key for side in sides for key in ([side] if isinstance(side, str) else side)}


def faults(claims: Mapping[str, Any], scales: Sequence[str]) -> list[str]:
    """What is wrong with the config of the claims, one a line."""
    found = []
    for key, claim in claims.items():
        wrong = set(claim) ^ _CLAIM if "test" in claim else set(claim) ^ (_CLAIM - {"test"})
        if wrong:
            found.append(f"claims.{key}: has {', '.join(claim)}; it must have {', '.join(sorted(_CLAIM - {'test'}))}")
            continue
        for number, test in enumerate(evidence_of(claim)):
            found += [f"claims.{key}.evidence[{number}]{fault}" for fault in faults_of(test, scales)]
    return found


# ------------------------------------------------------------------------------------------------------------ verdicts


@dataclass(frozen=True)
class Line:
    """One test with its outcome.

    Attributes:
        enough: whether it may decide: it has its least number of repetitions, and is not one to be shown beside.
        reason: why there is no effect, or why it may not decide.
    """

    test: Mapping[str, Any]
    evidence: Evidence
    verdict: str
    effect: Effect | None = None
    enough: bool = False
    reason: str = ""

    @property
    def scale(self) -> str:
        return str(self.test.get("scale", EXACT))

    @property
    def told(self) -> str:
        return KINDS[self.test["kind"]].told(self.test)


def examine(test: Mapping[str, Any], evidence: Evidence) -> Line:
    """Make one test."""
    line = _examined(test, evidence)
    if line.enough and not test.get("decides", True):
        return replace(line, enough=False, reason=joined(line.reason, "shown beside"))
    return line


def _examined(test: Mapping[str, Any], evidence: Evidence) -> Line:
    kind = KINDS[test["kind"]]
    if evidence.reason:
        return Line(test, evidence, NOT_RUN, reason=evidence.reason)
    try:
        effect = kind.measure(test, evidence)
    except Absent as absent:
        return Line(test, evidence, NOT_RUN, reason=str(absent))
    except Settled as settled:
        return Line(test, evidence, settled.verdict, enough=settled.verdict != UNDECIDED, reason=str(settled))
    if effect.count is not None and effect.count < test["at_least"]:
        few = f"{effect.repeated} of at least {test['at_least']}"
        return Line(test, evidence, UNDECIDED, effect, reason=few)
    return Line(test, evidence, kind.region(test).verdict(effect), effect, enough=True)


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        deciding: the lines that decided; none where nothing may decide.
        why: why the verdict is no clearer.
    """

    key: str
    claim: Mapping[str, Any]
    lines: Sequence[Line]
    verdict: str
    deciding: Sequence[Line]
    why: str = ""


def judge(key: str, claim: Mapping[str, Any], lines: Sequence[Line], scales: Sequence[str]) -> Judged:
    """The verdict on a claim: what all tests at the largest scale say that has one which may decide.

    Where they say different things the claim is undecided; so it is where there are tests with an effect and none of
    them may decide.

    Args:
        scales: ascending.
    """
    order = (EXACT, *scales)
    able = [line for line in lines if line.enough]
    if not able:
        ran = [line for line in lines if line.verdict != NOT_RUN and line.test.get("decides", True)]
        why = "; ".join(dict.fromkeys(line.reason for line in ran))
        return Judged(key, claim, lines, UNDECIDED if ran else NOT_RUN, [], why)
    largest = max((line.scale for line in able), key=order.index)
    deciding = [line for line in able if line.scale == largest]
    said = {line.verdict for line in deciding}
    if len(said) == 1:
        return Judged(key, claim, lines, said.pop(), deciding)
    counts = ", ".join(f"{sum(line.verdict == v for line in deciding)} {v}" for v in VERDICTS if v in said)
    return Judged(key, claim, lines, UNDECIDED, deciding, f"the tests differ: {counts}")


# -------------------------------------------------------------------------------------------------------------- output


def markdown(judged: Sequence[Judged], *, command: str) -> str:
    """The claims for people: counts, one line a claim, then every test."""
    lines = [
        "# What the records say of the papers' claims",
        "",
        f"Written by `{command}` from the records in this directory; no verdict is typed by hand. [How a verdict is "
        "computed](../docs/claims.md).",
        "",
        summary(judged),
        "",
        *_caveats(judged),
        "",
        "| claim | paper | verdict | decided at | seeds | effect, 95 % interval |",
        "|---|---|---|---|---|---|",
        *[_claim_row(j) for j in judged],
        "",
        "The effect of a metric is a gain: positive is better for the method named first; a point is a hundredth.",
        "",
    ]
    for j in judged:
        lines += [*_section(j), ""]
    settings = {
        f"- {line.test['table']}, {line.scale}: {_cell(line.evidence.about)}."
        for j in judged
        for line in j.lines
        if line.evidence.about
    }
    return "\n".join([*lines, "## Settings", "", *sorted(settings, key=_natural), ""])


def _natural(text: str) -> list[Any]:
    """table2 before table12."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", text)]


def summary(judged: Sequence[Judged]) -> str:
    """How many claims have which verdict, in one sentence."""
    counts = {verdict: sum(j.verdict == verdict for j in judged) for verdict in VERDICTS}
    return f"Of {len(judged)} claims: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}."


def _caveats(judged: Sequence[Judged]) -> list[str]:
    """What the evidence is, and what it is not."""
    deciding = [line for j in judged for line in j.deciding]
    models = sorted({name for line in deciding if line.effect is not None for name in line.effect.models})
    scales = list(dict.fromkeys(line.scale for line in deciding if line.scale != EXACT))
    if "paper" in scales:
        small = ""
    else:
        small = (
            "**None of it is at the papers' scale**: a verdict here is one on small models and little data, and does "
            "not say what a model of billions of parameters would do. "
        )
    where = (
        f"{', '.join(models)} at the scale{'s' if len(scales) > 1 else ''} {', '.join(scales)}"
        if models
        else "no model"
    )
    return [
        f"The deciding evidence was measured on: {where}. {small}An interval speaks of the seeds and test samples of "
        "one setting, not of other models and tasks; intervals are not corrected for the number of claims. The papers' "
        "full texts could not be read: a claim is in our words, with how sure we are that the paper makes it (H read "
        "in the source, M second-hand)."
    ]


def _claim_row(j: Judged) -> str:
    effects = [line.effect for line in j.deciding if line.effect is not None]
    shown = effects or [line.effect for line in j.lines if line.effect is not None]
    scale = j.deciding[0].scale if j.deciding else ""
    models = ", ".join(sorted({name for effect in effects for name in effect.models}))
    counts = sorted({effect.repeated for effect in shown if effect.repeated})
    cells = [
        f"[{_cell(j.claim['claim'])}](#{j.key})",
        f"{j.claim['paper']} ({j.claim['confidence']})",
        f"**{j.verdict}**" + (f": {_cell(j.why)}" if j.why else ""),
        " ".join(filter(None, [scale, f"({models})" if models else ""])),
        ", ".join(counts),
        "; ".join(effect.text for effect in shown),
    ]
    return f"| {' | '.join(cells)} |"


def _section(j: Judged) -> list[str]:
    lines = [
        f'<a id="{j.key}"></a>',
        "",
        f"## {j.claim['claim']}",
        "",
        f"{j.claim['paper']}, {j.claim['source']} ({j.claim['confidence']}). Verdict: **{j.verdict}**"
        + (f" ({j.why})." if j.why else "."),
        "",
        "| test | where | seeds | effect, 95 % interval | interval over | says |",
        "|---|---|---|---|---|---|",
    ]
    for line in j.lines:
        effect = line.effect
        where = f"{line.test['table']}, {line.scale}" if "table" in line.test else "computed here"
        note = "; ".join(filter(None, [line.reason, effect.said if effect else ""]))
        if line.verdict == NOT_RUN and line.evidence.command:
            note = f"{note}; `{line.evidence.command}`"
        cells = [
            line.told,
            where,
            "" if effect is None else effect.repeated,
            "" if effect is None else effect.text,
            "" if effect is None else effect.over,
            line.verdict + (f" ({note})" if note else ""),
        ]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def as_data(judged: Sequence[Judged]) -> dict[str, Any]:
    """The claims for machines: plain data for JSON."""
    return {
        "schema": 1,
        "counts": {verdict: sum(j.verdict == verdict for j in judged) for verdict in VERDICTS},
        "claims": [
            {
                "key": j.key,
                **{name: j.claim[name] for name in ("paper", "claim", "source", "confidence")},
                "verdict": j.verdict,
                "why": j.why,
                "evidence": [_line_data(line, line in j.deciding) for line in j.lines],
            }
            for j in judged
        ],
    }


def _line_data(line: Line, decides: bool) -> dict[str, Any]:
    effect = line.effect
    numbers = (effect.value, effect.low, effect.high) if effect else (None, None, None)
    value, low, high = (None if x is None else float(f"{round(x, 9) + 0.0:.{_DIGITS}g}") for x in numbers)
    return {
        "table": line.test.get("table"),
        "scale": line.scale,
        "test": dict(line.test),
        "told": line.told,
        "about": line.evidence.about,
        "command": line.evidence.command,
        "verdict": line.verdict,
        "decides": decides,
        "reason": line.reason,
        "effect": value,
        "low": low,
        "high": high,
        "unit": effect.unit if effect else None,
        "count": effect.count if effect else None,
        "counted": effect.counted if effect else None,
        "interval_over": effect.over if effect else None,
        "models": list(effect.models) if effect else [],
        "said": effect.said if effect else "",
    }


_CSV: Final = (
    "table",
    "scale",
    "told",
    "verdict",
    "decides",
    "effect",
    "low",
    "high",
    "unit",
    "count",
    "counted",
    "reason",
)


def as_csv(judged: Sequence[Judged]) -> str:
    """One line for each test of each claim."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["claim", "claim_verdict", *_CSV])
    for claim in as_data(judged)["claims"]:
        for line in claim["evidence"]:
            values = (line[name] for name in _CSV)
            writer.writerow(itertools.chain([claim["key"], claim["verdict"]], values))
    return out.getvalue()
