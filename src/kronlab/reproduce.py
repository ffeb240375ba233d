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

from kronlab.cell import SCALES, Cell
from kronlab.errors import Busy, ConfigError, KronlabError
from kronlab.estimate import describe
from kronlab.experiment import run_cell
from kronlab.layout import Find, Part, PlannedRow, Unavailable, Unrecorded, layout_of, plan
from kronlab.processes import ProcessError
from kronlab.progress import cells
from kronlab.report import sequential
from kronlab.report.tables import RowResult, Table, build
from kronlab.runs import Store
from kronlab.sweep import in_turn, one_line
from kronlab.tuning import rule

log = logging.getLogger(__name__)
_PAPER_GPU_BYTES = 40 * 10**9


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
    layout_of(spec, scale)
    kind = spec.get("kind", "cells")
    if kind not in MAKERS:
        raise ConfigError(f"{spec['name']}: kind={kind!r} is not known; use one of {', '.join(MAKERS)}")
    return MAKERS[kind](spec, scale, Request(**request))


def load_rows(spec: Mapping[str, Any], scale: str, results_dir: str | Path) -> list[RowResult]:
    """The rows of a table of cells with the records that are there, whoever made them.

    Needs neither weights nor data nor a network. Cells that were not run, and all cells of a row whose tuning is
    incomplete, are None.

    Raises:
        ConfigError: the table is not made of cells, or has no such scale.
    """
    _need_cells(spec)
    store = Store(results_dir)
    return _results(recorded_rows(spec, scale, store, [])[0], store)


def recorded_table(spec: Mapping[str, Any], scale: str, results_dir: str | Path) -> tuple[Table, list[RowResult]]:
    """A table of cells laid out from the records that are there, and its rows; runs and writes nothing.

    Raises:
        ConfigError: as `load_rows`.
    """
    _need_cells(spec)
    store = Store(results_dir)
    return _laid_out(spec, scale, *recorded_rows(spec, scale, store, []), store)


def _need_cells(spec: Mapping[str, Any]) -> None:
    kind = spec.get("kind", "cells")
    if kind not in BUILDERS:
        raise ConfigError(f"{spec['name']} is made of no cells (kind={kind}): it has no rows of records")


def _laid_out(
    spec: Mapping[str, Any], scale: str, rows: Sequence[PlannedRow], notes: Sequence[str], store: Store
) -> tuple[Table, list[RowResult]]:
    finished = _results(rows, store)
    lay_out = BUILDERS[spec.get("kind", "cells")]
    extra_notes = [*notes, *_tuning_notes(rows), *_missing_notes(rows, finished)]
    return lay_out(spec, scale, finished, extra_notes=extra_notes), finished


def recorded_rows(
    spec: Mapping[str, Any], scale: str, store: Store, overrides: Sequence[str]
) -> tuple[list[PlannedRow], list[str]]:
    """The plan that fits the records."""
    return plan(
        spec,
        scale,
        overrides=overrides,
        weights_needed=False,
        leave_out=Unrecorded(store, scale),
        find=_finder(store, "any"),
    )


def _finder(store: Store, reuse: str) -> Find:
    """The record of a cell that need not be run."""

    def find(cell: Cell) -> Mapping[str, Any] | None:
        return store.read(cell.scale, cell.id) if store.is_done(cell.scale, cell.id, reuse=reuse) else None

    return find


def _results(rows: Sequence[PlannedRow], store: Store) -> list[RowResult]:
    def records(row: PlannedRow) -> list[dict[str, Any] | None]:
        return [None if row.awaits else store.read(cell.scale, cell.id) for cell in row.cells]

    return [RowResult(row.key, row.label, records(row), row.published, row.group) for row in rows]


def _from_cells(spec: Mapping[str, Any], scale: str, request: Request) -> Table | None:
    """A cell that fails does not stop the others; it is told after the table is written.

    Where a setting is tuned, the trials of every row come first; then the table is planned anew with what they decided.
    """
    store = Store(request.results_dir)
    overrides = [f"results.dir={json.dumps(str(request.results_dir))}", f"force={str(request.force).lower()}"]
    overrides += [f"results.reuse={request.reuse}", *request.extra]
    find = _finder(store, request.reuse)
    leave_out = Unavailable()

    def planned(find: Find) -> tuple[list[PlannedRow], list[str]]:
        needed = not request.dry_run
        return plan(spec, scale, overrides=overrides, weights_needed=needed, leave_out=leave_out, find=find)

    if not (request.render_only or request.dry_run):
        store.check_writable()
    failed: list[str] = []
    if request.render_only:
        rows, notes = recorded_rows(spec, scale, store, overrides)
    else:
        again = request.force and not request.dry_run
        rows, notes = planned((lambda cell: None) if again else find)
    for note in notes:
        log.info("%s", note)
    log.info("%s at scale %s: %s", spec["name"], scale, _summary(rows, find))
    if not request.render_only:
        for line in describe([part.cell for row in rows for part in (*row.trials, *row.parts)], store):
            log.info("%s", line)
    if request.dry_run:
        _list(rows, find)
        return None
    if not request.render_only:
        trials = [part for row in rows if row.awaits for part in row.trials]
        total = len(trials) + sum(len(row.parts) for row in rows)
        failed += _run(trials, total=total)
        if trials:
            rows, notes = planned(find)
        failed += [f"{name}: {c.why_not()}" for row in rows for name, c in row.tuned() if c.value is None]
        failed += _run([p for row in rows if not row.awaits for p in row.parts], after=len(trials), total=total)
    table, finished = _laid_out(spec, scale, rows, notes, store)
    written = table.write(Path(request.results_dir) / "tables" / scale)
    if spec["scales"][scale].get("figures"):
        from kronlab.report.figures import draw  # matplotlib is slow to import

        written += draw(spec, scale, finished, Path(request.results_dir) / "figures" / scale)
    for path in written:
        log.info("wrote %s", path)
    for shown in (table, *table.more):
        log.info("\n%s", shown.markdown())
    if failed:
        raise KronlabError("\n".join(failed))
    return table


def _run(parts: Sequence[Part], *, after: int = 0, total: int) -> list[str]:
    """Run cells one after another, those that run elsewhere last; return what failed, a line each."""
    failed = []
    show = bool(parts) and parts[0].cell.config["runtime"]["progress"]
    with cells(total, done=after, show=show) as shown:

        def attempt(numbered: tuple[int, Part], wait: bool | None) -> None:
            number, part = numbered
            trial = "" if part.value is None else f", trial of {part.value:g}"
            log.info("[%d/%d]%s", number, total, trial)
            shown.update(0, note=part.cell.name)
            try:
                run_cell(part.cell, wait=wait)
            except ProcessError:
                raise
            except Exception as error:  # run_cell has kept it in the record, and the other cells can go on
                if isinstance(error, Busy) and wait is False:
                    raise
                failed.append(f"{part.cell.name}{trial}: {one_line(error)}")
                log.error("failed, going on with the next: %s", one_line(error))
            shown.update()

        in_turn(list(enumerate(parts, start=after + 1)), attempt)
    return failed


def _summary(rows: Sequence[PlannedRow], find: Find) -> str:
    """How many cells there are, and how many of them are done."""
    trials = [part for row in rows for part in row.trials]
    known = [cell for row in rows if not row.awaits for cell in row.cells]
    said = f"{sum(len(row.parts) for row in rows)} cells, {sum(find(cell) is not None for cell in known)} done"
    if trials:
        done = sum(find(part.cell) is not None for part in trials)
        said = f"{len(trials)} trials to tune with, {done} done; {said}"
    return said


def _list(rows: Sequence[PlannedRow], find: Find) -> None:
    """Every cell with its state, the trials first."""

    def tell(part: Part, more: str = "") -> None:
        state = "missing" if find(part.cell) is None else "done   "
        log.info("  %s %s  %s%s", state, part.cell.id, part.cell.name, more)

    for row in rows:
        for part in row.trials:
            tell(part, f", trial of {part.value:g}")
    for row in rows:
        if row.awaits:
            log.info("  after tuning: %s, %d cells", row.name, len(row.parts))
        else:
            for part in row.parts:
                tell(part)


def _tuning_notes(rows: Sequence[PlannedRow]) -> list[str]:
    """The rule, and for each row the choice with all scores that led to it, or why there is none."""
    rules = {arm: rule(choice.tuning) for row in rows for arm, choice in row.choices.items()}
    notes = [f"Tuned{f' ({arm})' if arm else ''}: {said}" for arm, said in rules.items()]
    for row in rows:
        for name, choice in row.tuned():
            notes.append(f"{name}: {choice.why_not() if choice.value is None else choice.told()}.")
    return notes


def _missing_notes(rows: Sequence[PlannedRow], results: Sequence[RowResult]) -> list[str]:
    """The cells without a record, where a row has several and the row's name alone does not say which."""
    lacking = []
    for row, result in zip(rows, results, strict=True):
        places = [part.place for part, record in zip(row.parts, result.records, strict=True) if record is None]
        if places and len(row.parts) > 1:
            lacking.append(f"{row.name} ({'all' if len(places) == len(row.parts) else '; '.join(places)})")
    return [f"Cells not run yet: {', '.join(lacking)}."] if lacking else []


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
    from kronlab.align_training import run_training

    asked = {key: getattr(request, key) for key in ("dry_run", "render_only", "force", "reuse", "extra")}
    table = run_align(spec, scale, name=spec["name"], results=request.results_dir, **asked)
    run_training(spec, scale, results=request.results_dir, **asked)
    return table


# How a table that is made of cells is laid out, by its `kind`.
BUILDERS: dict[str, Callable[..., Table]] = {"cells": build, "sequential": sequential.build}

# What a table can be made of: the `kind` of its config.
MAKERS: dict[str, Callable[[Mapping[str, Any], str, Request], Table | None]] = {
    **dict.fromkeys(BUILDERS, _from_cells),
    "bench": _from_bench,
    "align": _from_alignment,
}
