"""From a table's config to its cells: which experiments make which row (docs/tables.md has the format).

Composes configs and gives them ids; nothing is run. What a tuned setting is to be follows from records, which come
through a function that the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kronlab.cell import Cell, compose_config, digest, explain, make_cell
from kronlab.data import available
from kronlab.data.common import did_you_mean
from kronlab.errors import ConfigError
from kronlab.methods import label, trains
from kronlab.runs import Store
from kronlab.tuning import Choice, Tuning

Find = Callable[[Cell], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Part:
    """A cell and its place in a row.

    Attributes:
        arm: one of the layout's arms; "" where it has none.
        value: of the tuned setting, in a trial; None in a cell of the table.
    """

    cell: Cell
    arm: str
    seed: int
    value: float | None = None

    @property
    def place(self) -> str:
        """Arm and seed, for people. What is not trained has no seed."""
        seed = f"seed {self.seed}" if trains(self.cell.config["method"]) else ""
        return ", ".join(filter(None, [self.arm, seed]))


@dataclass(frozen=True)
class PlannedRow:
    """A row of a table with one cell for each arm and seed.

    Attributes:
        key: as the table's config has it; behind "<group>/" where there are groups.
        parts: its cells. While `awaits`, stand-ins with the smallest value of the tuned setting: as many and as dear as
            those that will be, and not to be run.
        published: {value, source, confidence} by a column's `published` key.
        trials: the cells that decide on the tuned setting, if there is one.
        choices: what they have decided, for each arm.
    """

    key: str
    label: str
    parts: Sequence[Part]
    published: Mapping[str, Any]
    group: str = ""
    trials: Sequence[Part] = ()
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        return [part.cell for part in self.parts]

    @property
    def awaits(self) -> bool:
        """Whether the tuned setting is not known for every arm, and so the row's cells are not."""
        return any(choice.value is None for choice in self.choices.values())

    @property
    def name(self) -> str:
        """Group and label, for people."""
        return ", ".join(filter(None, [self.group, self.label]))

    def tuned(self) -> list[tuple[str, Choice]]:
        """The choices, each with a name for people: the row's, and the arm's if it has one."""
        return [(", ".join(filter(None, [self.name, arm])), choice) for arm, choice in self.choices.items()]


class LeaveOut(Protocol):
    """Which of a config's optional evals to leave out."""

    def candidates(self, config: DictConfig, optional: Sequence[str]) -> Sequence[Collection[str]]:
        """Sets of evals to leave out. The first whose cell has a record is taken; without one, the first."""
        ...

    def why(self, name: str) -> str:
        """Why an eval is in no cell."""
        ...


class Nothing:
    """Every eval stays, whether its data can be had or not."""

    def candidates(self, config: DictConfig, optional: Sequence[str]) -> Sequence[Collection[str]]:
        return [()]

    def why(self, name: str) -> str:
        return "no cell is graded on it"


class Unavailable:
    """For running: what cannot be graded now, because its data cannot be had."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[bool, str]] = {}
        self._why: dict[str, str] = {}

    def candidates(self, config: DictConfig, optional: Sequence[str]) -> Sequence[Collection[str]]:
        return [[name for name in optional if not self._can_be_had(name, config)]]

    def _can_be_had(self, name: str, config: DictConfig) -> bool:
        section = OmegaConf.to_container(config.eval[name], resolve=True)
        assert isinstance(section, dict)
        source, split, where = section["source"], section["split"], config.data.dir
        key = digest([source, split, where])
        if key not in self._found:  # asking the hub takes seconds where there is no network
            self._found[key] = available(source, split, where)
        ok, why = self._found[key]
        if not ok:
            self._why[name] = why
        return ok

    def why(self, name: str) -> str:
        return self._why.get(name, "no cell is graded on it")


class Unrecorded:
    """For reading: what was left out when the records were made. Needs neither the data nor a network."""

    def __init__(self, store: Store, scale: str) -> None:
        self._store, self._scale = store, scale

    @cached_property
    def _graded(self) -> set[frozenset[str]]:
        return {frozenset(record["config"]["eval"]) for record in self._store.records(self._scale)}

    def candidates(self, config: DictConfig, optional: Sequence[str]) -> Sequence[Collection[str]]:
        if not optional:
            return [()]
        asked = frozenset(map(str, config.eval))
        fewer = {asked - graded for graded in self._graded if graded < asked and asked - graded <= set(optional)}
        return [(), *sorted(fewer, key=lambda names: (len(names), sorted(names)))]

    def why(self, name: str) -> str:
        return "none of the records has it"


def layout_of(spec: Mapping[str, Any], scale: str) -> Mapping[str, Any]:
    """A table's section of one scale.

    Raises:
        ConfigError: it has none.
    """
    if scale not in spec["scales"]:
        raise ConfigError(f"{spec['name']} has no scale {scale!r}; it has {', '.join(spec['scales'])}")
    section: Mapping[str, Any] = spec["scales"][scale]
    return section


def plan(
    spec: Mapping[str, Any],
    scale: str,
    *,
    overrides: Sequence[str] = (),
    weights_needed: bool,
    every_eval: bool = False,
    leave_out: LeaveOut | None = None,
    find: Find = lambda cell: None,
) -> tuple[list[PlannedRow], list[str]]:
    """All rows of a table with their cells, and notes on the evals that are left out.

    Args:
        overrides: further ones, of every cell.
        weights_needed: as in `make_cell`.
        every_eval: leave nothing out.
        leave_out: which optional evals to leave out otherwise; None: those whose data cannot be had.
        find: the record of a cell, if it is one that counts. Decides on the tuned setting.

    Raises:
        ConfigError: the table cannot be planned; it names the row.
    """
    layout = layout_of(spec, scale)
    leave_out = Nothing() if every_eval else leave_out or Unavailable()
    planner = _Planner(spec, scale, list(overrides), weights_needed, leave_out, find)
    rows = [planner.row(group, key) for group in layout.get("groups") or {"": []} for key in layout["rows"]]
    for fault in _faults(layout, rows):
        raise ConfigError(f"{spec['name']}, scale {scale}: {fault}")
    graded = {name for row in rows for cell in row.cells for name in cell.config["eval"]}
    missing = [name for name in layout.get("optional_evals", []) if name not in graded]
    return rows, [f"{name} is left out: {leave_out.why(name)}" for name in missing]


def _faults(layout: Mapping[str, Any], rows: Sequence[PlannedRow]) -> Iterator[str]:
    """Rows that would be the same numbers twice, and columns that no cell can fill."""
    seen: dict[str, PlannedRow] = {}
    for row in rows:
        for cell in row.cells:
            other = seen.setdefault(cell.id, row)
            if other is not row:
                yield f"rows {other.key} and {row.key} are the same experiment ({row.name}); leave one of them out"
    graded = {name for row in rows for cell in row.cells for name in cell.config["eval"]}
    for column in layout.get("columns", []):
        if "eval" in column and column["eval"] not in graded | set(layout.get("optional_evals", [])):
            near = did_you_mean(column["eval"], graded)
            yield f"column {column['title']}: no cell is graded on {column['eval']}{near}"


@dataclass(frozen=True)
class _Planner:
    spec: Mapping[str, Any]
    scale: str
    extra: list[str]
    weights_needed: bool
    leave_out: LeaveOut
    find: Find

    @cached_property
    def layout(self) -> Mapping[str, Any]:
        return layout_of(self.spec, self.scale)

    @cached_property
    def groups(self) -> Mapping[str, Any]:
        return self.layout.get("groups") or {"": []}

    def _of_group(self, group: str) -> Sequence[str]:
        """A group's overrides; in the config a list of them, or a mapping with arms of the group's own."""
        found = self.groups[group]
        overrides: Sequence[str] = found["overrides"] if isinstance(found, Mapping) else found
        return overrides

    def arms(self, group: str) -> Mapping[str, Sequence[str]]:
        """The arms of a group's rows: its own, else the layout's."""
        found = self.groups[group]
        own = found.get("arms") if isinstance(found, Mapping) else None
        return own or self.layout.get("arms") or {"": []}

    @cached_property
    def tunings(self) -> dict[str, Tuning]:
        """For each arm; empty where nothing is tuned."""
        section = self.layout.get("tune")
        if not section:
            return {}
        where = f"{self.spec['name']}, scale {self.scale}: tune"
        arms = dict.fromkeys(arm for group in self.groups for arm in self.arms(group))
        tunings = {arm: Tuning.read(section, where=where, arm=arm) for arm in arms}
        for key in {tuning.key for tuning in tunings.values()}:
            if any(override.lstrip("+").partition("=")[0] == key for override in self.extra):
                raise ConfigError(f"{key} is tuned in {self.spec['name']} and cannot be given")
        return tunings

    def row(self, group: str, key: str) -> PlannedRow:
        """One row with the cells of every arm and seed."""
        if key not in self.spec["rows"]:
            raise ConfigError(f"{self.spec['name']} has no row {key!r}; it has {', '.join(self.spec['rows'])}")
        try:
            return self._row(group, key)
        except (ConfigError, OmegaConfBaseException) as error:
            reason = str(error) if isinstance(error, ConfigError) else explain(error)
            raise ConfigError(f"{self.spec['name']}, row {key}: {reason}") from error

    def _row(self, group: str, key: str) -> PlannedRow:
        configs = {arm: self._compose(group, arm, key) for arm in self.arms(group)}
        trials: list[Part] = []
        choices: dict[str, Choice] = {}
        parts: dict[str, Part] = {}
        for arm, config in configs.items():
            settings: dict[str, Any] = {}
            if arm in self.tunings and trains(config.method):
                tuning = self.tunings[arm]
                tried = self._trials(tuning, group, arm, key, config)
                choice = tuning.choose([(part.value, self.find(part.cell)) for part in tried if part.value is not None])
                settings[tuning.key] = tuning.values[0] if choice.value is None else choice.value
                choices[arm] = choice
                trials += tried
            for seed in self.layout["seeds"]:
                cell = self._cell(config, settings | {"seed": seed})
                parts.setdefault(cell.id, Part(cell, arm, seed))  # the base model is one cell for all seeds
        found = list(parts.values())
        published = {
            **self.spec["rows"][key].get("published", {}),
            **self.spec.get("published_by_group", {}).get(group, {}).get(key, {}),
        }
        name = f"{group}/{key}" if group else key
        return PlannedRow(name, label(found[0].cell.config["method"]), found, published, group, trials, choices)

    def _trials(self, tuning: Tuning, group: str, arm: str, key: str, final: DictConfig) -> list[Part]:
        """The cells of one arm that decide on the tuned setting."""
        config = self._compose(group, arm, key, tuning.overrides)
        if tuning.eval not in config.eval:
            raise ConfigError(f"tune.by.eval={tuning.eval!r}: its trials are graded on {', '.join(config.eval)}")
        _check_held_out(tuning, config, final)
        return [
            Part(self._cell(config, {"seed": seed, tuning.key: value}), arm, seed, value)
            for value in tuning.values
            for seed in tuning.seeds
        ]

    def _compose(self, group: str, arm: str, key: str, trial: Sequence[str] = ()) -> DictConfig:
        """The config of a row's cells without seed and tuned setting, which every cell gets on top."""
        layout = self.layout
        return compose_config(
            [
                f"scale={self.scale}",
                *layout.get("common", []),
                *self._of_group(group),
                *self.arms(group)[arm],
                *self.spec["rows"][key]["overrides"],
                *layout.get("row_overrides", {}).get(key, []),
                *trial,
                *self.extra,
            ]
        )

    def _cell(self, config: DictConfig, settings: Mapping[str, Any]) -> Cell:
        """The cell of a config with these settings, and with no more evals than `leave_out` says."""
        config = config.copy()
        for key, value in settings.items():
            OmegaConf.update(config, key, value)
        optional = [name for name in self.layout.get("optional_evals", []) if name in config.eval]
        first = None
        for dropped in self.leave_out.candidates(config, optional):
            candidate = config.copy() if dropped else config
            with open_dict(candidate):
                for name in dropped:
                    del candidate.eval[name]
            cell = make_cell(candidate, weights_needed=self.weights_needed)
            if not optional or self.find(cell) is not None:
                return cell
            first = first or cell
        assert first is not None, "leave_out gives at least one candidate"
        return first


def _check_held_out(tuning: Tuning, trial: DictConfig, final: DictConfig) -> None:
    """Refuse to choose on the data that the table is graded on, and on those that are trained on.

    Raises:
        ConfigError: the deciding eval reads the same split of the same source.
    """

    def read(section: DictConfig) -> Any:
        plain = OmegaConf.to_container(section, resolve=True)
        assert isinstance(plain, dict)
        return plain.get("source"), plain.get("split")

    others = {f"eval {name} of the table is graded on": section for name, section in final.eval.items()}
    others["the trials are trained on"] = trial.task
    for said, section in others.items():
        if read(trial.eval[tuning.eval]) == read(section):
            raise ConfigError(f"tune.overrides leave {tuning.eval} on the data that {said}; choose another split")
