"""An adapter bank: any number of named adapters of one base model in one directory, a few of them in memory.

    bank = AdapterBank(model, "bank", max_loaded=8)
    bank.add("sums", "adapters/sums")                     # a PEFT folder, a packed one, or a PEFT model
    with bank.use("sums") as adapted:                     # a PeftModel with this adapter alone
        adapted.generate(**batch)
    bank.generate(batch, ["sums", None, "poems"])         # each row with an adapter of its own; None: the base

    <directory>/index.json          base and method; of each adapter its folder, files, hashes and bytes
    <directory>/<name>-<hash>/      an ordinary PEFT checkpoint, or a packed one (`adapters.quantize`)

An adapter is read when it is first asked for. At most ``max_loaded`` are in memory; another one takes the place of the
one that was not used for longest: its tensors are copied over where the two have the same configuration, which costs a
copy and no change of the model. The index is replaced in one step and names a folder by its content, so that whatever
is interrupted leaves the bank as it was.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from kronlab.adapters.base import BASE_NAME, KronConfig
from kronlab.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE, is_packed, method_of, read_adapter, write_checkpoint
from kronlab.adapters.lora_export import export_lora
from kronlab.adapters.peft_hook import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    PeftConfig,
    get_peft_model_state_dict,
    switch_frozen,
)
from kronlab.adapters.quantize import PACKED_FILE, QuantisedAdapter, quantize_adapter, save_packed
from kronlab.adapters.quantized_base import bits_of
from kronlab.errors import CheckpointError, ConfigError, KronlabError
from kronlab.runs import write_json

__all__ = ["AdapterBank", "BankEntry", "base_mark"]

INDEX = "index.json"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Fields of a PEFT config that do not say what the adapter is.
_INCIDENTAL = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
_SAMPLES = 64  # values of a tensor that tell it from another model's


@dataclass(frozen=True)
class BankEntry:
    """What the index says of one adapter.

    Attributes:
        folder: below the bank's directory.
        sha256: of each file, by name.
        bytes: of the files, together.
        parameters: of the adapter, with modules that are trained in full.
        kind: fp16, int8, int4 or nf4 where it is packed; None: tensors as they were given.
    """

    folder: str
    sha256: dict[str, str]
    bytes: int
    parameters: int
    kind: str | None = None


@dataclass
class _Slot:
    """A place for an adapter in the model.

    Attributes:
        key: the adapter's name for PEFT, which takes a part of a module's name for an adapter's if they are alike.
        structure: the config, as far as it says what the adapter is.
        tensors: the adapter's parameters under the names of a checkpoint; they share storage with the model's.
    """

    key: str
    structure: str
    tensors: dict[str, Tensor]


class AdapterBank:
    """Named adapters of one method for one base model; see the module.

    The model is changed in place (PEFT puts adapters into it) and computes as the base model outside of :meth:`use`.
    It is for inference: everything is frozen and in eval mode.

    Args:
        model: the base model, without adapters.
        directory: of the bank; made when the first adapter is added.
        max_loaded: how many adapters are in memory at most.

    Raises:
        ConfigError: max_loaded is not positive, or the model has adapters.
        CheckpointError: the directory's index cannot be read, or is of another base model.
    """

    def __init__(self, model: nn.Module, directory: str | Path, *, max_loaded: int = 8) -> None:
        if isinstance(max_loaded, bool) or not isinstance(max_loaded, int) or max_loaded < 1:
            raise ConfigError(f"AdapterBank: max_loaded={max_loaded!r} is not a positive whole number")
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ConfigError("AdapterBank: the model has adapters; give the base model, and add them to the bank")
        self.model = model.eval().requires_grad_(False)
        self.directory = Path(directory)
        self.max_loaded = max_loaded
        self.base = base_mark(model)
        self.method: str | None = None
        self._entries: dict[str, BankEntry] = {}
        self._peft: PeftModel | None = None
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # the one used last at the end
        self._layers: list[nn.Module] = []  # the adapted ones, and wrappers of modules that are trained in full
        self._in_use: list[str | None] = []
        self._made = 0
        if (self.directory / INDEX).is_file():
            self._read_index()

    # What there is.

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order in which they were added."""
        return tuple(self._entries)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Those in memory, the one used last at the end."""
        return tuple(self._slots)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the adapters in memory."""
        return sum(t.numel() * t.element_size() for slot in self._slots.values() for t in slot.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all adapters' files."""
        return sum(entry.bytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str) -> BankEntry:
        """What the index says of an adapter.

        Raises:
            ConfigError: there is none of this name.
        """
        if name not in self._entries:
            known = ", ".join(self._entries) or "none yet"
            raise ConfigError(f"{self.directory} has no adapter {name!r}; it has {known}")
        return self._entries[name]

    # Adding and removing.

    def add(
        self,
        name: str,
        source: str | Path | nn.Module,
        *,
        bits: int | None = None,
        kind: str | None = None,
        group_size: int = 64,
        adapter_name: str = "default",
        replace: bool = False,
    ) -> BankEntry:
        """Take an adapter into the bank; it is loaded once to see that it fits.

        Args:
            name: letters, digits, ``_ . -``.
            source: a folder of ``save_pretrained`` or ``save_packed``, or a PEFT model.
            bits, kind, group_size: store it packed, as :func:`kronlab.adapters.quantize_adapter` takes them; without
                them a folder is kept as it is.
            adapter_name: which adapter of a PEFT model.
            replace: an adapter of this name gives way to it.

        Raises:
            ConfigError: the name is taken or no name, the method is not the bank's, or PEFT cannot use it here.
            CheckpointError: the source cannot be read, or does not fit the base model. The bank is as it was.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"adapter name {name!r}: use letters, digits, '_', '.', '-', a letter or digit first")
        if name in self._entries and not replace:
            raise ConfigError(
                f"{self.directory} has an adapter {name!r} already; remove it first, or give replace=True"
            )
        self._check_unused(name)
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".adding-") as scratch:
            _copy_in(source, Path(scratch), bits, kind, group_size, adapter_name)
            method = method_of(scratch)
            if self._entries and self.method != method:
                raise ConfigError(
                    f"{self.directory} holds {self.method} adapters, and {name!r} is {method}; give each method a bank "
                    "of its own"
                )
            tensors, config = _read(Path(scratch), name)
            if name in self._slots:
                self._drop(name)
            self._place(name, tensors, config)
            try:
                return self._keep(name, Path(scratch), method, tensors)
            except (
                BaseException
            ):  # no room on the disk, Ctrl-C: what is in memory must not pass for what is in the index
                self._drop(name)
                raise

    def _keep(self, name: str, scratch: Path, method: str, tensors: Mapping[str, Tensor]) -> BankEntry:
        """Move a folder into the bank and its entry into the index."""
        entry = _entry(scratch, name, tensors)
        target = self.directory / entry.folder
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was interrupted
        shutil.copytree(scratch, target)
        old = self._entries.get(name)
        self.method = method
        self._write_index({**self._entries, name: entry})
        if old is not None and old.folder != entry.folder:
            shutil.rmtree(self.directory / old.folder, ignore_errors=True)
        return entry

    def _check_unused(self, name: str) -> None:
        if name in self._in_use:
            raise ConfigError(f"adapter {name!r} is in use; leave the block that uses it first")

    def remove(self, name: str) -> None:
        """Take an adapter out of the bank and delete its files.

        Raises:
            ConfigError: there is none of this name, or it is in use.
        """
        entry = self.entry(name)
        self._check_unused(name)
        if name in self._slots:
            self._drop(name)
        self._write_index({other: kept for other, kept in self._entries.items() if other != name})
        shutil.rmtree(self.directory / entry.folder, ignore_errors=True)

    # Using.

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """The model with this adapter alone, None for the base model; afterwards it is again what it was before.

        Raises:
            ConfigError: no such adapter, or more than ``max_loaded`` in use at a time.
            CheckpointError: its files cannot be read, or are not those that were added.
        """
        if name is not None:
            self.load([name])
        self._in_use.append(name)
        try:
            self._activate(name)
            yield self.model if self._peft is None else self._peft
        finally:
            self._in_use.pop()
            self._activate(self._in_use[-1] if self._in_use else None)

    def forward(self, batch: Mapping[str, Tensor], names: Sequence[str | None], **settings: Any) -> Any:
        """The model's output for a batch whose row i has the adapter names[i]; None: the base model.

        Equal to one row at a time up to rounding: a product of several rows is summed in another order.

        Raises:
            ConfigError: not one name for each row, an unknown one, more than ``max_loaded`` different ones, or a method
                of which PEFT cannot mix adapters (DoRA, VeRA, ...).
        """
        with self._mixed(batch, names) as (model, mixed):
            return model(**batch, **mixed, **settings)

    def generate(self, batch: Mapping[str, Tensor], names: Sequence[str | None], **settings: Any) -> Tensor:
        """As :meth:`forward`, for the model's ``generate``."""
        with self._mixed(batch, names) as (model, mixed):
            return model.generate(**batch, **mixed, **settings)

    @contextmanager
    def _mixed(
        self, batch: Mapping[str, Tensor], names: Sequence[str | None]
    ) -> Iterator[tuple[Any, dict[str, list[str]]]]:
        """The model, and what it has to be told for each row to get its adapter."""
        rows = len(next(iter(batch.values())))
        if len(names) != rows:
            raise ConfigError(
                f"{len(names)} names for a batch of {rows} rows; give one for each row, None for the base"
            )
        different = list(dict.fromkeys(names))
        adapters = [name for name in different if name is not None]
        if len(different) == 1:
            with self.use(different[0]) as model:
                yield model, {}
            return
        self.load(adapters)
        self._check_mixable(adapters)
        with self.use(adapters[0]) as model:
            keys = [BASE_NAME if name is None else self._slots[name].key for name in names]
            yield model, {"adapter_names": keys}

    def _check_mixable(self, adapters: Sequence[str]) -> None:
        """PEFT mixes LoRA, and through us CDKA and Kron-LoRA."""
        assert self._peft is not None
        configs: list[Any] = [self._peft.peft_config[self._slots[name].key] for name in adapters]
        whole = [sorted(config.modules_to_save or ()) for config in configs]
        if any(modules != whole[0] for modules in whole):
            raise ConfigError(
                f"adapters {', '.join(adapters)} train different modules in full (modules_to_save); ask for them one "
                "at a time"
            )
        for config in configs:
            plain_lora = isinstance(config, LoraConfig) and not config.use_dora
            if not plain_lora and not isinstance(config, KronConfig):
                kind = "dora" if isinstance(config, LoraConfig) else self.method
                raise ConfigError(f"adapters of {kind} cannot be mixed in a batch; give all rows the same adapter")

    def export_lora(self, directory: str | Path) -> dict[str, dict[str, float]]:
        """Write every adapter as an ordinary LoRA checkpoint, ``<directory>/<name>``, for stacks without kronlab.

        CDKA and Kron-LoRA as :func:`kronlab.export_lora` writes them, exactly; LoRA as it is, unpacked.

        Returns:
            By adapter and module, the relative error of ΔW; nothing for LoRA.

        Raises:
            ConfigError: adapters of another method.
        """
        if self.method not in (None, "cdka", "kron_lora", "lora"):
            raise ConfigError(f"{self.directory} holds {self.method} adapters, which are no LoRA in disguise")
        errors: dict[str, dict[str, float]] = {}
        for name in self._entries:
            target = Path(directory) / name
            if self.method == "lora":
                tensors, config = self._checked(name)
                write_checkpoint(config, tensors, target)
                errors[name] = {}
                continue
            self.load([name])
            assert self._peft is not None
            errors[name] = export_lora(self._peft, target, adapter_name=self._slots[name].key)
        return errors

    # Memory.

    def load(self, names: Sequence[str]) -> None:
        """Have these adapters in memory, at the cost of those that were not used for longest.

        Raises:
            ConfigError: no such adapter, or more than ``max_loaded`` at a time, those in use counted.
            CheckpointError: files that cannot be read, or are not those that were added.
        """
        for name in names:
            self.entry(name)
        needed = {name for name in [*names, *self._in_use] if name is not None}
        if len(needed) > self.max_loaded:
            raise ConfigError(
                f"{len(needed)} adapters at a time, and max_loaded={self.max_loaded}; raise it or split the batch"
            )
        for name in names:
            if name in self._slots:
                self._slots.move_to_end(name)
        for name in names:
            if name not in self._slots:
                self._place(name, *self._checked(name), needed=needed)

    def _checked(self, name: str) -> tuple[dict[str, Tensor], PeftConfig]:
        """Tensors and config of an adapter, from files that are those that were added."""
        entry = self.entry(name)
        folder = self.directory / entry.folder
        for file, known in entry.sha256.items():
            if not (folder / file).is_file():
                raise CheckpointError(f"adapter {name!r}: {folder / file} is missing; add the adapter again")
            if _sha256(folder / file) != known:
                raise CheckpointError(
                    f"adapter {name!r}: {folder / file} is not the file that was added (its sha256 differs); add the "
                    "adapter again with replace=True"
                )
        return _read(folder, name)

    def _place(
        self, name: str, tensors: dict[str, Tensor], config: PeftConfig, *, needed: set[str] | None = None
    ) -> None:
        """Put an adapter into memory, into the place of another one where there are enough."""
        structure = _structure(config)
        needed = needed or {used for used in self._in_use if used is not None}
        victim = None
        if len(self._slots) >= self.max_loaded:
            victim = next((other for other in self._slots if other not in needed), None)
            if victim is None:
                raise ConfigError(
                    f"max_loaded={self.max_loaded} adapters are in use; leave a block that uses one first"
                )
        if victim is not None and self._slots[victim].structure == structure:
            slot = self._slots[victim]
            _check_fits(name, tensors, slot.tensors)
            del self._slots[victim]
            victim = None
        else:
            slot = self._attach(name, config, structure, tensors)
        for key, value in tensors.items():
            slot.tensors[key].copy_(value)
        self._slots[name] = slot
        if victim is not None:
            self._drop(victim)

    def _attach(self, name: str, config: Any, structure: str, tensors: Mapping[str, Tensor]) -> _Slot:
        """A new place in the model for an adapter of this config; the model is as it was where that fails."""
        key = f"slot{self._made}"
        self._made += 1
        fresh = self._peft is None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's notes on names and on models that have had adapters before
                if self._peft is None:
                    self._peft = get_peft_model(self.model, config, adapter_name=key)  # type: ignore[arg-type]
                else:
                    self._peft.add_adapter(key, config)
            self._peft.eval().requires_grad_(False)
            places = get_peft_model_state_dict(self._peft, adapter_name=key, save_embedding_layers=False)
            _check_fits(name, tensors, places)
        except Exception as error:
            self._detach(key, whole=fresh)
            self._settle()
            if isinstance(error, KronlabError):
                raise
            reason = " ".join(str(error).split())
            raise CheckpointError(f"adapter {name!r} does not fit the base model: {reason}") from error
        self._settle()
        return _Slot(key, structure, places)

    def _detach(self, key: str, *, whole: bool) -> None:
        """Take what PEFT has put into the model out again; ``whole``: there is no other adapter."""
        if whole:
            # Not by PEFT's unload: it leaves modules that an adapter trains in full in the place of the base's, and is
            # not there yet where attaching has failed halfway.
            for module in list(self.model.modules()):
                for child_name, child in list(module.named_children()):
                    if isinstance(child, BaseTunerLayer):
                        setattr(module, child_name, child.get_base_layer())
                    elif isinstance(child, AuxiliaryTrainingWrapper):
                        setattr(module, child_name, child.original_module)
            self._peft = None
            return
        assert self._peft is not None
        if key in self._peft.peft_config:
            self._peft.delete_adapter(key)
        else:  # PEFT had not come that far
            for module in self._peft.modules():
                if isinstance(module, BaseTunerLayer):
                    module.delete_adapter(key)

    def _drop(self, name: str) -> None:
        """Take an adapter out of memory."""
        slot = self._slots.pop(name)
        self._detach(slot.key, whole=not self._slots)
        self._settle()

    def _activate(self, name: str | None) -> None:
        if self._peft is not None:
            key = self._slots[name].key if name in self._slots else None  # type: ignore[index]  # None is in none
            switch_frozen(self._peft, self._layers, key)

    def _settle(self) -> None:
        """After adapters have come or gone: know the layers, and have the one active that is in use."""
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = [] if self._peft is None else [m for m in self._peft.modules() if isinstance(m, kinds)]
        self._activate(self._in_use[-1] if self._in_use else None)

    # The index.

    def _read_index(self) -> None:
        path = self.directory / INDEX
        try:
            index = json.loads(path.read_text())
            if index["format"] != _FORMAT:
                raise ValueError(f"format {index['format']!r} and not {_FORMAT}")
            self.method, base = index["method"], index["base"]
            self._entries = {name: BankEntry(**entry) for name, entry in index["adapters"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is no index of an adapter bank ({type(error).__name__}: {error}); put the right one back, or "
                "make a new bank from the folders beside it"
            ) from error
        for part, mine in self.base.items():
            theirs = base.get(part)
            if theirs is not None and mine is not None and theirs != mine:
                raise CheckpointError(
                    f"{self.directory} is a bank for another base model ({base['class']}): its {part} is not that of "
                    f"this {self.base['class']}; open it with the model that its adapters were trained on"
                )

    def _write_index(self, entries: dict[str, BankEntry]) -> None:
        index = {
            "format": _FORMAT,
            "base": self.base,
            "method": self.method,
            "adapters": {name: vars(entry) for name, entry in entries.items()},
        }
        write_json(self.directory / INDEX, index)
        self._entries = entries


def base_mark(model: nn.Module) -> dict[str, str | None]:
    """What tells a base model from another one.

    ``class``; ``shapes``: of its layers with weights; ``embeddings and norms``, ``linear layers``: some values of each
    tensor in bfloat16, so that a model loaded in 16 or 32 bits is the same one. The linear layers of a quantised
    model cannot be compared: None.
    """
    digests = {part: hashlib.sha256() for part in ("shapes", "embeddings and norms", "linear layers")}
    quantised = False
    for name, module in sorted(model.named_modules()):
        linear = isinstance(module, nn.Linear)
        quantised |= bits_of(module) is not None
        if linear:
            digests["shapes"].update(f"{name} {module.in_features} {module.out_features}\n".encode())
        for key, value in sorted(module.named_parameters(recurse=False)):
            if bits_of(module) is not None:
                continue
            if not linear:
                digests["shapes"].update(f"{name}.{key} {tuple(value.shape)}\n".encode())
            some = value.detach().reshape(-1)[:: max(1, value.numel() // _SAMPLES)][:_SAMPLES]
            part = "linear layers" if linear else "embeddings and norms"
            digests[part].update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    found: dict[str, str | None] = {part: digest.hexdigest()[:16] for part, digest in digests.items()}
    if quantised:
        found["linear layers"] = None
    return {"class": type(model).__name__} | found


def _copy_in(
    source: str | Path | nn.Module,
    target: Path,
    bits: int | None,
    kind: str | None,
    group_size: int,
    adapter_name: str,
) -> None:
    """Write the source's config and tensors to a folder, packed where bits or kind ask for it."""
    packed = bits is not None or kind is not None
    if isinstance(source, nn.Module):
        config = getattr(source, "peft_config", {}).get(adapter_name)
        if config is None:
            raise ConfigError(f"the model has no adapter {adapter_name!r}; give adapter_name")
        tensors = get_peft_model_state_dict(source, adapter_name=adapter_name, save_embedding_layers=False)
        tensors = {key: value.detach() for key, value in tensors.items()}
    else:
        method_of(source)  # says what is wrong with a folder that has no config
        if not packed:
            files = [Path(source) / file for file in (CONFIG_FILE, WEIGHTS_FILE, PACKED_FILE)]
            for file in files:
                if file.is_file():
                    shutil.copyfile(file, target / file.name)
            return
        tensors, config = _read(Path(source), str(source))
    if packed:
        save_packed(quantize_adapter(tensors, bits, kind=kind, group_size=group_size), config, target)
    else:
        write_checkpoint(config, tensors, target)


def _read(folder: Path, name: str) -> tuple[dict[str, Tensor], PeftConfig]:
    """Tensors and config of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it cannot be attached to a model as it is.
    """
    # With an adapter on an embedding, PEFT saves the embedding's own weight too.
    tensors = {key: value for key, value in read_adapter(folder).items() if ".base_layer." not in key}
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever a broken or a later version's config makes PEFT raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"adapter {name!r}: its {CONFIG_FILE} cannot be read ({reason})") from error
    if config.is_prompt_learning:
        raise ConfigError(f"adapter {name!r} is {method_of(folder)}, which changes the prompt and no layer")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise ConfigError(
            f"adapter {name!r} starts inside the base weight (init_lora_weights={start!r}), which a bank's adapters "
            "share; save it for the original base model first (PEFT: path_initial_model_for_weight_conversion)"
        )
    config.inference_mode = True
    return tensors, config


def _entry(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> BankEntry:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    hashes = {file.name: _sha256(file) for file in files}
    content = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:12]
    return BankEntry(
        folder=f"{name}-{content}",
        sha256=hashes,
        bytes=sum(file.stat().st_size for file in files),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        kind=_kind(folder),
    )


def _kind(folder: Path) -> str | None:
    return QuantisedAdapter.load(folder / PACKED_FILE).kind if is_packed(folder) else None


def _structure(config: PeftConfig) -> str:
    """A config without what two adapters of the same kind may differ in; sets sorted."""
    said = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    return json.dumps(said, sort_keys=True, default=lambda value: sorted(map(str, value)))


def _check_fits(name: str, tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where the tensors are not those that the adapter has in this model."""
    for found, keys in (("lacks", places.keys() - tensors.keys()), ("has unknown", tensors.keys() - places.keys())):
        if keys:
            raise CheckpointError(
                f"adapter {name!r} {found} {len(keys)} of {len(places)} expected tensors, such as {min(keys)}; it is "
                "for another base model, or its config is not the one that was saved with it"
            )
    for key, place in places.items():
        if tensors[key].shape != place.shape:
            raise CheckpointError(
                f"adapter {name!r}: {key} has the shape {tuple(tensors[key].shape)}, and this base model wants "
                f"{tuple(place.shape)}; it is for a model of other sizes"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
