"""What Hydra finds as `hydra/launcher=joblib | submitit_local | submitit_slurm | ray` (docs/launchers.md).

Hydra imports every module of `hydra_plugins` whenever a script starts, so nothing heavy is imported up here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from kronlab.launch import Job


class KronlabLauncher(Launcher):
    """What all have in common: `launch` composes the jobs, `run` runs them somewhere."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from kronlab import launch

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = launch.make_jobs(self.config, self.task, self.context, job_overrides, initial_job_idx)
        return launch.returned(jobs, self.run(jobs))

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> dict[int, Any]:
        """Run the jobs; what they return, by number. Of one that ended without telling how, `sweep.lost` is told."""


class JoblibLauncher(KronlabLauncher):
    """`n_jobs` processes on this machine."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def run(self, jobs: Sequence[Job]) -> dict[int, Any]:
        from kronlab import launch

        return launch.with_joblib(jobs, n_jobs=self.n_jobs)


class SubmititLauncher(KronlabLauncher):
    """Jobs of submitit: on this machine, `n_jobs` at once, or in Slurm's queue."""

    def __init__(
        self, cluster: str, folder: str, max_num_timeout: int, parameters: Any, n_jobs: int | None = None
    ) -> None:
        self.cluster, self.folder, self.n_jobs = cluster, folder, n_jobs
        self.max_num_timeout, self.parameters = max_num_timeout, plain(parameters)

    def run(self, jobs: Sequence[Job]) -> dict[int, Any]:
        from kronlab import launch

        executor = launch.submitit_executor(self.cluster, self.folder, self.max_num_timeout, self.parameters)
        return launch.with_submitit(jobs, executor, n_jobs=self.n_jobs, own=self.cluster == "local")


class RayLauncher(KronlabLauncher):
    """Tasks of a Ray cluster."""

    def __init__(self, init: Any, remote: Any) -> None:
        self.init, self.remote = plain(init), plain(remote)

    def run(self, jobs: Sequence[Job]) -> dict[int, Any]:
        from kronlab import launch

        return launch.with_ray(jobs, init=self.init, remote=self.remote)


def plain(settings: Any) -> Any:
    """Settings as plain data, those that are null left out."""
    if OmegaConf.is_config(settings):
        settings = OmegaConf.to_container(settings, resolve=True)
    if isinstance(settings, dict):
        return {key: plain(value) for key, value in settings.items() if value is not None}
    return settings
