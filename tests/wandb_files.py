"""Reads the `.wandb` files of offline runs back: LevelDB's log format, with W&B's own protocol messages in it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _CHUNK_HEADER = 32768, 7, 7
_WHOLE, _LAST = 1, 4


@dataclass
class Run:
    """What `wandb sync` would upload of one file."""

    id: str
    group: str
    job_type: str
    tags: list[str]
    project: str
    config: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]


def read_run(folder: Path) -> Run:
    """The run in a run directory of W&B's."""
    (file,) = folder.glob("run-*.wandb")
    run = None
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            told = record.run
            config = {item.key: json.loads(item.value_json) for item in told.config.update}
            run = Run(told.run_id, told.run_group, told.job_type, list(told.tags), told.project, config)
        elif kind == "history":
            assert run is not None
            run.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            assert run is not None
            run.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            assert run is not None
            run.exit_code = record.exit.exit_code
    assert run is not None, f"{file} holds no run"
    return run


def offline_runs(results: Path) -> list[Run]:
    """All offline runs below a results directory, by directory.

    W&B's process closes the files a moment after their runs; so it is ended first, as the end of a script does.
    """
    import wandb

    wandb.teardown()
    return [read_run(folder) for folder in sorted((results / "wandb").glob("offline-run-*"))]


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = _FILE_HEADER, b""
    while at + _CHUNK_HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK_HEADER:  # no chunk begins in the last bytes of a block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + _CHUNK_HEADER : at + _CHUNK_HEADER + size]
        at += _CHUNK_HEADER + size
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def _key(item: Any) -> str:
    return str(item.key or "/".join(item.nested_key))
