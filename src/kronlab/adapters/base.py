"""What CDKA and Kron-LoRA share as PEFT tuners: configuration, layer and model.

A method adds its components (sizes of its factors, derived from the layer's dimensions), its parameters with
their initialisation, and the two functions of :mod:`kronlab.adapters.kron` that apply and form its ΔW.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kronlab.adapters import quantized_base
from kronlab.adapters.kron import PATHS, PlainLinear
from kronlab.adapters.peft_hook import (
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    PeftConfig,
    check_adapters_to_merge,
)
from kronlab.adapters.quantized_base import MergeError
from kronlab.errors import CheckpointError, ConfigError, DimensionError, KronlabError

logger = logging.getLogger(__name__)

SCALINGS = ("cdka", "rslora", "lora")
INITS = ("kaiming", "gaussian", "orthogonal", "gradient")
BASE_NAME = "__base__"  # PEFT's name, among `adapter_names`, for rows that get no adapter


class UnsupportedLayerError(KronlabError, TypeError):
    """A targeted module is of a type that these adapters cannot wrap."""


class TiedWeightError(KronlabError, ValueError):
    """Merging would change a weight that another module shares."""


class BrokenAdapterError(KronlabError, ValueError):
    """An adapter holds non-finite weights."""


# -------------------------------------------------------------------------------------- integers and patterns


def divisors(n: int) -> list[int]:
    """All divisors of n >= 1, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def nearest_divisor(n: int, wanted: float) -> int:
    """The divisor of n nearest to ``wanted``, the smaller of two equally near."""
    return min(divisors(n), key=lambda d: (abs(d - wanted), d))


def near_square(n: int) -> int:
    """The smaller of the two most nearly equal factors of n: 4096 -> 64, 14336 -> 112, 32000 -> 160."""
    return max(d for d in divisors(n) if d * d <= n)


def match_pattern(patterns: Mapping[str, Any], module_name: str) -> str | None:
    """The pattern that decides for a module, or None.

    A pattern matches as in PEFT's ``rank_pattern``: as a regular expression, against the whole module name or
    its end after a dot. Of several that match the longest decides, then the first in the alphabet: a saved
    config comes back with its keys sorted, so the order in which they were written cannot be what decides.
    """
    hits = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module_name)]
    return min(hits, key=lambda pattern: (-len(pattern), pattern)) if hits else None


# ---------------------------------------------------------------------------------------------- configuration


class Components(Protocol):
    """Sizes of one adapter's factors in one layer."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each factor; their elements add up to the adapter's parameters."""

    def max_rank(self) -> int:
        """Largest rank that ΔW can have."""

    def predicted_alignment(self) -> float | None:
        """Expected cosine between the first step's ΔW and the full gradient; None: no formula known."""


@dataclass
class KronConfig(PeftConfig):
    """Fields that both methods have; see :class:`CdkaConfig` and :class:`KronLoraConfig`."""

    r: int = field(default=8, metadata={"help": "Number of components (CDKA), or rank of B1·B2 (Kron-LoRA)."})
    alpha: float = field(default=32, metadata={"help": "Numerator α of the scale λ."})
    scaling: str | float = field(
        default="lora",
        metadata={"help": "λ: 'rslora' α/√r | 'lora' α/r | a number, λ itself (α is then unused)."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's input."})
    init_weights: str = field(
        default="kaiming",
        metadata={
            "help": "Start of the factors that are not zero then: 'kaiming' uniform with a=√5 | 'gaussian' "
            "of variance 1/fan_in | 'orthogonal': orthonormal rows, or columns where those are fewer | 'gradient': "
            "NaN until gradient_init_ has set them from the task's gradient, or a checkpoint is loaded. One "
            "factor always starts at zero, and ΔW with it."
        },
    )
    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={
            "help": "Module names (matched at their end), one regular expression for the full name, or "
            "'all-linear': every linear layer but the output layer."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or one regular expression: not to be adapted."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to be trained in full and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the only blocks to be adapted."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks; only with layers_to_transform."}
    )
    bias: str = field(
        default="none",
        metadata={"help": "Biases to be trained: 'none' | 'all' | 'cdka_only' or 'kron_lora_only' (adapted layers)."},
    )
    lm_head: bool = field(
        default=False,
        metadata={"help": "Adapt the output embedding too, whatever target_modules selects; exclude_modules wins."},
    )
    on_indivisible: str = field(
        default="error",
        metadata={
            "help": "Where a component does not divide its dimension: 'error' | 'fit' takes the nearest "
            "divisor (the smaller of two) and logs it."
        },
    )
    r_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Regular expression of module names -> r there; the longest decides."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Regular expression of module names -> α there."}
    )
    path: str = field(
        default="auto",
        metadata={
            "help": "How ΔW is applied: 'factored' | 'lora' | 'dense' | 'auto', the cheapest by estimate. The result "
            "is the same but for rounding; see kronlab.adapters.kron."
        },
    )

    # Name of the module that lm_head=True adds; the tuner finds it. No field: it belongs to the model.
    output_module: ClassVar[str | None] = None
    method: ClassVar[str] = ""
    inits: ClassVar[tuple[str, ...]] = INITS
    # Fields for a component that must divide a dimension, and words that they accept instead of a number.
    component_fields: ClassVar[tuple[str, ...]] = ()
    component_words: ClassVar[tuple[Any, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own configs do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        where = type(self).__name__
        self._check_count("r", self.r)
        _check_positive(where, "alpha", self.alpha)
        for name in self.component_fields:
            self._check_component(name, getattr(self, name))
        if isinstance(self.scaling, str):
            if self.scaling not in self._scalings():
                allowed = ", ".join(self._scalings())
                raise ConfigError(f"{where}: scaling={self.scaling!r} is unknown; use {allowed}, or a number for λ")
        elif isinstance(self.scaling, bool) or not isinstance(self.scaling, int | float):
            raise ConfigError(f"{where}: scaling={self.scaling!r} is neither a name nor a number")
        elif not math.isfinite(self.scaling):
            raise ConfigError(f"{where}: scaling={self.scaling!r} is not a finite number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{where}: dropout={self.dropout!r} is not in [0, 1)")
        _check_choice(where, "init_weights", self.init_weights, self.inits)
        _check_choice(where, "path", self.path, ("auto", *PATHS))
        _check_choice(where, "on_indivisible", self.on_indivisible, ("error", "fit"))
        _check_choice(where, "bias", self.bias, ("none", "all", f"{self.method}_only"))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"{where}: layers_pattern says nothing without layers_to_transform; give both or neither")
        for name, value in self._patterns():
            for pattern in value:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{where}: {name} has {pattern!r}, no regular expression ({error})") from None
        for pattern, r in self.r_pattern.items():
            self._check_count(f"r_pattern[{pattern!r}]", r)
        for pattern, alpha in self.alpha_pattern.items():
            _check_positive(where, f"alpha_pattern[{pattern!r}]", alpha)
        for name in self.component_fields:
            for pattern, value in getattr(self, f"{name}_pattern").items():
                self._check_component(f"{name}_pattern[{pattern!r}]", value)

    def _scalings(self) -> tuple[str, ...]:
        return SCALINGS

    def _check_count(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{type(self).__name__}: {name}={value!r} is not a positive whole number")

    def _check_component(self, name: str, value: Any) -> None:
        if value in self.component_words:
            return
        if isinstance(value, str):
            words = " or ".join(repr(word) for word in self.component_words if isinstance(word, str))
            instead = f"; use a positive whole number{f' or {words}' if words else ''}"
            raise ConfigError(f"{type(self).__name__}: {name}={value!r} is unknown{instead}")
        self._check_count(name, value)

    def _patterns(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(field name, patterns) of every per-module override."""
        for name in ("r", "alpha", *self.component_fields):
            yield f"{name}_pattern", getattr(self, f"{name}_pattern")

    def value_for(self, name: str, module_name: str) -> Any:
        """Value of field ``name`` in a module: its pattern's, or the field's own."""
        patterns = getattr(self, f"{name}_pattern")
        pattern = match_pattern(patterns, module_name)
        return getattr(self, name) if pattern is None else patterns[pattern]

    def divisor_for(self, name: str, value: int, dimension: str, size: int, module_name: str) -> int:
        """``value`` where it divides ``size``, else what on_indivisible says.

        Raises:
            DimensionError: it does not divide and on_indivisible is "error".
        """
        if size % value == 0:
            return value
        if self.on_indivisible == "fit":
            fitted = nearest_divisor(size, value)
            logger.warning(
                "%s: %s=%d does not divide %s=%d, using %d", module_name, name, value, dimension, size, fitted
            )
            return fitted
        below = [d for d in divisors(size) if d < value][-1:]
        above = [d for d in divisors(size) if d > value][:1]
        nearest = " or ".join(str(d) for d in below + above)
        raise DimensionError(
            f"{module_name}: {name}={value} does not divide {dimension}={size}; the nearest that do: "
            f'{nearest} (set {name}, or {name}_pattern for this module, or on_indivisible="fit")'
        )

    def components_for(self, module_name: str, d_in: int, d_out: int) -> Any:
        """The method's :class:`Components` in a layer of d_in inputs and d_out outputs.

        Raises:
            DimensionError: a component does not divide its dimension and on_indivisible is "error".
        """
        raise NotImplementedError

    def scale_for(self, module_name: str, components: Any) -> float:
        """λ in a layer."""
        alpha = self.value_for("alpha", module_name)
        if not isinstance(self.scaling, str):
            return float(self.scaling)
        if self.scaling == "rslora":
            return alpha / math.sqrt(components.r)
        return alpha / components.r


def _check_positive(where: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ConfigError(f"{where}: {name}={value!r} is not a positive number")


def _check_choice(where: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{where}: {name}={value!r} is unknown; use {', '.join(allowed)}")


def init_factor_(weight: Tensor, how: str) -> None:
    """Initialise a factor (rows, fan_in) in place.

    kaiming: uniform on ±1/√fan_in, which is Kaiming-uniform with a=√5. gaussian: N(0, 1/fan_in).
    orthogonal: orthonormal rows, or orthonormal columns where there are more rows than columns.
    gradient: NaN, so that an adapter which missed its initialisation cannot pass for a trained one.
    svd, qr: nothing; :mod:`kronlab.adapters.init` sets them from the base weight.
    """
    if weight.is_meta:
        return  # nothing to fill; counting a model must not cost its initialisation
    if how == "kaiming":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    elif how == "gaussian":
        nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
    elif how == "orthogonal":
        nn.init.orthogonal_(weight)
    elif how == "gradient":
        nn.init.constant_(weight, math.nan)


# ------------------------------------------------------------------------------------------------------ layer


class KronLinear(nn.Module, BaseTunerLayer):
    """A linear layer with any number of named adapters beside it.

    The base is an ``nn.Linear``, transformers' ``Conv1D``, or bitsandbytes' ``Linear8bitLt`` or ``Linear4bit``.

    forward: x (..., d_in) -> base_layer(x) + Σ over active adapters of dropout(x) · ΔWᵀ, in the base layer's
    output dtype. Under autocast x is passed on as it is, for the GEMMs cast by themselves; otherwise it is
    cast to the adapter's dtype (PEFT keeps adapters in float32 beside a half-precision base). Either way the
    sum is rounded to the output dtype once, at the end.

    ``components[adapter]``, ``scaling[adapter]`` (λ now) and ``initial_scaling[adapter]`` (λ of the config)
    say what an adapter is; all but the values of the parameters is known on the meta device too.
    """

    factor_names: ClassVar[tuple[str, ...]] = ()  # A, B ... : the parameter is prefix + name
    zero_factor: ClassVar[str] = ""  # the one that starts at zero
    prefix: ClassVar[str] = ""

    # Attributes of the base classes, for the type checker only.
    adapter_layer_names: tuple[str, ...]
    active_adapters: Any
    get_base_layer: Any
    set_adapter: Any
    _cast_input_dtype: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: Any, adapter_name: str, config: KronConfig, module_name: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.fan_in_fan_out = isinstance(base_layer, Conv1D | nn.Embedding)  # weight (d_in, d_out)
        self.in_features, self.out_features = _dimensions(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        setattr(self, f"{self.prefix}dropout", nn.ModuleDict())
        self.components: dict[str, Any] = {}
        self.path: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.merge_error: MergeError | None = None  # of the last merge, where the base is quantised
        self._quantised_original: list[Any] = []  # its weight before that; a list, so that it is no parameter
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    # The method's own part.

    def apply_delta(
        self, adapter_name: str, x: Tensor, base: Tensor | PlainLinear | None, keep: Tensor | None, scale: float
    ) -> Tensor:
        """base + (x · keep) · ΔWᵀ with λ = scale; arguments as in :mod:`kronlab.adapters.kron`."""
        raise NotImplementedError

    def dense_delta(self, factors: dict[str, Tensor], components: Any, scale: float) -> Tensor:
        """ΔW (d_out, d_in) of the given factors."""
        raise NotImplementedError

    # Adapters.

    def update_layer(self, adapter_name: str, config: KronConfig, module_name: str) -> None:
        """Add an adapter: size it, make its parameters, initialise them.

        Raises:
            DimensionError: a component does not divide its dimension.
        """
        components = config.components_for(module_name, self.in_features, self.out_features)
        # On the CPU in float32 first: a seed then gives the same start on every device.
        device = "meta" if self.base_layer.weight.is_meta else "cpu"
        for name, shape in self._parameter_shapes(components).items():
            weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
            with torch.no_grad():
                if name == self.zero_factor:
                    weight.zero_()
                else:
                    init_factor_(weight, config.init_weights)
            self.factor(name)[adapter_name] = weight
        self.components[adapter_name] = components
        self.path[adapter_name] = config.path
        self.initial_scaling[adapter_name] = config.scale_for(module_name, components)
        self.scaling[adapter_name] = self.initial_scaling[adapter_name]
        dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        getattr(self, f"{self.prefix}dropout")[adapter_name] = dropout
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _parameter_shapes(self, components: Any) -> dict[str, tuple[int, int]]:
        """Shape of each stored parameter by factor name."""
        raise NotImplementedError

    def factor(self, name: str) -> nn.ParameterDict:
        """Adapter name -> parameter, of one factor."""
        return getattr(self, self.prefix + name)

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        """Factor name -> parameter, of one adapter."""
        return {name: self.factor(name)[adapter_name] for name in self.factor_names}

    def saved_factors(self, adapter_name: str) -> tuple[str, ...]:
        """Names of the tensors that a checkpoint has of an adapter in this layer."""
        return self.factor_names

    # λ, with the methods that PEFT's tuners have.

    def set_scale(self, adapter: str, scale: float) -> None:
        """λ := scale · (λ of the config); an adapter that this layer lacks is passed over."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """λ := scale · λ for every active adapter."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """λ := λ / scale for every active adapter, or the λ of the config where scale is None."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = (
                    self.initial_scaling[adapter] if scale is None else self.scaling[adapter] / scale
                )

    # Counting; nothing here reads a parameter's value.

    def component_shapes(self, adapter_name: str = "default") -> dict[str, tuple[int, ...]]:
        """Shape of each factor of an adapter; the elements add up to its parameters."""
        return self.components[adapter_name].shapes()

    def max_rank(self, adapter_name: str = "default") -> int:
        """Largest rank that an adapter's ΔW can have."""
        return self.components[adapter_name].max_rank()

    def predicted_alignment(self, adapter_name: str = "default") -> float | None:
        """Expected cosine between an adapter's first step and the full gradient; see its Components."""
        return self.components[adapter_name].predicted_alignment()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # ΔW and merging.

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the base weight's orientation, in float32 or the adapter's dtype if that is wider."""
        factors = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in self.factors(adapter).items()
        }
        delta = self.dense_delta(factors, self.components[adapter], self.scaling[adapter])
        return delta.T if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight, summed in ΔW's dtype and rounded once.

        A quantised base is rounded to its own bits again; ``merge_error`` then says what that has cost.

        Args:
            safe_merge: refuse, with the base weight untouched, where the sum is not finite.
            adapter_names: which; None for the active ones.

        Raises:
            BrokenAdapterError: safe_merge met a non-finite value (a ValueError).
            QuantisedMergeError: the base has 4 bits, and :func:`allow_4bit_merge` does not allow it (a ValueError).
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.components]
        if names and quantized_base.bits_of(self.get_base_layer()) is not None:
            self._merge_quantised(names, safe_merge)
            return
        for name in names:
            weight = self.get_base_layer().weight
            merged = (weight.data + self.get_delta_weight(name).to(weight.device)).to(weight.dtype)
            self._check_merged(name, merged, safe_merge)
            weight.data.copy_(merged)
            self.merged_adapters.append(name)

    def _merge_quantised(self, names: list[str], safe_merge: bool) -> None:
        """Q(W + Σ ΔW) over what is merged by now and ``names``: W is kept, so that errors do not add up."""
        base = self.get_base_layer()
        quantized_base.check_4bit_merge(type(base).__qualname__, base)
        if self._quantised_original:
            quantized_base.restore_(base, self._quantised_original[0])
        original = quantized_base.kept(base)
        exact = quantized_base.dequantise(base)
        delta = torch.zeros_like(exact)
        for name in [*self.merged_adapters, *names]:
            delta += self.get_delta_weight(name).to(delta)
            self._check_merged(name, delta, safe_merge)
        exact += delta
        self._quantised_original = [original]
        base.weight = quantized_base.quantised_like(base, exact)
        self.merged_adapters.extend(names)
        self.merge_error = quantized_base.measure(quantized_base.dequantise(base), exact, delta)

    @staticmethod
    def _check_merged(name: str, merged: Tensor, safe_merge: bool) -> None:
        if safe_merge and not torch.isfinite(merged).all():
            raise BrokenAdapterError(f"adapter {name!r}: merging it gives non-finite weights; it seems to be broken")

    def unmerge(self) -> None:
        """Subtract every merged ΔW again: up to rounding in the base weight's dtype, exactly where it is quantised."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._quantised_original:
            quantized_base.restore_(self.get_base_layer(), self._quantised_original[0])
            self._quantised_original, self.merge_error = [], None
            self.merged_adapters.clear()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.components:
                weight = self.get_base_layer().weight
                weight.data.copy_(weight.data - self.get_delta_weight(name).to(weight.device))

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """With ``adapter_names``, row i of x gets the adapter adapter_names[i] alone; BASE_NAME: none.

        Raises:
            ConfigError: not one name for each row, or an adapter is merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self._names_for(x, adapter_names) if name in self.components]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None and len(set(adapter_names)) > 1:
            result: Any = self.base_layer(x, *args, **kwargs)
            for name, rows in rows_by_name(tuple(adapter_names), x.device).items():
                if name in self.components:
                    result[rows] = self._add_delta(name, x[rows], result[rows]).to(result.dtype)
            return result
        plain = None if args or kwargs else self._plain_base(x, names[0])
        result = self.base_layer(x, *args, **kwargs) if plain is None else plain
        dtype = result.dtype if plain is None else plain.weight.dtype
        for name in names:
            result = self._add_delta(name, x, result)
        return result.to(dtype)

    def _names_for(self, x: Tensor, adapter_names: Sequence[str] | None) -> list[str]:
        """The adapters that are asked for: the active ones, or those of the rows, each once."""
        if adapter_names is None or self.disable_adapters:
            return list(self.active_adapters)
        if len(adapter_names) != len(x):
            raise ConfigError(f"adapter_names has {len(adapter_names)} names for {len(x)} rows; give one for each row")
        if self.merged:
            raise ConfigError("adapter_names goes with adapters that are not merged; call unmerge_adapter() first")
        return list(dict.fromkeys(adapter_names))

    def _add_delta(self, adapter_name: str, x: Tensor, base: Tensor | PlainLinear) -> Tensor:
        """base + dropout(x) · ΔWᵀ, x in the dtype that the adapter computes in."""
        weight = self.factor(self.factor_names[0])[adapter_name]
        inputs = x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, weight.dtype)
        keep, scale = self._dropped(adapter_name, inputs)
        return self.apply_delta(adapter_name, inputs, base, keep, scale)

    def _plain_base(self, x: Tensor, adapter_name: str) -> PlainLinear | None:
        """The base layer as a weight that the adapter's operator may multiply x with itself, in the same node.

        None where calling the layer does something else: another type, hooks, a forward that was put in its place, a
        weight that is no plain tensor (sharded, quantised), or another dtype than that of the adapter's arithmetic.
        """
        base, weight = self.base_layer, getattr(self.base_layer, "weight", None)
        if type(base) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter or _is_hooked(base):
            return None
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            fits = x.dtype != torch.float64
        else:
            dtype = self.factor(self.factor_names[0])[adapter_name].dtype
            fits = x.dtype == dtype
        if not fits or weight.dtype != dtype or (base.bias is not None and base.bias.dtype != dtype):
            return None
        return PlainLinear(weight.T if self.fan_in_fan_out else weight, base.bias)

    def _dropped(self, adapter_name: str, x: Tensor) -> tuple[Tensor | None, float]:
        """(what dropout keeps of x, λ with dropout's 1/(1 - p)); the same draw as ``nn.Dropout`` would make."""
        dropout, scale = getattr(self, f"{self.prefix}dropout")[adapter_name], self.scaling[adapter_name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if p == 0:
            return None, scale
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
        return keep, scale / (1 - p)

    def __repr__(self) -> str:
        return f"{self.prefix.rstrip('_')}.{super().__repr__()}"


class KronEmbedding(KronLinear):
    """An embedding with adapters: the linear layer that it is on one-hot rows.

    d_in is num_embeddings and d_out embedding_dim, as in PEFT's LoRA. So ΔW is (embedding_dim, num_embeddings), and
    the base weight, (num_embeddings, embedding_dim), gets its transpose.

    forward: ids x (...) -> base_layer(ids) + s · Σ over active adapters of the rows ids of ΔWᵀ, (..., embedding_dim),
    gathered from the factors; ΔW is not formed. s is 1, or the constant by which the base layer multiplies its own
    rows (Gemma's does). Dropout has no input to act on and does nothing here. Tokens share factors, so a padding
    token's row moves with the others'.
    """

    _get_embed_scale: Any

    def lookup_delta(self, adapter_name: str, ids: Tensor) -> Tensor:
        """Rows ``ids`` of ΔWᵀ: (...) -> (..., d_out)."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self._names_for(x, adapter_names) if name in self.components]
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype, scale = result.dtype, self._get_embed_scale()
        everywhere: dict[str, Any] = dict.fromkeys(names, slice(None))
        where = everywhere if adapter_names is None else rows_by_name(tuple(adapter_names), x.device)
        for name in names:
            rows = where[name]
            delta = self.lookup_delta(name, x[rows])
            delta = delta if scale is None else delta * scale.to(delta)
            if adapter_names is None:
                result = result + delta
            else:
                result[rows] = (result[rows] + delta).to(dtype)
        return result.to(dtype)


@lru_cache(maxsize=64)  # every layer of a model asks for the same
def rows_by_name(names: tuple[str, ...], device: torch.device) -> dict[str, slice | Tensor]:
    """Name -> where it stands in ``names``: a slice where its rows follow each other, else their indices."""
    found: dict[str, slice | Tensor] = {}
    for name in dict.fromkeys(names):
        at = [i for i, other in enumerate(names) if other == name]
        together = at[-1] - at[0] == len(at) - 1
        found[name] = slice(at[0], at[-1] + 1) if together else torch.tensor(at, device=device)
    return found


# ------------------------------------------------------------------------------------------------------ model


class KronModel(BaseTuner):
    """Puts :class:`KronLinear` layers in the place of the targeted ones; PEFT drives it."""

    prefix: str = ""
    tuner_layer_cls: type[KronLinear] = KronLinear
    embedding_layer_cls: type[KronEmbedding] = KronEmbedding
    # Module name -> what the last merge into quantised weights has cost; stays after merge_and_unload.
    merge_errors: Mapping[str, MergeError] = MappingProxyType({})
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._places = _places(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._places = {}
        config = self.peft_config[adapter_name]
        names = [name for name, layer in adapter_layers(model) if adapter_name in layer.components]
        for field_name, patterns in config._patterns():
            unused = sorted(p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", name) for name in names))
            if unused and field_name != "alpha_pattern":  # PEFT warns of that one itself
                warnings.warn(f"{field_name} {unused} matched no adapted module and had no effect", stacklevel=2)

    def _prepare_adapter_config(self, peft_config: KronConfig, model_config: dict) -> KronConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: KronConfig, model: nn.Module) -> None:
        if peft_config.target_modules == "all-linear":
            _refuse_foreign_linears(model)
        if peft_config.lm_head:
            name = _output_module_name(model)
            peft_config.output_module = name  # type: ignore[misc]  # shadows the class's None
            if any(name.endswith(kept) for kept in peft_config.modules_to_save or ()):
                raise ConfigError(f"lm_head=True adapts {name}, which modules_to_save trains in full; drop one of them")

    @staticmethod
    def _check_target_module_exists(peft_config: KronConfig, key: str) -> Any:
        # PEFT wraps every module whose name ends like one in modules_to_save ("classifier" takes DistilBERT's
        # pre_classifier too) and stumbles over one that is adapted by then.
        if any(key.endswith(kept) for kept in peft_config.modules_to_save or ()):
            return False
        found = BaseTuner._check_target_module_exists(peft_config, key)
        if found is None or found is False:  # an excluded module is neither
            return key == peft_config.output_module
        return found and (key == peft_config.output_module or _in_chosen_layers(peft_config, key))

    def _create_and_replace(
        self,
        peft_config: KronConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        _check_supported(target, current_key)
        _check_called(self.model, target, current_key, self._places[target])
        layer_cls = self.embedding_layer_cls if isinstance(target, nn.Embedding) else self.tuner_layer_cls
        layer = layer_cls(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: KronConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT asks this of the method between reading a checkpoint and loading it. It goes on with a warning, or
        # without a word, where tensors are missing or unknown; with us that is an error.
        given = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        _check_fits(model, adapter_name, given, cls._get_learnable_bias_state_dict(model, model.state_dict(), config))
        return given

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to one adapter for each row: what ``PeftModel.forward(adapter_names=[...])`` comes down to."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_names(names)
        copies = _copies(self.model, args, kwargs)
        layers = [m for m in self.model.modules() if isinstance(m, KronLinear | AuxiliaryTrainingWrapper)]
        give = partial(_give_names, list(names), [name for name in names for _ in range(copies)])
        handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError where ``adapter_names`` cannot be had."""
        if self.training:
            raise ConfigError("adapter_names is for inference; call model.eval() first")
        asked = set(names) - {BASE_NAME}
        if unknown := sorted(asked - self.peft_config.keys()):
            raise ConfigError(f"adapter_names: {unknown[0]!r} is not loaded; there are {', '.join(self.peft_config)}")
        for path, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                # PEFT asks the active adapter whether there is anything to do, and then every name for its module.
                lacking = sorted((asked | set(module.active_adapters)) - set(module._adapters))
                if lacking:
                    raise ConfigError(
                        f"adapter_names: {path} is trained in full by some adapters and not by {lacking[0]!r}; mix "
                        "adapters with the same modules_to_save"
                    )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See :func:`kronlab.adapters.combine.add_weighted_adapter`; PEFT's users look for it here."""
        from kronlab.adapters.combine import add_weighted_adapter  # it needs both methods, which need this module

        return add_weighted_adapter(self, *args, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        super().merge_adapter(adapter_names, safe_merge=safe_merge)
        self._report_merge(list(adapter_layers(self.model)))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        layers = list(adapter_layers(self.model))
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            self._report_merge(layers)
        return model

    def _report_merge(self, layers: list[tuple[str, KronLinear]]) -> None:
        """Keep and log what merging into quantised weights has cost."""
        self.merge_errors = {name: layer.merge_error for name, layer in layers if layer.merge_error is not None}
        if not self.merge_errors:
            return
        name, worst = max(self.merge_errors.items(), key=lambda item: item[1].of_update)
        logger.warning(
            "merged into quantised weights: the rounding of %s is %.2g of its update, %.2g of its weight, at most "
            "%.2g; it is the worst of %d modules (see merge_errors)",
            name, worst.of_update, worst.relative, worst.max_abs, len(self.merge_errors),
        )  # fmt: skip

    def _check_merge_allowed(self) -> None:
        for name, layer in adapter_layers(self.model):
            quantized_base.check_4bit_merge(name, layer.get_base_layer())
            weight = layer.get_base_layer().weight
            for other_name, other in self.model.named_modules():
                if other is not layer.get_base_layer() and other._parameters.get("weight") is weight:
                    raise TiedWeightError(
                        f"{name}: merging would change {other_name} too, for they share one weight; untie it "
                        "before attaching the adapter (model.config.tie_word_embeddings = False, and the "
                        "output layer's weight = torch.nn.Parameter(weight.detach().clone())), or use the "
                        "adapter unmerged"
                    )


def _copies(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows that a model makes of one: beams or samples of ``generate``, choices of a multiple choice."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, Tensor) and ids.ndim == 3:
        return ids.shape[1]
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    asked = (kwargs.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences"))
    return max(asked)


def _give_names(
    names: list[str], copied: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the names of the rows that a layer is given; an encoder gets them before they are copied."""
    kwargs["adapter_names"] = names if len(args[0]) == len(names) else copied
    return args, kwargs


def _is_hooked(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its class's forward, for this layer or for all modules."""
    own: Any = layer
    hooks = (own._forward_hooks, own._forward_pre_hooks, own._backward_hooks, own._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__ or bool(nn.modules.module._has_any_global_hook())


def _dimensions(layer: Any) -> tuple[int, int]:
    """(d_in, d_out); not from the weight of a linear layer, which may be packed."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        rows, columns = layer.weight.shape
        return rows, columns
    return layer.in_features, layer.out_features


def _check_fits(model: nn.Module, adapter_name: str, given: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a checkpoint, under the model's names, with those that the adapter has there.

    Base weights of embeddings may come along, for PEFT saves them with an adapter on them. Tensors of ``biases`` are
    wanted too, but for those inside a module that is saved whole.

    Raises:
        CheckpointError: tensors are missing or unknown, or a shape is another; nothing has been loaded then.
    """
    state = model.state_dict()
    bare = {key: key.removeprefix("base_model.model.") for key in given}  # a model without PeftModel around it
    given = {bare[key] if key not in state and bare[key] in state else key: given[key] for key in given}
    ends = tuple(
        f".{layer.prefix}{factor}.{adapter_name}"
        for _, layer in adapter_layers(model)
        if adapter_name in layer.components
        for factor in layer.saved_factors(adapter_name)
    )
    whole = [(f"{name}.", m) for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    wanted = {key for key in state if ends and f".{key}".endswith(ends)}
    wanted |= {key for key in biases if not key.startswith(tuple(prefix for prefix, _ in whole))}
    for prefix, module in whole:
        wanted |= {f"{prefix}{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()}
    along = tuple(f"{name}." for name, module in model.named_modules() if module in _embeddings(model))
    allowed = {key for key in state if key.startswith(along)} | biases.keys()
    # With bias="all", PEFT saves a whole module's bias a second time, under a name that it does not read.
    allowed |= {key.replace(f".modules_to_save.{adapter_name}.", ".modules_to_save.") for key in biases}
    unknown = given.keys() - wanted - allowed
    for found, keys in (("lacks", wanted - given.keys()), ("has unknown", unknown)):
        if keys:
            raise CheckpointError(
                f"adapter {adapter_name!r}: the checkpoint {found} {len(keys)} of {len(wanted)} expected tensors, such "
                f"as {min(keys)}; load it with the configuration that was saved beside it, on the base model that it "
                "was trained on"
            )
    for key in sorted(wanted):
        if given[key].shape != state[key].shape:
            raise CheckpointError(
                f"adapter {adapter_name!r}: {key} has the shape {tuple(given[key].shape)} in the checkpoint and "
                f"{tuple(state[key].shape)} in the model; attach the adapter with the sizes that it was trained with"
            )


def _embeddings(model: nn.Module) -> set[nn.Module]:
    """Input and output embedding of a model of transformers."""
    found: set[nn.Module] = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if module is not None:
            found.add(module)
    return found


def _refuse_foreign_linears(model: nn.Module) -> None:
    """Raise UnsupportedLayerError where 'all-linear' would pass over quantised linears, for they are no nn.Linear."""
    for name, module in model.named_modules():
        leaf = not any(True for _ in module.children())
        if leaf and "linear" in type(module).__name__.lower() and quantized_base.is_foreign(module):
            _check_supported(module, name)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, KronLinear]]:
    """(module name, layer) of every CDKA or Kron-LoRA layer in a model."""
    for name, module in model.named_modules():
        if isinstance(module, KronLinear):
            yield name, module


def _in_chosen_layers(config: KronConfig, key: str) -> bool:
    """Whether layers_to_transform leaves a module in; PEFT asks only of names matched at their end."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return True
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", key)  # the first number in the name is the block's
        if match:
            return int(match[1]) in ([chosen] if isinstance(chosen, int) else chosen)
    return False


def _output_module_name(model: nn.Module) -> str:
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if getter is not None else None
    for name, module in model.named_modules():
        if output is not None and module is output:
            return name
    raise ConfigError(
        f"lm_head=True needs a model with an output embedding, and {type(model).__name__} has none; "
        "set lm_head=False, or name the layer in target_modules"
    )


def _check_supported(target: Any, name: str) -> None:
    """Raise UnsupportedLayerError (a TypeError) naming the module, unless its type and format can be adapted."""
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    reason = None
    if isinstance(target, BaseTunerLayer):
        reason = "already carries an adapter of another method; unload that one first"
    elif (quantised := quantized_base.refusal(target)) is not None:
        reason = quantised
    elif isinstance(target, nn.Embedding):
        if quantized_base.bits_of(target) is not None:
            reason = "is a quantised embedding, which is not supported; leave it out of target_modules"
        elif target.max_norm is not None:
            reason = "rescales its rows to max_norm, which an adapter cannot follow; leave it out of target_modules"
    elif not isinstance(target, nn.Linear | Conv1D):
        reason = "is neither nn.Linear, Conv1D (transformers) nor nn.Embedding; leave it out of target_modules"
    elif kind.endswith("NonDynamicallyQuantizableLinear"):
        # nn.MultiheadAttention reads this layer's weight and never calls it.
        reason = "is never called by nn.MultiheadAttention, so an adapter would do nothing; exclude it"
    if reason is not None:
        raise UnsupportedLayerError(f"{name}: {kind} {reason}")


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name that each module has in the model: as a rule one."""
    found: dict[nn.Module, list[str]] = {}
    for parent_name, parent in model.named_modules():
        for child_name, child in parent._modules.items():  # named_children leaves out a child's second name
            if child is not None:
                found.setdefault(child, []).append(f"{parent_name}.{child_name}".lstrip("."))
    return found


def _check_called(model: nn.Module, target: nn.Module, name: str, places: Sequence[str]) -> None:
    """Raise UnsupportedLayerError where the model would (also) call another module than the adapted one.

    That is so for one module under several names, of which PEFT replaces one, and for the table of an encoder-decoder
    model, whose weight encoder and decoder have in embeddings of their own.
    """
    others = [place for place in places if place != name]
    if len(places) > 1:
        raise UnsupportedLayerError(
            f"{name}: the same module is also {', '.join(others)}, where an adapter on {name} would not act; give each "
            "place a module of its own first (copy.deepcopy), or leave it out of target_modules"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and isinstance(target, nn.Embedding):
        called = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and m.weight is target.weight]
        if len(called) > 1 and target is model.get_input_embeddings():  # type: ignore[operator]
            called.remove(name)
            raise UnsupportedLayerError(
                f"{name}: the model does not call this table but {', '.join(called)}, which share its weight; name "
                "those in target_modules"
            )
