"""The training loss, step by step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure

from kronlab.report.figures.points import Point, Source, absences, done
from kronlab.report.figures.style import STYLE, WIDTH, caption, log_ticks
from kronlab.runs import Store, read_jsonl

_POINTS: Final = 25  # of a curve, where the entry states no window


def gather(source: Source, entry: Mapping[str, Any]) -> list[Point]:
    """Of each row, at the last step (x) of each window: the mean over seeds, and the lowest and the highest seed.

    A seed's value is the mean loss over the steps of a window; windows do not overlap, and an incomplete last one is
    left out. Seeds of other lengths than the longest one's count as far as they go.
    """
    curves = {row.key: _losses(source, row) for row in source.pick(entry.get("rows"))}
    longest = max((len(losses) for seeds in curves.values() for losses in seeds), default=0)
    window = entry.get("window") or max(1, math.ceil(longest / _POINTS))
    points = []
    for row in source.pick(entry.get("rows")):
        seeds = [_means(losses, window) for losses in curves[row.key]]
        for place in range(max(map(len, seeds), default=0)):
            found = [means[place] for means in seeds if place < len(means)]
            several = len(found) > 1
            points.append(
                Point(
                    panel="",
                    group=row.group,
                    key=row.key,
                    label=row.label,
                    x=float((place + 1) * window),
                    value=statistics.fmean(found),
                    low=min(found) if several else None,
                    high=max(found) if several else None,
                    seeds=len(found),
                    how="lowest and highest seed" if several else "",
                )
            )
    return points


def _losses(source: Source, row: Any) -> list[list[float]]:
    store = Store(source.results)
    found = [read_jsonl(store.folder(record["scale"], record["id"]) / "loss.jsonl") for record in done(row)]
    return [[float(line["loss"]) for line in lines] for lines in found if lines]


def _means(losses: Sequence[float], window: int) -> list[float]:
    whole = len(losses) - len(losses) % window
    return [statistics.fmean(losses[start : start + window]) for start in range(0, whole, window)]


@rc_context(STYLE)
def plot(source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Figure:
    """A line for each row, its band from the lowest to the highest seed; the legend in the order of the last losses."""
    looks, rows = source.looks(), source.pick(entry.get("rows"))
    lines = {row.key: [point for point in points if point.key == row.key] for row in rows}
    order = sorted((key for key in lines if lines[key]), key=lambda key: -lines[key][-1].value)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for key in order:
        look, line = looks[key], lines[key]
        steps = [point.position for point in line]
        label = f"{line[0].name}  {line[-1].value:#.3g}"
        axes.plot(steps, [point.value for point in line], color=look.colour, linestyle=look.dash, label=label)
        if any(point.low is not None for point in line):
            low, high = ([getattr(p, end) or p.value for p in line] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color=look.colour, alpha=0.08, linewidth=0)
    axes.set_yscale("log", nonpositive="mask")
    log_ticks(axes.yaxis)
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss (nats)")
    figure.legend(loc="outside right upper", title="method, last value", alignment="left", handlelength=2.4)
    window = round(points[0].position)
    means = f"means over windows of {window} steps and over seeds" if window > 1 else "means over seeds"
    sentences = [f"{source.spec['name']}, scale {source.scale}; {means}"]
    if any(point.seeds > 1 for point in points):
        sentences[0] += "; bands: from the lowest to the highest seed"
    lost = [row.label for row in rows if done(row) and not lines[row.key]]
    if lost:
        sentences.append(f"No loss curve kept: {', '.join(lost)}")
    caption(figure, sentences + absences(rows))
    return figure
