"""What a training step costs: bars of time and memory for each method as ratios to the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kronlab.report.cost import cases_of, peer_labels, setting, time_ratio
from kronlab.report.figures.style import BLACK, GREY, METHOD_COLOURS, SMALL, STYLE, ink_on


@rc_context(STYLE)
def cost_figure(spec: Mapping[str, Any], record: Mapping[str, Any]) -> Figure:
    """Bars for each method as a ratio to the baseline: time of a step (with 95 % interval), bytes kept for backward.

    One row of panels for each batch and precision; methods that were not measured there have no bar.
    """
    steps = cases_of(record, "step")
    labels = peer_labels(steps, list(spec["rows"]))
    bars = [1 + max(1, len(case["peers"])) for case in steps] or [1]
    figure = Figure(figsize=(9, 0.6 * len(bars) + 0.26 * sum(bars)), layout="constrained")
    panels = figure.subplots(len(bars), 2, squeeze=False, height_ratios=bars)[: len(steps)]
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
    colours = [METHOD_COLOURS.get(_method(case["settings"]["peers"][key]), GREY) for key in keys]
    at = range(len(keys))
    axes.barh(at, values, xerr=errors, color=colours, error_kw={"elinewidth": 1})
    axes.set_yticks(at, [labels[key] for key in keys])
    axes.invert_yaxis()
    axes.axvline(1, color=BLACK, linewidth=0.8, linestyle="--")
    axes.grid(axis="y", visible=False)
    axes.set_title(setting(case))
    for value, where, colour in zip(values, at, colours, strict=True):  # at the bar's foot, clear of the interval
        axes.annotate(
            f"{value:.2f}",
            (0, where),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=ink_on(colour),
        )


def _method(peer: Mapping[str, Any]) -> str:
    named = [text.removeprefix("method=") for text in peer.get("overrides", []) if text.startswith("method=")]
    return named[0] if named else str(peer.get("kind", "")).rpartition("_")[2]  # lokr, of peft_lokr and lycoris_lokr
