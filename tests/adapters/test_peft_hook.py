"""The hook into PEFT: real enum members, harmless repetition, one clear line on a PEFT that does not fit."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from kronlab.adapters import CdkaConfig, CdkaModel, KronLoraConfig, KronLoraModel, peft_hook

METHODS = [
    ("CDKA", CdkaConfig, CdkaModel, "cdka_"),
    ("KRON_LORA", KronLoraConfig, KronLoraModel, "kron_lora_"),
]


@pytest.mark.parametrize(("name", "config", "model", "prefix"), METHODS)
def test_members_are_real(name: str, config: Any, model: Any, prefix: str) -> None:
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert type(member) is PeftType
    assert member in list(PeftType)
    assert member in PeftType
    assert name in list(PeftType)
    assert (member.name, member.value) == (name, name)
    assert member == name
    assert str(member) == f"PeftType.{name}"
    assert {member: 1}[PeftType(name)] == 1
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps({"peft_type": member}) == f'{{"peft_type": "{name}"}}'
    assert [m.name for m in PeftType].count(name) == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is model
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == prefix
    assert config().peft_type is member


def test_the_enum_is_otherwise_as_it_was() -> None:
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError):
        PeftType("NO_SUCH_METHOD")
    with pytest.raises(AttributeError):
        PeftType.CDKA = "other"


def test_registering_again_is_harmless_and_a_reloaded_class_replaces_the_old() -> None:
    before = list(PeftType)
    peft_hook.register("cdka", CdkaConfig, CdkaModel, "cdka_")
    reloaded = type("CdkaConfig", (CdkaConfig,), {"__module__": CdkaConfig.__module__, "__qualname__": "CdkaConfig"})
    try:
        peft_hook.register("cdka", reloaded, CdkaModel, "cdka_")
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CDKA] is reloaded
    finally:
        peft_hook.register("cdka", CdkaConfig, CdkaModel, "cdka_")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CDKA] is CdkaConfig
    assert list(PeftType) == before


def test_another_packages_method_of_the_same_name_is_not_overwritten() -> None:
    foreign = type("CdkaConfig", (CdkaConfig,), {"__module__": "elsewhere"})
    with pytest.raises(ImportError, match="PEFT already has a method 'cdka', from kronlab"):
        peft_hook.register("cdka", foreign, CdkaModel, "cdka_")


def fake_peft(**changes: Any) -> SimpleNamespace:
    """The parts of PEFT that the hook asks for, as they are but for the changes."""
    tuners_utils = SimpleNamespace(
        BaseTuner=peft.tuners.tuners_utils.BaseTuner,
        BaseTunerLayer=peft.tuners.tuners_utils.BaseTunerLayer,
        check_adapters_to_merge=peft.tuners.tuners_utils.check_adapters_to_merge,
    )
    parts = {
        "__version__": "9.8.7",
        "PeftConfig": peft.PeftConfig,
        "PeftType": PeftType,
        "utils": SimpleNamespace(
            register_peft_method=peft.utils.register_peft_method,
            save_and_load=peft.utils.save_and_load,
            other=peft.utils.other,
        ),
        "peft_model": peft.peft_model,
        "mapping": peft.mapping,
        "tuners": SimpleNamespace(tuners_utils=tuners_utils, _buffer_dict=peft.tuners._buffer_dict),
    }
    return SimpleNamespace(**{**parts, **changes})


def without(path: str) -> SimpleNamespace:
    fake = fake_peft()
    parent: Any = fake
    *parents, last = path.split(".")
    for part in parents:
        parent = getattr(parent, part)
    delattr(parent, last)
    return fake


class NotOfStrings(enum.Enum):
    LORA = 1


class ClosedMeta(enum.EnumMeta):
    def __setattr__(cls, name: str, value: Any) -> None:
        if name.isupper():
            raise AttributeError("closed")
        super().__setattr__(name, value)


def test_the_installed_peft_fits() -> None:
    peft_hook.check_peft(peft)
    peft_hook.check_peft(fake_peft())


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (without("PeftType"), "has no PeftType"),
        (without("utils.register_peft_method"), "has no utils.register_peft_method"),
        (
            without("tuners.tuners_utils.check_adapters_to_merge"),
            "has no tuners.tuners_utils.check_adapters_to_merge",
        ),
        (
            fake_peft(tuners=SimpleNamespace(tuners_utils=SimpleNamespace(BaseTuner=object))),
            "has no tuners.tuners_utils.BaseTuner.inject_adapter",
        ),
        (fake_peft(PeftType=NotOfStrings), "PeftType that is no enum of strings"),
        (fake_peft(PeftType=str), "PeftType that is no enum of strings"),
        (
            fake_peft(
                utils=SimpleNamespace(
                    register_peft_method=lambda name, config_cls: None,
                    save_and_load=peft.utils.save_and_load,
                    other=peft.utils.other,
                )
            ),
            "register_peft_method without model_cls, prefix",
        ),
    ],
)
def test_a_peft_that_does_not_fit_gives_one_clear_line(fake: Any, reason: str) -> None:
    with pytest.raises(ImportError) as caught:
        peft_hook.check_peft(fake)
    message = str(caught.value)
    assert reason in message
    assert "does not fit peft 9.8.7" in message
    assert "peft>=0.21.2,<0.22" in message
    assert "\n" not in message


def test_an_enum_that_cannot_be_extended_is_reported() -> None:
    class Closed(str, enum.Enum, metaclass=ClosedMeta):  # noqa: UP042  (PEFT's form)
        pass

    with pytest.raises(ImportError, match=r"PeftType that cannot be extended \(AttributeError: closed\)"):
        peft_hook.extend_enum(Closed, "CDKA", fake_peft())

    class Blind(str, enum.Enum):  # noqa: UP042
        @classmethod
        def _missing_(cls, value: object) -> Any:
            return None

        def __hash__(self) -> int:
            return id(object())

    with pytest.raises(ImportError, match=r"does not fit peft 9\.8\.7"):
        peft_hook.extend_enum(Blind, "CDKA", fake_peft())


def test_importing_beside_an_unfit_peft(tmp_path: Path) -> None:
    """The real module in a fresh interpreter that has only a stand-in for some other PEFT."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("__version__ = '0.3.0'\nclass PeftConfig: ...\n")
    program = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('hook', {peft_hook.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: kronlab works with peft>=0.21.2,<0.22 and does not fit peft 0.3.0, "
        "which has no PeftType; "
        'mend it with: pip install "peft>=0.21.2,<0.22"'
    )
