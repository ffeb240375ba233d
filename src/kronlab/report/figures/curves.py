"""A metric against a size of the method: one panel for each size, one line for each method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kronlab.errors import ConfigError
from kronlab.report.figures.points import (
    Point,
    Source,
    caption_of,
    done,
    metric_points,
    metric_title,
    whiskers,
)
from kronlab.report.figures.style import STYLE, WIDTH, caption
from kronlab.report.tables import RowResult, unit_of

_FAINT: Final = 0.4
_BESIDE: Final = 2**0.1  # so that seeds are not hidden by the interval of their mean


def gather(source: Source, entry: Mapping[str, Any]) -> list[Point]:
    """Points of every panel, then those of the baseline, which have no x.

    Raises:
        ConfigError: a row's axis is not a positive number; two panels of one title.
    """
    names = [_title(panel) for panel in entry["panels"]]
    if len(set(names)) < len(names):
        raise ConfigError(f"{source.spec['name']}: two panels of a figure are called alike; give each its own title")
    points = []
    for panel in entry["panels"]:
        for row in source.pick(panel["rows"]):
            if records := done(row):
                x = number_at(source, row, records[0]["config"], panel["axis"])
                points += metric_points(row, entry, panel=_title(panel), x=x)
    if not points:
        return []
    for row in source.pick([entry["baseline"]]) if entry.get("baseline") else []:
        points += metric_points(row, entry)
    return points


def _title(panel: Mapping[str, Any]) -> str:
    return str(panel.get("title", panel["axis"].rpartition(".")[2]))


def number_at(source: Source, row: RowResult, section: Mapping[str, Any], axis: str) -> float:
    """The number at the dotted path `axis` of a section of a record's config.

    Raises:
        ConfigError: there is none that is positive.
    """
    value: Any = section
    for step in axis.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{source.spec['name']}: row {row.key} has {axis}={value!r}; a curve needs a positive number")
    return float(value)


@rc_context(STYLE)
def plot(source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Figure:
    """Mean over seeds with its interval on a log2 axis, each seed a faint dot, the baseline a band across."""
    panels = [panel for panel in entry["panels"] if any(point.panel == _title(panel) for point in points)]
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, panel in zip(drawn, panels, strict=True):
        handles |= _baseline(axes, source, [point for point in points if point.x is None])
        handles |= draw_lines(axes, source, [point for point in points if point.panel == _title(panel)])
        axes.set_xlabel(panel["axis"].rpartition(".")[2])
        axes.set_title(_title(panel))
    drawn[0].set_ylabel(f"{metric_title(source, entry)}\n{unit_of(entry['metric']).better}")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)))
    named = [*(key for panel in entry["panels"] for key in panel["rows"]), *filter(None, [entry.get("baseline")])]
    sentences = caption_of(source, points, source.pick(list(dict.fromkeys(named))))
    if any(point.is_mean and point.seeds > 1 for point in points):
        sentences[0] += "; faint dots: single seeds"
    caption(figure, sentences)
    return figure


def _baseline(axes: Axes, source: Source, points: Sequence[Point]) -> dict[str, Any]:
    looks, handles = source.looks(), {}
    for point in points:
        if not point.is_mean:
            continue
        line = axes.axhline(point.value, color=looks[point.key].colour, linewidth=1, linestyle="--", zorder=1)
        if point.low is not None and point.high is not None:
            axes.axhspan(point.low, point.high, color=looks[point.key].colour, alpha=0.13, linewidth=0, zorder=0)
        handles[point.name] = line
    return handles


def draw_lines(axes: Axes, source: Source, points: Sequence[Point]) -> dict[str, Any]:
    """One line for each method and group, on a log2 axis; its look is that of its first row in the table.

    Returns:
        What a legend shows: name -> line.
    """
    looks = source.looks()
    of_row = {row.key: (source.method(row), row.group) for row in source.rows}
    series: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        series.setdefault(of_row[point.key], []).append(point)
    handles = {}
    for (method, group), members in series.items():
        look = looks[next(key for key in of_row if of_row[key] == (method, group))]
        means = sorted((point for point in members if point.is_mean), key=lambda point: point.position)
        seeds = [point for point in members if not point.is_mean and _seeds_of(means, point) > 1]
        beside = [_BESIDE * p.position for p in seeds]
        axes.plot(beside, [p.value for p in seeds], "o", color=look.colour, alpha=_FAINT, markersize=3.5, mew=0)
        bars = axes.errorbar(
            [p.position for p in means],
            [p.value for p in means],
            yerr=whiskers(means),
            color=look.colour,
            marker=look.marker,
            markersize=4.5,
            elinewidth=1,
        )
        name = means[0].label if len(means) == 1 else family(means[0].label)
        handles[f"{name}, {group}" if group else name] = bars
    ticks = sorted({point.position for point in points})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    return handles


def family(label: str) -> str:
    """A row's label without its sizes: CDKA (2,8,4) -> CDKA, LoRA r=8 -> LoRA."""
    return re.split(r" \(| r=", label, maxsplit=1)[0]


def _seeds_of(means: Sequence[Point], seed: Point) -> int:
    return next(mean.seeds for mean in means if mean.key == seed.key)
