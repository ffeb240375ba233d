"""The one place that touches PEFT's internals: checks them, extends ``PeftType``, registers the methods.

PEFT accepts only members of its ``PeftType`` enum, and an enum is closed once defined, so a method from
outside has to add its member by hand. That, and the tuner base classes imported below, are internals without
a promise; hence the check, which turns a PEFT that has changed them into one clear ImportError instead of a
failure somewhere inside training.
"""

from __future__ import annotations

import copy
import enum
import inspect
import pickle
import tempfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import peft
from safetensors.torch import save_file
from torch import Tensor

SUPPORTED_PEFT = ">=0.21.2,<0.22"

# Where each thing that kronlab relies on lives, and the attributes that it must have.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "PeftConfig": (),
    "PeftType": (),
    "utils.register_peft_method": (),
    "utils.save_and_load.get_peft_model_state_dict": (),
    "utils.save_and_load.set_peft_model_state_dict": (),
    "utils.save_and_load.load_peft_weights": (),
    "peft_model.load_peft_weights": (),
    "mapping.PEFT_TYPE_TO_CONFIG_MAPPING": (),
    "mapping.PEFT_TYPE_TO_TUNER_MAPPING": (),
    "mapping.PEFT_TYPE_TO_PREFIX_MAPPING": (),
    "tuners.tuners_utils.BaseTuner": (
        "inject_adapter",
        "_prepare_adapter_config",
        "_prepare_model",
        "_check_target_module_exists",
        "_check_merge_allowed",
        "_create_and_replace",
        "_replace_module",
        "_unload_and_optionally_merge",
        "_remap_adapter_state_dict_for_load",
        "_get_learnable_bias_state_dict",
    ),
    "tuners.tuners_utils.BaseTunerLayer": (
        "get_base_layer",
        "set_adapter",
        "delete_adapter",
        "_cast_input_dtype",
        "_get_available_adapters",
        "_move_adapter_to_device_of_base_layer",
        "_active_adapter",
        "_disable_adapters",
    ),
    "tuners.tuners_utils.check_adapters_to_merge": (),
    "tuners._buffer_dict.BufferDict": (),
    "utils.other.AuxiliaryTrainingWrapper": ("adapter_state_dict_load_map",),
}
_REGISTER_ARGUMENTS = {"name", "config_cls", "model_cls", "prefix"}


def _unfit(reason: str, found: Any) -> NoReturn:
    version = getattr(found, "__version__", "of unknown version")
    raise ImportError(
        f"kronlab works with peft{SUPPORTED_PEFT} and does not fit peft {version}, which {reason}; "
        f'mend it with: pip install "peft{SUPPORTED_PEFT}"'
    )


def check_peft(found: Any) -> None:
    """Check that a PEFT package has the internals that kronlab hooks into.

    Args:
        found: the imported ``peft`` package (or anything of the same structure).

    Raises:
        ImportError: something is missing or of another kind; names the found version and the supported range.
    """
    for path, attributes in _REQUIRED.items():
        target: Any = found
        for part in path.split("."):
            if not hasattr(target, part):
                _unfit(f"has no {path}", found)
            target = getattr(target, part)
        for attribute in attributes:
            if not hasattr(target, attribute):
                _unfit(f"has no {path}.{attribute}", found)
    enum_cls = found.PeftType
    if not (isinstance(enum_cls, enum.EnumMeta) and issubclass(enum_cls, str)):
        _unfit("has a PeftType that is no enum of strings", found)
    missing = _REGISTER_ARGUMENTS - set(inspect.signature(found.utils.register_peft_method).parameters)
    if missing:
        _unfit(f"has a register_peft_method without {', '.join(sorted(missing))}", found)


def extend_enum(enum_cls: Any, name: str, found: Any = peft) -> Any:
    """Give a string enum a member whose name and value are ``name``, unless it has it, and return it.

    Args:
        enum_cls: a ``class E(str, Enum)``.
        name: name and value of the member.
        found: the package to blame in an error.

    Raises:
        ImportError: the new member does not behave like one defined in the class body.
    """
    if name in enum_cls.__members__:
        return enum_cls[name]
    try:
        member = str.__new__(enum_cls, name)
        member._name_ = name
        member._value_ = name
        member.__objclass__ = enum_cls
        member._sort_order_ = len(enum_cls._member_names_)
        # The attribute first: once a name is in the member map, the enum refuses to have it assigned.
        setattr(enum_cls, name, member)
        enum_cls._member_names_.append(name)
        enum_cls._member_map_[name] = member
        enum_cls._value2member_map_[name] = member
        if hasattr(enum_cls, "_hashable_values_"):  # Python 3.13 looks values up here
            enum_cls._hashable_values_.append(name)
        fits = (
            enum_cls(name) is member
            and enum_cls[name] is member
            and getattr(enum_cls, name) is member
            and isinstance(member, enum_cls)
            and list(enum_cls)[-1] is member
            and name in list(enum_cls)
            and member.value == member.name == name
            and hash(member) == hash(enum_cls(name))
            and copy.deepcopy(member) is member
            and pickle.loads(pickle.dumps(member)) is member
        )
    except Exception as error:
        _unfit(f"has a PeftType that cannot be extended ({type(error).__name__}: {error})", found)
    if not fits:
        _unfit("has a PeftType whose added members do not behave like its own", found)
    return member


check_peft(peft)

from peft import PeftConfig  # noqa: E402  (only after the check: its message is the better one)
from peft.mapping import (  # noqa: E402
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners._buffer_dict import BufferDict  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge  # noqa: E402
from peft.utils import register_peft_method  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: E402
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402

__all__ = [
    "SUPPORTED_PEFT",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "PeftConfig",
    "check_adapters_to_merge",
    "check_peft",
    "extend_enum",
    "get_peft_model_state_dict",
    "peft_type",
    "read_also",
    "register",
    "set_peft_model_state_dict",
    "switch_frozen",
]


def peft_type(name: str) -> Any:
    """The ``PeftType`` member called ``name``, added to the enum where it is not there yet."""
    return extend_enum(peft.PeftType, name)


def register(name: str, config_cls: type, model_cls: type, prefix: str) -> None:
    """Make a method known to PEFT; doing it again, also after a module reload, is harmless.

    Args:
        name: lower case; its upper case is the ``PeftType``.
        config_cls, model_cls: the method's ``PeftConfig`` and ``BaseTuner``.
        prefix: what every adapter parameter's name begins with.

    Raises:
        ImportError: another package has already given PEFT a method of this name.
    """
    member = peft_type(name.upper())
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is config_cls:
        return
    if known is not None:
        if (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
            raise ImportError(
                f"PEFT already has a method {name!r}, from {known.__module__}; do not import that one too"
            )
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(member, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)


def switch_frozen(model: Any, layers: list[Any], adapter_name: str | None) -> None:
    """Make one adapter of a PeftModel the active one, or none, where nothing is trained.

    What ``set_adapter`` and ``enable_adapter_layers`` or ``disable_adapter_layers`` do, without their walks over all
    modules and parameters to set what requires a gradient: that is what a switch would spend its time on.

    Args:
        layers: all of the model's tuner layers and wrappers of modules that are trained in full.
    """
    if adapter_name is not None:
        model.active_adapter = model.base_model.active_adapter = adapter_name
    for layer in layers:
        layer._disable_adapters = adapter_name is None
        if adapter_name is not None:
            layer._active_adapter = [adapter_name]


def read_also(knows: Callable[[Path], bool], read: Callable[[Path], Mapping[str, Tensor]]) -> None:
    """Let PEFT load adapter folders of another form: ``PeftModel.from_pretrained``, ``load_adapter``, ``swap_weights``.

    PEFT reads every adapter by one function, which has no place for another format, and is wrapped for that. For a
    folder of another form it is given one of PEFT's own with the same tensors; all other folders go to it as they are.
    Doing it again, also after a module reload, is harmless.

    Args:
        knows: whether a folder is of that form.
        read: its tensors, under the names of a PEFT checkpoint.
    """
    current = peft.peft_model.load_peft_weights
    plain = getattr(current, "kronlab_plain", current)

    @wraps(plain)
    def load_peft_weights(model_id: str, *args: Any, **kwargs: Any) -> Any:
        folder = Path(model_id, kwargs.get("subfolder") or "")
        if not knows(folder):
            return plain(model_id, *args, **kwargs)
        with tempfile.TemporaryDirectory() as scratch:
            save_file(dict(read(folder)), Path(scratch) / "adapter_model.safetensors")
            return plain(scratch, *args, **{key: value for key, value in kwargs.items() if key != "subfolder"})

    load_peft_weights.kronlab_plain = plain  # type: ignore[attr-defined]
    for module in (peft, peft.peft_model, peft.utils, peft.utils.save_and_load):
        setattr(module, "load_peft_weights", load_peft_weights)  # noqa: B010  (mypy knows the function there)
