"""What is kept of a first task when the same adapter goes on to a second: one panel for each ordered pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kronlab.report.figures.points import Point, Source, caption_of, metric_points, whiskers
from kronlab.report.figures.style import STYLE, WIDTH, caption
from kronlab.report.sequential import arm, pairs_of
from kronlab.report.tables import unit_of

_ALONE, _AFTER = 0.0, 1.0  # a point's x: after the first task alone, after both
_ACROSS = 3  # panels in a row, at most


def gather(source: Source, entry: Mapping[str, Any]) -> list[Point]:
    """Of each pair and trained row, the first task's metric after it alone and after both, where both are known."""
    points = []
    for first, second in pairs_of(source.spec, source.scale):
        judged = {"eval": first.eval, "metric": first.metric}
        for row in source.pick():
            found = [
                metric_points(arm(row, *tasks), judged, panel=f"{first.title}, then {second.title}", x=x)
                for x, tasks in ((_ALONE, [first.name]), (_AFTER, [first.name, second.name]))
            ]
            if all(found):
                points += [point for of_arm in found for point in of_arm]
    return points


@rc_context(STYLE)
def plot(source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Figure:
    """One line a row, from the hollow point (first task alone) to the filled one (after the second)."""
    pairs = list(dict.fromkeys(point.panel for point in points))
    across = min(_ACROSS, len(pairs))
    rows = max(len({point.key for point in points if point.panel == pair}) for pair in pairs)
    down = math.ceil(len(pairs) / across)
    figure = Figure(figsize=(WIDTH, 0.9 + down * (0.55 + 0.22 * rows)), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for number, axes in enumerate(panels):
        if number >= len(pairs):
            axes.set_axis_off()
            continue
        _panel(axes, source, [point for point in points if point.panel == pairs[number]], named=number % across == 0)
        axes.set_title(pairs[number], loc="left")
    metric = next(first.metric for first, _ in pairs_of(source.spec, source.scale))
    unit = unit_of(metric)
    for axes in list(figure.axes)[-across:]:
        axes.set_xlabel(f"accuracy on the first task ({unit.name})")
    sentences = caption_of(source, points, source.pick())
    caption(figure, [f"{sentences[0]}; hollow: after the first task alone, filled: after both", *sentences[1:]])
    return figure


def _panel(axes: Axes, source: Source, points: Sequence[Point], *, named: bool) -> None:
    looks = source.looks()
    keys = list(dict.fromkeys(point.key for point in points))
    for place, key in enumerate(keys):
        means = {point.x: point for point in points if point.key == key and point.is_mean}
        colour = looks[key].colour
        axes.plot([means[_ALONE].value, means[_AFTER].value], [place, place], color=colour, linewidth=2, alpha=0.5)
        for x, offset, face in ((_ALONE, -0.13, "white"), (_AFTER, 0.13, colour)):
            point = means[x]
            axes.errorbar(
                [point.value], [place + offset], xerr=whiskers([point]), color=colour, linestyle="none", elinewidth=0.9,
                capsize=0, alpha=0.6,
            )  # fmt: skip
            axes.plot([point.value], [place], color=colour, marker="o", markersize=5.5, markerfacecolor=face)
    labels = {point.key: point.label for point in points}
    axes.set_yticks(range(len(keys)), [labels[key] for key in keys] if named else [""] * len(keys))
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
