"""Long sequences: the generated task of any length, stretched rotary positions, and the figure across lengths."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from kronlab import models
from kronlab.cell import Cell, compose_config
from kronlab.data import Example, load_examples
from kronlab.data.retrieve_sum import QUESTION
from kronlab.encode import IGNORED, encode
from kronlab.errors import ConfigError
from kronlab.evals import exact
from kronlab.experiment import run_cell
from kronlab.report.figures import draw
from kronlab.report.tables import RowResult
from kronlab.runs import Store


def drawn(split: str = "test", n: int | None = 20, seed: int = 0, **source: Any) -> list[Example]:
    settings = {"name": "retrieve_sum", "length": 100, **source}
    return load_examples(settings, split=split, n=n, seed=seed, data_dir=None)


# ---- the task


@pytest.mark.parametrize(("length", "facts"), [(64, 1), (100, 2), (2048, 11)])
def test_the_answer_is_the_sum_of_the_digits_of_a_prompt_of_that_length(length: int, facts: int) -> None:
    for example in drawn(length=length, facts=facts):
        assert len(example.prompt.encode()) == length
        assert example.prompt.endswith(QUESTION)
        digits = [int(mark) for mark in example.prompt if mark.isdigit()]
        assert len(digits) == facts
        assert sum(digits) == int(example.gold)
        assert exact.grade(example.completion, example.gold)
        assert len(example.completion) == len("#### 11"), "a batch needs no padding"


def test_splits_and_seeds_share_no_prompt_and_a_smaller_n_is_a_prefix() -> None:
    sets = [drawn("test"), drawn("validation"), drawn("train"), drawn("train", seed=1)]
    prompts = [example.prompt for examples in sets for example in examples]
    assert len(set(prompts)) == len(prompts)
    assert drawn("test", seed=3) == sets[0]
    assert drawn("train", 5) == sets[2][:5]
    assert drawn("train", 5, length=101)[0].prompt[:50] != sets[2][0].prompt[:50]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"length": 63}, "length=63 must be a whole number, 64 or more"),
        ({"length": True}, "length=True must be"),
        ({"facts": 0}, "facts=0 must be a whole number, 1 to 11"),
        ({"facts": 12}, "facts=12 must be"),
        ({"fact": 2}, "unknown key 'fact'"),
        ({"n": None}, "n=null"),
        ({"split": "dev"}, "no split 'dev'"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        drawn(**arguments)
    assert "\n" not in str(caught.value)


def test_nothing_is_cut_off_the_longest_prompt() -> None:
    (example,) = drawn(n=1, length=16_384)
    limit = compose_config(["scale=smoke", "task=retrieve_sum"]).task.max_length
    row = encode(example, models.byte_tokenizer(), causal=True, max_length=limit)
    assert (len(row), row.truncated) == (16_384 + 8, False)
    assert sum(label != IGNORED for label in row.labels) == 8


def test_of_mixed_lengths_nothing_is_cut_off_either() -> None:
    task = compose_config(["scale=smoke", "task=retrieve_sum_lengths"]).task
    source: Any = OmegaConf.to_container(task.source)
    examples = load_examples(source, split="train", n=10, seed=0, data_dir=None)
    rows = [encode(e, models.byte_tokenizer(), causal=True, max_length=task.max_length) for e in examples]
    assert sorted(len(row) - 8 for row in rows) == [512] * 6 + [2048] * 3 + [8192]
    assert not any(row.truncated for row in rows)


# ---- rotary positions


def section(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = dict(compose_config(["scale=smoke", "model=tiny_llama"]).model)
    return plain | changes


def test_a_linear_factor_divides_every_position(tmp_path: Path) -> None:
    """Position p of the stretched model is position p / factor of the model as it was: RoPE is linear in p."""
    base, tokenizer = models.load(section(), dtype=torch.float32)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    where = {"source": "directory", "directory": str(tmp_path)}
    rope = {"rope_type": "linear", "factor": 4.0}
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)[None]
    for changes in ({}, where):  # made here, and read from a checkpoint
        plain, stretched = (
            models.load(section(**changes, **more), dtype=torch.float32)[0].eval() for more in ({}, {"rope": rope})
        )
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), stretched.parameters(), strict=True))
        with torch.no_grad():
            far = stretched(input_ids=ids, position_ids=4 * positions).logits
            near = plain(input_ids=ids, position_ids=positions).logits
            unlike = stretched(input_ids=ids, position_ids=positions).logits
        torch.testing.assert_close(far, near, atol=1e-5, rtol=1e-5)  # angles in fp32
        assert not torch.allclose(unlike, near, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "rope", "said"),
    [
        ("tiny_llama", {"rope_type": "stretch", "factor": 2.0}, "rope_type='stretch'; use one of"),
        ("tiny_t5", {"rope_type": "linear", "factor": 2.0}, "a t5 has no rotary positions"),
    ],
)
def test_positions_that_cannot_be_stretched_are_one_line(model: str, rope: dict[str, Any], said: str) -> None:
    plain: dict[str, Any] = dict(compose_config(["scale=smoke", f"model={model}"]).model)
    with pytest.raises(ConfigError, match=said) as caught:
        models.load(plain | {"rope": rope}, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_no_stretch_leaves_a_cell_as_it_is_and_a_stretch_makes_another(make: Callable[..., Cell]) -> None:
    plain, none, stretched = (
        make("model=tiny_llama", *more)
        for more in ([], ["+model.rope=null"], ["+model.rope={rope_type: linear, factor: 2.0}"])
    )
    assert plain.id == none.id != stretched.id
    assert plain.train_id != stretched.train_id


# ---- across lengths


def test_a_figure_across_evals_draws_each_at_its_length(make: Callable[..., Cell], tmp_path: Path) -> None:
    common = [
        "model=tiny_llama", "task=retrieve_sum", "task.source.length=64", "+eval@eval.retrieve_sum_2k=retrieve_sum_2k",
        "eval.retrieve_sum.source.length=64", "eval.retrieve_sum_2k.source.length=256", "trainer.max_steps=1",
    ]  # fmt: skip
    cells = {key: make(*common, f"method={key}") for key in ("none", "cdka")}
    rows = [RowResult(key, key, [run_cell(cell)]) for key, cell in cells.items()]
    figure = {"kind": "across", "evals": ["retrieve_sum", "retrieve_sum_2k"], "metric": "nll_per_token",
              "axis": "source.length", "rows": ["none", "cdka"]}  # fmt: skip
    scale = {"columns": [], "figures": [figure], "rows": list(cells)}
    spec = {
        "name": "table99",
        "rows": {key: {"overrides": [f"method={key}"]} for key in cells},
        "scales": {"smoke": scale},
    }
    draw(spec, "smoke", rows, tmp_path / "figures" / "smoke")
    written = tmp_path / "figures" / "smoke" / "table99.csv"
    points = [line for line in csv.DictReader(written.open()) if not line["record"]]
    assert [(line["key"], float(line["x"])) for line in points] == [
        ("none", 64), ("none", 256), ("cdka", 64), ("cdka", 256),
    ]  # fmt: skip
    record = Store(tmp_path).read("smoke", cells["cdka"].id)
    assert record is not None
    value = record["eval"]["retrieve_sum_2k"]["metrics"]["nll_per_token"]["value"]
    assert float(points[-1]["value"]) == pytest.approx(value, rel=1e-6)  # the CSV's digits
    figure["axis"] = "generation"
    with pytest.raises(ConfigError, match=r"row none has generation=\{"):
        draw(spec, "smoke", rows, tmp_path / "figures" / "smoke")
