"""One command in several processes (`accelerate launch`, torchrun): process 0 does all, the others train with it.

Records, leases, tables, grading and every other file are the business of process 0, which runs the same code as if it
were alone (`led`). The others wait for it. Where it comes to a training it calls them (`together`), all train, and they
wait again. In one process every function here does nothing but call what it is given.

Calls, answers and failures go over a key-value store beside the process group (torch's TCPStore), so that waiting for
process 0 to grade has no time limit, and a failure is told to the others although their collectives hang.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kronlab.errors import ConfigError, KronlabError

T = TypeVar("T")

PATIENCE = datetime.timedelta(seconds=30)  # for the others to end as this process did, once it has failed
_GLANCE_S = 0.1  # between looks at the store
_UNENDING = datetime.timedelta(days=30)
_PREFIX = "kronlab"


class ProcessError(KronlabError):
    """One of the processes has failed by itself, or does not answer: none of them can go on."""


@dataclass
class _Group:
    """What this process knows of the group: its store, and how far it has read."""

    store: Any
    calls: int = 0  # calls of process 0, over all pieces of work
    agreed: int = 0
    leading: bool = False


_group: _Group | None = None


def count() -> int:
    """How many processes run this command; torchrun and accelerate tell it by the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is process 0, the one that writes and speaks."""
    return rank() == 0


def sharded() -> bool:
    """Whether parameters are split between the processes (FSDP), so that no process holds them whole.

    Raises:
        ConfigError: a form of it that this code does not know.
    """
    if count() == 1:
        return False
    if _flag("ACCELERATE_USE_DEEPSPEED"):  # nothing here could put its parameters together, or test it
        raise ConfigError("DeepSpeed: a cell cannot be trained with it yet; use configs/accelerate/fsdp.yaml")
    if not _flag("ACCELERATE_USE_FSDP"):
        return False
    for key, right, setting in (
        ("FSDP_VERSION", "2", "fsdp_version: 2"),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", "fsdp_state_dict_type: FULL_STATE_DICT"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: true"),
    ):
        if os.environ.get(key, "").lower() != right.lower():
            raise ConfigError(f"{key}={os.environ.get(key)!r}: use {setting}, as configs/accelerate/fsdp.yaml does")
    return True


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def shard_on_cpus(accelerator: Any) -> None:
    """Split parameters where `sharded` says so: accelerate does it on GPUs, and on CPUs would go on with copies."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    if not sharded() or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def led(work: Callable[[], T]) -> T | None:
    """Run `work` in process 0 and return what it returns; the other processes help until it has ended, and get None.

    Raises:
        KronlabError: `work` raised it. The other processes raise one without words: process 0 has told it.
        ProcessError: in process 0: the processes are out of step, nothing more can be run in them.
        SystemExit: in another process, when process 0 will not go on.
    """
    if count() == 1:
        return work()
    group = _joined()
    if not is_first():
        logging.getLogger("kronlab").setLevel(logging.ERROR)  # process 0 tells it
        _serve(group)
        return None
    group.leading = True
    try:
        result = work()
    except BaseException as error:
        if not isinstance(error, ProcessError):
            _call(group, "failed" if isinstance(error, KronlabError) else "gone")
        raise
    finally:
        group.leading = False
    _call(group, "done")
    return result


def check_led() -> None:
    """Raise ConfigError where several processes would all do what is process 0's."""
    if count() > 1 and not (_group is not None and _group.leading):
        raise ConfigError(
            f"started with {count()} processes, each of which would write the same files; "
            "start scripts/train.py, or call kronlab.processes.led(lambda: run_cell(cell))"
        )


def together(work: Callable[[], T], helper: Callable[[], Any]) -> T:
    """In process 0, under `led`: do `work` while every other process does `helper`; return what `work` returns.

    Args:
        work: with the same collectives as `helper`, in the same order.
        helper: is pickled: a `functools.partial` of a module's function.

    Raises:
        ProcessError: a process has failed by itself.
        Exception: what `work` raised, if all processes failed with the same words.
    """
    if count() == 1:
        return work()
    check_led()
    group = _joined()
    _call(group, pickle.dumps(helper))
    return _in_step(group, work)


def meet() -> None:
    """Within `together`: wait until every process is ready for collectives, however long that takes.

    Behind it the processes are at the same place, so that one which fails need not wait long for the others to do so.

    Raises:
        ProcessError: a process could not make itself ready.
    """
    if count() == 1 or _group is None:
        return
    group = _group
    group.store.set(f"ready/{group.calls}/{rank()}", "")
    for other in range(count()):
        while not group.store.check([f"ready/{group.calls}/{other}"]):
            if group.store.check([f"failure/{group.calls}/1"]):
                raise ProcessError("another process could not make itself ready")
            time.sleep(_GLANCE_S)


def agree(compute: Callable[[], T]) -> T:
    """Within `together`: what `compute` returns, or raises, in process 0, in every process. It is pickled."""
    if count() == 1 or _group is None:
        return compute()
    group = _group
    group.agreed += 1
    key = f"agreed/{group.agreed}"
    if not is_first():
        error, value = pickle.loads(_read(group, key))
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]
    try:
        value = compute()
    except Exception as error:
        group.store.set(key, pickle.dumps((error, None)))
        raise
    group.store.set(key, pickle.dumps((None, value)))
    return value


def mean(value: float) -> float:
    """The mean of a number over the processes, the same in all of them; a collective."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / count()


def any_of(flag: bool) -> bool:
    """Whether the flag is up in any process, e.g. that of a signal; a collective."""
    return mean(float(flag)) > 0


def barrier() -> None:
    """Wait until every process has come here; a collective."""
    mean(0.0)


def own_random_numbers(seed: int) -> None:
    """Give each process but the first a random stream of its own, or all would drop out the same units."""
    if not is_first():
        torch.manual_seed(seed * 1_000_003 + rank())


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a tensor, put together where it is split between the processes; then a collective."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().to("cpu", copy=True).contiguous()


def whole_trained(network: nn.Module) -> dict[str, Tensor]:
    """`whole` of every trainable parameter, by name."""
    return {name: whole(p) for name, p in network.named_parameters() if p.requires_grad}


def _joined() -> _Group:
    """Join the process group, once."""
    global _group
    if _group is None:
        if not dist.is_initialized():
            # numbers and objects go over gloo, gradients of GPUs over nccl
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_UNENDING)
        _group = _Group(dist.PrefixStore(_PREFIX, store))
    return _group


def _read(group: _Group, key: str, limit: datetime.timedelta = _UNENDING) -> bytes:
    """The value of a key, as soon as it is there.

    Raises:
        torch.distributed.DistError: it was not there in time, or the store is gone.
    """
    group.store.wait([key], limit)
    return bytes(group.store.get(key))


def _call(group: _Group, what: bytes | str) -> None:
    group.calls += 1
    group.store.set(f"call/{group.calls}", what)


def _serve(group: _Group) -> None:
    """Do what process 0 calls for, until it has ended its work."""
    while True:
        group.calls += 1
        try:
            call = _read(group, f"call/{group.calls}")
        except dist.DistError:  # process 0 has gone, and the store with it
            raise SystemExit(2) from None
        if call == b"done":
            return
        if call == b"failed":
            raise KronlabError
        if call == b"gone":
            raise SystemExit(2)
        try:
            _in_step(group, pickle.loads(call))
        except ProcessError as error:
            _leave(group, error)
        except Exception:
            pass  # process 0 has raised the same


def _in_step(group: _Group, work: Callable[[], T]) -> T:
    """Do `work`, and see that it ended alike in all processes.

    Raises:
        ProcessError: it did not: told is what failed first.
        Exception: what `work` raised.
    """
    error: Exception | None = None
    mine, told = "", ""
    try:
        value = work()
    except Exception as caught:
        error = caught
        mine = f"{type(error).__name__}: {error}"
        told = str(error) if isinstance(error, KronlabError) else "".join(traceback.format_exception(error))
        if not is_first():
            error.__traceback__ = None  # its frames hold the network, and with it the connections
    if mine:
        order = group.store.add(f"failures/{group.calls}", 1)
        group.store.set(f"failure/{group.calls}/{order}", pickle.dumps((rank(), told)))
    group.store.set(f"end/{group.calls}/{rank()}", mine)
    try:
        ends = [_read(group, f"end/{group.calls}/{r}", PATIENCE if mine else _UNENDING) for r in range(count())]
        alike = all(end.decode() == mine for end in ends)
    except dist.DistError:
        alike = False
    if alike and error is None:
        return value
    if alike:
        assert error is not None
        raise error
    # What comes first is the cause; that others lost a connection follows from it.
    who, reason = pickle.loads(_read(group, f"failure/{group.calls}/1", PATIENCE))
    raise ProcessError(f"process {who} of {count()} failed: {reason}")


def _leave(group: _Group, error: ProcessError) -> None:
    """End a process that is not process 0, and make the others' collectives fail; process 0 tells the message."""
    gc.collect()
    dist.destroy_process_group()
    try:
        _read(group, f"end/{group.calls}/0", PATIENCE)
    except dist.DistError:  # it hangs, and the launcher will end it
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
