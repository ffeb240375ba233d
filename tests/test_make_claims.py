"""Claims from end to end: tiny cells are run and judged, and what is committed is what the committed records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kronlab.cell import CONFIG_DIR, SCALES, compose_config
from kronlab.claims import CHECKS, judge_claims, write_claims
from kronlab.errors import ConfigError
from kronlab.report.claim_tests import KINDS, NOT_RUN, SUPPORTED
from kronlab.report.claims import evidence_of, faults, rows_of
from kronlab.reproduce import reproduce

ROOT = CONFIG_DIR.parent


def config(name: str, *overrides: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(compose_config(overrides, name=name), resolve=True)
    assert isinstance(plain, dict)
    return plain


def shipped() -> dict[str, Any]:
    claims = config("claims")["claims"]
    assert isinstance(claims, dict)
    return claims


def a_claim(*evidence: dict[str, Any], **test: Any) -> dict[str, Any]:
    said = {"paper": "CDKA", "claim": "It is so.", "source": "abstract", "confidence": "H"}
    return {**said, "test": test, "evidence": list(evidence)}


def test_cells_that_were_run_are_judged(tmp_path: Path) -> None:
    """The whole road at scale smoke: table 2 is trained, then two of its rows are compared by likelihood."""
    reproduce(config("tables", "table=table2")["table"], scale="smoke", results_dir=str(tmp_path))
    compared = {
        "kind": "within",
        "ours": "kron_lora",
        "theirs": "lora",
        "margin": 100,
        "goal": "min",
        "table": "table2",
    }
    metrics = [{"eval": "chain_sum", "metric": "nll_per_token"}]
    claims = {
        "near": a_claim({"scale": "smoke"}, {"scale": "paper"}, **compared, metrics=metrics),
        "typo": a_claim({"scale": "smoke", "ours": "kronlora"}, **compared, metrics=metrics),
        "eval": a_claim({"scale": "smoke", "metrics": [{"eval": "sums", "metric": "nll_per_token"}]}, **compared),
    }
    near, typo, no_eval = judge_claims(claims, tmp_path)
    assert near.verdict == SUPPORTED  # not 100 nats/token worse
    effect = near.lines[0].effect
    assert effect is not None
    assert effect.models == ("tiny_llama",)
    assert effect.low <= effect.value <= effect.high
    assert near.lines[1].reason == "no record"
    assert near.lines[1].evidence.command == "make reproduce-table2 SCALE=paper"
    assert typo.verdict == NOT_RUN
    assert "no row kronlora" in typo.lines[0].reason
    assert no_eval.verdict == NOT_RUN
    assert "kron_lora on sums nll_per_token" in no_eval.lines[0].reason
    paths = write_claims(claims, tmp_path)
    before = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["claims.md", "claims.csv", "claims.json"]
    assert [path.read_bytes() for path in write_claims(claims, tmp_path)] == before
    assert json.loads(before[-1])["counts"][SUPPORTED] == 1


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ({"ours": "a", "theirs": "g/b"}, {"a", "g/b"}),
        ({"ours": ["a", "b"], "theirs": ["c", "d"]}, {"a", "b", "c", "d"}),
        ({"axis": "method.r", "rows": ["a"]}, {"a"}),
        ({"axis": "method.r"}, None),
    ],
)
def test_only_rows_that_are_looked_at_are_planned(test: dict[str, Any], expected: set[str] | None) -> None:
    assert rows_of(test) == expected


def test_without_records_nothing_is_run_and_nothing_falls_over(tmp_path: Path) -> None:
    claims = {key: claim for key, claim in shipped().items() if key != "cdka_parameters" and key != "kron_parameters"}
    claims["later"] = a_claim({"table": "table99", "scale": "mini"}, kind="identity", check="rank")
    claims["later"]["evidence"][0] |= {"kind": "ratio", "case": "1x1 fp32", "quantity": "wall", "range": [0, 1]}
    claims["later"]["test"] = {"ours": "a", "theirs": "b"}
    judged = {j.key: j for j in judge_claims(claims, tmp_path)}
    assert judged.pop("kron_rank").verdict == SUPPORTED  # it needs none
    assert {j.verdict for j in judged.values()} == {NOT_RUN}
    assert judged["later"].lines[0].reason == "there is no table99"
    assert not list(tmp_path.iterdir())


def test_a_record_that_is_not_whole_is_said_and_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "mini" / "table9.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    (judged,) = judge_claims({"kron_memory": shipped()["kron_memory"]}, tmp_path)
    assert judged.verdict == NOT_RUN
    assert "is not a whole record" in judged.lines[0].reason


def test_a_claim_that_is_set_wrongly_is_refused(tmp_path: Path) -> None:
    wrong = {"c": a_claim({"table": "table2", "scale": "smoke"}, kind="difference")}
    with pytest.raises(ConfigError, match=r"claims\.c\.evidence\[0\]: lacks goal, margin, metrics, ours, theirs"):
        judge_claims(wrong, tmp_path)
    with pytest.raises(ConfigError, match="check='sum': must be one of rank, parameters"):
        judge_claims({"c": a_claim({"kind": "identity", "check": "sum"})}, tmp_path)


# ---- what is shipped and committed ----


def test_shipped_claims_name_what_the_tables_have() -> None:
    claims = shipped()
    assert faults(claims, SCALES) == []
    for key, claim in claims.items():
        for test in evidence_of(claim):
            if KINDS[test["kind"]].source == "check":
                assert test["check"] in CHECKS
            elif (CONFIG_DIR / "table" / f"{test['table']}.yaml").is_file():
                _fits(key, test, config("tables", f"table={test['table']}")["table"])


def _fits(key: str, test: dict[str, Any], spec: dict[str, Any]) -> None:
    assert test["scale"] in spec["scales"], f"{key}: {spec['name']} has no scale {test['scale']}"
    layout = spec["scales"][test["scale"]]
    for side in ("ours", "theirs"):
        for name in [test[side]] if isinstance(test.get(side), str) else test.get(side, []):
            group, _, row = name.rpartition("/")
            assert row in layout.get("rows", layout.get("peers", [])), f"{key}: {spec['name']} has no row {row}"
            assert group in (layout.get("groups") or {"": None}), f"{key}: {spec['name']} has no group {group}"
    columns = [column for column in layout.get("columns", []) if "eval" in column]
    for part in test.get("metrics", []):
        known = [(column["eval"], column["metric"]) for column in columns]
        assert not columns or (part["eval"], part["metric"]) in known, f"{key}: {spec['name']} does not show {part}"


def test_the_readme_counts_the_verdicts_that_are_committed() -> None:
    counts = next(line for line in (ROOT / "results" / "claims.md").read_text().splitlines() if line.startswith("Of "))
    assert counts in (ROOT / "README.md").read_text()


def test_committed_claims_are_what_the_committed_records_say(tmp_path: Path) -> None:
    committed = ROOT / "results"
    if not (committed / "claims.md").is_file():
        pytest.skip("no claims are committed yet")
    (tmp_path / "results").mkdir()
    for kind in ("runs", "bench", "align"):
        (tmp_path / "results" / kind).symlink_to(committed / kind)
    for path in write_claims(shipped(), tmp_path / "results"):
        assert path.read_text() == (committed / path.name).read_text(), f"{path.name}: type make claims"
