"""Every table config that is made of cells: all rows at all scales compose, and what a table names is there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kronlab.cell import CONFIG_DIR, Cell, compose_config, make_cell
from kronlab.evals.registry import kind_of

TABLES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONFIG_DIR / "table").glob("*.yaml"))}
CELLS = [
    (name, scale) for name, spec in TABLES.items() if spec.get("kind", "cells") == "cells" for scale in spec["scales"]
]
SPEC_KEYS = {"name", "title", "kind", "baseline", "published", "published_by_group", "rows", "scales"}
SCALE_KEYS = {
    *("about", "groups", "rows", "arms", "seeds", "common", "row_overrides", "optional_evals", "tune", "columns"),
    *("figures", "group_title", "row_title"),
}
COLUMN_KEYS = {"eval", "metric", "title", "published", "mean_of"}


def group_of(layout: dict[str, Any], group: str) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides and arms of a group, which may have arms of its own."""
    section = layout.get("groups", {"": []})[group]
    arms = layout.get("arms", {"": []})
    return (section["overrides"], section.get("arms", arms)) if isinstance(section, dict) else (section, arms)


def overrides_of(spec: dict[str, Any], scale: str, group: str, arm: str, key: str) -> list[str]:
    """In the order in which a table is planned."""
    layout = spec["scales"][scale]
    own, arms = group_of(layout, group)
    return [
        f"scale={scale}",
        *layout["common"],
        *own,
        *arms[arm],
        *spec["rows"][key]["overrides"],
        *layout.get("row_overrides", {}).get(key, []),
    ]


def cell_of(overrides: list[str], seed: int) -> Cell:
    return make_cell(compose_config([*overrides, f"seed={seed}"]), weights_needed=False)


def places(layout: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Group, arm and row of every cell of one seed."""
    for group in layout.get("groups", {"": []}):
        yield from itertools.product([group], group_of(layout, group)[1], layout["rows"])


def published_of(spec: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Row, column's key and what was published, of all rows and groups."""
    sections = [*spec.get("published_by_group", {}).values()]
    sections.append({key: row["published"] for key, row in spec["rows"].items() if "published" in row})
    for section in sections:
        for row, cells in section.items():
            for column, cell in cells.items():
                yield row, column, cell


@pytest.mark.parametrize(("name", "scale"), CELLS, ids=[f"{name}-{scale}" for name, scale in CELLS])
def test_every_row_of_every_scale_is_a_cell(name: str, scale: str) -> None:
    spec = TABLES[name]
    layout = spec["scales"][scale]
    cells = {place: cell_of(overrides_of(spec, scale, *place), layout["seeds"][0]) for place in places(layout)}
    assert len({cell.id for cell in cells.values()}) == len(cells), "two rows are the same experiment"
    assert {cell.scale for cell in cells.values()} == {scale}
    assert set(layout.get("optional_evals", [])) <= {e for cell in cells.values() for e in cell.config["eval"]}
    for key in layout["rows"]:  # a group whose arms are its own may lack a column
        graded = {e for place, cell in cells.items() if place[2] == key for e in cell.config["eval"]}
        for column in layout["columns"]:
            assert column.get("mean_of") or column["eval"] in graded, f"{key}: no eval {column['eval']}"


@pytest.mark.parametrize(("name", "scale"), CELLS, ids=[f"{name}-{scale}" for name, scale in CELLS])
def test_a_scale_names_only_what_is_there(name: str, scale: str) -> None:
    spec = TABLES[name]
    layout = spec["scales"][scale]
    assert set(layout) <= SCALE_KEYS
    assert set(layout["rows"]) <= set(spec["rows"])
    assert len(set(layout["rows"])) == len(layout["rows"])
    assert set(layout.get("row_overrides", {})) <= set(layout["rows"])
    assert len(set(layout["seeds"])) == len(layout["seeds"]) > 0
    assert all(set(column) <= COLUMN_KEYS and column["title"] for column in layout["columns"])
    assert "\n" not in layout["about"].strip()
    for figure in layout.get("figures", []):
        panels = figure.get("panels", [])
        named = {*figure.get("rows", []), *(row for panel in panels for row in panel["rows"])}
        assert named | ({figure["baseline"]} if "baseline" in figure else set()) <= set(layout["rows"])
        assert not panels or all(len(panel["rows"]) > 1 for panel in panels)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in CELLS))
def test_a_table_says_what_it_is_and_where_published_numbers_were_read(name: str) -> None:
    spec = TABLES[name]
    assert set(spec) <= SPEC_KEYS
    assert spec["name"] == name
    assert spec["baseline"] in spec["rows"]
    assert Path(CONFIG_DIR, "table", f"{name}.yaml").read_text().startswith(f"# Table {name.removeprefix('table')}: ")
    columns = {
        column.get("published", column.get("eval"))
        for layout in spec["scales"].values()
        for column in layout["columns"]
    }
    for row, column, cell in published_of(spec):
        assert row in spec["rows"]
        assert column in columns, f"{row}: no column takes the published {column}"
        assert set(cell) == {"value", "source", "confidence"}
        assert isinstance(cell["value"], int | float)
        assert cell["source"]
        assert cell["confidence"] in ("H", "M", "C")


TUNED = [(name, scale) for name, scale in CELLS if TABLES[name]["scales"][scale].get("tune")]


@pytest.mark.parametrize(("name", "scale"), TUNED, ids=[f"{name}-{scale}" for name, scale in TUNED])
def test_a_setting_is_tuned_for_every_row_alike_and_not_on_test_data(name: str, scale: str) -> None:
    """And the trial of the chosen value is the training of the final cell."""
    spec = TABLES[name]
    layout = spec["scales"][scale]
    tune = layout["tune"]
    assert set(tune) == {"grid", "seeds", "overrides", "by"}
    ((key, values),) = tune["grid"].items()
    assert all(isinstance(value, int | float) for value in values)
    assert values == sorted(set(values))
    assert len(values) > 1
    assert tune["by"]["goal"] in ("min", "max")
    for place in places(layout):
        final = [*overrides_of(spec, scale, *place), f"{key}={values[0]}"]
        cell, trial = (cell_of(o, tune["seeds"][0]) for o in (final, [*final, *tune["overrides"]]))
        assert trial.train_id == cell.train_id
        validation = trial.config["eval"][tune["by"]["eval"]]
        assert validation["split"] != "test"
        assert kind_of(validation)
        for test in cell.config["eval"].values():
            assert (test["source"], test["split"]) != (validation["source"], validation["split"])
