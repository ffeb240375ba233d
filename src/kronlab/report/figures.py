"""Figures from records, as SVG and PNG; the same record gives the same bytes. Reads records only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from kronlab.report.alignment import layers_by_kind, measured, predicted
from kronlab.report.cost import cases_of, peer_labels, setting, time_ratio

# Text stays text in SVG; ids are drawn from this salt instead of a random one.
_STYLE: Any = {"svg.hashsalt": "kronlab", "svg.fonttype": "none", "font.size": 9, "axes.axisbelow": True}
_OURS, _OTHERS, _REFERENCE = "#c8553d", "#7a8ba3", "#222222"


def write_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write `<name>.svg` and `<name>.png`, each in one step, without date or version in them."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        path = directory / f"{name}.{suffix}"
        scratch = directory / f".{name}.{suffix}.tmp"
        with rc_context(_STYLE):
            figure.savefig(scratch, format=suffix, dpi=150, metadata=metadata)
        scratch.replace(path)
        written.append(path)
    return written


def cost_figure(spec: Mapping[str, Any], record: Mapping[str, Any]) -> Figure:
    """Bars for each method as a ratio to the baseline: time of a step (with 95 % interval), bytes kept for backward.

    One row of panels for each batch and precision; methods that were not measured there have no bar.
    """
    steps = cases_of(record, "step")
    labels = peer_labels(steps, list(spec["rows"]))
    tallest = max((len(case["peers"]) for case in steps), default=1)
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, max(1, len(steps)) * (0.9 + 0.24 * tallest)), layout="constrained")
        panels = figure.subplots(max(1, len(steps)), 2, squeeze=False)[: len(steps)]
        for (left, right), case in zip(panels, steps, strict=True):
            keys = [key for key in labels if "wall" in case["peers"].get(key, {})]
            _time_panel(left, case, keys, labels, spec["baseline"])
            _kept_panel(right, case, keys, labels, spec["baseline"])
    return figure


def _time_panel(
    axes: Axes, case: Mapping[str, Any], keys: Sequence[str], labels: Mapping[str, str], baseline: str
) -> None:
    found = {key: ratio for key in keys if (ratio := time_ratio(case, key, baseline)) is not None}
    ratios = list(found.values())
    errors = [[r[0] - r[1] for r in ratios], [r[2] - r[0] for r in ratios]]
    _bars(axes, case, list(found), labels, [r[0] for r in ratios], errors)
    seconds = case["peers"].get(baseline, {}).get("wall")
    median = f" ({statistics.median(seconds):.3g} s)" if seconds else ""
    axes.set_xlabel(f"time of a step / {labels.get(baseline, baseline)}{median}")


def _kept_panel(
    axes: Axes, case: Mapping[str, Any], keys: Sequence[str], labels: Mapping[str, str], baseline: str
) -> None:
    reference = case["peers"].get(baseline, {}).get("saved_bytes")
    shown = list(keys) if reference else []
    _bars(axes, case, shown, labels, [case["peers"][key]["saved_bytes"] / reference for key in shown], None)
    axes.set_xlabel(f"bytes kept for backward / {labels.get(baseline, baseline)}")


def _bars(
    axes: Axes,
    case: Mapping[str, Any],
    keys: Sequence[str],
    labels: Mapping[str, str],
    values: Sequence[float],
    errors: Any,
) -> None:
    ours = [case["settings"]["peers"][key].get("overrides", [""])[0] in _OUR_METHODS for key in keys]
    colours = [_OURS if mine else _OTHERS for mine in ours]
    at = range(len(keys))
    axes.barh(at, values, xerr=errors, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    axes.set_yticks(at, [labels[key] for key in keys])
    axes.invert_yaxis()
    axes.axvline(1, color=_REFERENCE, linewidth=0.8, linestyle="--")
    axes.grid(axis="x", linewidth=0.3)
    axes.set_title(setting(case), fontsize=9)
    for value, where in zip(values, at, strict=True):  # at the bar's foot, clear of the interval
        axes.annotate(
            f"{value:.2f}",
            (0, where),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color="white",
        )


_OUR_METHODS = ("method=cdka", "method=kron_lora")


def alignment_figure(record: Mapping[str, Any]) -> Figure:
    """Measured against predicted cosine of the first step, one panel an optimiser, with the diagonal.

    A dot is a grid point in one kind of layer, its bar the standard deviation over layers and draws; one colour for
    each r1, LoRA being r1 = 1, and grey diamonds for Kron-LoRA.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        titles = {"sgd": "gradient descent", "adamw": "AdamW"}
        for axes, (optimiser, title) in zip(panels, titles.items(), strict=True):
            _alignment_panel(axes, record, optimiser)
            axes.set_title(title, fontsize=9)
        panels[0].set_ylabel("measured cosine with the full gradient")
        panels[0].legend(fontsize=7, loc="upper left")
    return figure


def _alignment_panel(axes: Axes, record: Mapping[str, Any], optimiser: str) -> None:
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
        colour = _OTHERS if r1 is None else colours(widths.index(r1))
        label, marker = ("Kron-LoRA", "D") if r1 is None else (f"r1 = {r1}", "o")
        axes.errorbar(
            x, y, yerr=error, fmt=marker, color=colour, markersize=3.5, elinewidth=0.6, alpha=0.85, label=label
        )
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=_REFERENCE, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    for axis in (axes.xaxis, axes.yaxis):  # at 1, 2 and 5 of each decade: every tick of its own would overlap
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.3)
    axes.set_xlabel("predicted √(r / (r + r1·d_in/r2))")
