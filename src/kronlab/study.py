"""An Optuna study as a sweep: settings drawn from ranges, judged on validation data, and a killed study goes on.

    scripts/train.py -m hydra/sweeper=optuna 'trainer.lr=tag(log,interval(1e-5,1e-2))' +eval@eval.validation=validation

A trial is a cell like any other. The study lies in <results>/studies/<study>.db (SQLite).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from kronlab import lease, runs, sweep
from kronlab.cell import digest
from kronlab.errors import ConfigError
from kronlab.launch import needed
from kronlab.runs import Store

log = logging.getLogger(__name__)
_GOALS = {"min": "minimize", "max": "maximize"}
# Of what is typed, what says where and how a cell runs: it may change while a study goes on.
_NOT_OF_STUDY = ("results.", "runtime.", "data.dir", "publish.", "logger", "retry_failed", "dry_run", "hydra")
_RECORD, _NOTE, _AGAIN = "record", "note", "again"

Launch = Callable[[Sequence[Sequence[str]], int], Sequence[Any]]


def run_study(
    config: DictConfig, context: HydraContext, launch: Launch, arguments: Sequence[str], settings: Mapping[str, Any]
) -> Any:
    """Make trials until the study has `n_trials`, then tell all of them.

    Args:
        launch: the launcher's; takes lists of overrides and the number of the first, returns what the jobs return.
        arguments: the overrides that were typed; what is swept over is the search space.
        settings: study, n_trials, n_jobs, startup, seed, eval, metric, goal (configs/hydra/sweeper/optuna.yaml).

    Raises:
        ConfigError: settings that are wrong, an eval that is not on validation data, or a study of other settings.
        Busy: another process works on the study.
    """
    optuna = needed("optuna", launcher="basic hydra/sweeper=optuna", extra="optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _check(settings)
    fixed, space = _search_space(optuna, OverridesParser.create().parse_overrides(list(arguments)))
    one = [*fixed, *(f"{key}={_written(_any_of(distribution))}" for key, distribution in space.items())]
    _on_validation_data(context.config_loader.load_sweep_config(config, one), settings)
    store = Store(str(config.results.dir))
    what = f"study {settings['study']}"
    with lease.held(store.running() / f"study-{settings['study']}", what, wait=False):
        file = store.results / "studies" / f"{settings['study']}.db"
        file.parent.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=f"sqlite:///{file}",
            study_name=str(settings["study"]),
            direction=_GOALS[settings["goal"]],
            load_if_exists=True,
        )
        _same_study(study, fixed, space, settings)
        finished = _take_up(optuna, study, again=bool(config.retry_failed))
        study.sampler = optuna.samplers.TPESampler(
            seed=settings["seed"] + len(study.trials),  # going on must not draw the first trials' settings again
            n_startup_trials=settings["startup"],
        )
        number = 0
        while finished < settings["n_trials"]:
            trials = [study.ask(space) for _ in range(min(settings["n_jobs"], settings["n_trials"] - finished))]
            batch = [[*fixed, *(f"{key}={_written(value)}" for key, value in t.params.items())] for t in trials]
            for trial, done in zip(trials, launch(batch, number), strict=True):
                _tell(optuna, study, trial, done.return_value, settings)
            number, finished = number + len(trials), finished + len(trials)
        if number == 0:
            sweep.called_off()
        print(table(study, settings))
        return study


def _check(settings: Mapping[str, Any]) -> None:
    faults = []
    for key, least in (("n_trials", 1), ("n_jobs", 1), ("startup", 1), ("seed", 0)):
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            faults.append(f"hydra.sweeper.{key}={value!r}: must be a whole number of at least {least}")
    if settings["goal"] not in _GOALS:
        faults.append(f"hydra.sweeper.goal={settings['goal']!r}: must be min or max")
    name = settings["study"]
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        faults.append(f"hydra.sweeper.study={name!r}: must be letters, digits, - and _")
    if faults:
        raise ConfigError("\n".join(faults))


def _search_space(optuna: Any, overrides: Sequence[Override]) -> tuple[list[str], dict[str, Any]]:
    """What is typed for every trial, and a distribution for each setting that is swept over.

    Raises:
        ConfigError: nothing is, or a range cannot be searched.
    """
    fixed: list[str] = []
    space: dict[str, Any] = {}
    for override in overrides:
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
            continue
        key, swept = override.get_key_element(), override.value()
        try:
            if isinstance(swept, IntervalSweep):
                whole = isinstance(swept.start, int) and isinstance(swept.end, int)
                kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
                space[key] = kind(swept.start, swept.end, log="log" in swept.tags)
            else:
                choices = [*override.sweep_string_iterator()]
                space[key] = optuna.distributions.CategoricalDistribution(choices)
        except ValueError as error:
            raise ConfigError(f"{override.input_line}: {' '.join(str(error).split())}") from error
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna: nothing to search; give a setting a range, 'trainer.lr=tag(log,interval(1e-5,1e-2))'"
        )
    return fixed, space


def _any_of(distribution: Any) -> Any:
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def _written(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _same_study(study: Any, fixed: Sequence[str], space: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Trials of one study are of one experiment.

    Raises:
        ConfigError: the study was begun with other settings.
    """
    ours = {
        "fixed": sorted(line for line in fixed if not line.lstrip("+~").startswith(_NOT_OF_STUDY)),
        "space": {key: repr(distribution) for key, distribution in space.items()},
        "by": [settings["eval"], settings["metric"], settings["goal"]],
    }
    theirs = study.user_attrs.get("settings")
    if theirs is None:
        study.set_user_attr("settings", ours)
    elif digest(theirs) != digest(ours):
        raise ConfigError(
            f"hydra.sweeper.study={study.study_name}: it was begun with other settings ({json.dumps(theirs)}); "
            "choose another name"
        )


def _take_up(optuna: Any, study: Any, *, again: bool) -> int:
    """Queue once more what was cut off, and with `again` what has failed; the number of finished trials."""
    states = optuna.trial.TrialState
    finished = 0
    trials = study.get_trials()
    tried_again = {trial.user_attrs.get(_AGAIN) for trial in trials}
    for trial in trials:
        if trial.state == states.COMPLETE or trial.number in tried_again:
            finished += trial.state == states.COMPLETE
        elif trial.state == states.RUNNING or (trial.state == states.FAIL and (again or _NOTE not in trial.user_attrs)):
            if trial.state == states.RUNNING:
                study.tell(trial.number, state=states.FAIL)
            study.enqueue_trial(trial.params, user_attrs={_AGAIN: trial.number})
        elif trial.state == states.FAIL:
            finished += 1
    return finished


def _on_validation_data(config: DictConfig, settings: Mapping[str, Any]) -> None:
    """A test set that has chosen a setting is no test set any more.

    Raises:
        ConfigError: the trials have no such eval, or it is not on a validation split.
    """
    evals = OmegaConf.to_container(config.eval, resolve=True)
    assert isinstance(evals, dict)
    name = settings["eval"]
    if name not in evals:
        raise ConfigError(
            f"hydra.sweeper.eval={name!r}: the trials are graded on {', '.join(map(str, evals))}; add "
            "+eval@eval.validation=validation, or name one of them"
        )
    if evals[name].get("split") != "validation":
        raise ConfigError(
            f"hydra.sweeper.eval={name}: is on split {evals[name].get('split')!r}; only validation data may choose: "
            f"add +eval@eval.validation=validation, or eval.{name}.split=validation"
        )


def _tell(optuna: Any, study: Any, trial: Any, record: Any, settings: Mapping[str, Any]) -> None:
    """Give a trial its value: of one that has diverged the worst there is; one without a record has failed.

    Raises:
        ConfigError: there is no such metric.
    """
    worst = math.inf if settings["goal"] == "min" else -math.inf
    status = record["status"] if isinstance(record, Mapping) else None
    if isinstance(record, Mapping):
        trial.set_user_attr(_RECORD, record["id"])
    if status == runs.DIVERGED:
        trial.set_user_attr(_NOTE, "diverged")
        study.tell(trial, worst)
    elif status == runs.DONE:
        metrics = record["eval"][settings["eval"]]["metrics"]
        if settings["metric"] not in metrics:
            raise ConfigError(
                f"hydra.sweeper.metric={settings['metric']!r}: eval {settings['eval']} gives {', '.join(metrics)}"
            )
        study.tell(trial, float(metrics[settings["metric"]]["value"]))
    else:
        trial.set_user_attr(_NOTE, status or "no result")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def table(study: Any, settings: Mapping[str, Any]) -> str:
    """The trials, best first, and what the best one had."""
    trials = [trial for trial in study.trials if {_RECORD, _NOTE} & set(trial.user_attrs)]
    sign = 1 if settings["goal"] == "min" else -1
    trials.sort(key=lambda trial: sign * trial.value if trial.value is not None else math.inf)
    keys = sorted({key for trial in trials for key in trial.params})
    head = ["trial", *keys, f"{settings['eval']} {settings['metric']}", "cell"]
    rows = [head]
    for trial in trials:
        score = trial.user_attrs.get(_NOTE) or f"{trial.value:.4g}"
        params = [trial.params.get(key, "") for key in keys]
        told = [value if isinstance(value, str) else f"{value:.4g}" for value in params]
        rows.append([str(trial.number), *told, score, str(trial.user_attrs.get(_RECORD, ""))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    best = next((trial for trial in trials if trial.value is not None and math.isfinite(trial.value)), None)
    if best is not None:
        lines.append("best: " + " ".join(f"{key}={_written(value)}" for key, value in best.params.items()))
    return "\n".join(lines)
