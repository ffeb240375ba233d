"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems whose answers end in ``#### N``.

Read from ``{data_dir}/gsm8k/{train,test}.jsonl`` (7,473 and 1,319 rows of ``question``, ``answer``), else
from the hub.

Settings:
    hub (openai/gsm8k), hub_config (main), hub_revision: the hub dataset.
    prompt, completion: templates, by default ``Q: {question}\\nA: `` and ``{answer}``. Fields: question,
        answer, solution (the answer without its last line), gold.
    calculator_annotations: true keeps the ``<<48/2=24>>`` annotations; they are taken out by default.
    subset (seeded | first), test_seed, validation_rows (makes a split ``validation`` out of so many rows of
        train): see `kronlab.data.common.subset`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kronlab.data import common
from kronlab.data.common import Example, LengthFn, Template
from kronlab.errors import DataError

_KEYS = (*common.HUB_KEYS, "prompt", "completion", "calculator_annotations", "subset", "test_seed", "validation_rows")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """Examples of GSM8K: the completion is the worked answer, ending in ``#### N``, and gold is N as written.

    Raises:
        DataError: an answer without exactly one ``####``, or what `common.Place.rows` raises.
    """
    prompt, completion = _templates(source)
    held_by = common.rows_split(source, split)
    rows = _place(source, split).rows(data_dir, {"question": str, "answer": str})
    examples = []
    for i in common.subset(source, len(rows), split=split, n=n, seed=seed):
        fields = _fields(rows[i], f"gsm8k/{held_by} row {i}", bool(source.get("calculator_annotations", False)))
        examples.append(Example(f"gsm8k/{held_by}/{i}", prompt(fields), completion(fields), fields["gold"]))
    return examples


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`."""
    _templates(source)
    return _place(source, split).probe(data_dir)


def _place(source: Mapping[str, Any], split: str) -> common.Place:
    split = common.rows_split(source, split)
    common.check_split("gsm8k", split, ("train", "test"))
    return common.Place.of(source, split, (f"gsm8k/{split}.jsonl",), "openai/gsm8k", "main")


def _templates(source: Mapping[str, Any]) -> tuple[Template, Template]:
    common.check_keys(source, _KEYS)
    return (
        Template(source.get("prompt", common.DEFAULT_PROMPT), "gsm8k prompt"),
        Template(source.get("completion", "{answer}"), "gsm8k completion"),
    )


def _fields(row: Mapping[str, Any], where: str, annotations: bool) -> dict[str, str]:
    solution, marker, gold = row["answer"].rpartition("####")
    if not marker or not gold.strip() or "####" in solution:
        raise DataError(f"{where}: field 'answer' must end in one line '#### N': fix the row")
    solution = (solution if annotations else _CALCULATOR.sub("", solution)).strip()
    gold = gold.strip()
    return {
        "question": row["question"].strip(),
        "answer": f"{solution}\n#### {gold}",
        "solution": solution,
        "gold": gold,
    }
