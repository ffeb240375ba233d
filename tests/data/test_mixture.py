"""A mixture keeps its shares, order and splits; generated validation sets are apart from test and train."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from kronlab.data import available, load_examples
from kronlab.errors import ConfigError

SUMS = {"name": "reasoning_gym", "dataset": "chain_sum", "params": {"min_digits": 1, "max_digits": 2}}
GCD = {"name": "reasoning_gym", "dataset": "gcd", "completion": "#### {answer}"}


def mixture(**shares: float) -> dict[str, Any]:
    sources = {"sums": SUMS, "gcd": GCD}
    return {"name": "mixture", "parts": {name: {"share": shares[name], "source": sources[name]} for name in shares}}


def load(source: dict[str, Any], split: str = "train", n: int | None = 10, seed: int = 0) -> list[Any]:
    return load_examples(source, split=split, n=n, seed=seed, data_dir=None)


@pytest.mark.parametrize(("shares", "counts"), [((1, 1), (20, 20)), ((3, 1), (30, 10)), ((0.1, 0.7), (5, 35))])
def test_shares_are_kept_and_a_smaller_n_is_a_prefix(shares: tuple[float, float], counts: tuple[int, int]) -> None:
    source = mixture(sums=shares[0], gcd=shares[1])
    rows = load(source, n=40)
    assert Counter(row.meta["part"] for row in rows) == {"sums": counts[0], "gcd": counts[1]}
    assert len({row.id for row in rows}) == 40
    assert load(source, n=13) == rows[:13]


def test_each_part_is_its_source_as_it_is_alone() -> None:
    for split in ("train", "test"):
        rows = load(mixture(sums=1, gcd=1), split=split, n=8, seed=3)
        for name, source in (("sums", SUMS), ("gcd", GCD)):
            alone = load(source, split=split, n=4, seed=3)
            mixed = [row for row in rows if row.meta["part"] == name]
            assert [(row.prompt, row.completion, row.gold) for row in mixed] == [
                (row.prompt, row.completion, row.gold) for row in alone
            ]
            assert [row.id for row in mixed] == [f"{name}/{row.id}" for row in alone]


def test_a_part_whose_turn_does_not_come_is_not_loaded() -> None:
    source = mixture(sums=1)
    source["parts"]["never"] = {"share": 1e-9, "source": {"name": "jsonl", "path": "nowhere.jsonl"}}
    assert len(load(source, n=3)) == 3
    assert available(source, "train", None)[0] is False


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"name": "mixture"}, "parts=None"),
        ({"name": "mixture", "parts": {}}, "parts={}"),
        ({"name": "mixture", "parts": {"a": {"source": SUMS}}}, "parts.a="),
        (
            {"name": "mixture", "parts": {"a": {"share": 0, "source": SUMS}}},
            "parts.a.share=0; it must be a number above 0",
        ),
        ({"name": "mixture", "parts": {"a": {"share": True, "source": SUMS}}}, "parts.a.share=True"),
        ({"name": "mixture", "part": {}}, "unknown key 'part'"),
    ],
)
def test_a_wrong_mixture_is_one_line(source: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_of_a_mixture_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match="n=null"):
        load(mixture(sums=1), n=None)


# ---- a validation split


def questions(source: dict[str, Any], split: str, n: int | None = None, seed: int = 0) -> set[str]:
    return {row.prompt for row in load(source, split=split, n=n, seed=seed)}


def test_validation_shares_no_question_with_test_and_train() -> None:
    """Sums of two one-digit numbers: so few questions that every draw of one split meets those of the others."""
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = {**SUMS, "params": params, "test_pool": 40, "validation_seed": 20_000_017}
    test, validation = questions(source, "test"), questions(source, "validation")
    assert len(test) == len(validation) == 40
    assert not test & validation
    for seed in (0, 1):
        train = questions(source, "train", n=80, seed=seed)
        assert len(train) == 80
        assert not train & (test | validation)
    without = {key: value for key, value in source.items() if key != "validation_seed"}
    assert questions(without, "test") == test  # it changes no test set
    assert questions(without, "train", n=80) & validation  # and without it, nothing is kept for validation


def test_there_is_no_validation_split_without_its_seed() -> None:
    with pytest.raises(ConfigError, match="no split 'validation'"):
        load(SUMS, split="validation")
    with pytest.raises(ConfigError, match="validation_seed=-1 must be in"):
        load({**SUMS, "validation_seed": -1})
