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
    validation_rows: keeps so many GSM rows of the file back from train, as a split ``validation``: chosen by a fixed
        seed, whatever their length, and learned by no run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from kronlab.data import common
from kronlab.data.common import Example, LengthFn, Template
from kronlab.errors import ConfigError

SHUFFLE_SEED: Final = 42  # the authors' own
_KEYS = (*common.HUB_KEYS, "prompt", "completion", "shuffle", "rows", "max_tokens", "subset", "validation_rows")
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
        ConfigError: a split other than train and validation, or ``n`` larger than there is.
        DataError: as `common.Place.rows`.
    """
    common.check_keys(source, _KEYS)
    prompt = Template(source.get("prompt", "Q: {query}\nA: "), "metamathqa prompt")
    completion = Template(source.get("completion", "{solution}"), "metamathqa completion")
    wanted = int(source.get("rows", 100_000))
    max_tokens = int(source.get("max_tokens", 512))
    rows = _place(source, split).rows(data_dir, {"query": str, "response": str, "type": str})
    held = _kept_back(source, rows)

    def example(i: int) -> Example:
        fields = _fields(rows[i])
        meta = {"type": rows[i]["type"]}
        return Example(f"metamathqa/train/{i}", prompt(fields), completion(fields), fields["gold"], meta)

    if split == "validation":
        if n is not None and n > len(held):
            raise ConfigError(f"data source 'metamathqa': n={n} asked of split 'validation', which has {len(held)}")
        return [example(i) for i in held[:n]]
    if n is not None and common.choose(source, "subset", ("seeded", "first")) == "first":
        wanted = min(wanted, n)  # no need to go on: the first n of the set are the first n found
    chosen: list[Example] = []
    unseen = set(held)
    for i in _order(source, len(rows)):
        if len(chosen) == wanted:
            break
        if "GSM" not in rows[i]["type"] or i in unseen:
            continue
        found = example(i)
        if length_fn is None or length_fn(found.prompt + found.completion) <= max_tokens:
            chosen.append(found)
    rest = {key: value for key, value in source.items() if key != "validation_rows"}  # they are out already
    return [chosen[j] for j in common.subset(rest, len(chosen), split="train", n=n, seed=seed)]


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`."""
    common.check_keys(source, _KEYS)
    return _place(source, split).probe(data_dir)


def _place(source: Mapping[str, Any], split: str) -> common.Place:
    split = common.rows_split(source, split)
    common.check_split("metamathqa", split, ("train",), "; grade on gsm8k or math instead")
    files = ("metamathqa/train.jsonl", "metamathqa/*.jsonl", "metamathqa/*.json")
    return common.Place.of(source, split, files, "meta-math/MetaMathQA")


def _kept_back(source: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The rows of ``validation``; none without the setting."""
    if not source.get("validation_rows"):
        return []
    gsm = (i for i in common.seeded_order(len(rows), common.VALIDATION_SEED) if "GSM" in rows[i]["type"])
    return list(itertools.islice(gsm, int(source["validation_rows"])))


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
