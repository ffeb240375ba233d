"""A base model that a cell makes: made once, gone on with after a kill, known by its recipe and not by its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kronlab import models
from kronlab.cell import Cell, compose_config, make_cell
from kronlab.errors import ConfigError, ModelError
from kronlab.experiment import base_model, run_cell
from kronlab.plan import make_plan
from kronlab.runs import Store
from kronlab.train import Journal

RECIPE = [
    "scale=smoke",
    "model=tiny_llama_128",
    "method=full",
    "task=pretraining",
    "trainer=pretraining",
    "trainer.max_steps=3",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=8",
    "task.n=40",
    "eval_n=5",
]
QUICK = ["task=spell", "trainer.max_steps=2", "eval_n=4"]
SHORT = ["model=tiny_llama_pretrained", *QUICK]


def recipe(*more: str) -> str:
    """The override that puts a pre-training of three steps in the place of the shipped one."""
    return f"model.pretraining={json.dumps([*RECIPE, *more])}"


@pytest.fixture
def short(make: Callable[..., Cell]) -> Callable[..., Cell]:
    """A cell of two steps on a base model that was pre-trained for three."""
    return lambda *overrides, **named: make(recipe(), *SHORT, *overrides, **named)


def maker_of(cell: Cell) -> Cell:
    assert cell.pretraining is not None
    return cell.pretraining


def final_of(cell: Cell) -> Path:
    return Store(cell.config["results"]["dir"]).checkpoints(cell.train_id) / "final"


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_first_cell_makes_the_base_model_and_the_next_takes_it(
    make: Callable[..., Cell], short: Callable[..., Cell], tmp_path: Path
) -> None:
    cell = short("method=lora")
    record = run_cell(cell)
    maker = maker_of(cell)
    assert record["status"] == "done"
    made = Store(tmp_path).read("smoke", maker.id)
    assert made is not None
    assert (made["status"], made["train"]["steps"], made["config"]) == ("done", 3, maker.science)
    assert {path.stem for path in (tmp_path / "runs" / "smoke").glob("*.json")} == {cell.id, maker.id}
    before = stamps(final_of(maker))
    base = run_cell(short("method=none"))
    assert stamps(final_of(maker)) == before
    assert base["weights"] == record["weights"] == models.directory_mark(str(final_of(maker)))
    random = run_cell(make("method=none", "model=tiny_llama_128", *QUICK))
    nll = [r["eval"]["spell"]["metrics"]["nll_per_token"]["value"] for r in (base, random)]
    assert nll[0] < nll[1] - 0.05  # three steps teach it which bytes are letters


def test_what_is_loaded_is_what_the_pretraining_left(short: Callable[..., Cell]) -> None:
    cell = short("method=cdka")
    network, tokenizer = models.load(base_model(cell), dtype=torch.float32)
    saved = load_file(final_of(maker_of(cell)) / "model.safetensors")
    assert set(saved) == set(network.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in network.state_dict().items())
    start, bytes_ = models.load(maker_of(cell).config["model"], dtype=torch.float32)
    assert not torch.equal(saved["lm_head.weight"], start.state_dict()["lm_head.weight"])
    text = "Q: 12 - 7é\n<eos>"
    assert tokenizer(text)["input_ids"] == bytes_(text)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (257, 258)


def test_a_killed_pretraining_goes_on_to_the_same_weights(
    short: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = short("method=lora", results=tmp_path / "whole")
    run_cell(whole)
    cell = short("method=lora", "runtime.save_every=1", results=tmp_path / "killed")
    write, steps = Journal.on_step_end, []

    def killed(self: Journal, args: Any, state: Any, control: Any, **more: Any) -> None:
        steps.append(state.global_step)
        if steps == [1, 2, 3]:
            raise KeyboardInterrupt
        write(self, args, state, control, **more)

    monkeypatch.setattr(Journal, "on_step_end", killed)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell)
    assert not final_of(maker_of(cell)).exists()
    run_cell(cell)
    assert steps[:4] == [1, 2, 3, 3]  # only what was lost is done again
    one, two = (load_file(final_of(maker_of(c)) / "model.safetensors") for c in (whole, cell))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_record_without_its_weights_is_made_again(short: Callable[..., Cell], tmp_path: Path) -> None:
    """As after a clone, or where somebody has cleared a checkpoint."""
    cell = short("method=lora")
    run_cell(maker_of(cell))
    shutil.rmtree(final_of(maker_of(cell)).parent)
    assert run_cell(cell)["status"] == "done"
    assert (final_of(maker_of(cell)) / "model.safetensors").is_file()


def test_force_does_the_fine_tuning_again_and_not_its_base(short: Callable[..., Cell]) -> None:
    run_cell(short("method=lora"))
    cell = short("method=lora", "force=true")
    base, own = stamps(final_of(maker_of(cell))), stamps(final_of(cell))
    run_cell(cell)
    assert stamps(final_of(maker_of(cell))) == base
    assert stamps(final_of(cell)) != own


def test_the_recipe_is_in_the_id_and_the_place_is_not(make: Callable[..., Cell], tmp_path: Path) -> None:
    cells = [
        make(recipe(*more), *SHORT, *own, results=tmp_path / name)
        for name, more, own in [
            ("one", [], []),
            ("two", [], ["runtime.save_every=7"]),
            ("one", ["trainer.max_steps=4"], []),
            ("one", ["seed=1"], []),
            ("one", ["eval_n=6"], []),  # how the base is graded does not change what it is
            ("one", [], ["model.init_seed=3"]),  # nothing reads it
        ]
    ]
    first, elsewhere, longer, seeded, graded, unread = cells
    assert elsewhere.id == graded.id == unread.id == first.id
    assert maker_of(graded).id != maker_of(first).id
    assert len({first.id, longer.id, seeded.id}) == 3
    assert len({cell.train_id for cell in (first, longer, seeded)}) == 3
    assert first.science["model"]["pretraining"] == maker_of(first).train_id
    assert str(tmp_path) not in json.dumps(first.science)
    assert maker_of(elsewhere).config["results"] == elsewhere.config["results"]
    assert maker_of(elsewhere).config["runtime"] == elsewhere.config["runtime"]


def test_dry_run_and_plan_need_no_weights(short: Callable[..., Cell], tmp_path: Path) -> None:
    cell = short("method=lora", "dry_run=true")
    assert run_cell(cell)["status"] == "planned"
    assert not stamps(tmp_path)
    plan = make_plan(cell.config["model"], cell.config["method"])
    each = 4 * 8 * (128 + 128) + 3 * 8 * (128 + 256)
    assert plan["trainable_params"] == 4 * each
    assert plan["base_params"] == 2 * 260 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128


def test_the_shipped_recipe_makes_a_cell_and_shares_no_task_with_the_tables() -> None:
    cell = make_cell(compose_config(["scale=mini", "model=tiny_llama_pretrained", "task=spell", "method=cdka"]))
    parts = maker_of(cell).config["task"]["source"]["parts"]
    datasets = {part["source"]["dataset"] for part in parts.values()}
    assert "chain_sum" in datasets
    assert cell.config["task"]["source"]["dataset"] not in datasets
    assert maker_of(cell).scale == "mini"
    assert all(
        size % 64 == 0
        for key, size in cell.config["model"]["config"].items()
        if key.endswith("_size") and key != "vocab_size"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (recipe("method=lora"), "trains with method=lora; use method=full"),
        (recipe("model=tiny_llama"), "trains a model whose config is not model.config"),
        ("model.pretraining=null", "must be a list of overrides"),
        ("model.pretraining=[1]", "must be a list of overrides"),
        (recipe("trainer.lrr=1"), "trainer.lrr: unknown key; did you mean 'lr'?"),
        (f"model.pretraining={json.dumps(['scale=smoke', 'model=tiny_llama_pretrained', 'method=full'])}", None),
    ],
    ids=["method", "config", "null", "no text", "unknown key", "another pre-training behind it"],
)
def test_a_wrong_recipe_is_one_line(make: Callable[..., Cell], override: str, said: str | None) -> None:
    if said is None:
        assert maker_of(maker_of(make(override, *SHORT))).pretraining is None
        return
    with pytest.raises(ConfigError) as caught:
        make(override, *SHORT)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_pretrainings_behind_one_another_end_somewhere(make: Callable[..., Cell]) -> None:
    second = ["scale=smoke", "method=full", "model=tiny_llama_pretrained", recipe("model=tiny_llama_pretrained")]
    with pytest.raises(ConfigError, match="more than 2 pre-trainings behind one another") as caught:
        make(f"model.pretraining={json.dumps(second)}", *SHORT)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pretraining_that_diverges_is_one_line(make: Callable[..., Cell]) -> None:
    cell = make(recipe("trainer.lr=1e30", "trainer.warmup_ratio=0"), *SHORT)
    with pytest.raises(ModelError, match=r"tiny_llama_pretrained: its pre-training has diverged: .*not finite"):
        run_cell(cell)


def test_loaded_without_a_cell_it_says_what_to_do(short: Callable[..., Cell]) -> None:
    with pytest.raises(ModelError, match=r"python scripts/train.py model=tiny_llama_pretrained.*model.directory="):
        models.load(short().config["model"], dtype=torch.float32)
