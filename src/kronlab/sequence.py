"""Tasks one after another with one adapter: `sequence=[arc_challenge,arc_easy]` names them in training order.

Each stage is composed from the same overrides as a cell of its task alone, so that its section, sizes included, is that
cell's own, and the two share their trained weights. An override of one task's eval (`eval.arc_easy.n=50`) goes to the
stages that have the eval; on a command line it is written `++eval.arc_easy.n=50`, for there Hydra composes the default
task first, which does not have it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kronlab.errors import ConfigError

Compose = Callable[[tuple[str, ...]], DictConfig]
RESOLVED = "after"
"""The config's key for the sections of the tasks before `task`, in order; null: there are none."""


def first_look(overrides: Sequence[str]) -> tuple[str, ...]:
    """What to compose to learn the sequence: all overrides, but those of evals where a sequence is among them."""
    if not any(text.lstrip("+").startswith("sequence=") for text in overrides):
        return tuple(overrides)
    return tuple(text for text in overrides if not text.lstrip("+~").startswith("eval."))


def with_stages(config: DictConfig, overrides: Sequence[str], compose: Compose) -> DictConfig:
    """A composed config with its `sequence` resolved; as it is where that is null, or resolved already.

    `task` is then the last task, `after` has the task sections of those before it, `eval` the evals of all.

    Args:
        overrides: what `config` was composed from.
        compose: a config from overrides; may return the same object for the same ones, it is only read.

    Raises:
        ConfigError: the sequence is no list of tasks, or the tasks do not go together.
        HydraException: a task that is not there, or another override that Hydra refuses.
    """
    names = OmegaConf.select(config, "sequence")
    if names is None or RESOLVED in config:
        return config
    names = OmegaConf.to_container(names) if OmegaConf.is_list(names) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"sequence={names!r}: must be a list of tasks, such as [arc_challenge,arc_easy], or null")
    stages = _stages(names, overrides, compose)
    _check_trainers(names, stages)
    last = copy.deepcopy(stages[-1])
    evals = _evals(names, stages)
    with open_dict(last):
        last.sequence = names
        last[RESOLVED] = [plain(stage.task) for stage in stages[:-1]] or None
        last.eval = evals
    return last


def _stages(names: Sequence[str], overrides: Sequence[str], compose: Compose) -> list[DictConfig]:
    """The config of each task by itself."""
    parser = OverridesParser.create()
    shared: list[str] = []
    of_evals: list[tuple[str, str]] = []
    for text in overrides:
        override = parser.parse_override(text)
        key = override.key_or_group
        if key == "task" and override.package is None:
            raise ConfigError(f"{text} beside sequence={','.join(names)}: a sequence names all its tasks; leave it out")
        if key.startswith("eval."):
            of_evals.append((key.split(".")[1], text))
        elif key != "sequence":
            shared.append(text)
    alone = {name: compose((*shared, f"task={name}")) for name in names}
    known = {which for stage in alone.values() for which in _eval_section(stage)}
    stages = []
    for name in names:
        # one that no stage has stays in, for Hydra to refuse it
        own = [text for which, text in of_evals if which in _eval_section(alone[name]) or which not in known]
        stages.append(compose((*shared, f"task={name}", *own)) if own else alone[name])
    return stages


def _check_trainers(names: Sequence[str], stages: Sequence[DictConfig]) -> None:
    last = plain(stages[-1].trainer)
    for name, stage in zip(names, stages, strict=True):
        if plain(stage.trainer) != last:
            raise ConfigError(
                f"sequence: {name} and {names[-1]} bring different trainer settings; choose one with trainer=..."
            )


def _evals(names: Sequence[str], stages: Sequence[DictConfig]) -> dict[str, Any]:
    """The evals of all stages, in the order in which the tasks bring them."""
    found: dict[str, Any] = {}
    for name, stage in zip(names, stages, strict=True):
        for which, section in plain(_eval_section(stage)).items():
            if found.setdefault(which, section) != section:
                raise ConfigError(f"sequence: {name} grades {which} by other settings than a task before it")
    return found


def _eval_section(stage: DictConfig) -> DictConfig:
    return OmegaConf.select(stage, "eval", default=OmegaConf.create({}))


def plain(section: DictConfig) -> dict[str, Any]:
    """A composed config, or a section of one, as plain data with everything filled in.

    Raises:
        ConfigError: a value is missing, or refers to what is not there.
    """
    try:
        filled = OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}{str(error).strip().splitlines()[0]}; give {error.full_key or 'it'}=...") from error
    assert isinstance(filled, dict)
    return {str(key): value for key, value in filled.items()}
