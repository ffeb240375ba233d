"""The dashboards show what the records have: scores against components, parameters, losses, cost; built offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kronlab.cell import CONFIG_DIR
from kronlab.errors import ConfigError
from kronlab.report.wandb_dashboard import build_report, build_workspace, save
from kronlab.report.wandb_mirror import Target, headlines, summary, view
from kronlab.runs import Store

pytest.importorskip("wandb_workspaces", reason="dashboards are optional: wandb-workspaces is not installed")
PLACE = {"project": "kronlab", "entity": "somebody"}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return list(Store(CONFIG_DIR.parent / "results").records("mini"))


@pytest.fixture
def panels(request: pytest.FixtureRequest, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every panel as W&B gets it."""
    built = request.param(records, **PLACE)
    spec = json.loads(built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    found: list[dict[str, Any]] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if "viewType" in value and "config" in value:
                found.append(value)
            value = list(value.values())
        if isinstance(value, list):
            for each in value:
                look(each)

    look(spec)
    return found


def of_kind(panels: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [panel["config"] for panel in panels if panel["viewType"] == kind]


@pytest.mark.parametrize("panels", [build_report, build_workspace], indirect=True)
def test_scores_against_components_and_parameters(panels: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    drawn = {(panel["xAxis"], panel["yAxis"]) for panel in of_kind(panels, "Scatter Plot")}
    for score in headlines(records):
        for key in ("r1", "r2", "r"):
            assert (f"config:method.value.{key}", f"summary:{score}") in drawn
        assert ("summary:parameters/trainable", f"summary:{score}") in drawn


@pytest.mark.parametrize("panels", [build_report, build_workspace], indirect=True)
def test_losses_and_cost_by_method(panels: list[dict[str, Any]]) -> None:
    (loss, _) = of_kind(panels, "Run History Line Plot")
    assert loss["metrics"] == ["train/loss"]
    assert "label" in loss["groupBy"]
    costs = [metric for panel in of_kind(panels, "Bar Chart") for metric in panel["metrics"]]
    assert {"training/seconds", "training/peak_memory_bytes", "parameters/adapter_bytes"} <= set(costs)


@pytest.mark.parametrize("panels", [build_report], indirect=True)
def test_every_axis_is_something_that_a_run_has(panels: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    told: set[str] = set()
    for record in records:
        told |= {f"summary:{key}" for key in summary(record)}
        told |= {f"config:method.value.{key}" for key in view(record).config["method"]}
    for panel in of_kind(panels, "Scatter Plot"):
        assert {panel["xAxis"], panel["yAxis"]} <= told, panel["chartTitle"]


def test_nothing_scored_is_one_line() -> None:
    with pytest.raises(ConfigError, match="no record with scores"):
        build_report([], **PLACE)


def test_saving_needs_a_login(records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="not logged in"):
        save(records, Target("kronlab", None, "online", tmp_path))
