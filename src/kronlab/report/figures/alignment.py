"""Alignment of the first step with the full gradient: measured against predicted cosines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kronlab.report.alignment import layers_by_kind, measured, predicted
from kronlab.report.figures.style import BLACK, METHOD_COLOURS, STYLE, log_ticks


@rc_context(STYLE)
def alignment_figure(record: Mapping[str, Any]) -> Figure:
    """Measured against predicted cosine of the first step, one panel an optimiser, with the diagonal.

    A dot is a grid point in one kind of layer, its bar the standard deviation over layers and draws; one colour for
    each r1, LoRA being r1 = 1, and diamonds for Kron-LoRA.
    """
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {"sgd": "gradient descent", "adamw": "AdamW"}
    for axes, (optimiser, title) in zip(panels, titles.items(), strict=True):
        _panel(axes, record, optimiser)
        axes.set_title(title)
    panels[0].set_ylabel("measured cosine with the full gradient")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def _panel(axes: Axes, record: Mapping[str, Any], optimiser: str) -> None:
    points, kinds = record["settings"]["points"], list(layers_by_kind(record).values())
    groups: dict[int | None, list[str]] = {}
    for key, point in points.items():
        groups.setdefault(None if point["method"] == "kron_lora" else point.get("r1", 1), []).append(key)
    widths = sorted(r1 for r1 in groups if r1 is not None)
    colours = colormaps["viridis"].resampled(len(widths) + 1)  # one more: its last yellow is hardly seen on white
    ends: list[float] = []
    for r1 in [*widths, *([None] if None in groups else [])]:
        x, y, error = [], [], []
        for key in groups[r1]:
            cosines, finite = measured(record, key, optimiser), predicted(record, key, "finite")
            for chosen in kinds:
                x.append(float(finite[chosen].mean()))
                y.append(float(cosines[chosen].mean()))
                error.append(float(cosines[chosen].std()))
        ends += x
        colour = METHOD_COLOURS["kron_lora"] if r1 is None else colours(widths.index(r1))
        label, marker = ("Kron-LoRA", "D") if r1 is None else (f"r1 = {r1}", "o")
        axes.errorbar(
            x, y, yerr=error, fmt=marker, color=colour, markersize=3.5, elinewidth=0.6, capsize=0, alpha=0.85,
            label=label,
        )  # fmt: skip
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=BLACK, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    for axis in (axes.xaxis, axes.yaxis):  # every tick of its own would overlap
        log_ticks(axis)
    axes.set_xlabel("predicted √(r / (r + r1·d_in/r2))")
