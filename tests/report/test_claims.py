"""Verdicts from records made by hand: every kind of test, every verdict, and what happens where a thing is missing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kronlab.cell import SCALES
from kronlab.report.claim_tests import (
    CONTRADICTED,
    KINDS,
    NOT_RUN,
    SUPPORTED,
    UNDECIDED,
    Check,
    Effect,
    Evidence,
    Region,
)
from kronlab.report.claims import EXACT, Judged, Line, as_csv, as_data, examine, faults, judge, markdown
from kronlab.report.tables import RowResult

N = 200
SUMS = [{"eval": "sums", "metric": "nll_per_token"}]


def record(
    shift: float,
    seed: int,
    *,
    method: dict[str, Any] | None = None,
    status: str = "done",
    noise: float = 0.02,
    **config: Any,
) -> dict[str, Any]:
    """A finished cell whose NLL per token is about 1 + shift, and whose samples say the same."""
    hardness = np.random.default_rng(0).normal(size=N)  # of the samples, shared by all records
    random = np.random.default_rng([seed, int(1e4 * (shift + 1))])
    tokens = np.full(N, 10)
    nll = tokens * (1.0 + shift + 0.1 * hardness + noise * random.normal(size=N))
    made = {
        "sums": {
            "metrics": {"nll_per_token": {"value": float(nll.sum() / tokens.sum()), "n": N, "stderr": 0.1}},
            "data_sha": "s",
            "samples": {
                "id": [str(i) for i in range(N)],
                "correct": [0] * N,
                "nll": nll.tolist(),
                "nll_tokens": tokens.tolist(),
            },
        }
    }
    settings = {"method": method or {"name": "lora"}, "model": {"name": "tiny"}, "task": {"name": "sums"}, "seed": seed}
    return {"status": status, "config": settings | config, "eval": made if status == "done" else {}}


def row(key: str, shift: float, *, seeds: Sequence[int] = (0, 1, 2), group: str = "", **more: Any) -> RowResult:
    return RowResult(key, key, [record(shift, seed, **more) for seed in seeds], group=group)


def a_test(kind: str, **settings: Any) -> dict[str, Any]:
    shared = {"kind": kind, "table": "table2", "scale": "mini", "at_least": 3}
    if kind not in ("ratio", "alignment", "identity"):
        shared |= {"metrics": SUMS, "margin": 0}
        shared |= {} if kind == "spread" else {"goal": "min"}
    return shared | settings


def verdict(test: dict[str, Any], evidence: Evidence) -> str:
    assert faults({"c": {**CLAIM, "evidence": [test]}}, SCALES) == []
    return examine(test, evidence).verdict


CLAIM: dict[str, Any] = {"paper": "CDKA", "claim": "It is | better.", "source": "abstract", "confidence": "H"}
COMPARED = {"ours": "cdka", "theirs": "lora"}


# ------------------------------------------------------------------------------------------------- comparing two rows


@pytest.mark.parametrize(
    ("shift", "margin", "expected"),
    [
        (-0.1, 0, SUPPORTED),
        (0.1, 0, CONTRADICTED),
        (0.0, 0, UNDECIDED),
        (-0.1, 0.2, CONTRADICTED),
        (-0.1, 0.05, SUPPORTED),
    ],
)
def test_a_difference_against_its_margin(shift: float, margin: float, expected: str) -> None:
    rows = [row("lora", 0), row("cdka", shift)]
    assert verdict(a_test("difference", **COMPARED, margin=margin), Evidence(rows=rows)) == expected


def test_the_goal_turns_a_difference_round() -> None:
    evidence = Evidence(rows=[row("lora", 0), row("cdka", 0.1)])
    line = examine(a_test("difference", **COMPARED, goal="max"), evidence)
    assert line.verdict == SUPPORTED
    assert line.effect is not None
    assert line.effect.value == pytest.approx(0.1, abs=0.01)
    mirrored = examine(a_test("difference", **COMPARED, goal="min"), evidence).effect
    assert mirrored is not None
    # the bootstrap of the negative draws the same samples
    assert (mirrored.low, mirrored.high) == pytest.approx((-line.effect.high, -line.effect.low))


@pytest.mark.parametrize(
    ("shift", "expected"), [(0.0, SUPPORTED), (0.1, CONTRADICTED), (0.05, UNDECIDED), (-0.5, SUPPORTED)]
)
def test_within_a_margin(shift: float, expected: str) -> None:
    rows = [row("lora", 0), row("cdka", shift)]
    assert verdict(a_test("within", **COMPARED, margin=0.05), Evidence(rows=rows)) == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [(0.0, 0.2, SUPPORTED), (0.2, 0.0, CONTRADICTED), (0.1, 0.1, UNDECIDED)]
)
def test_degradation_is_a_difference_of_differences(ours: float, theirs: float, expected: str) -> None:
    rows = [row("a16", 0.3), row("a4", 0.3 + ours), row("b16", 0), row("b4", theirs)]
    assert verdict(a_test("degradation", ours=["a16", "a4"], theirs=["b16", "b4"]), Evidence(rows=rows)) == expected


def test_records_are_chosen_by_their_settings() -> None:
    """Of a row with several sequences of tasks, the one that is asked for."""
    wanted, other = {"after": [{"name": "a"}], "task": {"name": "b"}}, {"after": [{"name": "b"}], "task": {"name": "a"}}

    def both(key: str, shift: float) -> RowResult:
        chosen = [record(shift, seed, **wanted) for seed in range(3)]
        return RowResult(key, key, [*chosen, None, *(record(5 * shift, seed, **other) for seed in range(3))])

    where = {"after.0.name": "a", "task.name": "b"}
    test = a_test("difference", **COMPARED, metrics=[{"eval": "sums", "metric": "nll_per_token", "where": where}])
    line = examine(test, Evidence(rows=[both("lora", 0), both("cdka", -0.1)]))
    assert line.effect is not None
    assert line.effect.value == pytest.approx(0.1, abs=0.01)
    assert "after.0.name=a" in line.told


# --------------------------------------------------------------------------------------------------- rows along an axis


def along(values: dict[int, float], axis: str = "r2", **more: Any) -> list[RowResult]:
    """One CDKA row for each value of the axis, with its shift."""
    base = {"name": "cdka", "r1": 2, "r2": 8, "r": 4}
    return [row(f"{axis}_{value}", shift, method=base | {axis: value}, **more) for value, shift in values.items()]


@pytest.mark.parametrize(
    ("slope", "direction", "expected"),
    [
        (-0.05, "up", SUPPORTED), (0.05, "up", CONTRADICTED), (0.0, "up", UNDECIDED),
        (0.05, "down", SUPPORTED), (-0.05, "down", CONTRADICTED),
    ],
)  # fmt: skip
def test_a_trend_is_the_gain_of_a_doubling(slope: float, direction: str, expected: str) -> None:
    rows = along({2**k: k * slope for k in range(2, 6)})
    others = [row("lora", 9, method={"name": "lora", "r2": 3}), *along({1: 5.0, 4: 7.0}, "r1")]
    test = a_test("trend", axis="method.r2", direction=direction)
    line = examine(test, Evidence(rows=[*others, *rows]))
    assert line.verdict == expected
    assert line.effect is not None
    assert line.effect.value == pytest.approx(-slope, abs=0.003)
    assert line.effect.said == "r2 = 4, 8, 16, 32"  # the rows that differ in r2 alone


def test_a_trend_takes_unevenly_spaced_rows_and_those_it_is_told_to_take() -> None:
    rows = along({1: 0.0, 2: -0.1, 16: -0.4, 64: 3.0}, noise=0.0)
    test = a_test("trend", axis="method.r2", direction="up", rows=["r2_16", "r2_1", "r2_2"])
    line = examine(test, Evidence(rows=rows))
    assert line.verdict == SUPPORTED
    assert line.effect is not None
    assert line.effect.value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("shifts", "expected"),
    [
        ([0.0, -0.3, -0.4, -0.41], SUPPORTED),
        ([0.0, -0.01, -0.1, -0.4], CONTRADICTED),
        ([0.0, -0.1, -0.2, -0.3], UNDECIDED),
    ],
)
def test_diminishing_returns(shifts: list[float], expected: str) -> None:
    rows = along({2**k: shift for k, shift in enumerate(shifts)}, "r")
    assert verdict(a_test("diminishing", axis="method.r"), Evidence(rows=rows)) == expected


def test_two_rows_are_no_trend() -> None:
    line = examine(a_test("trend", axis="method.r2", direction="up"), Evidence(rows=along({1: 0.0, 2: 1.0})))
    assert (line.verdict, line.reason) == (NOT_RUN, "2 finished rows that differ in method.r2 alone, of at least 3")


# --------------------------------------------------------------------------------------------------------------- spread


@pytest.mark.parametrize(("apart", "expected"), [(0.5, SUPPORTED), (0.01, CONTRADICTED), (0.2, UNDECIDED)])
def test_spread_over_settings(apart: float, expected: str) -> None:
    ours = [row("small", 0.1), row("large", 0.3)]
    test = a_test("spread", ours=["small", "large"], theirs=["small_1", "large_1"])
    evidence = Evidence(rows=[*ours, row("small_1", 1.0), row("large_1", 1.0 - apart)])
    assert verdict(test, evidence) == expected


def test_a_setting_that_diverges_has_no_spread_and_settles_the_matter() -> None:
    test = a_test("spread", ours=["a", "b"], theirs=["c", "d"])
    fine, gone = [row("a", 0), row("b", 0)], [row("c", 0), row("d", 0, status="diverged")]
    line = examine(test, Evidence(rows=[*fine, *gone]))
    assert (line.verdict, line.enough, line.reason) == (SUPPORTED, True, "diverged: d")
    turned = test | {"ours": ["c", "d"], "theirs": ["a", "b"]}
    assert verdict(turned, Evidence(rows=[*fine, *gone])) == CONTRADICTED
    few = [row("a", 0, seeds=[0]), row("b", 0, seeds=[0])]
    assert verdict(test, Evidence(rows=[*few, *gone])) == NOT_RUN  # one seed of ours settles nothing


def test_the_spread_of_one_seed_has_no_interval() -> None:
    rows = [row(key, shift, seeds=[0]) for key, shift in zip("abcd", (0, 0, 0, 1), strict=True)]
    line = examine(a_test("spread", ours=["a", "b"], theirs=["c", "d"]), Evidence(rows=rows))
    assert (line.verdict, line.enough, line.effect) == (UNDECIDED, False, None)
    assert line.reason.startswith("one seed: +1.0")


# ------------------------------------------------------------------------------------------ benchmark, alignment, check


def bench(ours: Sequence[float], theirs: Sequence[float], **more: Any) -> Evidence:
    settings = {"rows": 8, "length": 128, "dtype": "bf16", "model": "tiny"}
    peers = {"kron_lora": {"wall": list(ours), "saved_bytes": 80}, "lora": {"wall": list(theirs), "saved_bytes": 100}}
    return Evidence(record={"cases": [{"part": "step", "settings": settings, "peers": peers | more}]})


RATIO = {"case": "8x128 bf16", "quantity": "wall", "ours": "kron_lora", "theirs": "lora", "range": [1.03, 1.08]}


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [(1.05, 0.001, SUPPORTED), (1.5, 0.001, CONTRADICTED), (0.9, 0.001, CONTRADICTED), (1.05, 0.3, UNDECIDED)],
)
def test_a_ratio_of_times_within_a_range(ratio: float, noise: float, expected: str) -> None:
    rounds = np.random.default_rng(0).normal(scale=noise, size=9)
    assert verdict(a_test("ratio", **RATIO), bench((ratio + rounds).tolist(), [1.0] * 9)) == expected


def test_too_few_rounds_decide_nothing() -> None:
    line = examine(a_test("ratio", **RATIO), bench([1.05, 1.05], [1.0, 1.0]))
    assert (line.verdict, line.enough, line.reason) == (UNDECIDED, False, "2 rounds of at least 3")


@pytest.mark.parametrize(("high", "expected"), [(1.0, SUPPORTED), (0.8, SUPPORTED), (0.7, CONTRADICTED)])
def test_a_ratio_of_bytes_is_one_measurement(high: float, expected: str) -> None:
    test = a_test("ratio", **RATIO | {"quantity": "saved_bytes", "range": [0, high]})
    assert verdict(test, bench([1], [1])) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"case": "4x512 fp32"}, "4x512 fp32 was not measured"),
        ({"ours": "dora"}, "8x128 bf16, not measured: dora"),
        ({"quantity": "peak_memory_bytes"}, "8x128 bf16 was not measured"),
    ],
)
def test_what_a_benchmark_lacks_is_said(change: dict[str, Any], reason: str) -> None:
    line = examine(a_test("ratio", **RATIO | change), bench([1.0] * 3, [1.0] * 3))
    assert (line.verdict, line.reason) == (NOT_RUN, reason)


def aligned(exponents: dict[str, float]) -> Evidence:
    """An alignment of layers whose cosines are exact powers of the sizes."""
    sizes = {
        f"{r1}_{r2}_{r}": (r1, r2, r)
        for r1, r2, r in [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4)]
    }

    def cosine(powers: dict[str, float], key: str) -> float:
        r1, r2, r = sizes[key]
        return 0.05 * float(r1 ** powers["r1"] * r2 ** powers["r2"] * r ** powers["r"])

    theory = {"r1": -0.5, "r2": 0.5, "r": 0.5}
    points = {key: {"finite": cosine(theory, key), "asymptotic": cosine(theory, key)} for key in sizes}
    layers = []
    for name in ("q", "k", "v"):
        draws = {key: [cosine(exponents, key)] * 3 for key in sizes}
        layers.append(
            {
                "name": name,
                "kind": name,
                "d_in": 8,
                "d_out": 8,
                "cosines": {k: {"sgd": v, "adamw": v} for k, v in draws.items()},
            }
        )
    grid = {key: dict(zip(("r1", "r2", "r"), s, strict=True)) | {"method": "cdka"} for key, s in sizes.items()}
    settings = {"points": grid, "seeds": 3, "model": {"name": "tiny"}}
    return Evidence(
        record={"settings": settings, "layers": layers, "shapes": [{"d_in": 8, "d_out": 8, "points": points}]}
    )


@pytest.mark.parametrize(
    ("finding", "expected"),
    [
        ("exponent of r2", SUPPORTED),
        ("exponent of r1", CONTRADICTED),
        ("exponent of r", CONTRADICTED),
        ("rank correlation", CONTRADICTED),
    ],
)
def test_alignment_against_its_thresholds(finding: str, expected: str) -> None:
    test = a_test("alignment", finding=finding, thresholds={"rank_correlation": 0.9, "exponent": 0.25})
    evidence = aligned({"r2": 0.5, "r1": 0.4, "r": 0.1})
    assert verdict(test, evidence) == expected
    assert verdict(test | {"finding": "exponent of d_in"}, evidence) == NOT_RUN


@pytest.mark.parametrize(("agreeing", "expected"), [(4, SUPPORTED), (3, CONTRADICTED)])
def test_an_identity_holds_in_every_case_or_not(agreeing: int, expected: str) -> None:
    line = examine({"kind": "identity", "check": "rank", "at_least": 1}, Evidence(check=Check(agreeing, 4, "pairs")))
    assert (line.verdict, line.scale) == (expected, EXACT)


# ------------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].source == "cells"])
def test_no_kind_of_test_falls_over_what_is_missing(kind: str) -> None:
    one = ["a", "b"] if kind in ("spread", "degradation") else "a"
    two = ["c", "d"] if kind in ("spread", "degradation") else "c"
    test = a_test(kind, ours=one, theirs=two, axis="method.r2", direction="up")
    rows = [RowResult(key, key, [None, None]) for key in "abcd"]
    other = [RowResult(key, key, [record(0, 0) | {"eval": {}}]) for key in "abcd"]
    failed = [RowResult(key, key, [record(0, 0, status="failed")]) for key in "abcd"]
    for evidence in (
        Evidence(),
        Evidence(rows=rows),
        Evidence(rows=other),
        Evidence(rows=failed),
        Evidence(reason="gone"),
    ):
        line = examine(test, evidence)
        assert line.verdict == NOT_RUN
        assert line.reason


@pytest.mark.parametrize("kind", ["ratio", "alignment", "identity"])
def test_no_record_is_not_run(kind: str) -> None:
    test = a_test(kind, **RATIO, check="rank", finding="rank correlation", thresholds={"rank_correlation": 1})
    assert examine(test, Evidence()).verdict == NOT_RUN


def test_one_seed_where_three_are_wanted_decides_nothing() -> None:
    rows = [row("lora", 0, seeds=[0]), row("cdka", -0.5, seeds=[0])]
    line = examine(a_test("difference", **COMPARED), Evidence(rows=rows))
    assert (line.verdict, line.enough, line.reason) == (UNDECIDED, False, "1 seed of at least 3")
    assert line.effect is not None
    assert line.effect.low > 0


def test_rows_of_different_test_data_are_not_compared() -> None:
    other = row("cdka", 0)
    for one in other.records:
        assert one is not None
        one["eval"]["sums"]["data_sha"] = "another"
    line = examine(a_test("difference", **COMPARED), Evidence(rows=[row("lora", 0), other]))
    assert (line.verdict, line.enough) == (UNDECIDED, False)


def test_cells_that_diverged_are_told() -> None:
    rows = [row("lora", 0), row("cdka", -0.5)]
    gone = RowResult("cdka", "cdka", [*rows[1].records, record(0, 3, status="diverged")])
    line = examine(a_test("difference", **COMPARED), Evidence(rows=[rows[0], gone]))
    assert line.effect is not None
    assert line.effect.said == "diverged, in no mean: cdka 1"


# ------------------------------------------------------------------------------------------------- verdicts of claims


def line(scale: str, said: str, *, enough: bool = True, **test: Any) -> Line:
    effect = None if said == NOT_RUN else Effect(0.01, -0.02, 0.03, "points", 3, "seeds", "seeds", ("tiny",))
    made = a_test("difference", **COMPARED, scale=scale) | test
    return Line(
        made,
        Evidence(about="a setting", command="make it"),
        said,
        effect,
        enough,
        "" if enough else "1 seed of at least 3",
    )


@pytest.mark.parametrize(
    ("lines", "expected", "deciding"),
    [
        ([], NOT_RUN, 0),
        ([line("small", NOT_RUN, enough=False)], NOT_RUN, 0),
        ([line("mini", SUPPORTED), line("paper", NOT_RUN, enough=False)], SUPPORTED, 1),
        ([line("small", CONTRADICTED), line("mini", SUPPORTED)], CONTRADICTED, 1),  # the larger scale decides
        ([line("mini", SUPPORTED), line("small", UNDECIDED)], UNDECIDED, 1),
        ([line("mini", SUPPORTED), line("small", UNDECIDED, enough=False)], SUPPORTED, 1),  # too few seeds
        ([line("mini", SUPPORTED), line("mini", CONTRADICTED)], UNDECIDED, 2),
        ([line("mini", SUPPORTED), line("mini", UNDECIDED)], UNDECIDED, 2),
        ([line("mini", UNDECIDED, enough=False)], UNDECIDED, 0),
        ([line("mini", SUPPORTED, enough=False, decides=False)], NOT_RUN, 0),
    ],
)
def test_the_largest_scale_with_enough_evidence_decides(lines: list[Line], expected: str, deciding: int) -> None:
    judged = judge("c", CLAIM, lines, SCALES)
    assert (judged.verdict, len(judged.deciding)) == (expected, deciding)


def test_evidence_shown_beside_does_not_decide() -> None:
    test = a_test("difference", **COMPARED, decides=False)
    shown = examine(test, Evidence(rows=[row("lora", 0), row("cdka", -0.1)]))
    assert (shown.verdict, shown.enough, shown.reason) == (SUPPORTED, False, "shown beside")


@pytest.mark.parametrize(
    ("region", "low", "high", "expected"),
    [
        (Region(low=0), 0.1, 0.2, SUPPORTED), (Region(low=0), 0.0, 0.2, UNDECIDED), (Region(0), 0.0, 0.0, UNDECIDED),
        (Region(low=0), -0.2, -0.1, CONTRADICTED), (Region(high=0), -0.2, -0.1, SUPPORTED),
        (Region(1, 2, closed=True), 1, 2, SUPPORTED), (Region(1, 2, closed=True), 0.5, 1.5, UNDECIDED),
        (Region(1, 2, closed=True), 2.1, 3, CONTRADICTED),
    ],
)  # fmt: skip
def test_regions(region: Region, low: float, high: float, expected: str) -> None:
    assert region.verdict(Effect((low + high) / 2, low, high, "", None, "", "")) == expected


# ---------------------------------------------------------------------------------------------------- config and output


def valid() -> dict[str, Any]:
    return {"c": {**CLAIM, "evidence": [a_test("difference", **COMPARED)]}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "vote"}, "claims.c.evidence[0].kind='vote': must be one of difference, within,"),
        ({"scale": "huge"}, ".scale='huge': must be one of smoke, mini, small, paper"),
        ({"margin": -1}, ".margin=-1: must be at least 0"),
        ({"goal": "high"}, ".goal='high': must be min or max"),
        ({"colour": 1}, "colour: no setting of difference"),
        ({"kind": "trend"}, "lacks axis, direction, which trend needs"),
        ({"metrics": []}, ".metrics=[]: must be a list"),
        ({"metrics": [*SUMS, {"eval": "sums", "metric": "exact_match"}]}, "metrics of different units have no mean"),
    ],
)
def test_a_fault_of_the_config_names_its_place(change: dict[str, Any], told: str) -> None:
    claims = valid()
    claims["c"]["evidence"][0] |= change
    assert any(told in fault for fault in faults(claims, SCALES))


def test_a_claim_must_say_where_it_was_read() -> None:
    claims = valid()
    del claims["c"]["source"]
    assert faults(claims, SCALES)[0].startswith("claims.c: has paper, claim,")


def both() -> list[Judged]:
    ran = examine(
        a_test("difference", **COMPARED), Evidence("a | setting", "make it", rows=[row("lora", 0), row("cdka", -0.1)])
    )
    missing = examine(
        a_test("difference", **COMPARED, scale="paper"), Evidence("on a GPU", "make paper", reason="no record")
    )
    return [judge("one", CLAIM, [ran, missing], SCALES), judge("two", CLAIM | {"claim": "Other."}, [missing], SCALES)]


def test_markdown_counts_and_says_what_would_run_the_rest() -> None:
    text = markdown(both(), command="make claims")
    assert "Of 2 claims: 1 supported, 0 contradicted, 0 undecided, 1 not run here." in text
    assert "measured on: tiny at the scale mini. **None of it is at the papers' scale**" in text
    assert "not run here (no record; `make paper`)" in text
    assert "- table2, mini: a \\| setting." in text
    for row_text in (r for r in text.splitlines() if r.startswith("|")):
        assert row_text.replace("\\|", "").count("|") == 7


def test_data_and_csv_hold_the_same_numbers() -> None:
    judged = both()
    data = as_data(judged)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["counts"] == {SUPPORTED: 1, CONTRADICTED: 0, UNDECIDED: 0, NOT_RUN: 1}
    first = data["claims"][0]["evidence"][0]
    assert first["decides"]
    assert first["low"] < first["effect"] < first["high"]
    assert first["count"] == 3
    rows = list(csv.DictReader(io.StringIO(as_csv(judged))))
    assert [r["claim"] for r in rows] == ["one", "one", "two"]
    assert float(rows[0]["effect"]) == first["effect"]
    assert rows[1]["effect"] == ""
    assert rows[1]["verdict"] == NOT_RUN


def test_the_same_records_give_the_same_bytes() -> None:
    assert markdown(both(), command="x") == markdown(both(), command="x")
    assert as_csv(both()) == as_csv(both())
