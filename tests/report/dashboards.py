"""What the dashboard's tests share: a made-up store of cells, the sections of it, and pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronlab.report.dashboard import Section, html, page_data
from kronlab.report.dashboard.charts import charts_of
from kronlab.report.figures.points import Source
from kronlab.report.tables import RowResult, build

METHODS = ("none", "lora", "cdka", "kron_lora", "dora", "pissa", "krona", "full")
SPEC: dict[str, Any] = {
    "name": "table5",
    "title": "A made-up table",
    "baseline": "lora",
    "rows": {name: {"overrides": [f"method={name}"]} for name in METHODS},
    "scales": {
        "mini": {
            "about": "made-up numbers",
            "columns": [
                {"eval": "sums", "metric": "exact_match", "title": "two sums"},
                {"eval": "sums", "metric": "nll_per_token", "title": "sums NLL"},
            ],
            "figures": [
                {"kind": "curves", "name": "curves", "eval": "sums", "metric": "exact_match", "baseline": "lora",
                 "panels": [{"axis": "method.r", "rows": ["cdka", "kron_lora"], "title": "rank"}]},
                {"kind": "forest", "name": "forest", "eval": "sums", "metric": "nll_per_token"},
            ],
        }
    },
}  # fmt: skip


def record(method: str, seed: int | None, *, label: str = "", status: str = "done", n: int = 6) -> dict[str, Any]:
    """A record whose numbers differ from cell to cell."""
    place = METHODS.index(method)
    right = [int((i + place + (seed or 0)) % 3 > 0) for i in range(n)]
    nll = [1.0 + 0.1 * place + 0.01 * i + 0.02 * (seed or 0) for i in range(n)]
    mean = sum(right) / n
    found: dict[str, Any] = {
        "id": f"{place:02x}{seed or 0:010x}",
        "scale": "mini",
        "label": label or f"label of {method}",
        "status": status,
        "error": "RuntimeError: it failed" if status == "failed" else None,
        "config": {"model": {"name": "toy"}, "method": {"name": method, "r": 2 + place}},
        "command": f"python scripts/train.py method={method} seed={seed}",
        "git": {"commit": "c0ffee", "dirty": False},
        "finished": "2026-01-02T03:04:05+00:00",
        "machine": {"gpu": None, "cpu": "a CPU", "cpu_capability": "none", "threads": 1},
        "versions": {"torch": "1", "transformers": "1", "peft": "1"},
    }
    if seed is not None:
        found["config"] |= {"seed": seed, "task": {"name": "sums", "n": 10}}
        found["config"]["trainer"] = {"lr": 1e-3, "batch_size": 4, "max_steps": 3, "epochs": 1, "precision": "fp32"}
    if status != "done":
        return found
    metrics = {
        "exact_match": {"value": mean, "n": n, "stderr": 0.1},
        "nll_per_token": {"value": sum(nll) / n, "n": n, "stderr": 0.05},
    }
    samples = {"id": [f"{i}" for i in range(n)], "correct": right, "nll": nll, "nll_tokens": [1] * n}
    train = {"seconds": 2.5, "tokens_per_s": 10.0, "peak_memory_bytes": 2**30, "final_loss": 0.5}
    return found | {
        "parameters": {"trainable": 0 if method == "none" else 1000 * place},
        "train": None if seed is None else train,
        "eval": {"sums": {"metrics": metrics, "data_sha": "s", "samples": samples}},
    }


def rows(seeds: int = 3, *, label: str = "") -> list[RowResult]:
    """Every method at several seeds; of the last ones a cell that failed, one that diverged, and one not run."""
    found = []
    for method in METHODS:
        told = f"{label} {method}" if label else f"label of {method}"
        numbers: Sequence[int | None] = [None] if method == "none" else range(seeds)
        cells: list[dict[str, Any] | None] = [record(method, seed, label=told) for seed in numbers]
        if method == "krona":
            cells = [record(method, seed, label=told, status="diverged") for seed in numbers]
        elif method == "pissa":
            cells[0] = record(method, 0, label=told, status="failed")
        elif method == "dora":
            cells[-1] = None
        found.append(RowResult(method, told, cells))
    return found


def write_store(results: Path, found: Sequence[RowResult]) -> None:
    """The records of rows, and loss curves of some, as a store has them."""
    for row in found:
        for one in row.records:
            if one is not None:
                path = results / "runs" / "mini" / f"{one['id']}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(one))
                if row.key in ("lora", "cdka") and one["status"] == "done":
                    loss = path.with_suffix("") / "loss.jsonl"
                    loss.parent.mkdir(exist_ok=True)
                    lines = [{"step": step, "loss": 2 / step} for step in range(1, 41)]
                    loss.write_text("".join(json.dumps(line) + "\n" for line in lines))


def section_of(found: Sequence[RowResult], results: Path) -> Section:
    source = Source(SPEC, "mini", found, results)
    return Section(
        build(SPEC, "mini", found),
        number="table5",
        about="made-up numbers",
        command="make reproduce-table5 SCALE=mini",
        rows={row.key: row for row in found},
        baselines={row.key: "lora" for row in found if row.key != "lora"},
        methods={row.key: row.key for row in found},
        charts=charts_of(source),
    )


CLAIMS: dict[str, Any] = {
    "schema": 1,
    "counts": {"supported": 1, "contradicted": 0, "undecided": 0, "not run here": 0},
    "claims": [
        {"key": "more", "paper": "CDKA", "claim": "More is more.", "source": "abstract", "confidence": "H",
         "verdict": "supported", "why": "",
         "evidence": [{"table": "table5", "scale": "mini", "test": {}, "told": "gain in sums", "about": "",
                       "command": "",
                       "verdict": "supported", "decides": True, "reason": "", "effect": 0.031, "low": 0.012,
                       "high": 0.05, "unit": "points", "count": 3, "counted": "seeds", "interval_over": "samples",
                       "models": ["toy"], "said": ""}]}
    ],
}  # fmt: skip


def data_of(found: Sequence[RowResult], results: Path) -> dict[str, Any]:
    records = [one for row in found for one in row.records if one is not None]
    absent = [{"name": "table7", "title": "Not run", "scale": "mini", "command": "make reproduce-table7 SCALE=mini"}]
    return page_data([section_of(found, results)], absent, records, CLAIMS)


def write_page(results: Path, found: Sequence[RowResult]) -> Path:
    """A store, and its page beside the records."""
    write_store(results, found)
    path = results / "dashboard.html"
    path.write_text(html(data_of(found, results), results="."), encoding="utf-8")
    return path
