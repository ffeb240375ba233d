"""What may stand at each key of an experiment's config: type, range, choices. One line for each key that holds another.

The rules stop what could only fail later, somewhere inside a library, without a word about the key. What depends on the
model, the data or several keys at once is checked where it is known (`kronlab.cell.validate`, adapters, loaders).
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import yaml
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from kronlab.adapters.quantize import FORMATS
from kronlab.data import LOADERS
from kronlab.data.common import did_you_mean
from kronlab.evals.code import PROTOCOLS
from kronlab.evals.graders import GRADERS
from kronlab.methods import METHODS
from kronlab.models import ARCHITECTURES, QUANTISATIONS, SOURCES

SCALES: Final = ("smoke", "mini", "small", "paper")
SEED_LIMIT: Final = 2**32 - 1  # numpy's
_MANY: Final = 10**9  # no count that means anything is larger; a slip of the keyboard is


@dataclass(frozen=True)
class Rule:
    """Whether a value may stand at a key, and in words what may."""

    right: Callable[[Any], bool]
    allowed: str


# ---------------------------------------------------------------------------------------------------- kinds of rules


def number(
    *, least: float | None = None, above: float | None = None, most: float | None = None, below: float | None = None
) -> Rule:
    """A finite number within bounds."""
    return _number((int, float), "a number", least, above, most, below)


def whole(least: int, most: int = _MANY) -> Rule:
    """A whole number from `least` to `most`; `_MANY` is not worth telling."""
    return _number((int,), "a whole number", least, None, most, None)


def _number(
    kinds: tuple[type[int] | type[float], ...],
    what: str,
    least: float | None,
    above: float | None,
    most: float | None,
    below: float | None,
) -> Rule:
    def right(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            return False
        return (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )

    bounds = [("of at least", least), ("above", above), ("of at most", most), ("below", below)]
    told = [
        f"{word} {bound if isinstance(bound, int) else f'{bound:g}'}" for word, bound in bounds if bound is not None
    ]
    if most == _MANY:
        told.pop()
    return Rule(right, " and ".join([f"{what} {told[0]}", *told[1:]]) if told else what)


def one_of(*choices: Any) -> Rule:
    """One of a few values, of the same type as well: 16.0 is not 16, nor true 1."""
    names = [str(choice) for choice in choices]
    first = f"{', '.join(names[:-1])} or " if len(names) > 1 else ""
    listed = f"{first}{names[-1]}" if len(names) <= 3 else f"one of {', '.join(names)}"
    return Rule(lambda value: any(type(value) is type(c) and value == c for c in choices), listed)


def known(choices: Sequence[str]) -> Rule:
    """One of many names."""
    return Rule(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_label(value: Any) -> bool:
    try:
        return _is_text(value) and all(spec == "" for _, _, spec, _ in string.Formatter().parse(value) if spec)
    except ValueError:
        return False


def _is_expression(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def either(*rules: Rule) -> Rule:
    return Rule(lambda value: any(rule.right(value) for rule in rules), ", or ".join(rule.allowed for rule in rules))


def or_null(rule: Rule, means: str = "") -> Rule:
    return Rule(lambda value: value is None or rule.right(value), f"{rule.allowed}, or null{means}")


def several(rule: Rule, what: str, *, least: int = 0, exactly: int | None = None) -> Rule:
    """A list of values that are right by `rule`."""

    def right(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) >= least
            and exactly in (None, len(value))
            and all(map(rule.right, value))
        )

    return Rule(right, f"a list of {what}")


def section(inside: str) -> Rule:
    return Rule(lambda value: isinstance(value, Mapping), f"a section with {inside}")


FLAG: Final = Rule(lambda value: isinstance(value, bool), "true or false")
TEXT: Final = Rule(_is_text, "text that is not empty")
FREE: Final = Rule(lambda value: isinstance(value, str) and "\0" not in value, "text")
STOPS: Final = several(Rule(lambda value: isinstance(value, str) and value != "", "text"), "texts that are not empty")
COUNT: Final = whole(1)
SHARE: Final = number(least=0, below=1)
TARGETS: Final = either(TEXT, several(TEXT, "names of modules", least=1))
NEAR_SQUARE: Final = either(COUNT, one_of("near_square"))


def _is_shots(value: Any) -> bool:
    return not value or (
        isinstance(value, Mapping) and set(value) == {"n", "split", "separator"} and COUNT.right(value["n"])
    )


# ------------------------------------------------------------------------------------------------------------ the rules

# `*` stands for any name. A key without a rule is the business of whoever reads it.
RULES: Final[dict[str, Rule]] = {
    "scale": known(SCALES),
    "seed": whole(0, SEED_LIMIT),
    "eval_n": or_null(COUNT, " for all"),
    "force": FLAG,
    "dry_run": FLAG,
    "retry_failed": FLAG,
    "trainer": section("the recipe"),
    "trainer.optimizer": known([str(name.value) for name in OptimizerNames]),
    "trainer.lr": number(above=0),
    "trainer.schedule": known([str(name.value) for name in SchedulerType]),
    "trainer.warmup_ratio": number(least=0, most=_MANY),
    "trainer.weight_decay": number(least=0),
    "trainer.betas": several(SHARE, "two numbers from 0 to below 1", exactly=2),
    "trainer.max_grad_norm": number(least=0),
    "trainer.epochs": number(above=0, most=_MANY),
    "trainer.max_steps": either(one_of(-1), COUNT),
    "trainer.batch_size": COUNT,
    "trainer.micro_batch_size": COUNT,
    "trainer.group_by_length": FLAG,
    "trainer.gradient_checkpointing": FLAG,
    "trainer.loss_rows": or_null(COUNT, " for all at once"),
    "trainer.compile": FLAG,
    "trainer.precision": one_of("bf16", "fp32"),
    "model": section("the base model"),
    "model.name": TEXT,
    "model.architecture": known(ARCHITECTURES),
    "model.source": known(SOURCES),
    "model.directory": or_null(TEXT),
    "model.hub": or_null(TEXT),
    "model.revision": or_null(TEXT),
    "model.licence": FREE,
    "model.gated": FLAG,
    "model.quantization": or_null(known(list(QUANTISATIONS))),
    "model.rope": or_null(section("rope_type and its numbers")),
    "model.init_seed": whole(0, SEED_LIMIT),
    "model.pypi": or_null(section("package, module and gguf or subdirectory")),
    "model.pypi.*": TEXT,
    "model.target_modules": TARGETS,
    "model.modules_to_save": or_null(several(TEXT, "names of modules")),
    "model.pretraining": several(TEXT, "overrides", least=1),
    "model.config": section("the fields of the model's config.json"),
    "method": section("the method's settings"),
    "method.name": known(METHODS),
    "method.label": Rule(_is_label, "text with {keys} of the method"),
    "method.path": TEXT,
    "method.r1": NEAR_SQUARE,
    "method.r2": NEAR_SQUARE,
    "method.r": COUNT,
    "method.d_a1": COUNT,
    "method.d_a2": or_null(COUNT),
    "method.init_r": COUNT,
    "method.delta_t": COUNT,
    "method.alpha": number(above=0),
    "method.scaling": either(TEXT, number()),
    "method.dropout": SHARE,
    "method.init": TEXT,
    "method.init_batches": COUNT,
    "method.lm_head": FLAG,
    "method.on_indivisible": TEXT,
    "method.budget": or_null(either(COUNT, TEXT)),
    "method.lr_ratio": or_null(number(above=0)),
    "method.betas": several(SHARE, "two numbers from 0 to below 1", exactly=2),
    "method.d_initial": number(),
    "method.factor": either(one_of(-1), COUNT),
    "method.gamma": number(above=0),
    "method.orthogonal": number(least=0),
    "method.t_init": SHARE,
    "method.t_final": SHARE,
    "method.target_modules": TARGETS,
    "method.options": section("arguments of PEFT's config"),
    "task": section("what is trained on"),
    "task.name": TEXT,
    "task.split": TEXT,
    "task.n": or_null(COUNT, " for all"),
    "task.max_length": COUNT,
    "task.source": section("the data source"),
    "data": section("dir and shuffle"),
    "data.dir": or_null(FREE),  # an empty environment variable is none
    "data.shuffle": one_of("paper", "seeded"),
    "adapter_storage": section("bits, kind and group_size"),
    "adapter_storage.bits": or_null(one_of(*sorted(set(FORMATS.values()), reverse=True))),
    "adapter_storage.kind": or_null(known(list(FORMATS))),
    "adapter_storage.group_size": whole(2),
    "results": section("dir and reuse"),
    "results.dir": TEXT,
    "results.reuse": one_of("local", "any"),
    "publish.dir": or_null(TEXT),
    "publish.as_lora": FLAG,
    "publish.hub": or_null(TEXT),
    "publish.private": FLAG,
    "logger": section("name"),
    "logger.name": one_of("none", "wandb"),
    "logger.project": TEXT,
    "logger.mode": one_of("offline", "online"),
    "logger.entity": or_null(TEXT),
    "logger.group": or_null(TEXT),
    "runtime": section("how a cell is run"),
    "runtime.device": one_of("auto", "cpu", "cuda"),
    "runtime.threads": or_null(whole(1, 4096), " for all cores"),
    "runtime.save_every": COUNT,
    "runtime.progress": FLAG,
    "runtime.keep_checkpoints": COUNT,
    "runtime.trail": FLAG,
    "runtime.wait": FLAG,
    "runtime.stale_after": number(above=0),
    "eval": section("at least one eval, as the task configs name them"),
    "eval.*": section("one eval's settings"),
    "eval.*.name": TEXT,
    "eval.*.split": TEXT,
    "eval.*.source": section("the data source"),
    "eval.*.grader": known(list(GRADERS)),
    "eval.*.also": several(TEXT, "graders"),
    "eval.*.n": or_null(Rule(COUNT.right, "at least 1"), " for all"),
    "eval.*.shots": Rule(_is_shots, "null, or n, split and separator"),
    "eval.*.max_length": or_null(COUNT),
    "eval.*.batch_size": COUNT,
    "eval.*.by": STOPS,
    "eval.*.k": several(COUNT, "whole numbers of at least 1", least=1),
    "eval.*.samples": COUNT,
    "eval.*.memory_mb": COUNT,
    "eval.*.timeout_s": number(above=0, most=86400),
    "eval.*.allow_unsandboxed": FLAG,
    "eval.*.protocol": known(PROTOCOLS),
    "eval.*.metric": or_null(TEXT),
    "eval.*.metrics": several(TEXT, "metrics", least=1),
    "eval.*.stops.*": STOPS,
    "eval.*.generation": section("max_new_tokens, batch_size and where to stop"),
    "eval.*.generation.max_new_tokens": whole(1, 2**20),
    "eval.*.generation.batch_size": COUNT,
    "eval.*.generation.stop_pattern": or_null(Rule(_is_expression, "a regular expression")),
    "eval.*.generation.stop_strings": STOPS,
    "eval.*.generation.sampling": or_null(section("temperature, top_p and seed")),
    "eval.*.generation.sampling.temperature": number(above=0),
    "eval.*.generation.sampling.top_p": number(above=0, most=1),
    "eval.*.generation.sampling.seed": whole(0, SEED_LIMIT),
}

# Of a data source, wherever it stands; a part of a mixture is one, too.
SOURCE_RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(("test_seed", "validation_seed"), whole(0, SEED_LIMIT)),
    **dict.fromkeys(("validation", "validation_rows"), or_null(whole(0))),
    "test_pool": whole(1, 10**7),
    "num_fewshot": or_null(whole(0, 1000)),
    "calculator_annotations": FLAG,
    **dict.fromkeys(("prompt", "completion", "gold"), FREE),
    "name": known([*LOADERS, "none"]),
    **dict.fromkeys(("dataset", "task", "format", "wording", "shuffle", "subset", "test_set"), TEXT),
    "hub": or_null(TEXT),
    "strip_instructions": several(Rule(_is_expression, ""), "regular expressions"),
    "params": section("parameters of the generator"),
    "parts": section("sources and their shares"),
    "share": number(above=0, most=_MANY),
}
_LARGEST_PARAMETER: Final = 10**6  # of a generator; what it makes of more fits nowhere

# Sections whose keys are those of the shipped configs: another one would change a cell's id and nothing else.
CLOSED: Final = ("trainer", "method", "runtime", "results", "data", "adapter_storage", "publish", "logger", "task")


# ------------------------------------------------------------------------------------------------------------- applying


def faults(config: Mapping[str, Any], config_dir: Path) -> Iterator[str]:
    """Every key of a resolved config that holds what it may not, in the order of `RULES`; then unknown keys.

    Args:
        config_dir: the folder of the configs, which say what keys there are.
    """
    told = [*_of_rules(config), *_of_sources(config), *_unknown(config, config_dir)]
    yield from told
    for path, value in leaves(config):  # whatever key it is: JSON has no nan, and no hash of it would be worth anything
        if isinstance(value, float) and not math.isfinite(value) and not any(t.startswith(path) for t in told):
            yield f"{path}={value!r}: must be a finite number"


def _of_rules(config: Mapping[str, Any]) -> Iterator[str]:
    for pattern, rule in RULES.items():
        for path, value in _at(config, pattern.split(".")):
            if not rule.right(value):
                yield _fault(path, value, rule)


def _of_sources(config: Mapping[str, Any]) -> Iterator[str]:
    for path, source in sources(config):
        yield from _source_faults(path, source)


def _unknown(config: Mapping[str, Any], config_dir: Path) -> Iterator[str]:
    for name in CLOSED:
        there, keys = config.get(name), known_keys(config_dir, name)
        for key in there if isinstance(there, Mapping) else ():
            if str(key) not in keys:
                yield f"{name}.{key} is not a setting{did_you_mean(str(key), keys)}"


def _fault(path: str, value: Any, rule: Rule) -> str:
    shown = repr(value)
    return f"{path}={shown if len(shown) <= 80 else shown[:77] + '...'}: must be {rule.allowed}"


def _at(config: Any, pattern: Sequence[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """All (path, value) that a pattern matches."""
    if not pattern:
        yield path, config
        return
    if not isinstance(config, Mapping):
        return
    first, rest = pattern[0], pattern[1:]
    for key in list(config) if first == "*" else [first] if first in config else []:
        yield from _at(config[key], rest, f"{path}.{key}" if path else str(key))


def sources(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every data source with its path: of tasks and of evals, and the parts of mixtures."""
    found = [*_at(config, ["task", "source"]), *_at(config, ["eval", "*", "source"])]
    for path, source in found:
        if isinstance(source, Mapping):
            yield path, source
            for part, inner in _at(source, ["parts", "*"], f"{path}"):
                if isinstance(inner, Mapping) and isinstance(inner.get("source"), Mapping):
                    yield f"{part}.source", inner["source"]


def _source_faults(path: str, source: Mapping[str, Any]) -> Iterator[str]:
    if "name" not in source:
        there = ", ".join(map(str, source)) or "nothing"
        yield f"{path} has no name, only {there}: set that at the eval's own source, where a task takes its from"
    for key, value in source.items():
        rule = SOURCE_RULES.get(str(key))
        if rule is not None and not rule.right(value):
            yield _fault(f"{path}.{key}", value, rule)
    params = source.get("params")
    for key, value in params.items() if isinstance(params, Mapping) else ():
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_PARAMETER:
            yield f"{path}.params.{key}={value!r}: must be a number of at most {_LARGEST_PARAMETER:g}"
    parts = source.get("parts")
    for name, part in parts.items() if isinstance(parts, Mapping) else ():
        if not isinstance(part, Mapping) or not isinstance(part.get("source"), Mapping):
            yield f"{path}.parts.{name}: must be a section with source and share"
        elif not SOURCE_RULES["share"].right(part.get("share", 1)):
            yield _fault(f"{path}.parts.{name}.share", part.get("share"), SOURCE_RULES["share"])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a config that is not a section."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, value
        for at, inner in enumerate(value):
            if isinstance(inner, Mapping | list | float):
                yield from leaves(inner, f"{path}.{at}")
    else:
        yield path, value


def _rule_of(path: str) -> Rule | None:
    """The rule of a path of `RULES`."""
    steps = path.split(".")
    for pattern, rule in RULES.items():
        wanted = pattern.split(".")
        if len(wanted) == len(steps) and all(w in ("*", s) for w, s in zip(wanted, steps, strict=True)):
            return rule
    return None


@lru_cache(maxsize=32)
def known_keys(config_dir: Path, name: str) -> frozenset[str]:
    """The keys of a section in any of the shipped configs."""
    keys: set[str] = set()
    for file in [*(config_dir / name).glob("*.yaml"), *config_dir.glob("*.yaml")]:
        there = yaml.safe_load(file.read_text()) or {}
        there = there if file.parent.name == name else there.get(name) or {}
        keys |= {str(key) for key in there if key != "defaults"} if isinstance(there, Mapping) else set()
    return frozenset(keys)
