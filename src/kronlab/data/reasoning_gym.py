"""Generated tasks: any dataset of the reasoning-gym library by name, endless and seeded.

Settings:
    dataset: the library's name of the task (``chain_sum``, ``gsm_symbolic``, ...).
    params: its parameters (``{min_terms: 2, max_terms: 4}``), without ``seed`` and ``size``.
    prompt, completion: templates, by default ``Q: {question}\\nA: `` and ``{answer}``. Fields: question,
        answer; solution (tasks that give worked reasoning: ``gsm_symbolic``); steps (``chain_sum``: the
        running sums, see `chain_sum_steps`).
    strip_instructions: regular expressions cut out of each question, e.g. ``Give the result as .*``.
    test_seed, test_pool: the test set is the first n of ``test_pool`` (500) distinct questions generated from
        ``test_seed`` (20_000_003).
    validation_seed: makes a split ``validation`` of as many questions, none of which is in the test pool or in
        train; without it there is no such split.

Train and test share no question, whatever n and seed are: the pool depends on neither, and every question of
the pool is dropped from train, which is refilled to exactly n distinct ones. Nor do two train seeds share
generator seeds: the library makes item i from ``seed + i``, so seeds 0 and 1 as they stand would give the
same items but one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import numpy as np

from kronlab.data import common
from kronlab.data.common import TEST_SEED, Example, LengthFn, Template
from kronlab.errors import ConfigError, DataError

TEST_POOL: Final = 500
_KEYS = (
    *("dataset", "params", "prompt", "completion", "strip_instructions"),
    *("test_seed", "test_pool", "validation_seed"),
)

# Generator seeds, all below 2**32 (numpy's limit): test in [0, 2**30), train in [2**30, 2**30 + 2**31 +
# draws).
_TRAIN_BASE: Final = 2**30
_TRAIN_SPAN: Final = 2**31
_TRAIN_STRIDE: Final = 10_000_019  # distance between two train seeds, and so the most draws of one
# These differ from process to process (seen in reasoning-gym 0.1.25): they iterate over sets of strings.
_HASH_ORDERED: Final = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
_CHUNK: Final = 512  # fixed, so that a task whose items depend on its size still gives nested sets


def load(
    source: Mapping[str, Any],
    *,
    split: str,
    n: int | None,
    seed: int,
    data_dir: str | None = None,
    length_fn: LengthFn | None = None,
) -> list[Example]:
    """``n`` generated examples with distinct questions; ``n=None`` is the whole pool for test and validation, an
    error for train.

    Raises:
        ConfigError: unknown task, parameter, template field or split; n larger than the test pool; train
        without n. DataError: the task has too few distinct questions; the message says how many it gave.
    """
    return list(_generated(json.dumps(dict(source)), split, n, seed))


@lru_cache(maxsize=16)
def _generated(source: str, split: str, n: int | None, seed: int) -> tuple[Example, ...]:
    """What `load` gives; the cells of a sweep mostly ask for the same."""
    task = _Task(json.loads(source))
    common.check_split(task.name, split, task.splits)
    if split != "train":
        pool = task.pool(split)
        if n is not None and n > len(pool):
            raise ConfigError(f"{task.name}: n={n} {split} questions asked of a pool of {len(pool)}: raise test_pool")
        return tuple(task.example(split, i, row) for i, row in enumerate(pool[:n]))
    if n is None:
        raise ConfigError(f"{task.name}: generated data has no end: set how many train examples to make (data.n_train)")
    base = _TRAIN_BASE + seed * _TRAIN_STRIDE % _TRAIN_SPAN
    held_out = {_key(row["question"]) for held in task.splits[1:] for row in task.pool(held)}
    rows = task.distinct(base, n, held_out, split)
    return tuple(task.example(split, i, row) for i, row in enumerate(rows))


def probe(source: Mapping[str, Any], split: str, data_dir: str | None) -> tuple[bool, str]:
    """See `kronlab.data.available`: generated data needs no file."""
    task = _Task(source)
    common.check_split(task.name, split, task.splits)
    return True, f"{task.name}: generated"


def chain_sum_steps(expression: str) -> str:
    """The running sums of a chain of additions and subtractions, one step each, joined by ``"; "``.

    >>> chain_sum_steps("812 + 880 - 5")
    '812 + 880 = 1692; 1692 - 5 = 1687'

    A single number has no step: it is returned as it is.

    Raises:
        DataError: if ``expression`` is anything but integers joined by ``" + "`` and ``" - "``.
    """
    first, *rest = expression.split() or [""]
    steps = []
    try:
        total = int(first)
        for operator, term in zip(rest[::2], rest[1::2], strict=True):
            if operator not in ("+", "-"):
                raise ValueError(operator)
            after = total + int(term) if operator == "+" else total - int(term)
            steps.append(f"{total} {operator} {term} = {after}")
            total = after
    except ValueError:
        raise DataError(
            f"chain_sum expression {expression!r} is not integers joined by + and -: cannot show steps"
        ) from None
    return "; ".join(steps) or first


class _Task:
    """One configured reasoning-gym task: checks its settings once, then draws rows."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        common.check_keys(source, _KEYS)
        self.dataset = str(source.get("dataset") or "")
        self.name = f"reasoning_gym {self.dataset}"
        if self.dataset in ("", "???"):
            raise ConfigError("data source 'reasoning_gym' has no dataset: set it to a task's name, e.g. chain_sum")
        if self.dataset not in _factory().DATASETS:
            near = common.did_you_mean(self.dataset, _factory().DATASETS)
            raise ConfigError(f"unknown reasoning_gym dataset {self.dataset!r}{near}")
        if self.dataset in _HASH_ORDERED and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            raise ConfigError(
                f"{self.name}: its items change with Python's string hashing: start with PYTHONHASHSEED=0"
            )
        self.params = dict(source.get("params") or {})
        for key in ("seed", "size"):
            if key in self.params:
                raise ConfigError(f"{self.name}: params.{key} is set by the loader: remove it (use seed, n, test_pool)")
        self.prompt = Template(source.get("prompt", common.DEFAULT_PROMPT), f"{self.name} prompt")
        self.completion = Template(source.get("completion", "{answer}"), f"{self.name} completion")
        try:
            self.strip = tuple(re.compile(p) for p in source.get("strip_instructions") or ())
        except re.error as e:
            raise ConfigError(f"{self.name}: strip_instructions: {e.pattern!r} is no regular expression: {e}") from None
        self.pool_seeds = {"test": int(source.get("test_seed", TEST_SEED))}
        if source.get("validation_seed") is not None:
            self.pool_seeds["validation"] = int(source["validation_seed"])
        self.splits = ("train", *self.pool_seeds)
        self.pool_size = int(source.get("test_pool", TEST_POOL))
        for split, pool_seed in self.pool_seeds.items():
            if not 0 <= pool_seed < _TRAIN_BASE - _TRAIN_STRIDE:
                raise ConfigError(
                    f"{self.name}: {split}_seed={pool_seed} must be in [0, {_TRAIN_BASE - _TRAIN_STRIDE})"
                )
        if self.pool_size < 1:
            raise ConfigError(f"{self.name}: test_pool={self.pool_size} must be at least 1")

    def pool(self, split: str) -> list[dict[str, Any]]:
        """The rows of ``test``, or those of ``validation``, which has none of test's questions."""
        taken = {_key(row["question"]) for row in self.pool("test")} if split == "validation" else frozenset()
        return self.distinct(self.pool_seeds[split], self.pool_size, taken, split)

    def distinct(self, base: int, n: int, taken: Set[str], split: str) -> list[dict[str, Any]]:
        """The first ``n`` rows drawn from ``base`` whose question is new and not in ``taken``."""
        draws = min(20 * n + 2000, _TRAIN_STRIDE)  # 20 n finds n of 1.0 n equally likely questions only for small n
        seen = set(taken)
        rows: list[dict[str, Any]] = []
        for row in itertools.islice(self._draw(base), draws):
            key = _key(row["question"])
            if key not in seen:
                seen.add(key)
                rows.append(row)
                if len(rows) == n:
                    return rows
        kept_out = f" besides the {len(taken)} of the test pool" if taken else ""
        raise DataError(
            f"{self.name}: only {len(rows)} distinct {split} questions{kept_out} in {draws} draws, "
            f"{n} wanted: widen params, or lower {'n' if split == 'train' else 'test_pool'}"
        )

    def _draw(self, base: int) -> Iterator[dict[str, Any]]:
        for start in itertools.count(base, _CHUNK):
            with self._refused_in_one_line(), _global_random(start):
                dataset = _factory().create_dataset(self.dataset, seed=start, size=_CHUNK, **self.params)
            for i in range(_CHUNK):
                with self._refused_in_one_line(), _global_random(start + i):
                    entry = dataset[i]
                yield self._fields(entry)

    @contextmanager
    def _refused_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, AssertionError, ValueError, LookupError, ArithmeticError) as e:
            raise ConfigError(f"{self.name}: params {self.params} are refused: {e}") from None

    def _fields(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        question = str(entry["question"])
        for pattern in self.strip:
            question = pattern.sub("", question)
        fields = {"question": question.strip(), "answer": str(entry["answer"])}
        metadata = entry["metadata"]
        if "answer_cot" in metadata:  # ends in its own "#### N" line, which the template is to decide on
            fields["solution"] = str(metadata["answer_cot"]).rpartition("####")[0].strip()
        if self.dataset == "chain_sum":
            fields["steps"] = chain_sum_steps(metadata["expression"])
        return fields

    def example(self, split: str, i: int, fields: Mapping[str, Any]) -> Example:
        return Example(
            id=f"{self.dataset}/{split}/{i}",
            prompt=self.prompt(fields),
            completion=self.completion(fields),
            gold=fields["answer"],
        )


def _key(question: str) -> str:
    """What makes two questions the same: their words."""
    return " ".join(question.casefold().split())


@contextmanager
def _global_random(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's global generators within the block, and put them back as they were behind it.

    Some tasks draw from them (list_functions) or seed them (pool_matrix): without this the former were not
    reproducible, and the latter would disturb the training run's own random numbers.
    """
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


@lru_cache(maxsize=1)
def _factory() -> Any:
    """reasoning_gym's registry (importing the library fills it)."""
    try:
        import reasoning_gym  # noqa: F401
        import reasoning_gym.factory as factory
    except ImportError as e:
        raise DataError(f"generated tasks need the package reasoning-gym ({e}): pip install reasoning-gym") from None
    return factory
