"""Paired differences to the baseline row, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kronlab.report.figures.points import Point, Source, caption_of, metric_title, whiskers
from kronlab.report.figures.style import BLACK, STYLE, WIDTH, caption
from kronlab.report.paired import baseline_of, difference
from kronlab.report.tables import unit_of


def gather(source: Source, entry: Mapping[str, Any]) -> list[Point]:
    """Of each row but the baseline, its difference to the baseline of its group; rows without one are left out."""
    factor = unit_of(entry["metric"]).factor
    points = []
    for row in source.pick(entry.get("rows")):
        reference = baseline_of(row, source.rows, source.spec["baseline"])
        found = difference(row, reference, entry["eval"], entry["metric"]) if reference is not None else None
        if found is not None:
            points.append(
                Point(
                    panel=row.group,
                    group=row.group,
                    key=row.key,
                    label=row.label,
                    x=None,
                    value=factor * found.mean,
                    low=factor * found.low,
                    high=factor * found.high,
                    seeds=found.seeds,
                    how=found.how,
                )
            )
    return points


@rc_context(STYLE)
def plot(source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Figure:
    """One line a row, in the table's order; filled where the interval excludes 0. One panel for each group."""
    groups = list(dict.fromkeys(point.panel for point in points))
    counts = [sum(point.panel == group for point in points) for group in groups]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.25 * len(groups) + 0.24 * len(points)), layout="constrained")
    heights = [count + 1 for count in counts]
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        _panel(axes, source, [point for point in points if point.panel == group])
        axes.set_title(group, loc="left")
    labels = list(dict.fromkeys(row.label for row in source.pick([source.spec["baseline"]])))
    baseline = labels[0] if len(labels) == 1 else f"{source.spec['baseline']} of the same group"
    side = "left" if unit_of(entry["metric"]).less_is_better else "right"
    unit = unit_of(entry["metric"]).name.replace("%", "percentage points")
    title = metric_title(source, entry).rpartition(" (")[0]
    panels[-1].set_xlabel(f"{title}: difference to {baseline} ({unit}); {side} is better")
    sentences = caption_of(source, points, source.pick(entry.get("rows")))
    caption(figure, [f"{sentences[0]}; filled: the interval excludes 0", *sentences[1:]])
    return figure


def _panel(axes: Axes, source: Source, points: Sequence[Point]) -> None:
    looks = source.looks()
    for place, point in enumerate(points):
        look = looks[point.key]
        apart = point.low is not None and point.high is not None and not point.low <= 0 <= point.high
        axes.errorbar(
            [point.value],
            [place],
            xerr=whiskers([point]),
            color=look.colour,
            marker="o",
            markersize=5.5,
            markerfacecolor=look.colour if apart else "white",
            elinewidth=1.2,
        )
    axes.axvline(0, color=BLACK, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(points)), [point.label for point in points])
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
