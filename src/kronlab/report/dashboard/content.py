"""From tables and records to the plain data of the page. No number is computed here: tables and figures have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kronlab.cell import SCALES
from kronlab.report.claim_tests import Effect
from kronlab.report.dashboard.charts import Chart, as_data
from kronlab.report.sequential import trained_on
from kronlab.report.tables import Column, RowResult, Table
from kronlab.runs import DONE

SCHEMA: Final = 1
_DIGITS: Final = 8  # of a number of a record; tables carry their own text

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A table of the page, and what its numbers come from.

    Attributes:
        number: of the table whose part this is, e.g. table9.
        about: the setting, a sentence.
        command: makes the table again.
        rows: the records behind each row, and its published numbers, by the row's key in the table; none in a table
            that is made of one measurement.
        baselines: key of a row -> key of the row that its paired differences are taken against.
        methods: key of a row -> the method that its config names, for rows that have no record yet.
        measured: path of that measurement, relative to the results directory; empty for a table of cells.
        recorded: the measurement itself.
    """

    table: Table
    number: str
    about: str
    command: str
    rows: Mapping[str, RowResult] = field(default_factory=dict)
    baselines: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[Chart] = ()
    measured: str = ""
    recorded: Record = field(default_factory=dict)


def page_data(
    sections: Sequence[Section], absent: Sequence[Mapping[str, str]], records: Sequence[Record], claims: Any
) -> dict[str, Any]:
    """All that the page shows, as JSON has it.

    Args:
        absent: table, title, scale and command of each table that has no record at a scale.
        records: every record of the store.
        claims: what results/claims.json holds, or None.
    """
    places = {(record["scale"], record["id"]): place for place, record in enumerate(records)}
    shown = [_section(section, places) for section in sections]
    return {
        "schema": SCHEMA,
        "scales": [scale for scale in SCALES if any(scale == at for at, _ in places)],
        "records": [_record(record) for record in records],
        "tables": shown,
        "absent": list(absent),
        "claims": None if claims is None else {"counts": claims["counts"], "claims": _claims(claims["claims"])},
    }


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The claims with the effect of each test in words, as results/claims.md has it."""
    return [{**claim, "evidence": [{**_told(line), "test": None} for line in claim["evidence"]]} for claim in claims]


def _told(line: Mapping[str, Any]) -> dict[str, Any]:
    if line["effect"] is None:
        return {**line, "text": "", "repeated": ""}
    effect = Effect(
        line["effect"], line["low"], line["high"], line["unit"], line["count"], line["counted"], line["interval_over"]
    )
    return {**line, "text": effect.text, "repeated": effect.repeated}


def method_of(record: Record) -> str:
    """Name of the method config; `none` for a base model."""
    return str(record["config"].get("method", {}).get("name", "none"))


def task_of(record: Record) -> str:
    """The task, or the tasks in their order; empty for a base model."""
    return " → ".join(trained_on(record))


def model_of(record: Record) -> str:
    return str(record["config"].get("model", {}).get("name", ""))


def _record(record: Record) -> dict[str, Any]:
    train, git = record.get("train") or {}, record.get("git") or {}
    metrics = {
        f"{name} · {metric}": [_short(found["value"]), _short(found["stderr"]), found["n"]]
        for name, section in record.get("eval", {}).items()
        for metric, found in section["metrics"].items()
    }
    return {
        "id": record["id"],
        "scale": record["scale"],
        "label": record["label"],
        "status": record["status"],
        "error": record.get("error"),
        "method": method_of(record),
        "model": model_of(record),
        "task": task_of(record),
        "seed": record["config"].get("seed"),
        "command": record.get("command"),
        "finished": record.get("finished") or record.get("started"),
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "trainable": record.get("parameters", {}).get("trainable"),
        "seconds": _short(train.get("seconds")),
        "peak": train.get("peak_memory_bytes"),
        "metrics": metrics,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _section(section: Section, places: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    table = section.table
    return {
        "id": f"{table.name}-{table.scale}",
        "name": table.name,
        "number": section.number,
        "scale": table.scale,
        "title": table.title,
        "about": section.about,
        "command": section.command,
        "rowTitle": table.row_title,
        "groupTitle": table.group_title if table.groups else None,
        "measured": _measured(section),
        "recorded": sum(record is not None for row in _once(section) for record in row.records),
        "planned": sum(len(row.records) for row in _once(section)),
        "rows": [_row(section, place, places) for place in range(len(table.keys))],
        "blocks": [
            {"title": block, "columns": [_column(column) for column in columns]}
            for block, columns in table.blocks().items()
        ],
        "notes": list(table.notes),
        "charts": [as_data(chart) for chart in section.charts],
    }


def _once(section: Section) -> list[RowResult]:
    """Each row behind the table once: a table of pairs of tasks has several lines of one row."""
    return list({row.key: row for row in section.rows.values()}.values())


def _measured(section: Section) -> dict[str, Any] | None:
    if not section.measured:
        return None
    git = [case["git"]["commit"] for case in section.recorded.get("cases", []) if case.get("git")]
    commit = (section.recorded.get("git") or {}).get("commit") or next(iter(git), None)
    return {"path": section.measured, "command": section.recorded.get("command"), "commit": commit}


def _row(section: Section, place: int, places: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    table = section.table
    key = table.keys[place]
    row = section.rows.get(key)
    records = [record for record in row.records if record is not None] if row else []
    methods = {method_of(record) for record in records} or {section.methods.get(key, "")}
    seeds = {record["config"].get("seed") for record in records if record["status"] == DONE} - {None}
    return {
        "key": key,
        "label": table.labels[place],
        "group": table.groups[place] if table.groups else "",
        "methods": sorted(methods - {""}),
        "models": sorted({model_of(record) for record in records}),
        "tasks": sorted({task for record in records for task in trained_on(record)}),
        "seeds": len(seeds) if row else None,
        "records": [places[record["scale"], record["id"]] for record in records],
        "cells": len(row.records) if row else 0,
        "baseline": section.baselines.get(key),
        "published": {
            name: {"value": found["value"], "source": found["source"], "confidence": found["confidence"]}
            for name, found in (row.published if row else {}).items()
        },
    }


def _column(column: Column) -> dict[str, Any]:
    return {
        "title": column.title,
        "cells": column.cells,
        "values": column.values,
        "parts": [f"{name} · {metric}" for name, metric in column.parts],
    }
