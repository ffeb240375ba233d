"""The jobs of a sweep in processes of their own: what the launchers of `hydra_plugins.kronlab_launchers` share.

The process that the user has started, the leader, composes every job and hands it to joblib, submitit or Ray. Whatever
runs a job calls `work`, which does what Hydra's own launcher does in the leader. While a job runs it has a mark in the
folder of the sweep's lines (`kronlab.sweep`):

    <results>/checkpoints/sweeps/<sweep>/3.pid      the process that runs job 3 now
    <results>/checkpoints/sweeps/<sweep>/stop       no other job is to begin

Processes on other machines need the same results directory, on storage that all of them see.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from kronlab import interrupt, sweep
from kronlab.errors import ConfigError

log = logging.getLogger(__name__)
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """One job of a sweep, ready to be pickled.

    Attributes:
        config: composed, with Hydra's own section.
        task: the function that `hydra.main` has decorated.
        state: Hydra's singletons in the leader.
        argv: what was typed; records keep it.
        folder: of the sweep's lines.
    """

    number: int
    config: DictConfig
    task: TaskFunction
    context: HydraContext
    state: Mapping[Any, Any]
    argv: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """What sets it apart from the sweep's other jobs."""
        return " ".join(filter_overrides(list(self.config.hydra.overrides.task)))

    @property
    def mark(self) -> Path:
        return self.folder / f"{self.number}.pid"


def make_jobs(
    config: DictConfig,
    task: TaskFunction,
    context: HydraContext,
    overrides: Sequence[Sequence[str]],
    first: int,
) -> list[Job]:
    """Compose all jobs, so that a faulty override stops the sweep before anything has begun.

    Raises:
        ConfigError: the script has no sweeps of cells.
    """
    told = os.environ.get(sweep.VARIABLE)
    if not told:
        raise ConfigError("hydra/launcher: only scripts/train.py runs its jobs in other processes; use basic")
    setup_globals()
    Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    folder = Path(told)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, changes in enumerate(overrides, start=first):
        composed = context.config_loader.load_sweep_config(config, list(changes))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        jobs.append(Job(number, composed, task, context, Singleton.get_state(), tuple(sys.argv), folder))
        log.info("#%d: %s", number, jobs[-1].name)
    return jobs


def work(job: Job) -> Any:
    """Run a job in this process, and return what its task function returns; None if no job is to begin any more.

    Raises:
        Interrupted: a signal has stopped it; the same job goes on from there.
    """
    setup_globals()
    Singleton.set_state(dict(job.state))
    sys.argv = list(job.argv)
    os.environ[sweep.VARIABLE] = str(job.folder)
    with interrupt.listening():
        job.mark.write_text(
            str(os.getpid())
        )  # before the look at `stop`: who stops us first makes that, then reads this
        try:
            if (job.folder / "stop").exists():
                return None
            done = run_job(
                hydra_context=job.context,
                task_function=job.task,
                config=job.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        finally:
            job.mark.unlink(missing_ok=True)
    return done.return_value


def work_apart(job: Job) -> tuple[int, Any]:
    """(number, result) of a job whose process belongs to the leader, which alone hears Ctrl-C and passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return job.number, work(job)
    except interrupt.Interrupted as stop:
        print(stop, file=sys.stderr)
        return job.number, None


def returned(jobs: Sequence[Job], results: Mapping[int, Any]) -> list[JobReturn]:
    """What Hydra wants of a launcher."""
    told = []
    for job in jobs:
        overrides = list(job.config.hydra.overrides.task)
        done = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
        done.return_value = results.get(job.number)
        told.append(done)
    return told


@contextmanager
def stoppable(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block the first signal is noted and `stop` called, in a thread; at its end it stops the sweep."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            if interrupt.pending():
                stop()
                return

    with interrupt.guarded():
        watcher = threading.Thread(target=watch, name="stop jobs", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def stop_processes(folder: Path) -> None:
    """Let no other job begin, and ask those that run on this machine to write a checkpoint and stop."""
    (folder / "stop").touch()
    for mark in folder.glob("*.pid"):
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int(mark.read_text()), signal.SIGTERM)


def needed(module: str, *, launcher: str, extra: str) -> ModuleType:
    """Import what a launcher stands on.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"hydra/launcher={launcher}: {module.partition('.')[0]} is not installed; pip install 'kronlab[{extra}]'"
        ) from error


def with_joblib(jobs: Sequence[Job], *, n_jobs: int) -> dict[int, Any]:
    """Run the jobs in `n_jobs` processes of this machine; results by job number.

    A process that dies takes the others of its pool along. So the jobs that had not begun are run in a new pool, then
    those that had, each in a pool of its own; one that dies there again is lost.

    Raises:
        ConfigError: fewer than two processes.
    """
    from joblib import Parallel, delayed

    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 2:
        raise ConfigError(
            f"hydra.launcher.n_jobs={n_jobs!r}: must be at least 2; hydra/launcher=basic takes one by one"
        )
    results: dict[int, Any] = {}

    def pool(todo: Sequence[Job]) -> None:
        parallel = Parallel(n_jobs, backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch=n_jobs)
        results.update(parallel(delayed(work_apart)(job) for job in todo))

    def in_turn() -> None:
        todo, had_begun = list(jobs), []
        while todo and not interrupt.pending():
            try:
                pool(todo)
            except BrokenProcessPool:
                left = [job for job in todo if job.number not in results]
                begun = [job for job in left if job.mark.exists()] or left
                had_begun += begun
                todo = [job for job in left if job not in begun]
            else:
                todo = []
        for job in had_begun:
            if interrupt.pending():
                break
            try:
                pool([job])
            except BrokenProcessPool as error:
                sweep.lost(job.number, job.name, f"its process died twice ({sweep.one_line(error)[:200]})")

    with stoppable(lambda: stop_processes(jobs[0].folder)):
        in_turn()
    return results


class Submitted:
    """A job as submitit pickles it. Asked to give the machine back, it writes a checkpoint and is queued again."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> Any:
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's, in the place of which `interrupt` listens
        try:
            return work(self.job)
        except interrupt.Interrupted as stop:
            print(stop, file=sys.stderr)
            if stop.signum == signal.SIGUSR2 and callable(requeue):
                requeue(stop.signum, None)  # calls `checkpoint`, queues the job again and leaves
            raise SystemExit(stop.status) from stop

    def checkpoint(self) -> Any:
        """What submitit queues again: the same, for a cell finds its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submitit_executor(cluster: str, folder: str, max_num_timeout: int, parameters: Mapping[str, Any]) -> Any:
    """Submitit's executor for a cluster, local or slurm.

    Raises:
        ConfigError: submitit or Slurm is not here, or there is no such parameter.
    """
    submitit = needed("submitit", launcher=f"submitit_{cluster}", extra="slurm")
    timeouts = {f"{cluster}_max_num_timeout": max_num_timeout}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **timeouts)
        executor.update_parameters(**parameters)
    except (RuntimeError, ValueError, NameError, TypeError) as error:
        raise ConfigError(f"hydra/launcher=submitit_{cluster}: {' '.join(str(error).split())}") from error
    return executor


def with_submitit(jobs: Sequence[Job], executor: Any, *, n_jobs: int | None, own: bool) -> dict[int, Any]:
    """Submit the jobs and wait for them; results by job number.

    Args:
        n_jobs: at most so many at once; None: all are submitted, as one array.
        own: the processes are this machine's and are stopped with the leader; otherwise the queue keeps them.
    """
    results: dict[int, Any] = {}
    waiting = list(jobs)
    running: list[tuple[Job, Any]] = []

    def stop() -> None:
        waiting.clear()
        if own:
            stop_processes(jobs[0].folder)
        else:
            told = " ".join(submitted.job_id for _, submitted in running)
            print(f"the jobs stay in the queue; to take them out: scancel {told}", file=sys.stderr)

    with stoppable(stop):
        if n_jobs is None:
            running = list(zip(jobs, executor.map_array(Submitted.__call__, map(Submitted, jobs)), strict=True))
            waiting.clear()
        while waiting or running:
            while waiting and len(running) < (n_jobs or 1):
                job = waiting.pop(0)
                with _deaf_to_ctrl_c():
                    running.append((job, executor.submit(Submitted(job))))
            time.sleep(_POLL_S)
            if interrupt.pending() and not own:
                break
            for job, submitted in [pair for pair in running if pair[1].done()]:
                running.remove((job, submitted))
                _collect(job, submitted, results)
    return results


def _collect(job: Job, submitted: Any, results: dict[int, Any]) -> None:
    submitted._results_timeout_s = 1 if interrupt.pending() else 15  # how long a result may be late on shared storage
    try:
        results[job.number] = submitted.result()
    except Exception as error:
        if not interrupt.pending():
            reason = sweep.one_line(error)[:120]
            sweep.lost(
                job.number, job.name, f"ended without a result ({reason} ...); its log: {submitted.paths.stderr}"
            )


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started within ignore Ctrl-C, which a terminal sends to all: the leader passes it on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def with_ray(jobs: Sequence[Job], *, init: Mapping[str, Any], remote: Mapping[str, Any]) -> dict[int, Any]:
    """Run the jobs as tasks of a Ray cluster, that of `init.address` or one made for them; results by job number.

    Args:
        init: what `ray.init` takes.
        remote: what a task needs (`num_cpus`, `num_gpus`, `max_retries`).

    Raises:
        ConfigError: Ray is not installed, or refuses the settings.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of cells that differ in a number are not one line
    ray = needed("ray", launcher="ray", extra="ray")
    own = not ray.is_initialized()
    try:
        if own:
            ray.init(**init)
        task = ray.remote(**remote)(work) if remote else ray.remote(work)
    except (ValueError, TypeError, ConnectionError) as error:
        raise ConfigError(f"hydra/launcher=ray: {' '.join(str(error).split())}") from error
    results: dict[int, Any] = {}
    running: dict[Any, Job] = {}

    def stop() -> None:
        (jobs[0].folder / "stop").touch()
        for reference in list(running):
            ray.cancel(reference, force=False)  # as Ctrl-C in the task's process

    try:
        with stoppable(stop):
            running.update({task.remote(job): job for job in jobs})
            while running:
                for reference in ray.wait(list(running), timeout=_POLL_S)[0]:
                    job = running.pop(reference)
                    try:
                        results[job.number] = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        if not interrupt.pending():
                            sweep.lost(job.number, job.name, f"ended without a result ({sweep.one_line(error)[:200]})")
    finally:
        if own:
            ray.shutdown()
    return results
