"""LLM-Adapters' format: read, written, and turned into lm-eval's prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kronlab.data import available, load_examples
from kronlab.data.commonsense import TASKS, Question, parse, write
from kronlab.errors import ConfigError, DataError

DATA = os.environ.get("KRONLAB_DATA")
LOCAL = [name for name in TASKS if name != "hellaswag"]
needs_data = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "commonsense").is_dir(), reason="needs commonsense/ under KRONLAB_DATA"
)


def _load(name: str, form: str, data_dir: str | None, **more: Any) -> list[Any]:
    source = {"name": "commonsense", "dataset": name, "format": form, **more}
    return load_examples(source, split="test", n=None, seed=0, data_dir=data_dir)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_written_is_read_back(name: str) -> None:
    choices = (
        ("no", "yes")
        if name == "boolq"
        else ("a cat.", "Answer: two", "the 3rd", "four")[: 2 if name in ("piqa", "winogrande") else 4]
    )
    question = Question("is it so", choices, 1)
    row = write(question, name)
    assert row["output"] == f"the correct answer is {row['answer']}"
    assert parse(row["instruction"], row["answer"], name, "here") == question


@needs_data
@pytest.mark.parametrize("name", LOCAL)
def test_every_local_row_is_read_and_written_back_to_the_letter(name: str) -> None:
    path = Path(DATA or "") / "commonsense" / TASKS[name].folder / "test.json"
    rows = json.loads(path.read_text("utf-8"))
    different = []
    for i, row in enumerate(rows):
        question = parse(row["instruction"], row["answer"], name, f"row {i}")
        assert len(question.choices) >= 2
        back = write(question, name)
        if back != {key: row[key] for key in ("instruction", "output", "answer")}:
            different.append(i)
    assert different == []


@needs_data
def test_prompts_of_both_protocols() -> None:
    first = {e.id: e for e in _load("arc_easy", "choices", DATA)}["arc_easy/test/1"]
    assert first.prompt == (
        "Question: Which piece of safety equipment is used to keep mold spores from entering the respiratory system?"
        "\nAnswer:"
    )
    assert first.completion == " breathing mask"
    assert json.loads(first.gold) == {
        "answer": 1,
        "choices": ["safety goggles", "breathing mask", "rubber gloves", "lead apron"],
    }
    same = {e.id: e for e in _load("arc_easy", "instruction", DATA)}["arc_easy/test/1"]
    assert same.prompt.startswith("Below is an instruction that describes a task.")
    assert same.prompt.endswith("answer1/answer2/answer3/answer4\n\n### Response:\n")
    assert (same.completion, same.gold) == ("the correct answer is answer2", "answer2")


@needs_data
def test_winogrande_scores_the_rest_after_either_name() -> None:
    example = {e.id: e for e in _load("winogrande", "choices", DATA)}["winogrande/test/0"]
    gold = json.loads(example.gold)
    assert gold["contexts"] == [f"Sarah was a much better surgeon than Maria so {name}" for name in ("Sarah", "Maria")]
    assert example.prompt == gold["contexts"][gold["answer"]] == gold["contexts"][1]
    assert example.completion == " always got the easier cases."


def test_hub_rows_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"question": "is ice cold", "passage": "Ice is cold.", "label": 1, "idx": 0}]
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "validation.jsonl").write_text(json.dumps(rows[0]) + "\n")
    example = _load("boolq", "choices", None, hub=str(tmp_path / "hub"), hub_config="default")[0]
    assert example.prompt == "Ice is cold.\nQuestion: is ice cold?\nAnswer:"
    assert example.completion == " yes"
    asked = _load("boolq", "instruction", None, hub=str(tmp_path / "hub"), hub_config="default")[0]
    assert asked.gold == "true"
    assert "question: is ice cold?\n\nAnswer format: true/false" in asked.prompt


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "arc_easy",
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
            Question("q", ("a", "b"), 1),
        ),
        (
            "openbookqa",
            {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": " A"},
            Question("q", ("a", "b"), 0),
        ),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, Question("g", ("a", "b"), 1)),
        (
            "social_i_qa",
            {"context": "c.", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "d", "label": "3"},
            Question("c. q?", ("a", "b", "d"), 2),
        ),
        (
            "winogrande",
            {"sentence": "s _ t", "option1": "a", "option2": "b", "answer": "1"},
            Question("s _ t", ("a", "b"), 0),
        ),
        (
            "hellaswag",
            {
                "activity_label": "Baking",
                "ctx_a": "One [title] stirs.",
                "ctx_b": "she",
                "endings": ["a [x] b", "c"],
                "label": "1",
            },
            Question("Baking: One. stirs. She", ("a b", "c"), 1),
        ),
    ],
)
def test_rows_of_the_tasks_own_datasets(name: str, row: dict[str, Any], expected: Question) -> None:
    assert TASKS[name].read(row) == expected


def test_faults_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'arc_easy'"):
        _load("arc_easi", "choices", None)
    with pytest.raises(ConfigError, match="train rows in the instruction format only"):
        _load("commonsense_170k", "choices", None)
    folder = tmp_path / "commonsense" / "piqa"
    folder.mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps([{"instruction": "What?", "output": "x", "answer": "solution1"}]))
    with pytest.raises(DataError, match=r"test.json row 0: field 'instruction' is not in LLM-Adapters' format of piqa"):
        _load("piqa", "choices", str(tmp_path))


@pytest.mark.parametrize("form", ["choices", "instruction"])
def test_validation_rows_are_kept_back_from_train(tmp_path: Path, form: str) -> None:
    rows = [write(Question(f"which of {i}", ("a", "b", "c"), i % 3), "arc_easy") for i in range(20)]
    for split in ("train", "test"):
        path = tmp_path / "commonsense" / "ARC-Easy" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    source = {"name": "commonsense", "dataset": "arc_easy", "format": form}

    def ids(split: str, **more: Any) -> set[str]:
        found = load_examples(source | more, split=split, n=None, seed=0, data_dir=str(tmp_path))
        return {example.id for example in found}

    held, left = ids("validation", validation_rows=5), ids("train", validation_rows=5)
    assert len(held) == 5
    assert held | left == ids("train") == {f"arc_easy/train/{i}" for i in range(20)}
    assert not held & left
    assert ids("test", validation_rows=5) == ids("test")
    assert available({**source, "validation_rows": 5}, "validation", str(tmp_path))[0]
    with pytest.raises(ConfigError, match="validation_rows=None"):
        ids("validation")
