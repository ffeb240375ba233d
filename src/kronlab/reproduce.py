"""From a table config to a table: measure what is missing of it, then write it from the records.

Most tables are made of cells: plan them, run those that are missing. The config's `kind` names another way (`MAKERS`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kronlab.cell import SCALES, Cell, compose_config, make_cell
from kronlab.data import available
from kronlab.errors import ConfigError, KronlabError
from kronlab.experiment import run_cell
from kronlab.methods import label
from kronlab.report.tables import RowResult, Table, build
from kronlab.runs import Store

log = logging.getLogger(__name__)
_PAPER_GPU_BYTES = 40 * 10**9


@dataclass(frozen=True)
class PlannedRow:
    """A row of a table with one cell for each seed."""

    key: str
    label: str
    cells: Sequence[Cell]
    published: Mapping[str, Any] | None


def choose_scale(asked: str | None, *, among: Collection[str] = SCALES) -> str:
    """The asked scale; without one, `paper` (if it is `among` a table's) on a GPU of at least 40 GB, else `mini`."""
    if asked:
        if asked not in SCALES:
            raise ConfigError(f"scale={asked!r} is not known; use one of {', '.join(SCALES)}")
        return asked
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    scale = "paper" if memory >= _PAPER_GPU_BYTES and "paper" in among else "mini"
    found = f"a GPU with {memory / 1e9:.0f} GB" if memory else "no GPU"
    log.info("SCALE=%s chosen (%s found); choose yourself with SCALE=smoke|mini|small|paper", scale, found)
    return scale


def plan(
    spec: Mapping[str, Any],
    scale: str,
    *,
    overrides: Sequence[str],
    weights_needed: bool,
    every_eval: bool = False,
) -> tuple[list[PlannedRow], list[str]]:
    """All cells of a table, and notes on what was left out because its data cannot be had.

    Args:
        weights_needed: as in `make_cell`.
        every_eval: leave nothing out, whether its data can be had or not.
    """
    if scale not in spec["scales"]:
        raise ConfigError(f"{spec['name']} has no scale {scale!r}; it has {', '.join(spec['scales'])}")
    layout = spec["scales"][scale]
    notes, dropped = [], []
    for name in layout.get("optional_evals", []) if not every_eval else []:
        config = compose_config([f"scale={scale}", *layout["common"], *overrides])
        section = config["eval"][name]
        ok, why = available(section["source"], section["split"], config["data"]["dir"])
        if not ok:
            dropped.append(name)
            notes.append(f"{name} is left out: {why}")
            log.info("%s is left out: %s", name, why)
    rows = []
    for key in layout["rows"]:
        row = spec["rows"][key]
        cells: dict[str, Cell] = {}
        for seed in layout["seeds"]:
            chosen = [f"scale={scale}", *layout["common"], *row["overrides"], f"seed={seed}"]
            chosen += [
                *layout.get("row_overrides", {}).get(key, []),
                *overrides,
                *[f"~eval.{name}" for name in dropped],
            ]
            cell = make_cell(compose_config(chosen), weights_needed=weights_needed)
            cells[cell.id] = cell  # the base model is one cell for all seeds
        first = next(iter(cells.values()))
        rows.append(PlannedRow(key, label(first.config["method"]), list(cells.values()), row.get("published")))
    return rows, notes


def _done(store: Store, rows: Sequence[PlannedRow], reuse: str) -> int:
    return sum(store.is_done(cell.scale, cell.id, reuse=reuse) for row in rows for cell in row.cells)


@dataclass(frozen=True)
class Request:
    """How a table is asked for, whatever it is made of."""

    results_dir: str
    dry_run: bool = False
    render_only: bool = False
    force: bool = False
    reuse: str = "local"
    extra: Sequence[str] = ()


def reproduce(spec: Mapping[str, Any], *, scale: str | None, **request: Any) -> Table | None:
    """Run what a table lacks and write it.

    Args:
        spec: the table's config section.
        scale: one of those that it has; None: chosen by the machine.
        request: the fields of `Request`.

    Returns:
        The table, or None after a dry run.

    Raises:
        KronlabError: the table cannot be made; after it is written, if a part of it failed.
    """
    scale = choose_scale(scale, among=spec["scales"])
    if scale not in spec["scales"]:
        raise ConfigError(f"{spec['name']} has no scale {scale!r}; it has {', '.join(spec['scales'])}")
    kind = spec.get("kind", "cells")
    if kind not in MAKERS:
        raise ConfigError(f"{spec['name']}: kind={kind!r} is not known; use one of {', '.join(MAKERS)}")
    return MAKERS[kind](spec, scale, Request(**request))


def _from_cells(spec: Mapping[str, Any], scale: str, request: Request) -> Table | None:
    """A cell that fails does not stop the others; it is told after the table is written."""
    overrides = [f"results.dir={json.dumps(str(request.results_dir))}", f"force={str(request.force).lower()}"]
    overrides += [f"results.reuse={request.reuse}", *request.extra]
    offline = request.dry_run or request.render_only
    rows, notes = plan(spec, scale, overrides=overrides, weights_needed=not offline)
    store = Store(request.results_dir)
    if request.render_only and notes:  # records that were made where the data was at hand can be tabled without it
        complete, _ = plan(spec, scale, overrides=overrides, weights_needed=False, every_eval=True)
        if _done(store, complete, "any") > _done(store, rows, "any"):
            rows, notes = complete, []
    cells = [cell for row in rows for cell in row.cells]
    done = _done(store, rows, request.reuse)
    log.info("%s at scale %s: %d cells, %d done", spec["name"], scale, len(cells), done)
    if request.dry_run:
        for cell in cells:
            state = "done   " if store.is_done(cell.scale, cell.id, reuse=request.reuse) else "missing"
            log.info("  %s %s  %s", state, cell.id, cell.name)
        return None
    failed = []
    for number, cell in enumerate(cells if not request.render_only else [], start=1):
        log.info("[%d/%d]", number, len(cells))
        try:
            run_cell(cell)
        except Exception as error:  # whatever it is, run_cell has kept it in the record, and the other cells can go on
            reason = " ".join(str(error).split()) or type(error).__name__
            failed.append(f"{cell.name}: {reason}")
            log.error("failed, going on with the next: %s", reason)
    finished = [RowResult(r.key, r.label, [store.read(c.scale, c.id) for c in r.cells], r.published) for r in rows]
    table = build(spec, scale, finished, extra_notes=notes)
    for path in table.write(Path(request.results_dir) / "tables" / scale):
        log.info("wrote %s", path)
    log.info("\n%s", table.markdown())
    if failed:
        raise KronlabError("\n".join(failed))
    return table


def _from_bench(spec: Mapping[str, Any], scale: str, request: Request) -> Table | None:
    from kronlab.bench.run import run_bench  # slow to import, and few tables need it

    if request.extra:
        raise ConfigError(f"extra={list(request.extra)}: {spec['name']} is made of no cells; use scripts/bench.py")
    return run_bench(
        spec,
        scale,
        name=spec["name"],
        results=request.results_dir,
        dry_run=request.dry_run,
        render_only=request.render_only,
        force=request.force,
        reuse=request.reuse,
    )


def _from_alignment(spec: Mapping[str, Any], scale: str, request: Request) -> Table | None:
    from kronlab.align import run_align

    return run_align(
        spec,
        scale,
        name=spec["name"],
        results=request.results_dir,
        dry_run=request.dry_run,
        render_only=request.render_only,
        force=request.force,
        reuse=request.reuse,
        extra=request.extra,
    )


# What a table can be made of: the `kind` of its config.
MAKERS: dict[str, Callable[[Mapping[str, Any], str, Request], Table | None]] = {
    "cells": _from_cells,
    "bench": _from_bench,
    "align": _from_alignment,
}
