"""From a results directory to its dashboard: every table that has a record, at every scale, on one page.

Reads records, runs nothing. What is not there is listed as such, with the command that makes it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kronlab import align
from kronlab.bench.run import read_record as read_bench
from kronlab.cell import CONFIG_DIR, SCALES, compose_config
from kronlab.errors import CheckpointError, ConfigError
from kronlab.report.alignment import alignment_table, kinds_table
from kronlab.report.alignment_training import training_table
from kronlab.report.cost import cost_table, generation_table, layer_table, trainer_table
from kronlab.report.dashboard import Section, html, page_data
from kronlab.report.dashboard.charts import charts_of
from kronlab.report.dashboard.measured import alignment_chart, cost_chart, training_chart
from kronlab.report.figures.points import Source, row_key
from kronlab.report.paired import baseline_of
from kronlab.report.tables import RowResult, Table
from kronlab.reproduce import BUILDERS, recorded_table
from kronlab.runs import Store

log = logging.getLogger(__name__)
Spec = Mapping[str, Any]


def write_dashboard(
    results: str | Path, out: str | Path | None = None, *, tables: Collection[str] | None = None
) -> Path:
    """Write the page and return its path; the same records give the same bytes.

    Args:
        results: the results directory; it may be empty, or absent.
        out: where the page goes; None: `dashboard.html` in the results directory.
        tables: names of those that are wanted; None: all.

    Raises:
        KronlabError: a record cannot be read; a table's config is at fault; the plotting library is not installed.
    """
    results = Path(results)
    path = Path(out) if out is not None else results / "dashboard.html"
    if path.is_dir():
        raise ConfigError(f"out={path} is a directory; name a file, for example {path / 'dashboard.html'}")
    text = html(collect(results, tables), results=_link(results, path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    return scratch.replace(path)


def collect(results: Path, tables: Collection[str] | None = None) -> dict[str, Any]:
    """The data of the page; `tables` as `write_dashboard` takes it.

    Raises:
        ConfigError: there is no table of a name.
    """
    sections: list[Section] = []
    absent: list[dict[str, str]] = []
    for spec in table_specs(tables):
        for scale in (scale for scale in SCALES if scale in spec["scales"]):
            found = list(_sections(spec, scale, results))
            sections += found
            if not found and scale != "smoke":
                absent.append(
                    {"name": spec["name"], "title": spec["title"], "scale": scale, "command": _command(spec, scale)}
                )
        log.info("%s: %s", spec["name"], _scales(sections, spec["name"]) or "nothing recorded yet")
    store = Store(results)
    records = [record for scale in SCALES for record in store.records(scale)]
    return page_data(sections, absent, records, _claims(results / "claims.json"))


def table_specs(wanted: Collection[str] | None = None) -> list[Spec]:
    """The config of every table, or of the `wanted` ones, in the order of their numbers.

    Raises:
        ConfigError: there is no table of a name.
    """
    names = sorted((path.stem for path in (CONFIG_DIR / "table").glob("table*.yaml")), key=lambda name: int(name[5:]))
    if unknown := sorted(set(wanted or ()) - set(names)):
        raise ConfigError(f"tables: there is no {unknown[0]}; use some of {', '.join(names)}")
    specs: list[Spec] = []
    for name in names if wanted is None else [name for name in names if name in wanted]:
        spec = OmegaConf.to_container(compose_config([f"table={name}"], name="tables").table, resolve=True)
        assert isinstance(spec, dict)
        specs.append({str(key): value for key, value in spec.items()})
    return specs


def _link(results: Path, from_folder: Path) -> str:
    """The results directory as a relative link; an absolute one where there is none (another drive)."""
    try:
        return Path(os.path.relpath(results.resolve(), from_folder.resolve())).as_posix()
    except ValueError:
        return results.resolve().as_uri()


def _scales(sections: list[Section], number: str) -> str:
    return ", ".join(dict.fromkeys(section.table.scale for section in sections if section.number == number))


def _command(spec: Spec, scale: str) -> str:
    return f"make reproduce-{spec['name']} SCALE={scale}"


def _about(spec: Spec, scale: str) -> str:
    return " ".join(str(spec["scales"][scale]["about"]).split())


def _claims(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        if found["schema"] != 1 or not isinstance(found["claims"], list):
            raise ValueError(f"its schema is {found['schema']!r}, 1 is wanted")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold the claims ({error}); make claims writes it anew") from error
    return found


# ------------------------------------------------------------------------------------------------------- sections


def _sections(spec: Spec, scale: str, results: Path) -> Iterator[Section]:
    """What there is of a table at a scale; nothing where nothing has been recorded."""
    kind = spec.get("kind", "cells")
    if kind in BUILDERS:
        if any((results / "runs" / scale).glob("*.json")):  # planning takes seconds
            yield from _of_cells(spec, scale, results)
    elif kind == "bench":
        yield from _of_benches(spec, scale, results)
    elif kind == "align":
        yield from _of_alignments(spec, scale, results)


def _of_cells(spec: Spec, scale: str, results: Path) -> Iterator[Section]:
    table, rows = recorded_table(spec, scale, results)
    if not any(record is not None for row in rows for record in row.records):
        return
    source = Source(spec, scale, rows, results)
    baselines = {row.key: baseline_of(row, rows, spec["baseline"]) for row in rows}
    for part in (table, *table.more):
        behind = {key: _behind(key, rows) for key in part.keys}
        yield Section(
            part,
            number=spec["name"],
            about=_about(spec, scale),
            command=_command(spec, scale),
            rows=behind,
            baselines={
                key: _same_place(key, row, reference)
                for key, row in behind.items()
                if (reference := baselines[row.key])
            },
            methods={key: source.method(row) for key, row in behind.items()},
            charts=charts_of(source) if part is table else (),
        )


def _behind(key: str, rows: list[RowResult]) -> RowResult:
    """The row that a line of the table is of; in a table of pairs of tasks several lines are of one row."""
    return next((row for row in rows if row.key == key), None) or next(
        row for row in rows if row_key(row) == key.rpartition("/")[2]
    )


def _same_place(key: str, row: RowResult, reference: RowResult) -> str:
    """The baseline's line that belongs to a line: of the same group, or of the same pair of tasks."""
    return key.removesuffix(row.key) + reference.key


def _of_benches(spec: Spec, scale: str, results: Path) -> Iterator[Section]:
    for path in sorted((results / "bench" / scale).glob("*.json"), key=lambda path: (path.stem != spec["name"], path)):
        record = read_bench(results, scale, path.stem)
        assert record is not None
        made = [make(spec, scale, record) for make in (cost_table, layer_table, trainer_table, generation_table)]
        for number, table in enumerate(table for table in made if table is not None):
            charts = [cost_chart(spec, record)] if number == 0 and path.stem == spec["name"] else []
            yield _measured(spec, scale, table, path.relative_to(results), record, [c for c in charts if c])


def _of_alignments(spec: Spec, scale: str, results: Path) -> Iterator[Section]:
    record = align.read_record(results, scale, spec["name"])
    if record is not None:
        path = align.record_path("", scale, spec["name"])
        yield _measured(spec, scale, alignment_table(spec, scale, record), path, record, [alignment_chart(record)])
        yield _measured(spec, scale, kinds_table(scale, record), path, record, [])
    name = f"{spec['name']}-training"
    record = align.read_record(results, scale, name)
    if record is not None:
        table, path = training_table(spec, scale, record), align.record_path("", scale, name)
        yield _measured(spec, scale, table, path, record, [training_chart(record)])


def _measured(
    spec: Spec, scale: str, table: Table, path: Path, record: Mapping[str, Any], charts: list[Any]
) -> Section:
    return Section(
        table,
        number=spec["name"],
        about=_about(spec, scale),
        command=_command(spec, scale),
        charts=charts,
        measured=path.as_posix(),
        recorded=record,
    )
