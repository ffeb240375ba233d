"""What is trained: turns a method config into a model with trainable parameters. PEFT does the work wherever it can."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kronlab import models
from kronlab.adapters.base import KronLinear
from kronlab.adapters.design import KINDS, Design, design
from kronlab.errors import ConfigError, KronlabError
from kronlab.hooks import AdaLora, Hooks, LoraPlus, freeze_constants
from kronlab.models import head_modules
from kronlab.moved_base import moves_base

log = logging.getLogger(__name__)

_MOVED_START = re.compile(r"pissa(_niter_\d+)?|lora_ga")
_TASK_TYPE = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS"}


def _common(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """The arguments that every PEFT config shares. A classification head is trained in full, beside the adapter."""
    targets = method["target_modules"]
    kept = model.get("modules_to_save")
    if not kept and model["architecture"] in models.WITH_HEAD:
        kept = head_modules(network)
    return {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(kept) if kept else None,
        "task_type": _TASK_TYPE.get(model["architecture"]),
    }


def _with_head(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """`_common`, with the output layer among the targets where `method.lm_head` asks for it."""
    arguments = _common(model, method, network)
    if method["lm_head"]:
        arguments["target_modules"] = _with_output_layer(network, arguments["target_modules"])
    return arguments


def _lora(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> Any:
    """LoRA, also of the methods that differ from it in their start (`kronlab.moved_base`) or their optimizer alone."""
    from peft import LoraConfig

    init = str(method.get("init") or "")
    if init and not _MOVED_START.fullmatch(init):
        raise ConfigError(f"method.init={init!r}; use pissa, pissa_niter_16 or lora_ga")
    return LoraConfig(
        r=method["r"],
        lora_alpha=method["alpha"],
        lora_dropout=method["dropout"],
        **_with_head(model, method, network),
        **dict(method["options"]),
    )


def _adalora(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> Any:
    from peft import AdaLoraConfig

    if method["init_r"] <= method["r"]:
        raise ConfigError(
            f"method.init_r={method['init_r']}: must be above method.r={method['r']}, the mean at the end"
        )
    t_init, t_final = method["t_init"], method["t_final"]
    if min(t_init, t_final) < 0 or t_init + t_final >= 1:
        raise ConfigError(f"method.t_init={t_init}, method.t_final={t_final}: shares of the steps, together below 1")
    return AdaLoraConfig(
        target_r=method["r"],
        init_r=method["init_r"],
        lora_alpha=method["alpha"],
        lora_dropout=method["dropout"],
        deltaT=method["delta_t"],
        beta1=method["betas"][0],
        beta2=method["betas"][1],
        orth_reg_weight=method["orthogonal"],
        total_step=1,  # not known yet: `kronlab.hooks.AdaLora.begin`
        **_with_head(model, method, network),
        **dict(method["options"]),
    )


def _vera(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=method["r"],
        d_initial=method["d_initial"],
        vera_dropout=method["dropout"],
        **_with_head(model, method, network),
        **dict(method["options"]),
    )


def _lokr(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(
        r=method["r"],
        alpha=method["alpha"],
        decompose_factor=method["factor"],
        **_with_head(model, method, network),
        **dict(method["options"]),
    )


def _cdka(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> Any:
    from kronlab.adapters import CdkaConfig

    own = {key: method[key] for key in ("r1", "r2", "r", "alpha", "scaling", "dropout", "lm_head", "on_indivisible")}
    return CdkaConfig(**own, init_weights=method["init"], **_common(model, method, network), **dict(method["options"]))


def _kron_lora(model: Mapping[str, Any], method: Mapping[str, Any], network: nn.Module) -> Any:
    from kronlab.adapters import KronLoraConfig

    own = {
        key: method[key] for key in ("r", "d_a1", "d_a2", "alpha", "scaling", "dropout", "lm_head", "on_indivisible")
    }
    return KronLoraConfig(
        **own, init_weights=method["init"], **_common(model, method, network), **dict(method["options"])
    )


# A new method: one function here (or a config that reuses one), one file in configs/method/.
PEFT_METHODS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], nn.Module], Any]] = {
    "lora": _lora,
    "cdka": _cdka,
    "kron_lora": _kron_lora,
    "adalora": _adalora,
    "vera": _vera,
    "lokr": _lokr,
}
METHODS = ("none", "adapter", "full", *PEFT_METHODS)


def quantised_fault(method: Mapping[str, Any], quantization: str) -> str | None:
    """Why a method cannot work on a base quantised so (a key of `models.QUANTISATIONS`); None where it can."""
    if method["name"] == "full":
        return "method full trains the base weights themselves"
    if method["name"] == "lokr":
        return "PEFT's LoKr takes no quantised layers"
    if moves_base(method):
        return f"{label(method)} starts inside the base weights"
    if quantization == "8bit" and dict(method.get("options") or {}).get("use_dora"):
        return "PEFT's DoRA cannot read the norms of 8-bit weights on a CPU; 4bit works"
    if method.get("init") == "gradient":
        return f"method {method['name']} with init=gradient needs the gradient of the base weights"
    return None


def trains(method: Mapping[str, Any]) -> bool:
    """Whether anything is trained: not for the base model, nor for an adapter that was trained before."""
    return method["name"] not in ("none", "adapter")


def _with_output_layer(network: nn.Module, targets: str | list[str]) -> list[str]:
    """`all-linear` leaves the output layer out; name every linear module and the output layer instead."""
    output = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    names = {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if (targets == "all-linear" and type(module).__name__ in ("Linear", "Conv1D")) or module is output
    }
    if output is None:
        raise ConfigError("method.lm_head=true, but this model has no output layer; leave it false")
    return sorted(names | (set() if isinstance(targets, str) else set(targets)))


def _finished_adapter(network: nn.Module, path: str) -> nn.Module:
    """A PEFT adapter from a directory, of whatever method, frozen."""
    from peft import PeftModel

    if not (Path(path) / "adapter_config.json").is_file():
        raise ConfigError(f"method.path={path!r}: no adapter_config.json there; give a folder of save_pretrained")
    with _told_in_one_line(f"method.path={path}: the adapter does not fit the model"):
        return PeftModel.from_pretrained(network, path)


@contextmanager
def _told_in_one_line(where: str) -> Iterator[None]:
    """PEFT's refusals as a ConfigError; ours say already what, where and how to mend it."""
    with warnings.catch_warnings():
        # PEFT asks transformers by an old name; nothing that a user of ours could change
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        try:
            yield
        except KronlabError:
            raise
        except (ValueError, TypeError, RuntimeError, OSError, KeyError) as error:
            reason = " ".join(str(error).split())
            hint = " (method.target_modules, model.config)" if re.search("arget[_ ]modules", reason) else ""
            raise ConfigError(f"{where}: {reason}{hint}") from error


def _design_kind(method: Mapping[str, Any]) -> str:
    """The name of a method's design rules in `kronlab.adapters.design.KINDS`.

    Raises:
        ConfigError: there are none, or its sizes differ by module.
    """
    name, options = method["name"], dict(method.get("options") or {})
    patterns = [key for key in options if key.endswith("_pattern")]
    if patterns:
        raise ConfigError(f"method.budget does not go with method.options.{patterns[0]}: it gives all modules one size")
    if name == "cdka" and "near_square" in (method["r1"], method["r2"]):
        if method["r1"] != method["r2"]:
            raise ConfigError("method.budget needs near_square for both r1 and r2, or for neither")
        return "krona"
    if name == "lora" and options.get("use_dora"):
        return "dora"
    if name not in KINDS:
        raise ConfigError(f"method.budget is not known to method {name}; set its sizes, or use {', '.join(KINDS)}")
    return str(name)


def designs(model: Mapping[str, Any], method: Mapping[str, Any], budget: int | str) -> list[Design]:
    """What the method can be within a budget on this model, best first (`kronlab.adapters.design.design`).

    The layers are those that the method would adapt; modules trained in full beside it are not counted.

    Raises:
        ConfigError: the method has no design rules, or the budget is wrong or too small.
    """
    kind = _design_kind(method)
    network = models.build_on_meta(model)
    total = models.count_parameters(network)[1]
    smallest = {key: 1 for key in ("r1", "r2", "r", "d_a1", "d_a2") if key in method}
    with torch.device("meta"):
        network = attach(network, model, {**method, **smallest, "budget": None})
    config: Any = network.config
    hidden = getattr(config.get_text_config(), "hidden_size", None)
    return design(_adapted_sizes(network), budget, kind, hidden_size=hidden, model_parameters=total)


def _adapted_sizes(network: nn.Module) -> list[tuple[int, int]]:
    """(d_in, d_out) of every layer with an adapter of ours or PEFT's LoRA."""
    from peft.tuners.lora import LoraLayer

    return [
        (module.in_features, module.out_features)
        for module in network.modules()
        if isinstance(module, KronLinear | LoraLayer)
    ]


def with_budget(model: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    """The method with its sizes resolved to the best design within `method.budget`; as it is where that is null.

    The budget itself is null in what comes back, so that a cell is the same whichever way its sizes were written.

    Raises:
        ConfigError: see `designs`.
    """
    budget = method.get("budget")
    if budget is None:
        return dict(method)
    return {**method, **_best_components(_canonical(model), _canonical(method)), "budget": None}


@lru_cache(maxsize=128)
def _best_components(model: str, method: str) -> dict[str, int]:
    """Sizes of the best design; kept, because the hundreds of cells of a table share a few models and methods."""
    settings = json.loads(method)
    best = designs(json.loads(model), settings, settings["budget"])[0]
    named = label({**settings, **best.components})
    log.info(
        "budget %s: %s, %s parameters, %.1f %% of it",
        settings["budget"],
        named,
        f"{best.parameters:,}",
        100 * best.share,
    )
    return dict(best.components)


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def label(method: Mapping[str, Any]) -> str:
    """The method's name in tables, its parameters filled in."""
    return str(method["label"]).format(**{key: value for key, value in method.items() if key != "label"})


def attach(network: nn.Module, model: Mapping[str, Any], method: Mapping[str, Any]) -> nn.Module:
    """Freeze the base and add the method's trainable parameters (fp32, whatever the base's dtype).

    Raises:
        ConfigError: an unknown method, or a setting that it does not take.
    """
    method = with_budget(model, method)
    name = method["name"]
    if name == "none":
        network.requires_grad_(False)
        return network
    if name == "full":
        network.requires_grad_(True)
        return network
    if name == "adapter":
        return _finished_adapter(network, method["path"])
    if name not in PEFT_METHODS:
        raise ConfigError(f"method.name={name!r} is not known; use one of {', '.join(METHODS)}")
    from peft import get_peft_model

    try:
        peft_config = PEFT_METHODS[name](model, method, network)
    except TypeError as error:
        raise ConfigError(f"method {name}: {error} (look at method.options)") from error
    with _told_in_one_line(f"method {name}"):
        adapted = get_peft_model(network, peft_config)
    for parameter in adapted.parameters():  # PEFT does so for the adapters alone, not for the modules that it copies
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    freeze_constants(adapted)
    return adapted


def hooks(network: nn.Module, method: Mapping[str, Any]) -> Hooks:
    """What the method adds to training, for a network that it is attached to."""
    if method["name"] == "adalora":
        return AdaLora(network, method["t_init"], method["t_final"])
    if method.get("lr_ratio") is not None:
        return LoraPlus(method["lr_ratio"])
    return Hooks()
