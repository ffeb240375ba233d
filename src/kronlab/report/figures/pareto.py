"""A metric against trainable parameters, with the front of the rows that no other row beats in both."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from kronlab.report.figures.labels import Label, place_labels
from kronlab.report.figures.points import (
    Point,
    Source,
    caption_of,
    done,
    metric_points,
    metric_title,
    whiskers,
)
from kronlab.report.figures.style import GREY, STYLE, WIDTH, caption, log_ticks
from kronlab.report.tables import unit_of


def gather(source: Source, entry: Mapping[str, Any]) -> list[Point]:
    """Mean and seeds of every row, at its number of trainable parameters (x; 0 for the base model)."""
    points = []
    for row in source.pick(entry.get("rows")):
        with_eval = [record for record in done(row) if entry["eval"] in record["eval"]]
        if with_eval:
            trainable = statistics.fmean(record["parameters"]["trainable"] for record in with_eval)
            points += metric_points(row, entry, x=trainable)
    return points if any(point.x for point in points) else []


def front(points: Sequence[Point], *, less_is_better: bool) -> list[Point]:
    """The points that no other one beats: fewer or as many parameters and a better value; by parameters, ascending."""
    sign = -1 if less_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.value)):
        if not best or sign * point.value > sign * best[-1].value:
            best.append(point)
    return best


@rc_context(STYLE)
def plot(source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Figure:
    """One marker a row, labelled beside it; without parameters (the base model) a line across."""
    unit, looks = unit_of(entry["metric"]), source.looks()
    means = [point for point in points if point.is_mean]
    placed, across = [point for point in means if point.x], [point for point in means if not point.x]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    budgets = [point.position for point in placed]
    if min(budgets) == max(budgets):  # nothing to scale the axis by
        axes.set_xlim(budgets[0] / 10, budgets[0] * 10)
    groups = list(dict.fromkeys(point.group for point in placed))
    fronts = []
    for group in groups:
        members = [point for point in placed if point.group == group]
        colour = looks[members[0].key].colour if len(groups) > 1 else GREY
        best = front(members, less_is_better=unit.less_is_better)
        fronts.append([(point.position, point.value) for point in best])
        axes.step(*zip(*fronts[-1], strict=True), ":", where="post", color=colour, zorder=1)
        if len(groups) > 1:
            axes.plot([], [], "o:", color=colour, label=group)
    for point in placed:
        look = looks[point.key]
        bars: Any = {"fmt": "none", "elinewidth": 0.9, "alpha": 0.6, "zorder": 2}
        axes.errorbar([point.position], [point.value], yerr=whiskers([point]), ecolor=look.colour, **bars)
        axes.plot(
            [point.position],
            [point.value],
            look.marker,
            color=look.colour,
            markersize=7,
            mec="white",
            mew=0.7,
            zorder=3,
        )
    for point in across:
        colour = looks[point.key].colour
        axes.axhline(point.value, color=colour, linewidth=1, linestyle="--", zorder=1)
    axes.margins(x=0.16, y=0.1)
    log_ticks(axes.xaxis, _count)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{metric_title(source, entry)}, {unit.better}")
    if len(groups) > 1:
        figure.legend(loc="outside upper center", ncols=len(groups))
    sentences = caption_of(source, points, source.pick(entry.get("rows")))
    caption(figure, [f"{sentences[0]}; dotted: the best for so many parameters", *sentences[1:]])
    labels = [  # the group is told by the colour
        Label(point.label, point.position, point.value, point.low, point.high, looks[point.key].colour)
        for point in placed
    ]
    lines = [Label(point.name, axes.get_xlim()[0], point.value) for point in across]
    place_labels(figure, axes, labels, lines=lines, steps=fronts)
    return figure


def _count(value: float) -> str:
    """1500 -> 1.5k."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
