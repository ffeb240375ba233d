"""A cell: one resolved experiment config. Its id is a hash of what can change a number, and of nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kronlab import interrupt, models
from kronlab.adapters.quantize import format_of
from kronlab.data.common import did_you_mean
from kronlab.errors import ConfigError
from kronlab.evals.registry import HARNESSES, harness_of, kind_of
from kronlab.methods import label, quantised_fault, trains, with_budget
from kronlab.moved_base import moves_base
from kronlab.sequence import RESOLVED, first_look, plain, with_stages
from kronlab.validate import SCALES as SCALES  # others take it from here
from kronlab.validate import faults

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
# In configs, ${repo:examples/made_up} is that folder of this checkout, wherever a script is started.
OmegaConf.register_new_resolver("repo", lambda path: str(CONFIG_DIR.parent / path), replace=True)
RECORD_SCHEMA = 1

# Facts about a model config that change no number: where its weights lie, what one may do with them.
_NOT_SCIENTIFIC_IN_METHOD = ("label", "path")
_NOT_SCIENTIFIC_IN_MODEL = ("directory", "licence", "gated", "pypi", "config", "pretraining")
# What the pre-training of a base model shares with the cell that asks for it: where and how it is run.
_SHARED_WITH_PRETRAINING = ("data", "results", "runtime", "logger")
_DEEPEST = 2  # pre-trainings behind one another: a base model may start from another one that was trained here

# Settings that were added after records had been made -> the value that means what was done before they existed. A
# setting with that value is left out of the hash, so that the older records keep their ids. `*` stands for any name.
NEUTRAL: dict[str, Any] = {
    "adapter_storage": None,
    "after": None,
    "method.budget": None,
    "method.init_batches": 8,
    "method.lr_ratio": None,
    "model.quantization": None,
    "model.rope": None,
    "trainer.compile": False,
    "trainer.loss_rows": None,
}
# What is done after training: cells that differ in nothing else share their trained weights.
_AFTER_TRAINING = ("eval", "adapter_storage")


@dataclass(frozen=True)
class Cell:
    """One experiment, ready to run.

    Attributes:
        config: the whole resolved config as plain data.
        science: the part that determines the numbers; the record keeps it.
        id: 12 hex digits of the hash of `science`.
        train_id: likewise of the part that determines the trained weights, so that cells which differ only in what they
            are graded on share a checkpoint.
        pretraining: the cell whose final weights are the base model, for `model.source: cell`; else None.
        before: of a sequence of tasks, the cell that trains all but the last; its weights are where this one starts.
    """

    config: dict[str, Any]
    science: dict[str, Any]
    id: str
    train_id: str
    pretraining: Cell | None = None
    before: Cell | None = None

    @property
    def scale(self) -> str:
        return str(self.config["scale"])

    @property
    def name(self) -> str:
        """A short human name: method, model, tasks in order (of what is only graded: its evals), seed."""
        c = self.config
        bits = f" in {c['model']['quantization']}" if c["model"].get("quantization") else ""
        where = " then ".join(t["name"] for t in _tasks(c)) if trains(c["method"]) else ", ".join(c["eval"])
        stored = c["adapter_storage"]
        form = f", stored as {stored['kind']}" if stored else ""
        return f"{label(c['method'])}, {c['model']['name']}{bits} on {where}, seed {c['seed']}{form}"


def digest(value: Any) -> str:
    """12 hex digits of the SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_cell(config: DictConfig, *, weights_needed: bool = True) -> Cell:
    """Resolve, check and identify a composed config.

    Args:
        weights_needed: False for planning: `source: auto` then stays as it is where no weights are at hand.

    Raises:
        ConfigError: all faults found, one a line.
        ModelError: no weights can be found.
    """
    return _make_cell(config, weights_needed=weights_needed, depth=0)


def _make_cell(config: DictConfig, *, weights_needed: bool, depth: int) -> Cell:
    resolved = plain(_with_typed_sequence(config))
    resolved.pop("hydra", None)
    validate(resolved)
    model = resolved["model"]
    resolved["method"] = with_budget(model, resolved["method"])
    try:
        source = models.resolve_source(model)
    except models.ModelError:
        if weights_needed:
            raise
        source = model.get("source") or "auto"
    model["source"] = source
    pretraining = _pretraining(resolved, weights_needed=weights_needed, depth=depth) if source == "cell" else None
    resolved["adapter_storage"] = _stored_form(resolved["adapter_storage"])
    return _identified(resolved, pretraining)


def _identified(config: dict[str, Any], pretraining: Cell | None) -> Cell:
    """A cell of a config that is resolved and checked."""
    earlier = config.get(RESOLVED) if trains(config["method"]) else None
    before = None
    if earlier:
        before = _identified(config | {"task": earlier[-1], RESOLVED: earlier[:-1] or None}, pretraining)
    science = _science(config, pretraining)
    train_part = {key: science[key] for key in science if key not in _AFTER_TRAINING}
    return Cell(config, science, digest(science), digest(train_part), pretraining, before)


def _stored_form(storage: Mapping[str, Any]) -> dict[str, Any] | None:
    """`adapter_storage` with bits and kind both said; None: the adapter stays as it was trained.

    Raises:
        ConfigError: there is no such form.
    """
    form = format_of(storage["bits"], storage["kind"], storage["group_size"])
    return {"bits": form[0], "kind": form[1], "group_size": storage["group_size"]} if form else None


def _tasks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The task sections of a resolved config, in the order in which they are trained."""
    return [*(config.get(RESOLVED) or []), config["task"]]


def _pretraining(config: Mapping[str, Any], *, weights_needed: bool, depth: int) -> Cell:
    """The cell that makes the base model of `config`, kept where `config` keeps its own results.

    Raises:
        ConfigError: it trains no whole model, another architecture than `model.config` says, or stands behind too
            many others.
    """
    model = config["model"]
    where = f"model {model['name']}: model.pretraining"
    if depth == _DEEPEST:
        raise ConfigError(
            f"{where}: more than {_DEEPEST} pre-trainings behind one another; start one from source=random"
        )
    overrides = model.get("pretraining")
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise ConfigError(f"{where}={overrides!r}: must be the list of overrides of the cell that trains it")
    shared = json.dumps({section: config[section] for section in _SHARED_WITH_PRETRAINING})
    cell = copy.deepcopy(_pretraining_cell(tuple(overrides), shared, weights_needed, depth + 1))
    if cell.config["method"]["name"] != "full":
        raise ConfigError(f"{where}: trains with method={cell.config['method']['name']}; use method=full")
    theirs = cell.config["model"]
    for key in ("architecture", "config"):
        if theirs[key] != model[key]:
            raise ConfigError(f"{where}: trains a model whose {key} is not model.{key}; make them the same")
    return cell


@lru_cache(maxsize=8)
def _pretraining_cell(overrides: tuple[str, ...], shared: str, weights_needed: bool, depth: int) -> Cell:
    """Hundreds of cells of a table may stand on one; `shared`: the sections that it takes over, as JSON."""
    composed = compose_config(overrides)
    for section, value in json.loads(shared).items():
        composed[section] = value
    return _make_cell(composed, weights_needed=weights_needed, depth=depth)


def _science(config: Mapping[str, Any], pretraining: Cell | None = None) -> dict[str, Any]:
    model = {k: v for k, v in config["model"].items() if k not in _NOT_SCIENTIFIC_IN_MODEL}
    if pretraining is not None:
        model.pop("init_seed", None)  # of the random model that the file is made from
        model["pretraining"] = pretraining.train_id
    if config["model"]["source"] == "random":
        model["config"] = config["model"]["config"]
    if config["model"]["source"] == "directory":
        model["weights"] = models.fingerprint(config["model"], "directory")
    method = {k: v for k, v in config["method"].items() if k not in _NOT_SCIENTIFIC_IN_METHOD}
    if config["method"]["name"] == "adapter":
        method["weights"] = models.directory_mark(config["method"]["path"])
    science = {
        "schema": RECORD_SCHEMA,
        "model": model,
        "method": method,
        "after": config.get(RESOLVED),
        "task": config["task"],
        "trainer": config["trainer"],
        "seed": config["seed"],
        "eval": config["eval"],
        "adapter_storage": config["adapter_storage"],
    }
    if not trains(config["method"]):  # the base model is one cell for every recipe and seed
        for key in ("after", "task", "trainer", "seed"):
            del science[key]
    science["precision"] = config["trainer"]["precision"]
    return _without_neutral(science)


def _without_neutral(science: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the settings that `NEUTRAL` calls neutral."""
    left: dict[str, Any] = copy.deepcopy(dict(science))
    for path, neutral in NEUTRAL.items():
        *way, last = path.split(".")
        sections = [left]
        for step in way:
            below = [list(s.values()) if step == "*" else [s.get(step)] for s in sections]
            sections = [section for group in below for section in group if isinstance(section, dict)]
        for section in sections:
            if last in section and section[last] == neutral:
                del section[last]
    return left


def validate(config: Mapping[str, Any]) -> None:
    """Gather every fault that can be seen without loading anything, and raise them together.

    Raises:
        ConfigError: one line for each fault: key, value, what is allowed.
    """
    found = list(faults(config, CONFIG_DIR))
    if found:  # what follows relies on types
        raise ConfigError("\n".join(found))
    method, storage = config["method"], config["adapter_storage"]
    if method.get("lr_ratio") is not None and method["name"] != "lora":
        found.append(f"method.lr_ratio={method['lr_ratio']!r}: must be null: only LoRA has factors A and B")
    quantization = config["model"].get("quantization")
    if quantization is not None and (fault := quantised_fault(method, quantization)) is not None:
        found.append(f"model.quantization={quantization!r}: {fault}; set it to null")
    positions = _positions(config["model"])
    for path, length in _max_lengths(config):
        if length is not None and positions is not None and length > positions:
            found.append(f"{path}={length}: must be at most model.config.max_position_embeddings={positions}")
    for task in _tasks(config):
        if task["name"] == "none" and trains(method):
            found.append("task='none': must be a task with training data, or method=none")
    try:
        label(method)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        found.append(f"method.label={method['label']!r}: cannot be filled in from the method's keys ({error})")
    found += _storage_faults(storage, method)
    if not config["eval"]:
        found.append("eval={}: must be at least one eval, as the task configs name them")
    for name, settings in config["eval"].items():
        kind = kind_of(settings)
        if kind not in HARNESSES:
            found.append(f"eval.{name}.kind={kind!r}: must be one of {', '.join(HARNESSES)}")
        else:
            found += harness_of(settings).faults(name, settings)
    if found:
        raise ConfigError("\n".join(found))


def _positions(model: Mapping[str, Any]) -> int | None:
    """The longest row that a model with learned positions can read; None: the config does not say, or there is none."""
    config = model.get("config") or {}
    positions = config.get("max_position_embeddings")
    learned = config.get("model_type") in ("bert", "distilbert")
    return positions if learned and isinstance(positions, int) else None


def _max_lengths(config: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    if trains(config["method"]):
        yield "task.max_length", config["task"]["max_length"]
    for name, settings in config["eval"].items():
        yield f"eval.{name}.max_length", settings.get("max_length")


def _storage_faults(storage: Mapping[str, Any], method: Mapping[str, Any]) -> Iterator[str]:
    try:
        form = _stored_form(storage)
    except ConfigError as error:
        yield f"adapter_storage: {error}"
        return
    if form is not None and method["name"] in ("none", "full"):
        yield f"adapter_storage.kind={form['kind']!r}: method={method['name']} has no adapter to store"
    if form is not None and moves_base(method):
        yield f"adapter_storage.kind={form['kind']!r}: {label(method)} is stored with a start: not measured yet"


def compose_config(overrides: Sequence[str], *, name: str = "config") -> DictConfig:
    """Compose a config outside of `hydra.main`, e.g. for the cells of a table, its `sequence` resolved.

    Raises:
        ConfigError: an override that Hydra refuses, in one line (`explain`).
    """
    check_groups(overrides)
    try:
        with interrupt.held():
            config = _compose(first_look(overrides), name)
            return with_stages(config, overrides, partial(_composed_stage, name=name))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def check_groups(overrides: Sequence[str]) -> None:
    """Refuse what is no option's name where a group wants one (`model=3`), for Hydra does so with a traceback.

    Raises:
        ConfigError: in one line.
    """
    for text in overrides:
        key, sign, value = text.lstrip("+").partition("=")
        group = key.partition("@")[0]
        if not sign or not (CONFIG_DIR / group).is_dir() or re.match(r"\w+\(", value):  # choice(...): a sweep
            continue
        names = [name.strip(" '\"") for name in value.strip("[]").split(",")]
        if not all(map(_is_name, names)):
            raise ConfigError(f"{group}={value}: must be the name of a file in configs/{group}/, without .yaml")


def _is_name(text: str) -> bool:
    """Whether Hydra would read it as a word: not as a number, nor as null, true or false."""
    try:
        float(text)
    except ValueError:
        return bool(re.fullmatch(r"[\w.-]+", text)) and text.lower() not in ("null", "true", "false")
    return False


def _compose(overrides: tuple[str, ...], name: str) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return compose(config_name=name, overrides=list(overrides))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(config_name=name, overrides=list(overrides))


@lru_cache(maxsize=256)
def _composed_stage(overrides: tuple[str, ...], name: str) -> DictConfig:
    """All ordered pairs of n tasks have n stages between them; nobody writes to what is returned."""
    return _compose(overrides, name)


def _with_typed_sequence(config: DictConfig) -> DictConfig:
    """The sequence of a config that `hydra.main` has composed from what was typed, resolved."""
    if OmegaConf.select(config, "sequence") is None or RESOLVED in config:
        return config
    if not HydraConfig.initialized():
        raise ConfigError("sequence is not resolved: compose the config with kronlab.cell.compose_config")
    typed = HydraConfig.get()
    try:
        stage = partial(_composed_stage, name=str(typed.job.config_name))
        return with_stages(config, list(typed.overrides.task), stage)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf refuses, in one line: which key or option, and which are known.

    Hydra's own advice for an unknown key is to add it with `+key=`, which would change nothing but the cell's id.
    """
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such option{did_you_mean(choice, error.options)}"
    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0]
        return f"{error.override}: not an override ({reason}); quote a value that holds = or , or braces"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        if not cause.parent_node:  # an open section, like method.options
            return f"{cause.full_key}: not there yet; add it with +{cause.full_key}=..."
        return f"{cause.full_key}: unknown key{did_you_mean(str(cause.key), map(str, cause.parent_node))}"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
