"""From the config of the claims to results/claims.md: load what each test looks at, judge, write (docs/claims.md).

What is not there is said, and stops nothing: a table without records, a row that a table lacks, an eval without data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from omegaconf import DictConfig, OmegaConf

from kronlab.align import read_record as read_alignment
from kronlab.bench.run import read_record as read_bench
from kronlab.cell import CONFIG_DIR, SCALES, compose_config
from kronlab.errors import ConfigError, KronlabError
from kronlab.plan import make_plan
from kronlab.report.claim_tests import KINDS, Check, Evidence
from kronlab.report.claims import Judged, as_csv, as_data, evidence_of, examine, faults, judge, markdown, rows_of
from kronlab.reproduce import load_rows
from kronlab.runs import write_json


def judge_claims(claims: Mapping[str, Any], results: str | Path) -> list[Judged]:
    """Every claim with its verdict, in the order of the config.

    Args:
        claims: by key, as in configs/claims.yaml.

    Raises:
        ConfigError: all faults of the config, one a line.
    """
    found = faults(claims, SCALES)
    if found:
        raise ConfigError("\n".join(found))
    tests = {key: evidence_of(claim) for key, claim in claims.items()}
    load = _Loader(Path(results), [test for of_claim in tests.values() for test in of_claim])
    return [
        judge(key, claim, [examine(test, load(test)) for test in tests[key]], SCALES) for key, claim in claims.items()
    ]


def write_claims(claims: Mapping[str, Any], results: str | Path, *, command: str = "make claims") -> list[Path]:
    """Judge the claims and write <results>/claims.md, .json and .csv; return their paths."""
    judged, folder = judge_claims(claims, results), Path(results)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"claims.{suffix}" for suffix in ("md", "csv", "json")]
    for path, text in zip(paths, (markdown(judged, command=command), as_csv(judged)), strict=False):
        scratch = path.with_suffix(f"{path.suffix}.tmp")
        scratch.write_text(text)
        scratch.replace(path)
    write_json(paths[-1], as_data(judged))
    return paths


# ------------------------------------------------------------------------------------------------------------- loading


class _Loader:
    """Evidence by table and scale, each read once, and of a table the rows that `tests` look at."""

    def __init__(self, results: Path, tests: Sequence[Mapping[str, Any]]) -> None:
        self.results, self.tests = results, tests
        self._found: dict[tuple[str, str], Evidence] = {}

    def __call__(self, test: Mapping[str, Any]) -> Evidence:
        if KINDS[test["kind"]].source == "check":
            return Evidence(check=CHECKS[test["check"]](test)) if test["check"] in CHECKS else _unknown_check(test)
        at = (test["table"], test["scale"])
        if at not in self._found:
            self._found[at] = self._load(*at)
        return self._found[at]

    def _load(self, table: str, scale: str) -> Evidence:
        if not (CONFIG_DIR / "table" / f"{table}.yaml").is_file():
            return Evidence(reason=f"there is no {table}")
        spec: Any = OmegaConf.to_container(compose_config([f"table={table}"], name="tables").table, resolve=True)
        if scale not in spec["scales"]:
            return Evidence(reason=f"{table} has no scale {scale}")
        about = " ".join(spec["scales"][scale]["about"].split())
        command = f"make reproduce-{table} SCALE={scale}"
        try:
            return Evidence(about, command, **self._read(spec, scale))
        except KronlabError as error:
            return Evidence(about, command, reason=" ".join(str(error).split()))

    def _read(self, spec: Mapping[str, Any], scale: str) -> dict[str, Any]:
        kind, name = spec.get("kind", "cells"), spec["name"]
        if kind in ("bench", "align"):
            record = (read_bench if kind == "bench" else read_alignment)(self.results, scale, name)
            return {"record": record} if record is not None else {"reason": "no record"}
        if not any((self.results / "runs" / scale).glob("*.json")):  # planning takes seconds
            return {"reason": "no record"}
        layout = spec["scales"][scale]
        named = [rows_of(test) for test in self.tests if (test.get("table"), test.get("scale")) == (name, scale)]
        if None not in named:  # a tuned row takes seconds to plan
            wanted = {key.rpartition("/")[2] for keys in named for key in keys or ()}
            layout = {**layout, "rows": [key for key in layout["rows"] if key in wanted]}
        rows = load_rows({**spec, "scales": {scale: layout}}, scale, self.results)
        return {"rows": rows} if any(r is not None for row in rows for r in row.records) else {"reason": "no record"}


def _unknown_check(test: Mapping[str, Any]) -> Evidence:
    raise ConfigError(f"check={test['check']!r}: must be one of {', '.join(CHECKS)}")


# -------------------------------------------------------------------------------------------------------------- checks


def kronecker_rank(_: Mapping[str, Any]) -> Check:
    """rank(A ⊗ B) = rank(A)·rank(B) for random matrices of every pair of ranks from 0 to 4, in fp64."""
    rng = np.random.default_rng(0)

    def of_rank(rank: int) -> np.ndarray:
        rows, columns = rng.integers(4, 9, size=2)
        left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
        return np.asarray(left @ right)

    agreeing, pairs = 0, list(itertools.product(range(5), repeat=2)) * 4
    for a, b in pairs:
        agreeing += int(np.linalg.matrix_rank(np.kron(of_rank(a), of_rank(b)))) == a * b
    return Check(
        agreeing, len(pairs), "pairs of random matrices, of 4 to 8 rows and columns and ranks from 0 to 4, in fp64"
    )


def parameter_counts(test: Mapping[str, Any]) -> Check:
    """Trainable parameters of each of `anchors` ({overrides, count}), counted on the meta device, against its count."""
    counts = [_counted(tuple(anchor["overrides"])) == anchor["count"] for anchor in test["anchors"]]
    return Check(sum(counts), len(counts), "published or derived counts, exactly")


@cache
def _counted(overrides: tuple[str, ...]) -> int:
    config: DictConfig = compose_config(overrides, name="plan")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return int(make_plan(plain["model"], plain["method"])["trainable_params"])


CHECKS: Final[Mapping[str, Callable[[Mapping[str, Any]], Check]]] = {
    "rank": kronecker_rank,
    "parameters": parameter_counts,
}
"""What needs no records, by the `check` of a test of kind identity."""
