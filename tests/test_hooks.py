"""What LoRA+ and AdaLoRA add to training: groups and their learning rates, the allocation of ranks, the penalty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kronlab import methods
from kronlab.encode import SupervisedHead, encode
from kronlab.errors import ConfigError
from kronlab.hooks import AdaLora, LoraPlus
from kronlab.runs import read_jsonl
from kronlab.train import train

TRAINER = ["trainer.batch_size=4", "trainer.micro_batch_size=2", "trainer.max_steps=6", "trainer.warmup_ratio=0"]


@pytest.fixture
def fit(build: Callable[..., Any], make: Callable[..., Any], toys: Callable[..., Any], tmp_path: Path) -> Any:
    """Train the tiny LLaMA for six steps; the network, the losses and the folder."""

    def fit(*overrides: str) -> tuple[nn.Module, list[float], Path]:
        config = make(*TRAINER, *overrides).config
        network, tokenizer = build(*overrides)
        rows = [encode(example, tokenizer, causal=True, max_length=64) for example in toys(24)]
        folder = tmp_path / "-".join(o.replace("/", "") for o in overrides)
        train(
            network, rows, config["trainer"], directory=folder, seed=0, pad_id=tokenizer.pad_token_id,
            objective=SupervisedHead(network, causal=True), runtime=config["runtime"],
            hooks=methods.hooks(network, config["method"]),
        )  # fmt: skip
        return network, [line["loss"] for line in read_jsonl(folder / "loss.jsonl")], folder

    return fit


def test_lora_plus_gives_b_its_own_learning_rate(build: Callable[..., Any]) -> None:
    network, _ = build("method=lora_plus")
    hooks = methods.hooks(network, {"name": "lora", "lr_ratio": 16})
    assert isinstance(hooks, LoraPlus)
    optimizer = hooks.optimizer(network, torch.optim.AdamW, 0.01, {"lr": 1e-3, "betas": (0.9, 0.95)})
    names = {id(p): name for name, p in network.named_parameters()}
    seen = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert seen.keys() == {name for name, p in network.named_parameters() if p.requires_grad}
    for name, group in seen.items():
        assert group["lr"] == pytest.approx(16e-3 if "lora_B" in name else 1e-3), name
        assert (group["weight_decay"], group["betas"]) == (0.01, (0.9, 0.95))


def test_lora_plus_with_ratio_one_trains_as_lora_and_with_another_does_not(fit: Any) -> None:
    """The groups' order differs, and nothing else: AdamW treats every weight by itself."""
    _, plain, _ = fit("method=lora", "trainer.max_grad_norm=0")
    _, one, folder = fit("method=lora_plus", "method.lr_ratio=1", "trainer.max_grad_norm=0")
    _, sixteen, _ = fit("method=lora_plus", "trainer.max_grad_norm=0")
    assert one == pytest.approx(plain, abs=1e-6)
    assert sixteen[:1] == plain[:1]
    assert sixteen[2:] != pytest.approx(plain[2:], abs=1e-3)
    state = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert len(state["param_groups"]) == 4, "PEFT's groups: A, embeddings, B, B without decay"


def test_other_methods_do_not_take_a_ratio(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"method.lr_ratio=4: must be null: only LoRA"):
        make("method=cdka", "+method.lr_ratio=4")
    with pytest.raises(ConfigError, match=r"method.lr_ratio=0: must be a number above 0"):
        make("method=lora_plus", "method.lr_ratio=0")
    assert make("method=lora", "+method.lr_ratio=null").id == make("method=lora").id, "as before the key existed"


def test_adalora_keeps_the_ranks_of_its_budget(fit: Any) -> None:
    network, _, _ = fit("method=adalora", "method.delta_t=1")
    values = [p for name, p in network.named_parameters() if "lora_E" in name]
    assert [len(p) for p in values] == [12] * 14
    assert sum(int((p != 0).sum()) for p in values) == 8 * 14
    assert network.peft_config["default"].rank_pattern is None, "PEFT would prune what it saves, for good"


def test_adalora_penalty_by_the_definition(build: Callable[..., Any]) -> None:
    network, _ = build("method=adalora", randomise=0.3)
    hooks = AdaLora(network, 0.1, 0.5)
    norms = []
    for name, p in network.named_parameters():
        if "lora_A" in name:
            norms.append((p @ p.T - torch.eye(12)).square().sum().sqrt())
        if "lora_B" in name:
            norms.append((p.T @ p - torch.eye(12)).square().sum().sqrt())
    assert len(norms) == 28
    penalty = hooks.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty, 0.1 * sum(norms) / 28)


def test_adalora_penalty_acts_and_is_not_in_the_reported_loss(fit: Any) -> None:
    with_it, losses, _ = fit("method=adalora")
    without, plain, _ = fit("method=adalora", "method.orthogonal=0")
    assert losses[0] == plain[0]

    def distance(network: nn.Module) -> float:
        parts = [p for name, p in network.named_parameters() if "lora_A" in name]
        return sum(float((p @ p.T - torch.eye(12)).norm()) for p in parts)

    assert distance(with_it) < distance(without) - 0.1


def test_adalora_schedule(build: Callable[..., Any]) -> None:
    network, _ = build("method=adalora")
    hooks = AdaLora(network, 0.1, 0.5)
    config = network.peft_config["default"]
    hooks.begin(100)
    assert (config.total_step, config.tinit, config.tfinal) == (100, 10, 50)
    hooks.begin(2)  # importance needs a step before the ranks are fixed
    assert (config.total_step, config.tinit, config.tfinal) == (2, 0, 0)
    with pytest.raises(ConfigError, match="there is only 1; train longer"):
        hooks.begin(1)
