"""The accelerate configs that are shipped are read by accelerate's own loader, and say what they claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
EXPECTED: dict[str, tuple[DistributedType, dict[str, Any]]] = {
    "one_gpu": (DistributedType.NO, {}),
    "ddp": (DistributedType.MULTI_GPU, {}),
    "fsdp": (DistributedType.FSDP, {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, {"zero_stage": 3}),
}


def test_every_file_is_known_here() -> None:
    assert {path.stem for path in FOLDER.glob("*")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    kind, settings = EXPECTED[name]
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.mixed_precision == "bf16"
    assert config.num_processes == (1 if name == "one_gpu" else config.num_processes)
    assert (config.num_processes > 1) is (name != "one_gpu")
    section = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    assert {key: section.get(key) for key in settings} == settings


def test_a_key_that_accelerate_does_not_know_is_refused(tmp_path: Path) -> None:
    """So the test above can fail."""
    path = tmp_path / "wrong.yaml"
    path.write_text((FOLDER / "ddp.yaml").read_text() + "no_such_key: 1\n")
    with pytest.raises(ValueError, match="no_such_key"):
        load_config_from_file(str(path))


def test_launch_knows_every_key_of_deepspeed_and_makes_zero_3_of_them() -> None:
    """As far as can be told without DeepSpeed itself."""
    config = load_config_from_file(str(FOLDER / "deepspeed_zero3.yaml"))
    assert isinstance(config, ClusterConfig)
    settings = dict(config.deepspeed_config)
    assert set(settings) <= {action.dest for action in launch_command_parser()._actions}
    made = DeepSpeedPlugin(**settings).deepspeed_config
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    for size in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert made[size] == "auto"  # the trainer's
