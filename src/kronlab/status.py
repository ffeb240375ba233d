"""Where the cells of a results directory stand, or those of a table: `make status`. Reads records and leases alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kronlab import lease, runs
from kronlab.cell import SCALES, Cell
from kronlab.errors import CheckpointError, ConfigError
from kronlab.estimate import Pace, paces_of, span
from kronlab.reproduce import recorded_rows
from kronlab.runs import Store

RUNNING, STALE, MISSING, CORRUPT = "running", "stale", "missing", "corrupt"
STATES = (RUNNING, STALE, runs.FAILED, CORRUPT, runs.DIVERGED, MISSING, runs.DONE)
"""In the order in which they are told."""


@dataclass(frozen=True)
class Entry:
    """One cell.

    Attributes:
        state: one of `STATES`. stale: its lease is held by a process that is gone; whoever runs it next takes it over.
        note: why it has failed or diverged; at what stage it is, and where.
        beat_s: seconds since the last sign of life, by this machine's clock; None: it is not running.
        seconds: that running it takes, by the records of the same model on a CPU; None: done, or not known.
    """

    id: str
    scale: str
    name: str
    state: str
    note: str = ""
    beat_s: float | None = None
    seconds: float | None = None


def gather(
    results: str | Path,
    *,
    table: Mapping[str, Any] | None = None,
    scale: str | None = None,
    reuse: str = "local",
    stale_after: float = lease.STALE_AFTER_S,
) -> list[Entry]:
    """The state of every cell that has a record or runs; with a table, of every cell that it needs at this scale.

    Args:
        reuse: which records count for a table (`Store.is_done`).
        stale_after: seconds of silence after which a process that cannot be seen from here is called stale.

    Raises:
        ConfigError: the table cannot be planned, or has no cells.
    """
    store = Store(results)
    held = _held(store, stale_after)
    if table is None:
        return [*_recorded(store, scale, held)]
    if scale is None:
        raise ConfigError("table_scale is needed with a table: smoke, mini, small or paper")
    rows, _ = recorded_rows(table, scale, store, [])
    cells: dict[str, Cell] = {}
    for row in rows:
        for part in (*row.trials, *(() if row.awaits else row.parts)):
            cells.setdefault(part.cell.id, part.cell)
    paces = paces_of(store)
    return [_of_table(cell, store, held, paces, reuse) for cell in cells.values()]


def _held(store: Store, stale_after: float) -> dict[str, tuple[str, str, float, str]]:
    """For each piece of work under a lease: state, note, seconds since the last beat, name."""
    found = {}
    for work, holder, alive, age in lease.running(store.running()):
        gone = alive is False or (alive is None and age > stale_after)
        note = f"{holder}, beat {age:.0f} s ago" + ("; that process is gone" if alive is False else "")
        found[work] = (STALE if gone else RUNNING, note, round(age, 1), holder.what or work)
    return found


def _recorded(store: Store, scale: str | None, held: Mapping[str, tuple[str, str, float, str]]) -> Iterator[Entry]:
    for each in SCALES if scale is None else [scale]:
        ids = {path.stem for path in (store.results / "runs" / each).glob("*.json")}
        leased = {work.removeprefix(f"{each}-") for work in held if work.startswith(f"{each}-")}
        for cell_id in sorted(ids | leased):
            yield _entry(store, each, cell_id, held)


def _entry(store: Store, scale: str, cell_id: str, held: Mapping[str, tuple[str, str, float, str]]) -> Entry:
    work = held.get(f"{scale}-{cell_id}")
    if work is not None:
        return Entry(cell_id, scale, work[3], work[0], work[1], beat_s=work[2])
    try:
        record = store.read(scale, cell_id)
    except CheckpointError as error:
        return Entry(cell_id, scale, "?", CORRUPT, str(error))
    if record is None:
        return Entry(cell_id, scale, "?", MISSING)
    return Entry(cell_id, scale, record["name"], record["status"], " ".join((record.get("error") or "").split()))


def _of_table(
    cell: Cell,
    store: Store,
    held: Mapping[str, tuple[str, str, float, str]],
    paces: Mapping[str, Pace],
    reuse: str,
) -> Entry:
    found = _entry(store, cell.scale, cell.id, held)
    if found.state == runs.DONE and not store.is_done(cell.scale, cell.id, reuse=reuse):
        found = Entry(cell.id, cell.scale, cell.name, MISSING, "its record came with the clone")
    seconds = None
    if found.state not in (runs.DONE, runs.DIVERGED):
        pace = paces.get(cell.config["model"]["name"])
        seconds = pace.seconds(cell.config) if pace else None
    return Entry(cell.id, cell.scale, cell.name, found.state, found.note, found.beat_s, seconds)


def left(entries: list[Entry]) -> tuple[float | None, int]:
    """(seconds that the cells take which are not done, one after another; how many of them of unknown time)."""
    todo = [e for e in entries if e.state not in (runs.DONE, runs.DIVERGED)]
    known = [e.seconds for e in todo if e.seconds is not None]
    return (sum(known) if known or not todo else None), len(todo) - len(known)


def render(entries: list[Entry], form: str, *, results: str | Path, eta: bool) -> str:
    """The states as text, cells that are done only counted, or as one JSON object.

    Raises:
        ConfigError: there is no such format.
    """
    counts = Counter(entry.state for entry in entries)
    seconds, unknown = left(entries) if eta else (None, 0)
    ordered = sorted(entries, key=lambda e: (STATES.index(e.state), e.scale, e.name, e.id))
    if form == "json":
        told = {state: counts[state] for state in STATES if counts[state]}
        cells = [asdict(entry) for entry in ordered]
        return json.dumps({"counts": told, "seconds_left": seconds, "unknown": unknown, "cells": cells}, indent=1)
    if form != "text":
        raise ConfigError(f"format={form!r}: use text or json")
    said = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "none"
    lines = [f"{results}: {len(entries)} cells: {said}"]
    if eta and (seconds or unknown):
        time = f"about {span(seconds)} left" if seconds is not None else "time left unknown"
        more = f", and {unknown} of unknown time" if seconds is not None and unknown else ""
        lines[0] += f"; {time}{more}, one after another"
    for entry in ordered:
        if entry.state != runs.DONE:
            note = f": {entry.note}" if entry.note else ""
            lines.append(f"  {entry.state:<8} {entry.id}  {entry.scale}  {entry.name}{note}")
    return "\n".join(lines)
