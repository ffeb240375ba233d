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

from kronlab.report.tables import RowResult, Table, build, paired_difference

NLL_SPEC = {"eval": "sums", "metric": "nll_per_token", "title": "sums NLL"}
SPEC: dict[str, Any] = {
    "name": "table2",
    "title": "a title",
    "baseline": "lora",
    "published": {"title": "published: X", "unit": "%", "note": "Where it\nwas read."},
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
    label: str, seed: int | None = 0, *, status: str = "done", shift: float = 0.0, **more: Any
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "method": {"name": "lora", "alpha": 16},
        "trainer": {"max_steps": 4, "epochs": 1, "lr": 1e-2, "batch_size": 8, "precision": "fp32"},
        "task": {"n": 24, "name": "sums"},
    }
    if seed is not None:
        config["seed"] = seed
    train = None
    if seed is not None:
        train = {"seconds": 10.0 + seed, "tokens_per_s": 1000.0, "peak_memory_bytes": 3 * 2**29, "final_loss": 1.25}
    made: dict[str, Any] = {
        "scale": "smoke",
        "label": label,
        "status": status,
        "config": config,
        "parameters": {"trainable": 8192 if seed is not None else 0},
        "train": train,
        "eval": {"sums": section(1000 + (seed or 0), shift=shift)},
        "machine": {"gpu": None, "cpu": "CPU", "cpu_capability": "AVX2", "threads": 2},
        "versions": {"torch": "1", "transformers": "2", "peft": "3"},
    }
    if status != "done":
        for key in ("eval", "train", "parameters"):
            del made[key]
    return made | more


def row(key: str, *records: dict[str, Any] | None, published: dict[str, Any] | None = None) -> RowResult:
    return RowResult(key, f"label of {key}", records, {"sums": published} if published else {})


def table(*rows: RowResult) -> Table:
    return build(SPEC, "smoke", rows)


def column(made: Table, title: str) -> Any:
    (found,) = [c for c in made.columns if c.title == title]
    return found


# ---- paired differences ----


def test_paired_difference_is_the_difference_of_the_ratios() -> None:
    ours, baseline = section(1, shift=-0.1), section(2)
    # the same reference completions: the same tokens
    ours["samples"]["nll_tokens"] = baseline["samples"]["nll_tokens"]
    pair = paired_difference(ours, baseline)
    assert pair is not None
    tokens = np.array(baseline["samples"]["nll_tokens"])
    a, b = np.array(ours["samples"]["nll"]), np.array(baseline["samples"]["nll"])
    assert pair[0] == pytest.approx(a.sum() / tokens.sum() - b.sum() / tokens.sum())
    # delta method for a ratio of means: Var(d - R t) / (n mean(t)^2), sample variance with n - 1
    d = a - b
    n = len(d)
    variance = np.var(d - pair[0] * tokens, ddof=1) / (n * tokens.mean() ** 2)
    assert pair[1] == pytest.approx(1.96 * math.sqrt(variance))


def test_paired_interval_agrees_with_a_bootstrap_over_samples() -> None:
    ours, baseline = section(1, n=400, shift=-0.1), section(2, n=400)
    ours["samples"]["nll_tokens"] = baseline["samples"]["nll_tokens"]
    pair = paired_difference(ours, baseline)
    assert pair is not None
    tokens = np.array(baseline["samples"]["nll_tokens"])
    d = np.array(ours["samples"]["nll"]) - np.array(baseline["samples"]["nll"])
    draws = np.random.default_rng(0).integers(0, len(d), (4000, len(d)))
    means = d[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (high - low) / 2 == pytest.approx(pair[1], rel=0.1)  # 4,000 draws give the quantiles to some percent
    assert (high + low) / 2 == pytest.approx(pair[0], abs=0.1 * pair[1])


def test_pairing_takes_out_what_the_samples_share() -> None:
    """Hard samples are hard for both: the paired interval is far below the unpaired one."""
    ours = section(3)
    baseline = section(3)
    baseline["samples"]["nll"] = [x + 0.01 * (i % 3) for i, x in enumerate(ours["samples"]["nll"])]
    pair = paired_difference(ours, baseline)
    assert pair is not None
    assert pair[1] < 0.05 * 1.96 * math.sqrt(2) * ours["metrics"]["nll_per_token"]["stderr"]


def test_nothing_is_compared_across_different_data() -> None:
    assert paired_difference(section(1, sha="a"), section(2, sha="b")) is None
    fewer = section(2, n=39)
    assert paired_difference(section(1), fewer) is None
    single = section(1)
    single["samples"] = {key: values[:1] for key, values in single["samples"].items()}
    assert paired_difference(single, single) is None, "no spread from one sample"
    made = table(row("lora", record("LoRA")), row("other", record("O") | {"eval": {"sums": section(5, sha="new")}}))
    assert column(made, "sums NLL: difference to lora, paired, 95 %").cells == ["", ""]


def test_a_difference_is_taken_at_a_seed_that_both_have() -> None:
    made = table(
        row("lora", record("LoRA", 0), record("LoRA", 1)),
        row("ours", record("Ours", 0, status="failed", error="x"), record("Ours", 1, shift=-0.2)),
        row("apart", record("Apart", 2)),
        row("base", record("Base", None)),
    )
    ours = column(made, "sums NLL: difference to lora, paired, 95 %")
    # seed 1 of both follows from the same random numbers: the difference is the shift, without spread
    assert ours.values[1] == pytest.approx(-0.2)
    assert ours.spreads[1] == pytest.approx(0, abs=1e-9)
    assert ours.cells[1] == "-0.200 ± 0.000"
    assert ours.cells[2] == "", "no seed in common"
    assert ours.values[3] == pytest.approx(0), "a base model has no seed: compared with the baseline's first"


# ---- cells ----


def test_one_seed_has_the_standard_error_over_samples() -> None:
    one = record("LoRA")
    made = table(row("lora", one))
    metric = one["eval"]["sums"]["metrics"]["exact_match"]
    found = column(made, "sums (%)")
    assert (found.values, found.spreads) == ([100 * metric["value"]], [100 * metric["stderr"]])
    assert found.cells == [f"{100 * metric['value']:.1f} ± {100 * metric['stderr']:.1f}"]
    assert any("standard error over test samples" in note for note in made.notes)


def test_several_seeds_have_mean_and_standard_deviation() -> None:
    records = [record("LoRA", seed) for seed in range(4)]
    made = table(row("lora", *records))
    values = [r["eval"]["sums"]["metrics"]["nll_per_token"]["value"] for r in records]
    found = column(made, "sums NLL (nats/token)")
    assert found.values == [pytest.approx(np.mean(values))]
    assert found.spreads == [pytest.approx(np.std(values, ddof=1))]
    assert column(made, "training time (s)").values == [pytest.approx(11.5)]
    assert any("Seeds: 0, 1, 2, 3; ± is the standard deviation over seeds" in note for note in made.notes)


def test_missing_failed_and_diverged_cells_are_shown_and_named() -> None:
    made = table(
        row("lora", record("LoRA")),
        row("missing", None),
        row("failed", record("F", status="failed", error="why")),
        row("diverged", record("D", status="diverged", error="nan")),
        row("partly", record("P", 0), record("P", 1, status="diverged", error="nan"), None, None),
    )
    found = column(made, "sums (%)")
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


def test_published_numbers_show_only_where_they_were_read() -> None:
    said = {"value": 42.08, "source": "arXiv 1", "confidence": "M"}
    made = table(row("lora", record("LoRA"), published=said), row("ours", record("Ours")))
    found = column(made, "published: X (%)")
    assert found.cells == ["42.08 [M]", ""]
    assert found.values == [42.08, None]
    assert "Where it was read." in made.notes
    silent = table(row("lora", record("LoRA")), row("ours", record("Ours")))
    assert not any(c.title.startswith("published") for c in silent.columns)
    assert "Where it was read." not in silent.notes


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
    said = {"value": 42.08, "source": "arXiv 1", "confidence": "M"}
    rows = [
        row("lora", record("LoRA", 0), record("LoRA", 1), published=said),
        row("none", None),
        row("gone", record("D", status="diverged", error="nan")),
        row("base", record("Base", None)),
    ]
    return build(SPEC | {"title": r"50 % & more_of {x} | $1 ^ ~ \ #2"}, "smoke", rows)


def test_csv_reads_back_as_the_numbers(mixed: Table) -> None:
    read = list(csv.DictReader(io.StringIO(mixed.csv())))
    assert [line["key"] for line in read] == ["lora", "none", "gone", "base"]
    for c in mixed.columns:
        for line, value in zip(read, c.values, strict=True):
            assert (line[c.title] == "") == (value is None)
            if value is not None:
                assert float(line[c.title]) == pytest.approx(value, rel=1e-9)
        for line, spread in zip(read, c.spreads, strict=False):
            if spread is not None:
                assert float(line[f"{c.title}: spread"]) == pytest.approx(spread, rel=1e-5)


def test_markdown_has_as_many_cells_in_every_line(mixed: Table) -> None:
    lines = [line for line in mixed.markdown().splitlines() if line.startswith("|")]
    counts = {len(re.split(r"(?<!\\)\|", line)) for line in lines}
    assert len(lines) == 2 + 4
    assert counts == {len(mixed.columns) + 3}  # the method, and the empty ends


def test_latex_has_as_many_cells_in_every_line_and_escapes(mixed: Table) -> None:
    text = mixed.latex()
    body = text.split("\\begin{tabular}")[1].split("\\end{tabular}")[0]
    lines = [line for line in body.splitlines() if "\\\\" in line]
    assert len(lines) == 1 + 4
    assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {len(mixed.columns) + 1}
    assert body.startswith("{l" + "r" * len(mixed.columns) + "}")
    assert r"\caption{50 \% \& more\_of \{x\} | \$1 \textasciicircum{} \textasciitilde{} \textbackslash{} \#2}" in text
    assert not re.search(r"(?<!\\)[%_#]", body)
    assert "±" not in text


def test_write_makes_three_files_and_nothing_else(mixed: Table, tmp_path: Path) -> None:
    paths = mixed.write(tmp_path / "tables")
    assert sorted(p.name for p in paths) == ["table2.csv", "table2.md", "table2.tex"]
    assert sorted((tmp_path / "tables").iterdir()) == sorted(paths)
    assert (tmp_path / "tables" / "table2.md").read_text() == mixed.markdown()
    assert mixed.write(tmp_path / "tables") == paths, "written over, not refused"


def test_a_bar_in_a_label_does_not_break_markdown() -> None:
    made = build(SPEC, "smoke", [RowResult("a", "x | y", [record("L")])])
    assert "| x \\| y |" in made.markdown()
