"""What a method may add to training: parameter groups, a penalty, work after each step, a state to resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronlab.errors import ConfigError

_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what PEFT's RankAllocator remembers from step to step


def freeze_constants(network: nn.Module) -> None:
    """Freeze the rank that AdaLoRA's layers divide by: PEFT leaves it trainable, and out of what it saves."""
    for name, parameter in network.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


class Hooks:
    """The hooks that `kronlab.train` calls; here they do nothing, as for most methods."""

    def optimizer(
        self, network: nn.Module, kind: type[Optimizer], weight_decay: float, keywords: dict[str, Any]
    ) -> Optimizer | None:
        """An optimizer with groups of the method's own; None: the trainer's."""
        return None

    def begin(self, steps: int) -> None:
        """Training is about to start or go on; there are `steps` in all."""

    def penalty(self) -> Tensor | None:
        """A scalar that is minimised beside the task's loss, once per step."""
        return None

    def after_step(self, step: int) -> None:
        """The optimizer has done step number `step` (from 1); its gradients are still there."""

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must keep beside the weights for a resume to the last bit."""
        return None

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


class LoraPlus(Hooks):
    """LoRA+ (arXiv 2402.12354): B learns at `ratio` times the learning rate of A."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def optimizer(
        self, network: Any, kind: type[Optimizer], weight_decay: float, keywords: dict[str, Any]
    ) -> Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            network, kind, loraplus_lr_ratio=self.ratio, loraplus_weight_decay=weight_decay, **keywords
        )


class AdaLora(Hooks):
    """AdaLoRA (arXiv 2303.10512): the ranks are allocated after every step, and A and B are kept orthogonal.

    PEFT prunes what it saves by the rank pattern in the adapter's config. A pruned direction may come back, though,
    as long as the budget falls, so the pattern is kept here: checkpoints hold every direction, the pruned ones with
    E = 0, which is the same function.

    Args:
        network: a PeftModel with an AdaLoRA adapter.
        t_init: share of the steps before the budget falls.
        t_final: share of the steps after it has fallen.
    """

    def __init__(self, network: Any, t_init: float, t_final: float) -> None:
        self._tuner = network.base_model
        self._config = network.peft_config["default"]
        self._shares = t_init, t_final
        self._pattern: dict[str, list[bool]] | None = None

    def optimizer(
        self, network: nn.Module, kind: type[Optimizer], weight_decay: float, keywords: dict[str, Any]
    ) -> None:
        freeze_constants(network)  # PEFT may have activated the adapter anew when a checkpoint was loaded

    def begin(self, steps: int) -> None:
        """Fix the schedule.

        Raises:
            ConfigError: fewer than two steps: importance is known after one.
        """
        if steps < 2:
            raise ConfigError(f"AdaLoRA allocates ranks by earlier steps and there is only {steps}; train longer")
        t_init, t_final = (int(share * steps) for share in self._shares)
        self._config.total_step, self._config.tinit = steps, t_init
        self._config.tfinal = min(t_final, steps - 2)

    def penalty(self) -> Tensor | None:
        """Weight times the mean over all A, B of ||A Aᵀ - I||, ||Bᵀ B - I|| (Frobenius), eq. 4, mean as in PEFT."""
        weight = self._config.orth_reg_weight
        if not weight:
            return None
        norms = []
        for name, p in self._tuner.named_parameters():
            if "lora_A." in name or "lora_B." in name:
                gram = p @ p.T if "lora_A." in name else p.T @ p  # (r, r)
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device)))
        return weight * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        self._config.rank_pattern = self._pattern
        self._tuner.update_and_allocate(step)
        self._pattern, self._config.rank_pattern = self._config.rank_pattern, None

    def state(self) -> dict[str, Any]:
        allocator = self._tuner.rankallocator
        return {"pattern": self._pattern, **{name: dict(getattr(allocator, name)) for name in _IMPORTANCE}}

    def restore(self, state: dict[str, Any]) -> None:
        devices = {name: p.device for name, p in self._tuner.model.named_parameters()}
        for name in _IMPORTANCE:
            kept = {key: tensor.to(devices[key]) for key, tensor in state[name].items()}
            setattr(self._tuner.rankallocator, name, kept)
        self._pattern = state["pattern"]
