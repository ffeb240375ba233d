"""Dashboards as code: a W&B report and a W&B workspace over the runs of `wandb_mirror`, built from the same panels.

Both are built without a network; only `save` talks to W&B. What it has saved is noted beside W&B's files, so that the
next time replaces it and does not add to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Final

from kronlab.errors import ConfigError
from kronlab.report.wandb_mirror import Target, default_entity, headlines, require_server
from kronlab.runs import write_json

TITLE: Final = "Kronecker adapters: what the records say"
_COMPONENTS: Final = ("r1", "r2", "r")
_NLL: Final = "nll_per_token"
_SAVED: Final = "dashboards.json"


def _library(name: str) -> Any:
    """A module of wandb-workspaces.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(f"wandb_workspaces.{name}")
    except ImportError as error:
        raise ConfigError("dashboards need the package wandb-workspaces: pip install wandb-workspaces") from error


def panels(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The panels of every section, by its title; scores are those that the records have.

    Raises:
        ConfigError: no record is scored, so there is nothing to draw.
    """
    wr = _library("reports.v2")
    records = list(records)
    scores = headlines(records)
    if not scores:
        raise ConfigError("no record with scores: run something first, or give another results.dir, scale or table")
    likelihoods = [f"{name}/{_NLL}" for name in _evals_with(records, _NLL)]

    def scatter(x: Any, score: str, **settings: Any) -> Any:
        return wr.ScatterPlot(title=settings.pop("title"), x=x, y=wr.SummaryMetric(score), **settings)

    components = [
        scatter(wr.Config(f"method.{key}"), score, title=f"{score} against {key}", log_x=True, regression=True)
        for score in scores
        for key in _COMPONENTS
    ]
    pareto = [
        scatter(wr.SummaryMetric("parameters/trainable"), score, title=f"{score} by trainable parameters", log_x=True)
        for score in [*scores, *likelihoods]
    ]
    by_method = {"groupby": wr.Config("cell.label"), "groupby_aggfunc": "mean"}
    loss = [
        wr.LinePlot(
            title="training loss by method", x="Step", y=["train/loss"], groupby_rangefunc="stddev", **by_method
        ),
        wr.LinePlot(title="learning rate by method", x="Step", y=["train/lr"], **by_method),
    ]
    costs = {
        "training/seconds": "training time (s)",
        "training/tokens_per_s": "tokens/s in training",
        "training/peak_memory_bytes": "peak memory of training (bytes)",
        "parameters/adapter_bytes": "adapter (bytes)",
    }
    cost = [
        wr.BarPlot(title=title, metrics=[key], groupby_rangefunc="stddev", **by_method) for key, title in costs.items()
    ]
    return {
        "Scores against r1, r2, r": components,
        "Scores by parameters": pareto,
        "Loss by method": loss,
        "Cost": cost,
    }


def _evals_with(records: Iterable[Mapping[str, Any]], metric: str) -> list[str]:
    found: dict[str, None] = {}
    for record in records:
        for name, result in (record.get("eval") or {}).items():
            metrics = list(result["metrics"])
            if metric in metrics and metrics[0] != metric:
                found[name] = None
    return list(found)


def build_report(records: Iterable[Mapping[str, Any]], *, project: str, entity: str) -> Any:
    """The W&B report (`wandb_workspaces.reports.v2.Report`): a heading and a grid of panels for each section."""
    wr = _library("reports.v2")
    blocks = [wr.P("One run for each cell of the project. Made from the records: `make wandb-push` makes it again.")]
    for title, drawn in panels(records).items():
        # a run set that names its project asks the server for it; without a name it is the report's own
        blocks += [wr.H2(title), wr.PanelGrid(runsets=[wr.Runset(name="cells")], panels=drawn)]
    return wr.Report(project=project, entity=entity, title=TITLE, blocks=blocks, width="fluid")


def build_workspace(records: Iterable[Mapping[str, Any]], *, project: str, entity: str) -> Any:
    """The same panels as a W&B workspace (`wandb_workspaces.workspaces.Workspace`), for looking around."""
    ws = _library("workspaces")
    sections = [ws.Section(name=title, panels=drawn, is_open=True) for title, drawn in panels(records).items()]
    return ws.Workspace(project=project, entity=entity, name=TITLE, sections=sections)


def save(records: Sequence[Mapping[str, Any]], target: Target) -> list[str]:
    """Save both; return their addresses.

    Raises:
        ConfigError: wandb-workspaces is not installed, nobody is logged in, or the server does not answer.
    """
    _library("reports.v2")
    require_server()
    entity = target.entity or default_entity()
    notes = target.folder / _SAVED
    saved = json.loads(notes.read_text()) if notes.is_file() else {}
    mine = saved.setdefault(f"{entity}/{target.project}", {})
    report = build_report(records, project=target.project, entity=entity)
    report.id = mine.get("report", "")
    report.save()
    workspace = build_workspace(records, project=target.project, entity=entity)
    workspace._internal_name, workspace._internal_id = mine.get("workspace", ("", ""))
    workspace.save()
    mine |= {"report": report.id, "workspace": [workspace._internal_name, workspace._internal_id]}
    write_json(notes, saved)
    return [report.url, workspace.url]
