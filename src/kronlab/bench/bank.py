"""Many adapters of one base: an adapter bank (`kronlab.bank`) of each method, and PEFT alone with all LoRAs loaded.

Adapters have random values and are made by the same recipe for all; base weights are the model's.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from kronlab.adapters.base import BASE_NAME
from kronlab.adapters.peft_hook import get_peft_model_state_dict
from kronlab.bank import AdapterBank
from kronlab.bench.measure import Times, interleaved
from kronlab.bench.peers import Peer

ACTIONS = ("switch", "read", "one", "mixed")


class Server(Protocol):
    """What serves the tasks; every action is one call.

    Attributes:
        disk_bytes, memory_bytes: of all adapters' files, and of the adapters in memory.
    """

    disk_bytes: int
    memory_bytes: int

    def switch(self) -> None:
        """Make another one of the adapters in memory the active one."""

    def read(self) -> None:
        """Have an adapter in memory that is not there."""

    def one(self) -> Tensor:
        """Logits of the batch, one adapter for all rows."""

    def mixed(self) -> Tensor:
        """Logits of the batch, its rows with as many adapters as there are rows, the base model among them."""


def save_tasks(network: nn.Module, folder: Path, tasks: int) -> list[Path]:
    """The network's adapter with random values, saved `tasks` times; the same values for the same method."""
    assert isinstance(network, PeftModel)
    draw = torch.Generator().manual_seed(0)
    places = get_peft_model_state_dict(network, save_embedding_layers=False)
    folders = []
    for task in range(tasks):
        for value in places.values():
            value.copy_(0.02 * torch.randn(value.shape, generator=draw))
        folders.append(folder / f"task{task}")
        network.save_pretrained(str(folders[-1]))
    return folders


class ByBank:
    """A bank with room for as many adapters as a batch mixes."""

    def __init__(self, base: nn.Module, folders: list[Path], batch: dict[str, Tensor], directory: Path) -> None:
        self.batch, rows = batch, len(batch["input_ids"])
        self.bank = AdapterBank(base, directory, max_loaded=rows)
        for folder in folders:
            self.bank.add(folder.name, folder)
        self.names = list(self.bank.names)
        self.mixture = [None, *itertools.islice(itertools.cycle(self.names), rows - 1)]
        self.bank.load(self.names[:rows])
        self.disk_bytes, self.memory_bytes = self.bank.stored_bytes, self.bank.loaded_bytes
        self._next = itertools.cycle(self.names)
        self._turn = itertools.cycle(self.mixture[1:])

    def switch(self) -> None:
        with self.bank.use(next(self._turn)):
            pass

    def read(self) -> None:
        """The one not used for longest, so that it is never in memory; afterwards all is as before for `switch`."""
        name = next(name for name in self._next if name not in self.bank.loaded)
        self.bank.load([name])

    def one(self) -> Tensor:
        rows = len(self.mixture)
        return self.bank.forward(self.batch, [self.names[0]] * rows).logits

    def mixed(self) -> Tensor:
        return self.bank.forward(self.batch, self.mixture).logits


class ByPeft:
    """A PeftModel with all adapters loaded, switched by `set_adapter`, mixed by `adapter_names`."""

    def __init__(self, base: nn.Module, folders: list[Path], batch: dict[str, Tensor], directory: Path) -> None:
        self.batch, rows = batch, len(batch["input_ids"])
        self.model: Any = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=folders[0].name)  # type: ignore[arg-type]
        for folder in folders[1:]:
            self.model.load_adapter(str(folder), adapter_name=folder.name)
        self.model.eval()
        self.folders = {folder.name: folder for folder in folders}
        self.names = list(self.folders)
        self.mixture = [BASE_NAME, *itertools.islice(itertools.cycle(self.names), rows - 1)]
        self.disk_bytes = sum(file.stat().st_size for folder in folders for file in _checkpoint(folder))
        self.memory_bytes = sum(
            p.numel() * p.element_size() for name, p in self.model.named_parameters() if "lora_" in name
        )
        self._turn = itertools.cycle(self.mixture[1:])

    def switch(self) -> None:
        self.model.set_adapter(next(self._turn), inference_mode=True)

    def read(self) -> None:
        """The last one, taken out and read again."""
        self.model.delete_adapter(self.names[-1])
        self.model.load_adapter(str(self.folders[self.names[-1]]), adapter_name=self.names[-1])

    def one(self) -> Tensor:
        self.model.set_adapter(self.names[0], inference_mode=True)
        return self.model(**self.batch).logits

    def mixed(self) -> Tensor:
        return self.model(**self.batch, adapter_names=self.mixture).logits


def _checkpoint(folder: Path) -> Iterator[Path]:
    yield from (file for file in folder.iterdir() if file.name.startswith("adapter_"))


SERVERS: dict[str, Callable[..., Server]] = {"method": ByBank, "by_peft": ByPeft}


@torch.no_grad()
def serve_beside(
    peers: Mapping[str, tuple[str, Peer]],
    base: Callable[[], nn.Module],
    model: Mapping[str, Any],
    batch: dict[str, Tensor],
    settings: Mapping[str, Any],
    done: Callable[[float], object],
) -> dict[str, dict[str, Any]]:
    """Every peer's server on the same batch, all actions interleaved.

    Args:
        peers: key -> (kind in `SERVERS`, peer).
        base: a fresh base model that shares its weights with the others.
        settings: tasks (more than the batch has rows), rounds.

    Returns:
        By peer: label, disk_bytes and memory_bytes of all, trainable (parameters of one adapter), wall and cpu seconds
        by action; gap: the largest difference of a logit between the mixed batch and its rows one at a time.
    """
    share = 1 / (len(peers) * (settings["rounds"] + 1))
    with tempfile.TemporaryDirectory() as scratch:
        servers: dict[str, Server] = {}
        found: dict[str, dict[str, Any]] = {}
        for key, (kind, peer) in peers.items():
            torch.manual_seed(0)
            network = peer.attach(base(), model)
            folders = save_tasks(network, Path(scratch) / key, settings["tasks"])
            trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
            del network
            servers[key] = server = SERVERS[kind](base(), folders, batch, Path(scratch) / f"{key}-bank")
            found[key] = {"label": peer.label, "trainable": trainable, "gap": _gap(server, batch)}
            found[key] |= {"disk_bytes": server.disk_bytes, "memory_bytes": server.memory_bytes}
            for action in ACTIONS:
                getattr(server, action)()
            done(share)
        works = {f"{key}/{action}": getattr(server, action) for key, server in servers.items() for action in ACTIONS}
        times = interleaved(works, rounds=settings["rounds"], after_each=lambda _: done(share / len(ACTIONS)))
    return {key: row | _by_action(key, times) for key, row in found.items()}


def _gap(server: Any, batch: dict[str, Tensor]) -> float:
    """How far a mixed batch is from its rows one at a time, in logits."""
    mixed, whole = server.mixed(), (server.batch, server.mixture)
    gap = 0.0
    for i, name in enumerate(whole[1]):
        server.batch, server.mixture = {key: value[i : i + 1] for key, value in batch.items()}, [name]
        gap = max(gap, float((server.mixed()[0] - mixed[i]).abs().max()))
    server.batch, server.mixture = whole
    return gap


def _by_action(key: str, times: Mapping[str, Times]) -> dict[str, dict[str, list[float]]]:
    return {
        clock: {action: [float(f"{t:.6g}") for t in getattr(times[f"{key}/{action}"], clock)] for action in ACTIONS}
        for clock in ("wall", "cpu")
    }
