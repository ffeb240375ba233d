"""What Hydra finds as `hydra/sweeper=optuna` (docs/launchers.md); the study itself is in `kronlab.study`."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """Trials of an Optuna study in the place of a grid; any launcher runs them."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from kronlab.study import run_study

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        return run_study(self.config, self.hydra_context, self.launcher.launch, arguments, self.settings)
