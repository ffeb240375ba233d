"""Charts of the page as Vega-Lite specifications: the points of the table's figures, and the same looks.

A specification holds no colour of the page: `$ink` and `$surface` stand for those of its theme, and the hues of
`kronlab.report.figures.style` for their counterparts in it (`page.js` puts them in). Its data are the chart's points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kronlab.report.figures import KINDS, entries
from kronlab.report.figures.curves import family
from kronlab.report.figures.loss import gather as gather_losses
from kronlab.report.figures.pareto import front
from kronlab.report.figures.points import Point, Source, absences, caption_of, done, metric_title, unit_of
from kronlab.report.figures.style import Look

Spec = dict[str, Any]

_DIGITS: Final = 6
_SHAPES: Final = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
                  "<": "triangle-left", ">": "triangle-right"}  # fmt: skip
DIM: Final[Spec] = {"condition": {"test": "lit === '' || datum.series === lit", "value": 1}, "value": 0.12}
_BAND: Final = {"condition": {"test": "lit === datum.series", "value": 0.25}, "value": 0.07}


@dataclass(frozen=True)
class Series:
    """A line or a marker of the legend, by the id that its points carry."""

    id: str
    label: str
    look: Look


@dataclass(frozen=True)
class Mark:
    """A point as it is drawn: as what (mean, seed, across, front), and in which series."""

    point: Point
    series: str
    kind: str


@dataclass(frozen=True)
class Chart:
    """A figure: panels side by side, each a specification, under one legend.

    Attributes:
        kind: of the figure, e.g. pareto.
        title: what is drawn, for people.
        x, y: what the two axes show.
        caption: sentences: scale, seeds, what the intervals are, and what is not in it.
        panels: title -> specification.
    """

    name: str
    kind: str
    title: str
    x: str
    y: str
    caption: str
    marks: Sequence[Mark]
    series: Sequence[Series]
    panels: Mapping[str, Spec] = field(default_factory=dict)


def charts_of(source: Source) -> list[Chart]:
    """The figures that the table's config names at this scale, then a Pareto plot and loss curves where it has none.

    What nothing has been run of is left out.

    Raises:
        ConfigError: an entry that cannot be drawn whatever the records say.
    """
    named: list[tuple[str, Mapping[str, Any]]] = list(entries(source.spec, source.scale))
    kinds = {entry["kind"] for _, entry in named}
    first = next((column for column in source.layout["columns"] if "eval" in column), None)
    if "pareto" not in kinds and first is not None and source.spec.get("kind", "cells") == "cells":
        pareto = {"kind": "pareto", "eval": first["eval"], "metric": first["metric"]}
        named.append((f"{source.spec['name']}_pareto", pareto))
    if "loss" not in kinds and source.spec.get("kind", "cells") == "cells":
        named.append((f"{source.spec['name']}_loss", {"kind": "loss"}))
    charts = []
    for name, entry in named:
        points = gather_losses(source, entry) if entry["kind"] == "loss" else KINDS[entry["kind"]].gather(source, entry)
        if points:
            charts.append(DRAWN[entry["kind"]](name, source, entry, points))
    return charts


def as_data(chart: Chart) -> dict[str, Any]:
    """A chart for JSON."""
    return {
        "name": chart.name,
        "kind": chart.kind,
        "title": chart.title,
        "x": chart.x,
        "y": chart.y,
        "caption": chart.caption,
        "series": [
            {"id": one.id, "label": one.label, "colour": one.look.colour, "shape": _shape(one.look),
             "dash": _dash(one.look)} for one in chart.series
        ],
        "points": [_datum(mark) for mark in chart.marks],
        "panels": [{"title": title, "spec": spec} for title, spec in chart.panels.items()],
    }  # fmt: skip


def drawable(spec: Spec, panel: str, points: Sequence[Mapping[str, Any]]) -> Spec:
    """A specification with its points, as `page.js` completes it: those of the panel and those of every panel."""
    return {**spec, "datasets": {"points": [point for point in points if point.get("panel", "") in ("", panel)]}}


def _datum(mark: Mark) -> dict[str, Any]:
    """The point without what is empty; numbers to as many digits as can be seen."""
    point = mark.point
    values = {
        "key": point.key, "series": mark.series, "kind": mark.kind, "name": point.name,
        "label": point.label if point.group else "", "panel": point.panel,
        "x": point.x, "value": point.value, "low": point.low, "high": point.high, "seeds": point.seeds,
        "how": point.how, "seed": point.seed, "record": point.record,
    }  # fmt: skip
    if point.is_mean:
        known = point.low is not None and point.high is not None
        ends = f"{point.low:.4g} to {point.high:.4g}" if known else "none"
        values["interval"] = f"{ends}, {point.how}" if known and point.how else ends
    rounded = {key: float(f"{v:.{_DIGITS}g}") if isinstance(v, float) else v for key, v in values.items()}
    return {key: value for key, value in rounded.items() if value is not None and value != ""}


# ------------------------------------------------------------------------------------------------------ pieces


def _shape(look: Look) -> str:
    return _SHAPES.get(look.marker, "stroke")


def _dash(look: Look) -> list[float]:
    return [1, 0] if look.dash == "-" else [float(length) for length in look.dash[1]]


def _marks(points: Sequence[Point], series: Callable[[Point], str]) -> list[Mark]:
    """Means and seeds; a seed that is its mean, or lies on no axis, is listed and not drawn."""
    several = {(point.key, point.panel, point.x) for point in points if point.is_mean and point.seeds > 1}

    def kind(point: Point) -> str:
        if point.is_mean:
            return "mean" if point.x is not None else "across"
        return "seed" if point.x is not None and (point.key, point.panel, point.x) in several else "only"

    return [Mark(point, series(point), kind(point)) for point in points]


def _of_rows(source: Source, points: Sequence[Point]) -> list[Series]:
    """One series a row, in the order of the points."""
    looks = source.looks()
    names = {point.key: point.name for point in points}
    return [Series(key, name, looks[key]) for key, name in names.items()]


def base(series: Sequence[Series], height: int, layers: Sequence[Spec], description: str) -> Spec:
    ids, colours = [one.id for one in series], [one.look.colour for one in series]

    def scale(values: Sequence[Any]) -> Spec:
        return {"field": "series", "type": "nominal", "legend": None, "scale": {"domain": ids, "range": list(values)}}

    channels = {
        "color": scale(colours),
        "shape": scale([_shape(one.look) for one in series]),
        "strokeDash": scale([_dash(one.look) for one in series]),
    }

    def looked(layer: Spec) -> Spec:
        wanted = layer.pop("looks", ("color",))
        encoding = {**{name: channels[name] for name in wanted}, **layer.get("encoding", {})}
        return {**layer, "encoding": encoding}

    return {
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"name": "points"},
        "params": [{"name": "lit", "value": ""}],
        "layer": [looked(layer) for layer in layers],
    }


def only(*kinds: str) -> list[Spec]:
    return [{"filter": " || ".join(f"datum.kind === '{kind}'" for kind in kinds)}]


def quantity(name: str, title: str | list[str], **more: Any) -> Spec:
    return {"field": name, "type": "quantitative", "title": title, **more}


def tooltip(y: str, x: str = "", *, of_seed: bool = False) -> list[Spec]:
    """What is told of a point: its row, where it has one its x, its value, and what stands behind that."""
    numbers = [quantity("x", x, format=",.6~g")] if x else []
    numbers.append(quantity("value", y, format=",.6~g"))
    behind = ("seed", "record") if of_seed else ("interval", "seeds")
    return [
        {"field": "name", "type": "nominal", "title": "row"},
        *numbers,
        *({"field": name, "type": "nominal", "title": name} for name in behind),
    ]


def whisker(x: Spec, y: Spec, kinds: Sequence[str], opacity: float = 1.0) -> Spec:
    """An upright interval."""
    return {
        "transform": [*only(*kinds), {"filter": "isValid(datum.low)"}],
        "mark": {"type": "rule", "strokeWidth": 1.4},
        "encoding": {
            "x": x,
            "y": {**y, "field": "low"},
            "y2": {"field": "high"},
            "opacity": {**DIM, "condition": {**DIM["condition"], "value": opacity}},
        },
    }


# ------------------------------------------------------------------------------------------------------- kinds


def _curves(name: str, source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Chart:
    """As `kronlab.report.figures.curves`: means and seeds over a size, one line a method; the baseline across."""
    looks, of_row = source.looks(), {row.key: f"{source.method(row)}/{row.group}" for row in source.rows}
    first = {series: key for key, series in reversed(of_row.items())}
    members: dict[str, list[Point]] = {}
    for point in points:
        members.setdefault(of_row[point.key], []).append(point)
    series = []
    for id, found in members.items():
        keys = {point.key for point in found}
        label = found[0].label if len(keys) == 1 else family(found[0].label)
        group = found[0].group
        series.append(Series(id, f"{label}, {group}" if group else label, looks[first[id]]))
    y_title = metric_title(source, entry)
    y = quantity("value", y_title, scale={"zero": False, "domain": _extent(points), "nice": True})
    panels = {}
    for panel in entry["panels"]:
        title = str(panel.get("title", panel["axis"].rpartition(".")[2]))
        at = sorted({point.position for point in points if point.panel == title})
        if not at:
            continue
        x_title = panel["axis"].rpartition(".")[2]
        x = quantity("x", x_title, scale={"type": "log", "base": 2, "nice": False, "padding": 14},
                      axis={"values": at, "format": "~g", "grid": False})  # fmt: skip
        panels[title] = base(series, 250, _line_layers(x, y, x_title, y_title), f"{y_title} against {x_title}")
    named = [*(key for panel in entry["panels"] for key in panel["rows"]), *filter(None, [entry.get("baseline")])]
    caption = _caption(source, points, named, "faint dots: single seeds; dashed: the baseline")
    better = unit_of(entry["metric"]).better
    return Chart(name, "curves", f"{y_title}, one size at a time; {better}", "size", y_title, caption,
                 _marks(points, lambda point: of_row[point.key]), series, panels)  # fmt: skip


def _line_layers(x: Spec, y: Spec, x_title: str, y_title: str) -> list[Spec]:
    """Means joined by a line, their intervals, each seed a faint dot; what has no place on the axis lies across."""
    return [
        {
            "transform": [*only("across"), {"filter": "isValid(datum.low)"}],
            "mark": {"type": "rect", "opacity": 0.12},
            "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "transform": only("across"),
            "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.4},
            "encoding": {"y": y, "tooltip": tooltip(y_title)},
        },
        {
            "transform": only("seed"),
            "mark": {"type": "point", "filled": True, "size": 18, "opacity": 0.35, "xOffset": 7},
            "encoding": {"x": x, "y": y, "tooltip": tooltip(y_title, x_title, of_seed=True)},
        },
        whisker(x, y, ("mean",)),
        {
            "transform": only("mean"),
            "mark": {"type": "line", "strokeWidth": 1.8},
            "encoding": {"x": x, "y": y, "opacity": DIM},
        },
        {
            "looks": ("color", "shape"),
            "transform": only("mean"),
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "encoding": {"x": x, "y": y, "opacity": DIM, "tooltip": tooltip(y_title, x_title)},
        },
    ]


def _across(name: str, source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Chart:
    """As `kronlab.report.figures.across`: means and seeds over what several evals differ in, one line a row."""
    unit = unit_of(entry["metric"])
    x_title = str(entry.get("title", entry["axis"].rpartition(".")[2]))
    y_title = f"{entry['metric'].replace('_', ' ')} ({unit.name})"
    at = sorted({point.position for point in points})
    x = quantity("x", x_title, scale={"type": "log", "base": 2, "nice": False, "padding": 14},
                  axis={"values": at, "format": "~g", "grid": False})  # fmt: skip
    y = quantity("value", y_title, scale={"zero": False})
    series = _of_rows(source, points)
    panels = {"": base(series, 300, _line_layers(x, y, x_title, y_title), f"{y_title} against {x_title}")}
    return Chart(name, "across", f"{y_title} against {x_title}; {unit.better}", x_title, y_title,
                 _caption(source, points, entry.get("rows"), "faint dots: single seeds"),
                 _marks(points, lambda point: point.key), series, panels)  # fmt: skip


def _extent(points: Sequence[Point]) -> list[float]:
    """Lowest and highest value or end of an interval, so that panels side by side share their axis."""
    found = [v for point in points for v in (point.value, point.low, point.high) if v is not None]
    return [min(found), max(found)]


def _pareto(name: str, source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Chart:
    """As `kronlab.report.figures.pareto`: a metric against parameters, with the front; a base model across."""
    unit, y_title, x_title = unit_of(entry["metric"]), metric_title(source, entry), "trainable parameters"
    placed = [point for point in points if point.is_mean and point.x]
    series = _of_rows(source, points)
    marks = [mark for mark in _marks(points, lambda point: point.key) if mark.kind != "seed"]
    marks = [replace(mark, kind="across") if mark.point.is_mean and not mark.point.x else mark for mark in marks]
    for group in dict.fromkeys(point.group for point in placed):
        members = [point for point in placed if point.group == group]
        best = front(members, less_is_better=unit.less_is_better)
        marks += [Mark(replace(point, low=None, high=None), point.group, "front") for point in best]
    budgets = [point.position for point in placed]
    wide = {"domain": [budgets[0] / 4, budgets[0] * 4]} if min(budgets) == max(budgets) else {}
    x = quantity("x", x_title, scale={"type": "log", "nice": False, "padding": 24, **wide},
                  axis={"format": "~s", "tickCount": 5, "labelOverlap": True, "grid": False})  # fmt: skip
    y = quantity("value", y_title, scale={"zero": False})
    layers: list[Spec] = [
        {
            "looks": (),
            "transform": only("front"),
            "mark": {
                "type": "line",
                "interpolate": "step-after",
                "strokeDash": [2, 3],
                "color": "$ink",
                "opacity": 0.6,
            },
            "encoding": {"x": x, "y": y, "detail": {"field": "series"}},
        },
        {
            "transform": only("across"),
            "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.4},
            "encoding": {"y": y, "tooltip": tooltip(y_title)},
        },
        whisker(x, y, ("mean",), opacity=0.5),
        {
            "looks": ("color", "shape"),
            "transform": only("mean"),
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "stroke": "$surface", "strokeWidth": 1},
            "encoding": {"x": x, "y": y, "opacity": DIM, "tooltip": tooltip(y_title, x_title)},
        },
    ]
    caption = _caption(source, points, entry.get("rows"), "dotted: the best for so many parameters")
    spec = base(series, 320, layers, f"{y_title} against trainable parameters")
    return Chart(name, "pareto", f"{y_title} against trainable parameters; {unit.better}", x_title, y_title, caption,
                 marks, series, {"": spec})  # fmt: skip


def _loss(name: str, source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Chart:
    """As `kronlab.report.figures.loss`: one line a row, its band from the lowest to the highest seed."""
    x_title, y_title, series = "training step", "training loss (nats)", _of_rows(source, points)
    x = quantity("x", x_title, scale={"nice": False}, axis={"grid": False, "tickCount": 6})
    y = quantity("value", y_title, scale={"type": "log", "nice": False}, axis={"tickCount": 6, "format": "~g"})
    shown = [{"filter": "datum.value > 0"}]
    layers: list[Spec] = [
        {
            "transform": [*shown, {"filter": "datum.low > 0"}],
            "mark": {"type": "area", "clip": True},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "opacity": _BAND},
        },
        {
            "looks": ("color", "strokeDash"),
            "transform": shown,
            "mark": {"type": "line", "strokeWidth": 1.7},
            "encoding": {"x": x, "y": y, "opacity": DIM, "tooltip": tooltip(y_title, x_title)},
        },
    ]
    window = round(points[0].position)
    means = f"means over windows of {window} steps and over seeds" if window > 1 else "means over seeds"
    rows = source.pick(entry.get("rows"))
    lost = [row.label for row in rows if done(row) and row.key not in {point.key for point in points}]
    sentences = [f"{source.spec['name']}, scale {source.scale}, {_counted(points)}; {means}"]
    sentences[0] += "; bands: from the lowest to the highest seed" if any(point.seeds > 1 for point in points) else ""
    sentences += [f"No loss curve kept: {', '.join(lost)}"] if lost else []
    marks = [Mark(point, point.key, "mean") for point in points]
    return Chart(name, "loss", "Training loss by method", x_title, y_title, _told([*sentences, *absences(rows)]), marks,
                 series, {"": base(series, 320, layers, "training loss against steps")})  # fmt: skip


def _counted(points: Sequence[Point]) -> str:
    low, high = min(point.seeds for point in points), max(point.seeds for point in points)
    return f"{low} to {high} seeds" if low < high else f"{low} seed{'s' if low > 1 else ''}"


def lying(
    series: Sequence[Series], points: Sequence[Point], x_title: list[str], at: float | None, *, hollow: str
) -> Spec:
    """Rows one below the other with lying intervals and a line at `at`; `hollow` says which markers are not filled.

    Args:
        x_title: its lines, of which the first one says what is drawn.
    """
    names = list(dict.fromkeys(point.label for point in points))
    y = {"field": "label", "type": "nominal", "sort": names, "title": None,
         "axis": {"labelLimit": 150, "ticks": False, "domain": False, "grid": False}}  # fmt: skip
    x = quantity("value", x_title, scale={"zero": False}, axis={"tickCount": 6})
    label = [{"calculate": "datum.label || datum.name", "as": "label"}]
    told = tooltip(x_title[0])
    layers: list[Spec] = [
        {"transform": [*label, {"filter": "isValid(datum.low)"}], "mark": {"type": "rule", "strokeWidth": 1.6},
         "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}, "opacity": DIM}},
        {"transform": label,
         "mark": {"type": "point", "filled": True, "size": 70, "strokeWidth": 1.8, "opacity": 1},
         "encoding": {"y": y, "x": x, "opacity": DIM, "tooltip": told,
                      "stroke": {"field": "series", "type": "nominal", "legend": None},
                      "fill": {"condition": {"test": hollow, "value": "$surface"}, "field": "series",
                               "type": "nominal", "legend": None}}},
    ]  # fmt: skip
    spec = base(series, 0, layers, " ".join(x_title))
    scale = spec["layer"][0]["encoding"]["color"]["scale"]
    last = spec["layer"][1]["encoding"]
    last.pop("color")
    last["stroke"]["scale"] = last["fill"]["scale"] = scale
    spec["height"] = 24 * len(names)
    if at is not None:
        line = {"mark": {"type": "rule", "color": "$ink", "strokeWidth": 1}, "data": {"values": [{"at": at}]}}
        spec["layer"].insert(0, {**line, "encoding": {"x": {"field": "at", "type": "quantitative"}}})
    return spec


def _forest(name: str, source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Chart:
    """As `kronlab.report.figures.forest`: paired differences to the baseline, filled where the interval excludes 0."""
    unit, series = unit_of(entry["metric"]), _of_rows(source, points)
    labels = list(dict.fromkeys(row.label for row in source.pick([source.spec["baseline"]])))
    baseline = labels[0] if len(labels) == 1 else f"{source.spec['baseline']} of the same group"
    title = metric_title(source, entry).rpartition(" (")[0]
    shown_in = unit.name.replace("%", "points")
    x_title = [f"difference to {baseline}", f"({shown_in})", f"{_side(unit.less_is_better)} is better"]
    panels = {
        group: lying(series, [p for p in points if p.panel == group], x_title, 0.0,
                      hollow="!(datum.low > 0 || datum.high < 0)")
        for group in dict.fromkeys(point.panel for point in points)
    }  # fmt: skip
    caption = _caption(source, points, entry.get("rows"), "filled: the interval excludes 0")
    marks = [Mark(point, point.key, "mean") for point in points]
    return Chart(
        name,
        "forest",
        f"{title}: paired difference to {baseline}",
        "",
        " ".join(x_title),
        caption,
        marks,
        series,
        panels,
    )


def _side(less_is_better: bool) -> str:
    return "left" if less_is_better else "right"


def _kept(name: str, source: Source, entry: Mapping[str, Any], points: Sequence[Point]) -> Chart:
    """As `kronlab.report.figures.kept`: the first task alone (hollow) and after the second (filled), a panel a pair."""
    means = [point for point in points if point.is_mean]
    series, x_title = _of_rows(source, means), ["metric of the first task (%)"]
    panels = {
        pair: lying(series, [p for p in means if p.panel == pair], x_title, None, hollow="datum.x === 0")
        for pair in dict.fromkeys(point.panel for point in means)
    }
    caption = _caption(source, points, None, "hollow: after the first task alone, filled: after both")
    marks = [Mark(point, point.key, "mean") for point in means]
    return Chart(name, "kept", "What is kept of the first task", "", x_title[0], caption, marks, series, panels)


def _caption(source: Source, points: Sequence[Point], keys: Any, more: str) -> str:
    picked = source.pick(list(dict.fromkeys(keys))) if keys is not None else source.pick()
    first, *rest = caption_of(source, points, picked)
    return _told([f"{first}; {more}", *rest])


def _told(sentences: Sequence[str]) -> str:
    return " ".join(f"{sentence.rstrip('.')}." for sentence in sentences)


DRAWN: Final[Mapping[str, Callable[[str, Source, Mapping[str, Any], Sequence[Point]], Chart]]] = {
    "curves": _curves,
    "across": _across,
    "pareto": _pareto,
    "loss": _loss,
    "forest": _forest,
    "kept": _kept,
}
"""How each kind of figure (`kronlab.report.figures.KINDS`) is drawn here."""
