"""Tables from records made by hand: every number against a formula of the test's own, every file read back."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kronlab.errors import ConfigError
from kronlab.report.paired import difference, mean_difference
from kronlab.report.tables import RowResult, Table, build, unit_of

NLL_SPEC = {"eval": "sums", "metric": "nll_per_token", "title": "sums NLL"}
SPEC: dict[str, Any] = {
    "name": "table2",
    "title": "a title",
    "baseline": "lora",
    "published": {"note": "Where it\nwas read."},
    "scales": {
        "smoke": {
            "about": "tiny",
            "columns": [{"eval": "sums", "metric": "exact_match", "title": "sums"}, NLL_SPEC],
        }
    },
}


def section(seed: int, n: int = 40, shift: float = 0.0, sha: str = "s") -> dict[str, Any]:
    """An eval section of a record, of which the numbers follow from `seed`; shift moves every NLL."""
    random = np.random.default_rng(seed)
    correct = (random.random(n) < 0.4).astype(float)
    tokens = random.integers(5, 30, n)
    nll = tokens * (1.0 + shift) + random.normal(size=n)
    ratio = nll.sum() / tokens.sum()
    residuals = nll - ratio * tokens
    return {
        "metrics": {
            "exact_match": {
                "value": float(correct.mean()),
                "n": n,
                "stderr": float(correct.std(ddof=1) / math.sqrt(n)),
            },
            "nll_per_token": {
                "value": float(ratio),
                "n": n,
                "stderr": float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / tokens.sum()),
            },
        },
        "data_sha": sha,
        "samples": {
            "id": [f"sums/test/{i}" for i in range(n)],
            "correct": correct.astype(int).tolist(),
            "nll": nll.tolist(),
            "nll_tokens": tokens.tolist(),
        },
    }


def record(
    label: str,
    seed: int | None = 0,
    *,
    status: str = "done",
    shift: float = 0.0,
    task: str = "sums",
    **more: Any,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "method": {"name": "lora", "alpha": 16},
        "trainer": {"max_steps": 4, "epochs": 1, "lr": 1e-2, "batch_size": 8, "precision": "fp32"},
        "task": {"n": 24, "name": task},
        "eval": {task: {"generation": {"max_new_tokens": 4}}},
    }
    if seed is not None:
        config["seed"] = seed
    train = None
    if seed is not None:
        train = {"seconds": 10.0 + seed, "tokens_per_s": 1000.0, "peak_memory_bytes": 3 * 2**29, "final_loss": 1.25}
    made: dict[str, Any] = {
        "id": f"{label}-{seed}",
        "command": "python scripts/tables.py table=table2",
        "scale": "smoke",
        "label": label,
        "status": status,
        "config": config,
        "parameters": {"trainable": 8192 if seed is not None else 0},
        "train": train,
        "eval": {task: section(1000 + (seed or 0), shift=shift)},
        "machine": {"gpu": None, "cpu": "CPU", "cpu_capability": "AVX2", "threads": 2},
        "versions": {"torch": "1", "transformers": "2", "peft": "3"},
    }
    if status != "done":
        for key in ("eval", "train", "parameters"):
            del made[key]
    return made | more


def row(
    key: str, *records: dict[str, Any] | None, published: dict[str, Any] | None = None, group: str = ""
) -> RowResult:
    full = f"{group}/{key}" if group else key
    return RowResult(full, f"label of {key}", records, published or {}, group)


def table(*rows: RowResult) -> Table:
    return build(SPEC, "smoke", rows)


def column(made: Table, title: str, block: str | None = None) -> Any:
    (found,) = [c for c in made.columns if title in (c.title, c.name) and block in (None, c.block)]
    return found


def score(made: Table, title: str) -> Any:
    return column(made, title, "")


# ---- paired differences ----


def test_every_score_has_its_paired_difference_with_bounds() -> None:
    rows = [
        row("lora", record("LoRA", 0), record("LoRA", 1)),
        row("ours", *(record("Ours", seed, shift=-0.2) for seed in (0, 1))),
    ]
    made = table(*rows)
    for title, metric, factor in (("sums", "exact_match", 100), ("sums NLL", "nll_per_token", 1)):
        found = column(made, f"{title}: difference to lora")
        exact = difference(rows[1], rows[0], "sums", metric)
        assert exact is not None
        assert found.block == "Paired difference to label of lora"
        assert found.cells[0] == ""
        assert found.values == [None, pytest.approx(factor * exact.mean)]
        assert found.more["low"] == [None, pytest.approx(factor * exact.low)]
        assert found.more["high"] == [None, pytest.approx(factor * exact.high)]
        assert found.more["seeds"] == [None, 2]
    # the numbers follow from the seed: the difference is the shift, without spread
    assert column(made, "sums NLL: difference to lora").cells[1] == "-0.200 [-0.200, -0.200] *"
    assert column(made, "sums: difference to lora").cells[1] == "+0.0 [+0.0, +0.0]"
    notes = "\n".join(made.notes)
    assert "over samples and seeds (10,000 bootstrap draws)" in notes
    assert "One seed" not in notes
    assert "without correction" in notes


def test_without_samples_and_with_one_seed_there_is_no_interval_and_a_note() -> None:
    def finished(*records: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        for r in records:
            value = {"value": 0.5 if r["label"] == "LoRA" else 0.7, "n": 40, "stderr": 0.1}
            r["eval"]["sums"]["metrics"]["finished"] = value
        return records

    more = {"eval": "sums", "metric": "finished", "title": "ended"}
    spec = SPEC | {"scales": {"smoke": SPEC["scales"]["smoke"] | {"columns": [more]}}}
    one = build(spec, "smoke", [row("lora", *finished(record("LoRA"))), row("o", *finished(record("O")))])
    assert column(one, "ended: difference to lora").cells == ["", ""]
    assert any(note.startswith("ended: no paired difference") for note in one.notes)
    two = [row(key, *finished(*(record(name, s) for s in (0, 1)))) for key, name in (("lora", "LoRA"), ("o", "O"))]
    made = build(spec, "smoke", two)
    assert column(made, "ended: difference to lora").values[1] == pytest.approx(20)
    assert any("over seeds alone where a record keeps no samples (Student's t)." in note for note in made.notes)
    assert not any("no paired difference" in note for note in made.notes)


def test_a_table_without_its_baseline_has_no_differences() -> None:
    made = table(row("ours", record("Ours")), row("base", record("Base", None)))
    assert {c.block for c in made.columns} == {"", "Cost"}
    assert "paired" not in "\n".join(made.notes).lower()


# ---- cells ----


def test_one_seed_has_the_standard_error_over_samples() -> None:
    one = record("LoRA")
    made = table(row("lora", one))
    metric = one["eval"]["sums"]["metrics"]["exact_match"]
    found = score(made, "sums (%)")
    assert (found.values, found.spreads) == ([100 * metric["value"]], [100 * metric["stderr"]])
    assert found.cells == [f"{100 * metric['value']:.1f} ± {100 * metric['stderr']:.1f}"]
    assert any("standard error over test samples" in note for note in made.notes)


def test_several_seeds_have_mean_and_standard_deviation() -> None:
    records = [record("LoRA", seed) for seed in range(4)]
    made = table(row("lora", *records))
    values = [r["eval"]["sums"]["metrics"]["nll_per_token"]["value"] for r in records]
    found = score(made, "sums NLL (nats/token)")
    assert found.values == [pytest.approx(np.mean(values))]
    assert found.spreads == [pytest.approx(np.std(values, ddof=1))]
    assert column(made, "training time (s)").values == [pytest.approx(11.5)]
    assert any("Seeds: 0, 1, 2, 3; ± is the standard deviation over seeds" in note for note in made.notes)
    assert column(made, "seeds").cells == ["4"]


def test_the_number_of_seeds_is_that_of_the_mean() -> None:
    made = table(
        row("lora", record("LoRA", 0), record("LoRA", 1, status="diverged", error="nan"), record("LoRA", 2)),
        row("base", record("Base", None)),
        row("missing", None),
    )
    assert column(made, "seeds").cells == ["2", "–", ""]
    assert column(made, "seeds").values == [2, None, None]
    assert score(made, "sums (%)").more["seeds"] == [2, 1, 0]


def test_units() -> None:
    assert unit_of("exact_match")[:] == (100, 1, "%", False)
    assert unit_of("pass@1").name == unit_of("accuracy_ranked").name == unit_of("acc_norm").name == "%"
    assert unit_of("matthews").name == unit_of("f1_ranked").name == unit_of("spearman").name == "×100"
    assert (unit_of("nll_per_token").name, unit_of("nll").name, unit_of("choice_nll").factor) == (
        "nats/token",
        "nats",
        1,
    )


# ---- arms, means, groups ----

GLUE: dict[str, Any] = SPEC | {
    "scales": {
        "smoke": {
            "about": "tiny",
            "arms": {"a": [], "b": []},
            "columns": [
                {"eval": "a", "metric": "exact_match", "title": "A"},
                {"eval": "b", "metric": "exact_match", "title": "B (MCC)"},
                {"mean_of": ["a", "b"], "title": "Mean"},
            ],
        }
    }
}


def arms(label: str, seeds: int, shift: int = 0) -> list[dict[str, Any]]:
    found = [record(label, seed, task=task) for task in ("a", "b") for seed in range(seeds)]
    for r in found:  # each test set has its own samples
        (name,) = r["eval"]
        r["eval"] = {name: section(10 * shift + r["config"]["seed"] + (500 if name == "b" else 0), sha=name)}
    return found


def test_records_of_several_arms_fill_one_row_and_its_mean() -> None:
    lora, ours = arms("LoRA", 3), arms("Ours", 3, shift=1)
    rows = [row("lora", *lora), row("ours", *ours[:5], None)]
    made = build(GLUE, "smoke", rows)
    value = {
        (r["label"], *r["eval"], r["config"]["seed"]): 100
        * next(iter(r["eval"].values()))["metrics"]["exact_match"]["value"]
        for r in lora + ours
    }
    a = [value["LoRA", "a", s] for s in range(3)]
    b = [value["LoRA", "b", s] for s in range(3)]
    assert score(made, "A (%)").values[0] == pytest.approx(np.mean(a))
    assert score(made, "B (MCC, %)").spreads[0] == pytest.approx(np.std(b, ddof=1))
    by_seed = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    assert score(made, "Mean (%)").values[0] == pytest.approx(np.mean(by_seed))
    assert score(made, "Mean (%)").spreads[0] == pytest.approx(np.std(by_seed, ddof=1))
    assert score(made, "Mean (%)").more["seeds"] == [3, 2], "the seed that lacks b is in no mean over both"
    assert column(made, "seeds").cells == ["3", "2 to 3"]
    exact = mean_difference(rows[1], rows[0], [("a", "exact_match"), ("b", "exact_match")])
    assert exact is not None
    assert column(made, "Mean: difference to lora").values[1] == pytest.approx(100 * exact.mean)
    assert "Not run yet: label of ours (1 cell)." in made.notes


def test_one_seed_gives_the_mean_over_evals_the_error_of_a_sum_of_independent_ones() -> None:
    (a, b) = arms("LoRA", 1)
    made = build(GLUE, "smoke", [row("lora", a, b)])
    errors = [r["eval"][name]["metrics"]["exact_match"]["stderr"] for name, r in (("a", a), ("b", b))]
    assert score(made, "Mean (%)").spreads == [pytest.approx(100 * math.hypot(*errors) / 2)]


def test_a_mean_is_of_evals_that_have_columns() -> None:
    layout = GLUE["scales"]["smoke"]
    wrong = [*layout["columns"], {"mean_of": ["a", "c"], "title": "Other"}]
    with pytest.raises(ConfigError, match="column 'Other': mean_of names c, which has no column of its own"):
        build(GLUE | {"scales": {"smoke": layout | {"columns": wrong}}}, "smoke", [row("lora", None)])
    optional = GLUE | {"scales": {"smoke": layout | {"optional_evals": ["b"]}}}
    made = build(optional, "smoke", [row("lora", arms("LoRA", 1)[0])])
    assert [c.title for c in made.columns if c.block == ""] == ["seeds", "trainable parameters", "A (%)"]


def test_groups_have_their_own_baseline_and_the_first_column() -> None:
    rows = [
        row(key, record(key, shift=shift), group=group)
        for group, apart in (("big", 0.3), ("small", 0.1))
        for key, shift in (("lora", 0.0), ("ours", apart))
    ]
    layout = SPEC["scales"]["smoke"] | {"group_title": "size"}
    made = build(SPEC | {"scales": {"smoke": layout}}, "smoke", rows)
    assert column(made, "sums NLL: difference to lora").values == [None, pytest.approx(0.3), None, pytest.approx(0.1)]
    assert "| size | method |" in made.markdown()
    assert "| small | label of ours |" in made.markdown()
    assert "small & label of ours &" in made.latex()
    read = list(csv.DictReader(io.StringIO(made.csv())))
    assert [(line["key"], line["size"]) for line in read][1:3] == [("big/ours", "big"), ("small/lora", "small")]
    missing = build(SPEC, "smoke", [row("lora", None, group="big"), row("lora", record("L"), group="small")])
    assert "Not run yet: label of lora (big) (1 seed)." in missing.notes


# ---- notes ----


def test_recipes_are_told_once_where_they_are_shared() -> None:
    cells = [r for name in ("LoRA", "DoRA", "CDKA") for r in arms(name, 2)]
    for r in cells:
        r["config"]["trainer"] = dict(r["config"]["trainer"], lr=3e-4 if r["label"] == "CDKA" else 3e-3)
        r["config"]["method"] = {"alpha": 64 if r["label"] == "CDKA" else 16}
        r["config"]["task"]["n"] = 2000 if r["config"]["task"]["name"] == "a" else None
    made = build(
        GLUE, "smoke", [row(name, *[r for r in cells if r["label"] == name]) for name in ("LoRA", "DoRA", "CDKA")]
    )
    about = [note for note in made.notes if "lr " in note or "batch" in note]
    assert about == [
        "Training on a, b: batch 8, 4 steps, fp32. a: 2,000 examples; b: all examples.",
        "LoRA, DoRA: α 16, lr 0.003; CDKA: α 64, lr 0.0003.",
    ]
    for r in cells:  # one method has a rate for each task
        if r["label"] == "CDKA" and r["config"]["task"]["name"] == "b":
            r["config"]["trainer"]["lr"] = 1e-3
    made = build(GLUE, "smoke", [row("all", *cells)])
    assert any("CDKA on a: α 64, lr 0.0003; CDKA on b: α 64, lr 0.001." in note for note in made.notes)


def test_evals_that_are_alike_share_a_note() -> None:
    one = record("LoRA")
    one["eval"] |= {"choice": section(1), "more": section(2, n=30)}
    one["config"]["eval"]["more"] = {"generation": {"sampling": {"temperature": 1}}}
    notes = table(row("lora", one)).notes
    assert "sums: 40 test samples, greedy decoding." in notes
    assert "choice: 40 test samples." in notes
    assert "more: 30 test samples, sampled." in notes


# ---- every seed ----


def test_every_value_leads_to_its_record() -> None:
    rows = [
        row("lora", record("LoRA", 0), record("LoRA", 1, status="diverged", error="nan"), None, group="g"),
        row("base", record("Base", None), group="g"),
    ]
    made = table(*rows)
    read = list(csv.DictReader(io.StringIO(made.seeds)))
    assert [(r["row"], r["seed"], r["metric"], r["status"]) for r in read] == [
        ("g/lora", "0", "exact_match", "done"),
        ("g/lora", "0", "nll_per_token", "done"),
        ("g/lora", "1", "", "diverged"),
        ("g/lora", "", "", "missing"),
        ("g/base", "", "exact_match", "done"),
        ("g/base", "", "nll_per_token", "done"),
    ]
    first = rows[0].records[0]
    assert first is not None
    metric = first["eval"]["sums"]["metrics"]["exact_match"]
    assert (float(read[0]["value"]), float(read[0]["stderr"]), int(read[0]["n"])) == pytest.approx(
        (metric["value"], metric["stderr"], 40)
    )
    assert (read[0]["record"], read[0]["command"]) == ("LoRA-0", "python scripts/tables.py table=table2")
    assert (read[0]["group"], read[0]["task"], read[0]["eval"], read[2]["record"]) == ("g", "sums", "sums", "LoRA-1")


# ---- what is there and what is not ----


def test_missing_failed_and_diverged_cells_are_shown_and_named() -> None:
    made = table(
        row("lora", record("LoRA")),
        row("missing", None),
        row("failed", record("F", status="failed", error="why")),
        row("diverged", record("D", status="diverged", error="nan")),
        row("partly", record("P", 0), record("P", 1, status="diverged", error="nan"), None, None),
    )
    found = score(made, "sums (%)")
    assert found.cells[1:4] == ["", "failed", "diverged"]
    assert found.values[1:4] == [None, None, None]
    assert found.values[4] is not None
    notes = "\n".join(made.notes)
    assert "Not run yet: label of missing (1 seed), label of partly (2 seeds)." in notes
    assert "Failed: label of failed (1 seed)." in notes
    assert "Diverged, in no mean: label of diverged (1 seed), label of partly (1 seed)." in notes
    assert column(made, "trainable parameters").cells[:4] == ["8,192", "", "", ""]


def test_an_empty_table_can_be_written() -> None:
    made = table(row("lora", None), row("other", None))
    assert "Not run yet: label of lora (1 seed), label of other (1 seed)." in made.notes
    assert all(cell == "" for c in made.columns for cell in c.cells)
    made.markdown(), made.csv(), made.latex()


def test_what_is_unknown_is_empty_and_zero_is_zero() -> None:
    blind = record("LoRA")
    blind["train"]["peak_memory_bytes"] = None
    made = table(row("lora", blind), row("base", record("Base", None)))
    assert column(made, "peak memory, training (GiB)").cells == ["", ""]
    assert column(made, "trainable parameters").cells == ["8,192", "0"]
    assert column(made, "training time (s)").cells == ["10", ""]
    assert column(table(row("lora", record("L"))), "peak memory, training (GiB)").cells == ["1.50"]


def published(value: float, source: str = "arXiv 1") -> dict[str, Any]:
    return {"value": value, "source": source, "confidence": "M"}


def test_published_numbers_stand_beside_the_first_column_of_their_eval() -> None:
    made = table(row("lora", record("LoRA"), published={"sums": published(42.08)}), row("ours", record("Ours")))
    titles = [c.title for c in made.columns if c.block == ""]
    assert titles[2:] == ["sums (%)", "sums: published (%)", "sums NLL (nats/token)"]
    found = column(made, "sums: published (%)")
    assert found.cells == ["42.08 [M]", ""]
    assert found.values == [42.08, None]
    notes = "\n".join(made.notes)
    assert "Where it was read." in notes
    assert "Published numbers: arXiv 1 [M]: sums (" in notes
    assert "nothing at this scale compares with them" in notes
    silent = table(row("lora", record("LoRA")), row("ours", record("Ours"), published={"other": published(1)}))
    assert not any("published" in c.title for c in silent.columns)
    assert "Where it was read." not in silent.notes


def test_only_at_paper_scale_is_ours_compared_with_what_was_published() -> None:
    columns = [
        {"eval": "sums", "metric": "exact_match", "title": "sums", "published": "x"},
        {"eval": "sums", "metric": "nll_per_token", "title": "NLL", "published": "y"},
        {"mean_of": ["sums"], "title": "Mean"},
    ]
    spec = SPEC | {"scales": {"paper": {"about": "as published", "columns": columns}}}
    one, said = record("LoRA"), {"x": published(30.0), "y": published(0.9, "arXiv 2"), "mean": published(29.0)}
    made = build(spec, "paper", [row("lora", one, published=said), row("none", None, published=said)])
    value = 100 * one["eval"]["sums"]["metrics"]["exact_match"]["value"]
    assert column(made, "sums: ours − published (points)").values == [pytest.approx(value - 30), None]
    assert column(made, "Mean: ours − published (points)").cells[0] == f"{value - 29:+.2f}"
    assert column(made, "NLL: published (nats/token)").cells == ["0.90 [M]"] * 2
    notes = "\n".join(made.notes)
    assert "arXiv 1 [M]: sums, Mean; arXiv 2 [M]: NLL" in notes
    assert "nothing at this scale" not in notes


def test_an_optional_eval_that_nobody_graded_has_no_column() -> None:
    layout = SPEC["scales"]["smoke"]
    more = {"eval": "gsm8k", "metric": "exact_match", "title": "GSM8K"}
    spec = SPEC | {"scales": {"smoke": layout | {"columns": [*layout["columns"], more], "optional_evals": ["gsm8k"]}}}
    assert not any(c.title == "GSM8K (%)" for c in build(spec, "smoke", [row("lora", record("L"))]).columns)
    graded = record("L")
    graded["eval"]["gsm8k"] = section(7)
    made = build(spec, "smoke", [row("lora", graded), row("other", record("O"))])
    assert column(made, "GSM8K (%)").cells[1] == ""


# ---- files ----


@pytest.fixture
def mixed() -> Table:
    rows = [
        row("lora", record("LoRA", 0), record("LoRA", 1), published={"sums": published(42.08)}),
        row("none", None),
        row("gone", record("D", status="diverged", error="nan")),
        row("base", record("Base", None)),
    ]
    return build(SPEC | {"title": r"50 % & more_of {x} | $1 ^ ~ \ #2"}, "smoke", rows)


def test_csv_reads_back_as_the_numbers(mixed: Table) -> None:
    read = list(csv.DictReader(io.StringIO(mixed.csv())))
    assert [line["key"] for line in read] == ["lora", "none", "gone", "base"]
    numbers = {title: values for c in mixed.columns for title, values in c.numbers().items()}
    assert list(read[0]) == ["key", "method", *numbers]
    assert {"sums (%): spread", "sums: difference to lora: low", "final training loss"} < set(numbers)
    assert len(numbers) == sum(len(c.numbers()) for c in mixed.columns), "no title twice"
    for title, values in numbers.items():
        for line, value in zip(read, values, strict=True):
            assert (line[title] == "") == (value is None)
            if value is not None:
                assert float(line[title]) == pytest.approx(value, rel=1e-5)


def blocks_of(made: Table) -> list[int]:
    """How many columns each block has, the name of the row included."""
    blocks = dict.fromkeys(c.block for c in made.columns)
    return [1 + sum(c.block == block for c in made.columns) for block in blocks]


def test_markdown_has_as_many_cells_in_every_line_of_a_block(mixed: Table) -> None:
    text = mixed.markdown()
    blocks = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n## ")]
    assert [len(lines) for lines in blocks] == [2 + 4] * 3
    counts = [{len(re.split(r"(?<!\\)\|", line)) - 2 for line in lines} for lines in blocks]
    assert counts == [{n} for n in blocks_of(mixed)]
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["Paired difference to label of lora", "Cost"]


def test_latex_has_as_many_cells_in_every_line_and_escapes(mixed: Table) -> None:
    text = mixed.latex()
    parts = [part.split("\\end{tabular}")[0] for part in text.split("\\begin{tabular}")[1:]]
    assert len(parts) == 3
    for body, count in zip(parts, blocks_of(mixed), strict=True):
        lines = [line for line in body.splitlines() if "\\\\" in line]
        assert len(lines) == 1 + 4
        assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {count}
        assert body.startswith("{l" + "r" * (count - 1) + "}")
        assert not re.search(r"(?<!\\)[%_#]", body)
    assert r"\caption{50 \% \& more\_of \{x\} | \$1 \textasciicircum{} \textasciitilde{} \textbackslash{} \#2}" in text
    assert not set("±×−α") & set(text)


def test_fourteen_rows_and_ten_scores_stay_readable() -> None:
    columns = [{"eval": f"task{i}", "metric": "exact_match", "title": f"T{i}"} for i in range(10)]
    spec = SPEC | {"scales": {"smoke": {"about": "wide", "arms": {}, "columns": columns}}}
    rows = []
    for key in ["lora", *(f"m{i}" for i in range(13))]:
        cells = [record(key, seed, task=f"task{i}") for i in range(10) for seed in range(2)]
        rows.append(row(key, *cells))
    text = build(spec, "smoke", rows).markdown()
    widths = {len(line) for line in text.splitlines() if line.startswith("|") and "---" not in line}
    assert max(widths) < 300
    assert sum(line.startswith("- ") for line in text.splitlines()) < 10, "what is shared is told once"


def test_write_makes_its_files_and_nothing_else(mixed: Table, tmp_path: Path) -> None:
    paths = mixed.write(tmp_path / "tables")
    assert sorted(p.name for p in paths) == ["table2.csv", "table2.md", "table2.seeds.csv", "table2.tex"]
    assert sorted((tmp_path / "tables").iterdir()) == sorted(paths)
    assert (tmp_path / "tables" / "table2.md").read_text() == mixed.markdown()
    assert mixed.write(tmp_path / "tables") == paths, "written over, not refused"


def test_a_bar_in_a_label_does_not_break_markdown() -> None:
    made = build(SPEC, "smoke", [RowResult("a", "x | y", [record("L")])])
    assert "| x \\| y |" in made.markdown()
