"""Adapter checkpoints as files: read and written tensor by tensor, with no base model.

A kronlab checkpoint is PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors`` with the keys
``base_model.model.<module>.<prefix><factor>``. Two foreign layouts are read as well: PEFT's LoRA, and the one of CDKA's
authors (``lora_A.weight`` (r1·r, d_in/r2), ``lora_B.weight`` (d_out/r1, r2·r), component i in rows and columns [i::r]).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from kronlab.adapters.base import KronConfig
from kronlab.adapters.cdka import CdkaComponents, CdkaConfig
from kronlab.adapters.kron_lora import KronLoraComponents, KronLoraConfig
from kronlab.adapters.nearest import LowRank
from kronlab.adapters.peft_hook import PeftConfig, read_also
from kronlab.adapters.quantize import PACKED_FILE, QuantisedAdapter
from kronlab.errors import CheckpointError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
AUTHORS_FILE = "cdka.json"  # beside tensors in the authors' layout, which do not say what r is
PEFT_ROOT = "base_model.model."
# A tensor of one of our adapters: module, method, factor.
FACTOR = re.compile(r"^(?P<module>.+)\.(?P<method>cdka|kron_lora)_(?P<factor>A_start|B_start|A|B1|B2|B)$")
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?$")
# What these names end in is an embedding, whose LoRA tensors have other names; without the model nothing else says so.
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "shared", "word_embeddings", "position_embeddings", "embed_in")


@dataclass(frozen=True)
class Layer:
    """One adapted module of a checkpoint.

    Attributes:
        components: sizes, as the tuner would have derived them.
        factors: tensors by factor name, ``A_start`` and ``B_start`` among them where the adapter has an offset.
        scale: λ.
    """

    components: Any
    factors: dict[str, Tensor]
    scale: float


@dataclass(frozen=True)
class KronCheckpoint:
    """A CDKA or Kron-LoRA checkpoint: config, layers by module name, and the tensors of modules trained in full."""

    config: KronConfig
    layers: dict[str, Layer]
    others: dict[str, Tensor]


@dataclass(frozen=True)
class LoraCheckpoint:
    """A PEFT LoRA checkpoint: ΔW of each module (the scale is in `up`), and the tensors of modules trained in full."""

    config: LoraConfig
    updates: dict[str, LowRank]
    others: dict[str, Tensor]
    embeddings: frozenset[str]


def write_checkpoint(config: Any, tensors: dict[str, Tensor], directory: str | Path) -> None:
    """Write a PEFT checkpoint; a file of the same name is replaced only when the new one is whole."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(target))
    save_tensors(tensors, target / WEIGHTS_FILE)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file and rename it into its place."""
    scratch = path.with_name(f".{path.name}.part")
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, scratch, metadata={"format": "pt"})
    scratch.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: it is not there, or no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; give a folder that save_pretrained wrote, with {WEIGHTS_FILE}")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own class, and OSError
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); write it again") from error


def read_adapter(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, PEFT's own or packed (:func:`~.quantize.save_packed`), then in float32.

    Raises:
        CheckpointError: there is neither, or it cannot be read.
    """
    folder = Path(directory)
    if is_packed(folder):
        return QuantisedAdapter.load(folder / PACKED_FILE).state_dict()
    return read_tensors(folder / WEIGHTS_FILE)


def is_packed(directory: str | Path) -> bool:
    """Whether a folder has a packed adapter, and none of PEFT's own form, which would go first."""
    folder = Path(directory)
    return (folder / PACKED_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file()


read_also(is_packed, read_adapter)


def method_of(directory: str | Path) -> str:
    """ "cdka", "kron_lora", "lora" or whatever else ``adapter_config.json`` calls its peft_type, in lower case.

    Raises:
        CheckpointError: there is no readable config.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; give a folder that save_pretrained wrote")
    try:
        return str(json.loads(path.read_text())["peft_type"]).lower()
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} names no peft_type ({error!r}); give a folder that save_pretrained wrote"
        ) from error


def read_kron(directory: str | Path) -> KronCheckpoint:
    """Read a CDKA or Kron-LoRA checkpoint; sizes come from the tensors, λ from the config.

    Raises:
        CheckpointError: files or factors are missing, or the sizes do not belong together.
    """
    method = method_of(directory)
    if method not in _COMPONENTS:
        raise CheckpointError(f"{directory} holds a {method} adapter; give one of {', '.join(_COMPONENTS)}")
    config: Any = PeftConfig.from_pretrained(str(directory))
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others = {}
    for key, value in read_adapter(directory).items():
        found = FACTOR.match(key)
        if found:
            factors[found["module"].removeprefix(PEFT_ROOT)][found["factor"]] = value
        else:
            others[key] = value
    if not factors:
        raise CheckpointError(f"{directory} holds no factor of a {method} adapter")
    layers = {}
    for name, tensors in factors.items():
        try:
            components = _COMPONENTS[method](config, name, tensors)
        except (KeyError, ValueError) as error:
            shapes = ", ".join(f"{factor} {tuple(value.shape)}" for factor, value in tensors.items())
            raise CheckpointError(f"{directory}: {name} has {shapes}, no factors of {method} ({error})") from error
        layers[name] = Layer(components, tensors, config.scale_for(name, components))
    return KronCheckpoint(config, layers, others)


def _cdka_components(config: CdkaConfig, name: str, factors: dict[str, Tensor]) -> CdkaComponents:
    return cdka_components(factors["A"], factors["B"], config.value_for("r", name))


def cdka_components(a: Tensor, b: Tensor, r: int) -> CdkaComponents:
    """Sizes of stacked factors A (r1·r, d_in/r2) and B (d_out/r1, r2·r).

    Raises:
        ValueError: r does not divide what it should.
    """
    if a.shape[0] % r or b.shape[1] % r:
        raise ValueError(f"r={r} does not divide {a.shape[0]} rows of A and {b.shape[1]} columns of B")
    r1, r2 = a.shape[0] // r, b.shape[1] // r
    return CdkaComponents(r2 * a.shape[1], r1 * b.shape[0], r1, r2, r)


def _kron_lora_components(config: KronLoraConfig, name: str, factors: dict[str, Tensor]) -> KronLoraComponents:
    (d_a2, d_a1), (d_b2, r), (r_again, d_b1) = (factors[key].shape for key in ("A", "B1", "B2"))
    if r != r_again:
        raise ValueError(f"B1 has {r} columns and B2 {r_again} rows")
    return KronLoraComponents(d_a1 * d_b1, d_a2 * d_b2, d_a1, d_a2, r)


_COMPONENTS: dict[str, Any] = {"cdka": _cdka_components, "kron_lora": _kron_lora_components}


def check_no_embedding(names: Any, instead: str) -> None:
    """Raise where a module seems to be an embedding: PEFT names its LoRA tensors otherwise than a linear layer's.

    Raises:
        CheckpointError: see above; says what to do `instead`.
    """
    found = [name for name in names if name.rpartition(".")[2] in _EMBEDDINGS]
    if found:
        raise CheckpointError(f"{found[0]} seems to be an embedding, which files alone do not tell; {instead}")


# ------------------------------------------------------------------------------------------------- PEFT's LoRA


def read_lora(directory: str | Path) -> LoraCheckpoint:
    """Read a PEFT LoRA checkpoint (also rsLoRA) as the ΔW of each module.

    Raises:
        CheckpointError: files are missing, or the adapter is more than W + ΔW with ΔW = s·B·A (DoRA, biases).
    """
    method = method_of(directory)
    if method != "lora":
        raise CheckpointError(f"{directory} holds a {method} adapter and no LoRA")
    config = LoraConfig.from_pretrained(str(directory))
    check_plain(config, str(directory))
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others, embeddings = {}, set()
    for key, value in read_adapter(directory).items():
        found = _LORA.match(key)
        if found is None:
            others[key] = value
            continue
        name = found["module"].removeprefix(PEFT_ROOT)
        pairs[name][found["factor"]] = value
        if found["embedding"]:
            embeddings.add(name)
    strange = [key for key in others if ".lora_" in key]
    broken = [name for name, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if strange or broken or not pairs:
        reason = strange[0] if strange else f"one factor of {broken[0]}" if broken else "no LoRA factors"
        raise CheckpointError(f"{directory}: {WEIGHTS_FILE} holds {reason}, which is no plain LoRA")
    updates = {
        name: LowRank(pair["A"], lora_scale(config, name, pair["A"]) * pair["B"]) for name, pair in pairs.items()
    }
    return LoraCheckpoint(config, updates, others, frozenset(embeddings))


def check_plain(config: Any, where: str) -> None:
    """Raise unless a LoraConfig means W + s·B·A and nothing else.

    Raises:
        CheckpointError: names the setting.
    """
    for setting, plain in (("use_dora", False), ("bias", "none"), ("lora_bias", False), ("use_qalora", False)):
        if getattr(config, setting, plain) != plain:
            raise CheckpointError(
                f"{where}: {setting}={getattr(config, setting)!r} makes it more than a low-rank update; merge it and "
                "give the difference of the weights instead"
            )


def lora_scale(config: LoraConfig, name: str, down: Tensor) -> float:
    """PEFT's scale of one module: α/r, or α/√r for rsLoRA, patterns applied."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
    rank = down.shape[0]
    return alpha / (rank**0.5 if config.use_rslora else rank)


# --------------------------------------------------------------------------------------- CDKA's authors' layout


def read_authors(directory: str | Path, *, r: int | None = None, alpha: float | None = None) -> KronCheckpoint:
    """Read a checkpoint of CDKA's authors: their tensors are ours under other names.

    The tensors alone do not say what r is; it comes from the argument, else from ``cdka.json`` (:func:`write_authors`),
    else from the ``r`` of ``adapter_config.json``. So does α, as ``alpha`` and ``lora_alpha``, or the authors' 64. r1
    and r2 follow from the shapes.

    Raises:
        CheckpointError: files are missing, nobody says what r is, or it does not divide.
    """
    folder = Path(directory)
    said: dict[str, Any] = {}
    for name in (CONFIG_FILE, AUTHORS_FILE):  # the second wins
        if (folder / name).is_file():
            said |= json.loads((folder / name).read_text())
    r = r if r is not None else said.get("r")
    if r is None:
        raise CheckpointError(f"{directory}: nothing there says what r is; give it as components.r=...")
    alpha = alpha if alpha is not None else said.get("alpha", said.get("lora_alpha", 64))
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others = {}
    for key, value in read_tensors(folder / WEIGHTS_FILE).items():
        found = _LORA.match(key)
        if found and not found["embedding"]:
            pairs[found["module"].removeprefix(PEFT_ROOT)][found["factor"]] = value
        else:
            others[key] = value
    layers = {}
    sizes = set()
    for name, pair in pairs.items():
        try:
            components = cdka_components(pair["A"], pair["B"], r)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{directory}: {name} is not of the authors' layout ({error})") from error
        layers[name] = Layer(components, pair, 0.0)
        sizes.add((components.r1, components.r2))
    if len(sizes) != 1:
        found_sizes = ", ".join(map(str, sorted(sizes))) or "no factors"
        raise CheckpointError(f"{directory}: one (r1, r2) for all modules is expected, found {found_sizes} with r={r}")
    ((r1, r2),) = sizes
    config = CdkaConfig(
        r1=r1,
        r2=r2,
        r=r,
        alpha=alpha,
        target_modules=sorted(layers),
        task_type=said.get("task_type"),
        base_model_name_or_path=said.get("base_model_name_or_path"),
        modules_to_save=said.get("modules_to_save"),
        inference_mode=True,
    )
    layers = {
        name: Layer(layer.components, layer.factors, config.scale_for(name, layer.components))
        for name, layer in layers.items()
    }
    return KronCheckpoint(config, layers, others)


def write_authors(checkpoint: KronCheckpoint, directory: str | Path) -> None:
    """Write a CDKA checkpoint in its authors' layout, with ``cdka.json`` saying (r1, r2, r), α and the modules.

    No ``adapter_config.json`` is written: PEFT would take the tensors for a LoRA, which they are not.

    Raises:
        CheckpointError: another method, another λ than α/√(r·r2), sizes that differ by module, or an offset.
    """
    config: Any = checkpoint.config
    if not isinstance(config, CdkaConfig):
        raise CheckpointError(f"the authors' layout holds CDKA adapters, not {config.method}; convert it to cdka first")
    if config.scaling != "cdka":
        raise CheckpointError(f"the authors' λ is α/√(r·r2), and this adapter has scaling={config.scaling!r}")
    if any("A_start" in layer.factors for layer in checkpoint.layers.values()):
        raise CheckpointError(
            "the authors' layout has no place for the start of an svd initialisation; convert to cdka"
        )
    sizes = {(layer.components.r1, layer.components.r2, layer.components.r) for layer in checkpoint.layers.values()}
    if len(sizes) != 1 or config.alpha_pattern:
        raise CheckpointError(
            "the authors' layout holds one (r1, r2, r) and α for all modules; this adapter has several"
        )
    ((r1, r2, r),) = sizes
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(checkpoint.others)
    for name, layer in checkpoint.layers.items():
        for factor, value in layer.factors.items():
            tensors[f"{PEFT_ROOT}{name}.lora_{factor}.weight"] = value
    save_tensors(tensors, target / WEIGHTS_FILE)
    said = {"r1": r1, "r2": r2, "r": r, "alpha": config.alpha, "target_modules": sorted(checkpoint.layers)}
    kept = {key: getattr(config, key) for key in ("task_type", "base_model_name_or_path", "modules_to_save")}
    (target / AUTHORS_FILE).write_text(json.dumps(said | kept, indent=1) + "\n")


def write_kron(checkpoint: KronCheckpoint, directory: str | Path) -> None:
    """Write an ordinary kronlab checkpoint, tensors in float32; PeftModel.from_pretrained loads it with kronlab."""
    tensors = dict(checkpoint.others)
    for name, layer in checkpoint.layers.items():
        for factor, value in layer.factors.items():
            tensors[f"{PEFT_ROOT}{name}.{checkpoint.config.method}_{factor}"] = value.to(torch.float32)
    write_checkpoint(checkpoint.config, tensors, directory)
