"""Every switch that docs/discrepancies.md names exists: it composes, with whatever values the document gives it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from kronlab.cell import CONFIG_DIR, compose_config
from kronlab.errors import ConfigError

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "discrepancies.md").read_text()
_CODE = re.compile(r"`([^`]*)`")
_SWITCH = re.compile(r"(\+?[a-z_0-9]+(?:[.@][a-z_0-9]+)*)=(\S*)")
METHODS = sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml") if path.stem != "adapter")
# where a switch may live: a method's settings, or those of a task
BASES = [[f"method={name}"] for name in METHODS] + [
    [f"task={name}"] for name in ("gsm8k", "codefeedback", "metamathqa", "glue_cola_text")
]  # fmt: skip
BASES += [["model=distilbert", "task=piqa_head"], ["task=mbpp", "+eval@eval.humaneval=humaneval"]]


def switches() -> list[tuple[str, str]]:
    """(key, value) of each switch in the last column of a table; value "" where the document leaves it open."""
    found = []
    for line in TEXT.splitlines():
        if not line.startswith("| ") or line.startswith("| point"):
            continue
        last = re.split(r"(?<!\\)\|", line.strip().strip("|"))[-1]
        for code in _CODE.findall(last):
            for key, values in _SWITCH.findall(code.replace("\\|", "|")):
                found += [(key, value) for value in values.split("|")]
    return sorted(set(found))


@cache
def base(overrides: tuple[str, ...]) -> DictConfig:
    return compose_config([*overrides, "scale=small"])


def home(key: str) -> list[str] | None:
    """The first composition that has the setting, or, of one that is added with +, its section; None: there is none."""
    place = key.lstrip("+").rpartition(".")[0] if key.startswith("+") else key
    missing = object()
    if "@" in key or "." not in key:
        return []
    return next((o for o in BASES if OmegaConf.select(base(tuple(o)), place, default=missing) is not missing), None)


def test_the_document_has_switches() -> None:
    keys = {key for key, _ in switches()}
    assert {"data.shuffle", "method.alpha", "method.lm_head", "trainer.batch_size", "task", "eval.gsm8k.grader"} <= keys
    assert len(keys) > 30


@pytest.mark.parametrize(("key", "value"), switches(), ids="=".join)
def test_it_is_a_setting_and_composes(key: str, value: str) -> None:
    overrides = home(key if value or key.startswith("+") or home(key) else key.rpartition(".")[0])
    assert overrides is not None, f"no method and no task has {key}"
    if value:
        config = compose_config([*overrides, f"{key}={value}", "scale=small"])
        assert OmegaConf.select(config, key.lstrip("+").partition("@")[0]) is not None


def test_one_that_does_not_exist_is_found_out() -> None:
    assert home("method.no_such_setting") is None
    with pytest.raises(ConfigError, match="no_such_task"):
        compose_config(["task=no_such_task", "scale=small"])
