"""MetaMathQA (Yu et al. 2023, arXiv 2309.12284): CDKA's training set for maths, by its authors' recipe.

The recipe: go through the rows in order, keep those whose ``type`` has "GSM" and that fit ``max_tokens``
tokens, stop at ``rows`` of them; prompt ``Q: {query}\\nA: ``; the response is cut before
``"\\nThe answer is:"``. That makes the training set; ``n`` and ``subset`` then choose from it.

Read from one ``{data_dir}/metamathqa/*.jsonl`` or ``*.json`` (fields ``query``, ``response``, ``type``), else
from the hub.

Settings:
    hub (meta-math/MetaMathQA), hub_config, hub_revision: the hub dataset.
    prompt, completion: templates, by default ``Q: {query}\\nA: `` and ``{solution}``. Fields: query, question
        (the same), response, solution (the response, cut), gold.
    shuffle: explicit, because in the authors' code ``dataset.shuffle(seed=42)`` throws its result away.
        ``paper`` goes in file order, as their code does; ``seeded`` in the order which that call would have
        given (``numpy.random.default_rng(42).permutation``).
    rows (100000), max_tokens (512): the size of the set and the length of a row, of prompt and completion
        together.
    subset (seeded | first): see `kronlab.data.common.subset`; ``subset=first`` with n rows is the recipe
        stopped at n.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from kronlab.data import common
from kronlab.data.common import Example, LengthFn, Template

SHUFFLE_SEED: Final = 42  # the authors' own
_KEYS = (*common.HUB_KEYS, "prompt", "completion", "shuffle", "rows", "max_tokens", "subset")
_TAIL = "\nThe answer is:"


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """Training examples of MetaMathQA; gold is the text after the last "The answer is:" ("" where a response
    has none).

    A row fits if ``length_fn(prompt + completion) <= max_tokens``; without ``length_fn`` every row fits. An
    example's id is its row in the file, whatever the shuffle.

    Raises:
        ConfigError: a split other than train, or ``n`` larger than the recipe's set.
        DataError: as `common.Place.rows`.
    """
    common.check_keys(source, _KEYS)
    prompt = Template(source.get("prompt", "Q: {query}\nA: "), "metamathqa prompt")
    completion = Template(source.get("completion", "{solution}"), "metamathqa completion")
    wanted = int(source.get("rows", 100_000))
    max_tokens = int(source.get("max_tokens", 512))
    rows = _place(source, split).rows(data_dir, {"query": str, "response": str, "type": str})

    if n is not None and common.choose(source, "subset", ("seeded", "first")) == "first":
        wanted = min(wanted, n)  # no need to go on: the first n of the set are the first n found
    chosen: list[Example] = []
    for i in _order(source, len(rows)):
        if len(chosen) == wanted:
            break
        if "GSM" not in rows[i]["type"]:
            continue
        fields = _fields(rows[i])
        text, learned = prompt(fields), completion(fields)
        if length_fn is None or length_fn(text + learned) <= max_tokens:
            meta = {"type": rows[i]["type"]}
            chosen.append(Example(f"metamathqa/train/{i}", text, learned, fields["gold"], meta))
    return [chosen[j] for j in common.subset(source, len(chosen), split="train", n=n, seed=seed)]


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`."""
    common.check_keys(source, _KEYS)
    return _place(source, split).probe(data_dir)


def _place(source: Mapping[str, Any], split: str) -> common.Place:
    common.check_split("metamathqa", split, ("train",), "; grade on gsm8k or math instead")
    files = ("metamathqa/train.jsonl", "metamathqa/*.jsonl", "metamathqa/*.json")
    return common.Place.of(source, split, files, "meta-math/MetaMathQA")


def _order(source: Mapping[str, Any], count: int) -> Iterable[int]:
    if common.choose(source, "shuffle", ("paper", "seeded")) == "paper":
        return range(count)
    import numpy as np

    return (int(i) for i in np.random.default_rng(SHUFFLE_SEED).permutation(count))


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    solution, tail, _ = row["response"].partition(_TAIL)
    gold = row["response"].rpartition(_TAIL)[2].strip() if tail else ""
    return {
        "query": row["query"],
        "question": row["query"],
        "response": row["response"],
        "solution": solution,
        "gold": gold,
    }
