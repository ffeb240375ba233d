"""The figure of table 12, part two: cosine and overlap with full fine-tuning at every kept step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from kronlab.report.alignment_training import adapters, overlap_over_chance, series

_STYLE: Any = {"font.size": 9, "axes.axisbelow": True}
_LORA, _KRON_LORA, _REFERENCE = "#222222", "#c8553d", "#222222"


def training_figure(record: Mapping[str, Any]) -> Figure:
    """One line an adapter, with the range over seeds as a band: cosine; overlap over what chance gives."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        styles = _styles(record)
        for row, style in styles.items():
            _line(left, record, series(record, row, "cosine"), style)
            _line(right, record, overlap_over_chance(record, row), style)
        left.set_ylabel("cosine with the update of full fine-tuning")
        right.set_ylabel("overlap of leading singular vectors / chance")
        right.axhline(1, color=_REFERENCE, linewidth=0.8, linestyle="--")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(record["steps"], [str(step) for step in record["steps"]], fontsize=7)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("optimizer step")
            axes.grid(linewidth=0.3)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def _styles(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """LoRA black, Kron-LoRA red, CDKA by colour in the order of the rows."""
    labels = {key: record["rows"][key]["label"] for key in adapters(record)}
    ours = [key for key, label in labels.items() if label.startswith("CDKA")]
    colours = colormaps["viridis"].resampled(len(ours) + 1)  # one more: its last yellow is hardly seen on white
    others = {key: _LORA if label.startswith("LoRA") else _KRON_LORA for key, label in labels.items()}
    return {
        key: {"label": label, "color": colours(ours.index(key)) if key in ours else others[key]}
        for key, label in labels.items()
    }


def _line(axes: Axes, record: Mapping[str, Any], values: np.ndarray, style: Mapping[str, Any]) -> None:
    """values: (seeds, steps)."""
    axes.plot(record["steps"], values.mean(axis=0), marker="o", markersize=2.5, linewidth=1.2, **style)
    axes.fill_between(record["steps"], values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, lw=0)
