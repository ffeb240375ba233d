"""Generated tasks: seeded, distinct, and no question in both train and test."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronlab.data import Example, available, fingerprint, load_examples
from kronlab.data import reasoning_gym as loader
from kronlab.data.reasoning_gym import chain_sum_steps
from kronlab.errors import ConfigError, DataError
from kronlab.evals import gsm8k

CHAIN_SUM = {
    "name": "reasoning_gym",
    "dataset": "chain_sum",
    "params": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "completion": "{steps}\n#### {answer}",
}
GSM_SYMBOLIC = {
    "name": "reasoning_gym",
    "dataset": "gsm_symbolic",
    "completion": "{solution}\n#### {answer}",
    "strip_instructions": [r"\s*Give the result as your final answer\. Do not include units\."],
}
GCD = {"name": "reasoning_gym", "dataset": "gcd", "params": {"max_value": 60}, "completion": "#### {answer}"}
TASKS = [CHAIN_SUM, GSM_SYMBOLIC, GCD, {"name": "reasoning_gym", "dataset": "simple_equations"}]


def load(source: dict[str, Any], split: str, n: int | None, seed: int = 0) -> list[Example]:
    return load_examples(source, split=split, n=n, seed=seed, data_dir=None)


def prompts(examples: list[Example]) -> set[str]:
    return {" ".join(e.prompt.casefold().split()) for e in examples}


@pytest.mark.parametrize("source", TASKS, ids=lambda s: s["dataset"])
@pytest.mark.parametrize("seed", [0, 1, 20_000_003])
def test_train_and_test_share_no_question(source: dict[str, Any], seed: int) -> None:
    train, test = load(source, "train", 400, seed), load(source, "test", None, seed)
    assert len(train) == len(prompts(train)) == len({e.id for e in train}) == 400
    assert len(test) == len(prompts(test)) == len({e.id for e in test}) == 500
    assert not prompts(train) & prompts(test)


def test_pool_questions_do_turn_up_in_the_train_stream_and_are_dropped() -> None:
    """Else the test above would pass without any filter."""
    task = loader._Task(CHAIN_SUM)
    pool = {row["question"] for row in task.pool("test")}
    raw = [row["question"] for row in task.distinct(loader._TRAIN_BASE, 400, frozenset(), "train")]
    assert set(raw) & pool
    assert not {q for q in raw if q in pool} & {e.prompt[3:-4] for e in load(CHAIN_SUM, "train", 400)}


def test_test_set_depends_neither_on_seed_nor_on_train() -> None:
    assert load(GCD, "test", 20, seed=0) == load(GCD, "test", 20, seed=7)
    assert load(GCD, "test", 20) == load(GCD, "test", 60)[:20]
    other = {**GCD, "test_seed": 5}
    assert load(other, "test", 20) != load(GCD, "test", 20)


def test_train_is_deterministic_nested_and_differs_by_seed() -> None:
    long = load(CHAIN_SUM, "train", 600)
    assert load(CHAIN_SUM, "train", 600) == long
    assert load(CHAIN_SUM, "train", 50) == long[:50]
    assert fingerprint(long) == fingerprint(load(CHAIN_SUM, "train", 600))
    assert fingerprint(long) != fingerprint(load(CHAIN_SUM, "train", 600, seed=1))
    assert fingerprint(long[:2]) != fingerprint(long[1::-1])  # order counts


def test_neighbouring_seeds_give_unrelated_sets() -> None:
    """The library's item i of seed s is item i-1 of seed s+1: used as it is, these would be nearly equal."""
    wide = {**CHAIN_SUM, "params": {"min_terms": 4, "max_terms": 4, "min_digits": 3, "max_digits": 3}}
    assert not prompts(load(wide, "train", 300, seed=0)) & prompts(load(wide, "train", 300, seed=1))


@pytest.mark.parametrize("dataset", ["list_functions", "pool_matrix"])
def test_tasks_that_use_the_global_generators_are_reproducible_and_leave_them_alone(dataset: str) -> None:
    source = {"name": "reasoning_gym", "dataset": dataset, "test_pool": 5}
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    first = load(source, "train", 20)
    assert (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]) == before
    random.seed(2)
    np.random.seed(2)
    assert load(source, "train", 20) == first


def test_tasks_that_change_with_string_hashing_need_it_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"name": "reasoning_gym", "dataset": "isomorphic_strings", "test_pool": 2}
    for value in (None, "random"):
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        if value:
            monkeypatch.setenv("PYTHONHASHSEED", value)
        assert "start with PYTHONHASHSEED=0" in refused(ConfigError, source)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(load(source, "train", 5)) == 5


def test_generated_values_stay_the_same() -> None:
    """A change of these changes every result on generated data: it belongs in the changelog."""
    first = load(CHAIN_SUM, "test", 1)[0]
    assert first.id == "chain_sum/test/0"
    assert first.prompt == EXPECTED_TEST_0[0]
    assert (first.completion, first.gold) == EXPECTED_TEST_0[1:]
    assert load(CHAIN_SUM, "train", 1)[0].prompt == EXPECTED_TRAIN_0


@pytest.mark.parametrize("source", [CHAIN_SUM, GSM_SYMBOLIC, GCD], ids=lambda s: s["dataset"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_own_completions_are_graded_right(source: dict[str, Any], split: str) -> None:
    for e in load(source, split, 300):
        assert gsm8k.grade(e.completion, e.gold), e
        assert not gsm8k.grade(e.completion, str(Fraction(e.gold) + 1)), e


def test_gsm_symbolic_keeps_its_reasoning_and_loses_the_instruction() -> None:
    for e in load(GSM_SYMBOLIC, "train", 200):
        assert "Do not include units" not in e.prompt
        assert e.prompt.endswith("\nA: ")
        reasoning, _, answer = e.completion.partition("\n#### ")
        assert len(reasoning) > 20
        assert answer == e.gold


@pytest.mark.parametrize(
    ("expression", "steps"),
    [
        ("812 + 880 - 5", "812 + 880 = 1692; 1692 - 5 = 1687"),
        ("3 - 9 - 1", "3 - 9 = -6; -6 - 1 = -7"),
        ("-4 - -6", "-4 - -6 = 2"),
        ("0 + 0", "0 + 0 = 0"),
        ("42", "42"),
    ],
)
def test_chain_sum_steps(expression: str, steps: str) -> None:
    assert chain_sum_steps(expression) == steps


@pytest.mark.parametrize("expression", ["1 * 2", "1 +", "1 + x", "", "1.5 + 2"])
def test_chain_sum_steps_refuses_what_is_no_chain(expression: str) -> None:
    with pytest.raises(DataError, match="cannot show steps"):
        chain_sum_steps(expression)


@given(
    st.integers(-999, 999),
    st.lists(st.tuples(st.sampled_from("+-"), st.integers(-999, 999)), min_size=1, max_size=6),
)
def test_chain_sum_steps_are_true_and_linked(first: int, terms: list[tuple[str, int]]) -> None:
    steps = chain_sum_steps(" ".join([str(first), *(f"{o} {t}" for o, t in terms)])).split("; ")
    total = first
    for step, (operator, term) in zip(steps, terms, strict=True):
        after = total + (term if operator == "+" else -term)
        assert step == f"{total} {operator} {term} = {after}"
        total = after


# ---- errors ----


def refused(error: type[Exception], source: dict[str, Any], split: str = "train", n: int | None = 5) -> str:
    with pytest.raises(error) as caught:
        load(source, split, n)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_too_few_questions_says_how_many() -> None:
    tiny = {
        **CHAIN_SUM,
        "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "test_pool": 50,
    }
    message = refused(DataError, tiny, n=400)  # 10 * 10 * 2 questions in all, 50 of them in the pool
    assert "only 150 distinct train questions besides the 50 of the test pool in 10000 draws, 400 wanted" in message
    assert len(load(tiny, "train", 150)) == 150
    message = refused(DataError, {**tiny, "test_pool": 500}, "test")
    assert "only 200 distinct test questions in 12000 draws, 500 wanted" in message
    assert "lower test_pool" in message


def test_questions_equal_after_stripping_are_one_question() -> None:
    blind = {**CHAIN_SUM, "strip_instructions": [r"[0-9]+"], "test_pool": 3}
    assert "distinct test questions" in refused(DataError, {**blind, "test_pool": 500}, "test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": "chain_sums"}, "unknown reasoning_gym dataset 'chain_sums'; did you mean 'chain_sum'?"),
        ({"dataset": None}, "has no dataset: set it"),
        ({"params": {"min_term": 2}}, "params {'min_term': 2} are refused: .*min_term"),
        ({"params": {"min_terms": 9, "max_terms": 2}}, "are refused: max_terms must be >= min_terms"),
        ({"params": {"seed": 3}}, "params.seed is set by the loader: remove it"),
        ({"params": {"size": 3}}, "params.size is set by the loader: remove it"),
        ({"completion": "{stepz}"}, r"template field {stepz} is not in the data; did you mean 'steps'\?"),
        ({"completion": "{answer!r}"}, "bad template"),
        ({"completion": "{answer.__class__}"}, "bad template"),
        ({"prompt": "{question"}, "bad template"),
        ({"strip_instructions": ["("]}, r"'\(' is no regular expression"),
        ({"test_seed": -1}, "test_seed=-1 must be in"),
        ({"test_seed": 2**30}, "must be in"),
        ({"test_pool": 0}, "test_pool=0 must be at least 1"),
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'?"),
    ],
)
def test_settings_are_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    message = refused(ConfigError, {**CHAIN_SUM, **change})
    assert words in message or re.search(words, message), message


def test_n_is_checked() -> None:
    assert "set how many train examples" in refused(ConfigError, CHAIN_SUM, n=None)
    assert "n=501 test questions asked of a pool of 500: raise test_pool" in refused(
        ConfigError, CHAIN_SUM, "test", 501
    )
    assert "n=0 must be a positive integer" in refused(ConfigError, CHAIN_SUM, n=0)
    assert "no split 'dev': it has train, test" in refused(ConfigError, CHAIN_SUM, "dev")


def test_available() -> None:
    assert available(CHAIN_SUM, "test", None) == (True, "reasoning_gym chain_sum: generated")
    ok, why = available({**CHAIN_SUM, "dataset": "gcdd"}, "test", None)
    assert not ok
    assert "did you mean 'gcd'" in why


EXPECTED_TEST_0 = (
    "Q: State the final answer to the following arithmetic problem: 42 - 86 - 21 =\nA: ",
    "42 - 86 = -44; -44 - 21 = -65\n#### -65",
    "-65",
)
EXPECTED_TRAIN_0 = "Q: State the final answer to the following arithmetic problem: 93 + 35 - 79 =\nA: "
