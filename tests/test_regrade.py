"""Scores made again from the kept rows, few-shot prompts, verdicts as a stage of their own, and evaluate.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kronlab.cell import CONFIG_DIR, Cell
from kronlab.data import Example, few_shot
from kronlab.errors import CheckpointError, ConfigError
from kronlab.evals import graders, registry
from kronlab.evals.harness import Harness, Row, Settings, Subject
from kronlab.evals.statistics import mean_metric
from kronlab.evaluate import evaluate, regrade, regrade_records
from kronlab.experiment import run_cell
from kronlab.generate import ready_to_grade
from kronlab.runs import Store, read_jsonl

SHORT = ["trainer.max_steps=2", "eval_n=4", "eval.chain_sum.generation.max_new_tokens=8"]


@pytest.fixture
def done(make: Callable[..., Cell]) -> tuple[Store, dict[str, Any], Path]:
    """A finished record and its samples' file."""
    cell = make(*SHORT, "method=cdka")
    store = Store(cell.config["results"]["dir"])
    return store, run_cell(cell), store.folder(cell.scale, cell.id) / "chain_sum" / "samples.jsonl"


def test_regrading_with_the_same_grader_changes_no_number(done: tuple[Store, dict[str, Any], Path]) -> None:
    store, record, samples = done
    before = samples.read_text()
    new, changed = regrade(store, record)
    assert changed == {"chain_sum": []}
    assert new["eval"] == record["eval"]
    assert {k: v for k, v in new.items() if k != "regraded"} == record
    assert new["regraded"]["versions"]["kronlab"]
    assert store.read("smoke", record["id"]) == new
    assert sorted(samples.read_text().splitlines()) == sorted(before.splitlines())


def test_regrading_needs_only_the_rows(done: tuple[Store, dict[str, Any], Path]) -> None:
    """What a model has written counts: rows that are edited to be right score as right."""
    store, record, samples = done
    rows = read_jsonl(samples)
    rows[0]["completion"] = f"so it is\n#### {rows[0]['gold']}"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new, changed = regrade(store, record)
    assert changed == {"chain_sum": [rows[0]["id"]]}
    assert new["eval"]["chain_sum"]["metrics"]["exact_match"]["value"] == 0.25
    first = next(row for row in read_jsonl(samples) if row["id"] == rows[0]["id"])
    assert (first["correct"], first["reason"], first["answer"]) == (True, "right", rows[0]["gold"])


def test_a_new_grader_version_is_in_the_record(
    done: tuple[Store, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, record, _ = done
    newer = graders.Grader("gsm8k", "99", lambda text, gold: True, lambda text: "x")
    monkeypatch.setitem(graders.GRADERS, "gsm8k", newer)
    new, changed = regrade(store, record)
    assert len(changed["chain_sum"]) == 4
    assert new["eval"]["chain_sum"]["graders"] == {"gsm8k": "99"}
    assert new["eval"]["chain_sum"]["metrics"]["exact_match"]["value"] == 1.0
    assert (
        new["eval"]["chain_sum"]["metrics"]["nll_per_token"] == record["eval"]["chain_sum"]["metrics"]["nll_per_token"]
    )


def test_lost_samples_are_one_clear_line_and_nothing_is_written(done: tuple[Store, dict[str, Any], Path]) -> None:
    store, record, samples = done
    samples.write_text(samples.read_text().splitlines(keepends=True)[0])
    with pytest.raises(CheckpointError, match="holds 1 samples and the record 4: run the cell again"):
        regrade(store, record)
    assert store.read("smoke", record["id"]) == record
    with pytest.raises(CheckpointError, match="is failed"):
        regrade(store, record | {"status": "failed"})


def test_the_script_regrades_and_says_what_changed(done: tuple[Store, dict[str, Any], Path]) -> None:
    store, _, _ = done
    script = [sys.executable, str(CONFIG_DIR.parent / "scripts" / "evaluate.py"), f"results.dir={store.results}"]
    run = subprocess.run([*script, "regrade=all"], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "exact_match 0.0000 -> 0.0000, same" in run.stdout + run.stderr
    with pytest.raises(ConfigError, match="no such record"):
        regrade_records(store.results, "feedfeedfeed")


def test_committed_records_keep_their_scores(tmp_path: Path) -> None:
    """Every score that is published can be made again from the completions that are published with it."""
    committed = Store(CONFIG_DIR.parent / "results")
    seen = 0
    for scale in ("mini", "small"):
        for record in committed.records(scale):
            for name, old in record["eval"].items() if record["status"] == "done" else ():
                path = committed.folder(scale, record["id"]) / name / "samples.jsonl"
                if not path.is_file():  # of generated tasks, those of the first seed alone are in git
                    assert "spell" in name or name in ("pretraining", "digits", "digits_turned")
                    continue
                rows = read_jsonl(path)
                settings = record["config"]["eval"][name]
                harness = registry.harness_of(settings)
                if harness.grades_late:  # code is run by the tests of its own harness
                    continue
                fresh = {row["id"]: row | harness.grade(row, settings) for row in rows}
                new = harness.score([fresh[sample] for sample in old["samples"]["id"]], settings)
                for metric, value in old["metrics"].items():
                    assert new["metrics"][metric]["value"] == pytest.approx(value["value"], rel=1e-12), (name, metric)
                seen += 1
    assert seen >= 20


# ---- a trained adapter from a folder


def test_a_saved_adapter_is_graded_as_it_was_when_trained(make: Callable[..., Cell], tmp_path: Path) -> None:
    cell = make(*SHORT, "method=cdka")
    record = run_cell(cell)
    final = Store(tmp_path).checkpoints(cell.train_id) / "final"
    again = run_cell(make(*SHORT, "method=adapter", f"method.path={final}"))
    assert again["train"] is None
    assert again["parameters"]["trainable"] == 0
    assert again["eval"]["chain_sum"]["samples"] == record["eval"]["chain_sum"]["samples"]


def test_a_folder_without_an_adapter_is_one_clear_line(make: Callable[..., Cell], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no adapter_config.json there"):
        run_cell(make(*SHORT, "method=adapter", f"method.path={tmp_path / 'empty'}"))


# ---- few-shot


def test_few_shot_prompts_show_the_same_solved_examples(toys: Callable[..., list[Example]]) -> None:
    solved = [Example("train/0", "Q: 1\nA: ", "one", "1"), Example("train/1", "Q: 2\nA: ", "two", "2")]
    shown = few_shot(toys(3), solved, separator="\n\n")
    for example, plain in zip(shown, toys(3), strict=True):
        assert example.prompt == "Q: 1\nA: one\n\nQ: 2\nA: two\n\n" + plain.prompt
        assert (example.id, example.completion, example.gold) == (plain.id, plain.completion, plain.gold)
    with pytest.raises(ConfigError, match="shown with its solution and graded"):
        few_shot(toys(3), toys(1), separator="")


def test_shots_come_from_the_training_split_whatever_the_seed(make: Callable[..., Cell]) -> None:
    from kronlab.experiment import _graded_examples

    shots = ['+eval.chain_sum.shots={n: 2, split: train, separator: "\\n\\n"}']
    one, two = (make(*SHORT, *shots, f"seed={seed}") for seed in (0, 1))
    graded = [_graded_examples(cell.config, cell.config["eval"]["chain_sum"]) for cell in (one, two)]
    assert graded[0] == graded[1]
    assert all(example.prompt.count("####") == 2 for example in graded[0])
    assert make(*SHORT).id != one.id


# ---- verdicts as a second stage


class Parity(Harness):
    """Right where the prompt has an even number of letters; dear to judge, so judged after all rows are there."""

    kind, version, grades_late = "parity", "1", True
    judged: list[str] = []

    def batches(self, examples: Sequence[Example], settings: Settings) -> Iterator[list[Example]]:
        yield from ([example] for example in examples)

    def samples_per_example(self, settings: Settings) -> int:
        return 2

    def collect(self, subject: Subject, batch: Sequence[Example], settings: Settings) -> list[Row]:
        return [{"id": f"{batch[0].id}#{k}", "length": len(batch[0].prompt) + k} for k in range(2)]

    def grade(self, row: Row, settings: Settings) -> Row:
        if len(self.judged) == settings["killed_after"]:
            raise KeyboardInterrupt
        self.judged.append(row["id"])
        return {"correct": row["length"] % 2 == 0, "reason": "parity"}

    def score(self, rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
        return {
            "metrics": {"even": mean_metric([float(row["correct"]) for row in rows])},
            "samples": {"id": [row["id"] for row in rows]},
        }


def test_late_verdicts_are_kept_when_judging_is_killed(
    build: Callable[..., Any], toys: Callable[..., list[Example]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, tokenizer = build("model=tiny_llama", "method=none")
    ready_to_grade(network, torch.float32)
    subject = Subject(network, tokenizer, causal=True)
    monkeypatch.setitem(registry.HARNESSES, "parity", Parity())
    settings = {"name": "p", "kind": "parity", "killed_after": 5}
    examples, path = toys(4), tmp_path / "p" / "samples.jsonl"
    Parity.judged = []
    with pytest.raises(KeyboardInterrupt):
        evaluate(subject, examples, settings, path=path, progress=False)
    assert len(read_jsonl(path)) == 8  # the completions are safe
    assert all("correct" not in row for row in read_jsonl(path))
    kept = list(Parity.judged)
    path.with_name("verdicts.jsonl").open("a").write('{"id": "toy/3#1", "row')  # cut short by the kill
    Parity.judged = []
    # what is not part of the verdict may not decide whether it is kept
    rows = evaluate(subject, examples, settings, path=path, progress=False)
    assert kept + Parity.judged == [row["id"] for row in rows]
    assert [row["id"] for row in rows] == [f"toy/{i}#{k}" for i in range(4) for k in range(2)]
    assert [row["correct"] for row in rows] == [row["length"] % 2 == 0 for row in rows]
    assert read_jsonl(path) == rows
    assert not path.with_name("verdicts.jsonl").exists()
