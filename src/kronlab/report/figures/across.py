"""A metric against a number that several evals differ in, like the length of their prompts: one line for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from kronlab.report.figures.curves import draw_lines, number_at
from kronlab.report.figures.points import Point, Source, caption_of, done, metric_points, unit_of
from kronlab.report.figures.style import STYLE, WIDTH, caption


def gather(source: Source, entry: Mapping[str, Any]) -> list[Point]:
    """For every row its points on each eval that it was graded on; the base model is a row like any other.

    Raises:
        ConfigError: an eval's axis is not a positive number.
    """
    points = []
    for row in source.pick(entry.get("rows")):
        for name in entry["evals"]:
            graded = [record for record in done(row) if name in record["eval"]]
            if graded:
                x = number_at(source, row, graded[0]["config"]["eval"][name], entry["axis"])
                points += metric_points(row, {"eval": name, "metric": entry["metric"]}, x=x)
    return points


@rc_context(STYLE)
def plot(source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Figure:
    """Mean over seeds with its interval on a log2 axis, each seed a faint dot."""
    unit = unit_of(entry["metric"])
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    handles = draw_lines(axes, source, points)
    axes.set_xlabel(entry.get("title", entry["axis"].rpartition(".")[2]))
    axes.set_ylabel(f"{entry['metric'].replace('_', ' ')} ({unit.name})\n{unit.better}")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)))
    sentences = caption_of(source, points, source.pick(entry.get("rows")))
    if any(point.is_mean and point.seeds > 1 for point in points):
        sentences[0] += "; faint dots: single seeds"
    caption(figure, sentences)
    return figure
