"""The sequential table: which records make which number, what is paired with what, and what is said where one lacks."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kronlab.cell import CONFIG_DIR
from kronlab.errors import ConfigError
from kronlab.layout import plan
from kronlab.report.figures import draw
from kronlab.report.sequential import (
    Task,
    arm,
    backward,
    build,
    chains_of,
    overall,
    pairs_of,
    retention,
    tasks_of,
    trained_on,
)
from kronlab.report.tables import RowResult

N = 40
A, B = Task("a", "a", "acc", "Task A"), Task("b", "b", "acc", "Task B")
SPEC: dict[str, Any] = {
    "name": "table10",
    "kind": "sequential",
    "title": "Kept",
    "baseline": "lora",
    "published": {"note": "Somebody's numbers."},
    "rows": {
        "base": {"overrides": ["method=none"]},
        "lora": {"overrides": ["method=lora"]},
        "kron_lora": {"overrides": ["method=kron_lora"]},
    },
    "tasks": {name: {"eval": name, "metric": "acc", "title": f"Task {name.upper()}"} for name in "ab"},
    "scales": {
        "mini": {
            "about": "synthetic",
            "rows": ["base", "lora", "kron_lora"],
            "tasks": ["a", "b"],
            "figures": [{"kind": "kept", "name": "kept"}],
        }
    },
}


def section(right: Sequence[int]) -> dict[str, Any]:
    value = sum(right) / len(right)
    ids = [f"x/{i}" for i in range(len(right))]
    return {
        "metrics": {"acc": {"value": value, "n": len(right), "stderr": 0.05}},
        "samples": {"id": ids, "correct": list(right)},
        "data_sha": "same",
    }


def first(count: int) -> list[int]:
    """The first `count` of N samples are right."""
    return [int(i < count) for i in range(N)]


def record(method: str, tasks: str, seed: int, **right: Sequence[int]) -> dict[str, Any]:
    """`tasks`: one letter for each, in training order; none for the base model."""
    config: dict[str, Any] = {"method": {"name": method}, "eval": {}}
    if tasks:
        config |= {
            "task": {"name": tasks[-1], "n": 9},
            "seed": seed,
            "trainer": {"lr": 0.1, "batch_size": 8, "max_steps": 3, "epochs": 1, "precision": "fp32"},
        }
    if len(tasks) > 1:
        config["after"] = [{"name": name} for name in tasks[:-1]]
    return {
        "id": f"{method}-{tasks}-{seed}",
        "status": "done",
        "label": method,
        "command": "python scripts/train.py",
        "config": config,
        "eval": {name: section(values) for name, values in right.items()},
        "parameters": {"trainable": 1000 if tasks else 0},
        "train": {"steps": 3} if tasks else None,
        "machine": {"gpu": None, "cpu": "c", "cpu_capability": "AVX", "threads": 1},
        "versions": {"torch": "2", "transformers": "5", "peft": "0"},
    }


def row(method: str, *counts: tuple[int, int, int, int, int, int], **changes: Any) -> RowResult:
    """One seed for each tuple: right on a after a; b after b; a, b after a-b; b, a after b-a."""
    records: list[Mapping[str, Any] | None] = []
    for seed, (aa, bb, a_ab, b_ab, b_ba, a_ba) in enumerate(counts):
        records += [
            record(method, "a", seed, a=first(aa)),
            record(method, "b", seed, b=first(bb)),
            record(method, "ab", seed, a=first(a_ab), b=first(b_ab)),
            record(method, "ba", seed, b=first(b_ba), a=first(a_ba)),
        ]
    return RowResult(method, f"{method} r=8", records, **changes)


LORA = row("lora", (32, 24, 16, 28, 12, 30), (30, 20, 20, 26, 10, 30))
KRON = row("kron_lora", (32, 24, 30, 28, 20, 30), (30, 20, 28, 26, 18, 30))
BASE = RowResult("base", "base model", [record("none", "", 0, a=first(8), b=first(10))])


def test_each_number_is_of_its_own_records() -> None:
    found = retention(LORA, A, B)
    assert found.first == pytest.approx((32 + 30) / 2 / N)
    assert found.kept == pytest.approx((16 + 20) / 2 / N)
    assert found.second == pytest.approx((24 + 20) / 2 / N)
    assert found.reached == pytest.approx((28 + 26) / 2 / N)
    assert found.forgetting is not None
    assert found.forgetting.mean == pytest.approx((16 + 10) / 2 / N)
    assert found.transfer is not None
    assert found.transfer.mean == pytest.approx((4 + 6) / 2 / N)
    assert found.share is not None
    assert found.share.mean == pytest.approx(36 / 62)
    other = retention(LORA, B, A)
    assert other.first == found.second
    assert other.kept == pytest.approx((12 + 10) / 2 / N)
    assert other.transfer is not None
    assert other.transfer.mean == pytest.approx((-2 + 0) / 2 / N)


def test_the_interval_of_the_share_is_that_of_a_plain_bootstrap() -> None:
    """One seed: resample the questions and divide."""
    rng = np.random.default_rng(0)
    before, after = rng.integers(2, size=400), rng.integers(2, size=400)
    before |= after  # forgets some, learns none
    alone = RowResult("lora", "LoRA", [record("lora", "a", 0, a=before.tolist())])
    both = RowResult("lora", "LoRA", [record("lora", "ab", 0, a=after.tolist())])
    share = retention(RowResult("lora", "LoRA", [*alone.records, *both.records]), A, B).share
    assert share is not None
    drawn = rng.integers(400, size=(4000, 400))
    ratios = after[drawn].sum(1) / before[drawn].sum(1)
    assert share.mean == pytest.approx(after.sum() / before.sum())
    assert [share.low, share.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.01)


def test_nothing_forgotten_and_nothing_known() -> None:
    same = retention(row("lora", (20, 20, 20, 20, 20, 20)), A, B)
    assert same.share is not None
    assert (same.share.mean, same.share.low, same.share.high) == (1, 1, 1)
    assert same.forgetting is not None
    assert not same.forgetting.excludes_zero
    nothing = retention(row("lora", (0, 20, 0, 20, 20, 0)), A, B)
    assert nothing.share is None, "a share of nothing"
    assert nothing.kept == 0


def test_a_missing_or_failed_arm_leaves_its_numbers_empty() -> None:
    records = [r for r in LORA.records if r is not None and trained_on(r) != ("a",)]
    found = retention(RowResult("lora", "LoRA", [*records, None]), A, B)
    assert (found.first, found.share, found.forgetting) == (None, None, None)
    assert found.kept is not None
    assert found.transfer is not None
    failed = [{**r, "status": "failed"} if r is not None else None for r in LORA.records]
    assert retention(RowResult("lora", "LoRA", failed), A, B).kept is None


def test_arms_are_told_apart_by_the_order_of_their_tasks() -> None:
    assert [r["id"] for r in arm(LORA, "a", "b").records if r] == ["lora-ab-0", "lora-ab-1"]
    assert [r["id"] for r in arm(LORA, "b").records if r] == ["lora-b-0", "lora-b-1"]
    assert arm(LORA, "a", "b", "a").records == []
    assert trained_on(BASE.records[0]) == ()  # type: ignore[arg-type]


def test_the_table(tmp_path: Path) -> None:
    published = {"a>b": {"value": 55.18, "source": "a paper", "confidence": "H"}}
    kron = row("kron_lora", (32, 24, 30, 28, 20, 30), (30, 20, 28, 26, 18, 30), published=published)
    table = build(SPEC, "mini", [BASE, LORA, kron])
    assert table.keys == ["a>b/lora", "a>b/kron_lora", "b>a/lora", "b>a/kron_lora", "mean/lora", "mean/kron_lora"]
    assert table.groups[::2] == ["Task A → Task B", "Task B → Task A", "mean of all pairs"]
    by_title = {column.title: column for column in table.columns}
    kept = by_title["first task, after the second (%)"]
    assert kept.values == pytest.approx([45, 72.5, 27.5, 47.5, 36.25, 60])
    assert kept.cells[:2] == ["45.0", "72.5"]
    assert by_title["first task, after the second: published (%)"].cells == ["", "55.18 [H]", "", "", "", ""]
    forgetting = by_title["forgetting (points)"]
    assert forgetting.values == pytest.approx([32.5, 5, 27.5, 7.5, 30, 6.25])
    assert forgetting.cells[0].startswith("+32.5 [")
    assert forgetting.cells[0].endswith("]"), "two seeds are too few for an interval that excludes 0"
    assert forgetting.cells[4].startswith("+30.0 [")
    assert by_title["kept share (%)"].more["low"][4:] == [None, None]
    apart = by_title["first task, after the second: difference to lora r=8 (points)"]
    assert apart.values[1] == pytest.approx(27.5)
    assert apart.values[0] is None
    assert "Untrained: Task A 20.0 %, Task B 25.0 %." in table.notes
    assert "Published numbers: a paper [H]. Somebody's numbers." in table.notes
    assert not any("Not run yet" in note for note in table.notes)
    table.write(tmp_path)
    lines = list(csv.DictReader((tmp_path / "table10.seeds.csv").open()))
    assert {line["trained on"] for line in lines} == {"", "a", "b", "a > b", "b > a"}
    assert sum(line["trained on"] == "a > b" for line in lines) == 8  # two rows, two seeds, two tasks
    assert len((tmp_path / "table10.csv").read_text().splitlines()) == 7
    assert "\\to" in (tmp_path / "table10.tex").read_text()


def test_the_interval_of_a_mean_over_pairs_knows_that_they_share_samples_and_seeds() -> None:
    """Two pairs that say the same of the same samples are no better known than one of them."""
    twice = row("lora", (32, 32, 16, 32, 16, 32), (30, 30, 20, 30, 20, 30))
    one, both = retention(twice, A, B), overall(twice, KRON, [(A, B), (B, A)])
    for pair, mean in ((one.forgetting, both.forgetting), (one.transfer, both.transfer)):
        assert pair is not None
        assert mean is not None
        assert (mean.mean, mean.low, mean.high) == pytest.approx((pair.mean, pair.low, pair.high))
    assert both.apart is not None
    assert both.apart.mean == pytest.approx(((16 - 30) + (20 - 28) + (16 - 20) + (20 - 18)) / 4 / N)
    assert overall(twice, None, [(A, B), (B, A)]).apart is None


C = Task("c", "c", "acc", "Task C")
CHAINED: dict[str, Any] = {
    **SPEC,
    "tasks": {name: {"eval": name, "metric": "acc", "title": f"Task {name.upper()}"} for name in "abc"},
    "scales": {"mini": {**SPEC["scales"]["mini"], "chains": [["a", "b", "c"]]}},
}


def chained(method: str, a: Sequence[int], b: Sequence[int], c: int) -> RowResult:
    """One seed: right on a after a, a-b, a-b-c; on b after a-b, a-b-c; on c after a-b-c."""
    return RowResult(
        method,
        f"{method} r=8",
        [
            record(method, "a", 0, a=first(a[0])),
            record(method, "b", 0, b=first(30)),
            record(method, "ab", 0, a=first(a[1]), b=first(b[0])),
            record(method, "ba", 0, a=first(30), b=first(30)),
            record(method, "abc", 0, a=first(a[2]), b=first(b[1]), c=first(c)),
        ],
    )


def test_a_longer_chain_is_a_table_of_its_own(tmp_path: Path) -> None:
    lora, kron = chained("lora", (32, 24, 12), (28, 20), 16), chained("kron_lora", (32, 28, 24), (28, 26), 16)
    transfer = backward(lora, [A, B, C])
    assert transfer is not None
    assert transfer.mean == pytest.approx(((12 - 32) + (20 - 28)) / 2 / N)
    assert backward(lora, [A]) is None
    table = build(CHAINED, "mini", [BASE, lora, kron])
    (chain,) = table.more
    assert chain.groups[::2] == ["Task A", "Task A → Task B", "Task A → Task B → Task C"]
    by_title = {column.title: column.values for column in chain.columns}
    assert by_title["Task A (%)"] == pytest.approx([80, 80, 60, 70, 30, 60])
    assert by_title["Task B (%)"] == [None, None, *map(pytest.approx, (70, 70, 50, 65))]
    assert by_title["Task C (%)"] == [None] * 4 + [pytest.approx(40)] * 2
    assert by_title["mean of the tasks so far (%)"] == pytest.approx([80, 80, 65, 70, 40, 55])
    assert by_title["backward transfer (points)"] == [None, None, *map(pytest.approx, (-20, -10, -35, -12.5))]
    assert by_title["mean so far: difference to lora r=8 (points)"][1::2] == pytest.approx([0, 5, 15])
    assert {path.name for path in table.write(tmp_path)} >= {"table10.md", "table10-chains.md", "table10-chains.csv"}


def test_a_chain_that_lacks_a_stage_shows_what_there_is() -> None:
    lora = chained("lora", (32, 24, 12), (28, 20), 16)
    records = [r for r in lora.records if r is not None]
    (chain,) = build(CHAINED, "mini", [RowResult("lora", "LoRA", [*records[:2], *records[3:]])]).more
    assert next(c.values for c in chain.columns if c.title == "Task A (%)") == [80, None, 30]
    assert next(c.values for c in chain.columns if c.title.startswith("backward")) == [None, None, None]
    assert build(CHAINED, "mini", [RowResult("lora", "LoRA", records[:4])]).more == [], "nothing of it was run"
    assert chains_of(SPEC, "mini") == []


def test_a_chain_of_unknown_tasks_is_one_line() -> None:
    spec = {**CHAINED, "scales": {"mini": {**CHAINED["scales"]["mini"], "chains": [["a", "b", "z"]]}}}
    with pytest.raises(ConfigError, match="scale mini: chains: no task 'z'; it has a, b, c"):
        build(spec, "mini", [BASE, LORA])


def test_a_mean_needs_every_pair() -> None:
    records = [r for r in LORA.records if r is not None and trained_on(r) != ("b", "a")]
    table = build(SPEC, "mini", [RowResult("lora", "LoRA", [*records, None, None])])
    kept = next(column for column in table.columns if column.title == "first task, after the second (%)")
    assert kept.values == [pytest.approx(45), None, None]
    assert kept.cells[1:] == ["", ""]
    assert any(note.startswith("Not run yet: LoRA (2") for note in table.notes)


def test_without_any_record_there_is_a_table_of_blanks() -> None:
    rows = [RowResult(key, key, [None] * 4) for key in ("base", "lora", "kron_lora")]
    table = build(SPEC, "mini", rows)
    assert len(table.keys) == 6
    assert all(cell == "" for column in table.columns for cell in column.cells)


def test_the_figure_draws_both_ends_of_each_pair(tmp_path: Path) -> None:
    folder = tmp_path / "figures" / "mini"
    written = draw(SPEC, "mini", [BASE, LORA, KRON], folder)
    assert sorted(path.name for path in written) == ["table10_kept.csv", "table10_kept.png", "table10_kept.svg"]
    points = list(csv.DictReader((folder / "table10_kept.csv").open()))
    means = [point for point in points if not point["record"]]
    assert len(means) == 8  # two pairs, two rows, two ends
    values = {(p["panel"], p["key"], float(p["x"])): float(p["value"]) for p in means}
    assert values["Task A, then Task B", "lora", 0] == pytest.approx(77.5)
    assert values["Task A, then Task B", "lora", 1] == pytest.approx(45)
    before = (folder / "table10_kept.svg").read_bytes()
    draw(SPEC, "mini", [BASE, LORA, KRON], folder)
    assert (folder / "table10_kept.svg").read_bytes() == before
    assert draw(SPEC, "mini", [BASE], tmp_path / "none") == [], "nothing to draw yet"


# ---- the configs ----


@pytest.mark.parametrize("scale", ["smoke", "mini", "small"])
def test_arms_of_table_10_are_its_tasks_all_their_pairs_and_its_chains(scale: str) -> None:
    spec = yaml.safe_load((CONFIG_DIR / "table" / "table10.yaml").read_text())
    layout = spec["scales"][scale]
    pairs = pairs_of(spec, scale)
    orders = [(task,) for task in tasks_of(spec, scale)] + [*pairs]
    orders += [tuple(chain[:k]) for chain in chains_of(spec, scale) for k in range(1, len(chain) + 1)]
    assert set(layout["arms"]) == {">".join(task.name for task in order) for order in orders}
    one = {**spec, "scales": {scale: {**layout, "rows": ["lora"], "seeds": [0]}}}
    (row,), _ = plan(one, scale, weights_needed=False, every_eval=True)
    for part in row.parts:
        trained = [task["name"] for task in [*(part.cell.config.get("after") or []), part.cell.config["task"]]]
        assert ">".join(trained) == part.arm
        for name in trained:
            judged = spec["tasks"][name]
            assert judged["eval"] in part.cell.config["eval"]
            metrics = part.cell.config["eval"][judged["eval"]].get("metrics")
            assert metrics is None or metrics[0] == judged["metric"], "the metric that the samples are of"
    trained_as = {part.arm: part.cell.train_id for part in row.parts}
    for part in row.parts:
        if part.cell.before is not None:
            assert part.cell.before.train_id == trained_as[part.arm.rpartition(">")[0]], "what came before is shared"


def test_rows_of_table_11_share_their_training() -> None:
    spec = yaml.safe_load((CONFIG_DIR / "table" / "table11.yaml").read_text())
    rows, _ = plan(spec, "smoke", weights_needed=False)
    by_group: dict[str, set[str]] = {}
    for row in rows:
        by_group.setdefault(row.group, set()).update(cell.train_id for cell in row.cells)
    assert [len(ids) for ids in by_group.values()] == [1, 1]
    assert len({cell.id for row in rows for cell in row.cells}) == 6
    assert rows[0].label == "lora r=8, 16 bits (fp16)"
