"""Labels beside points, placed so that they cover neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from kronlab.report.figures.style import GREY, SMALL

_DISTANCES: Final = (7, 12, 18, 26, 36, 48, 62, 78, 96, 116, 138)  # points, from a point to the edge of its label
_DIRECTIONS: Final = 16
_ROUNDS: Final = 6
_MARKER: Final = 9.0  # points, width and height of a marker and some air
_BAR: Final = 4.0  # likewise, width of an interval
# What a place costs beside its distance in points: for each square point that it covers or that lies outside, for each
# place on its line that lies in something, for each line of another label that its own crosses.
_COVERED, _THROUGH, _CROSSED = 5.0, 20.0, 60.0


@dataclass(frozen=True)
class Label:
    """A text for the point (x, y), whose interval reaches from `low` to `high`; all in data coordinates."""

    text: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    colour: str = GREY


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[Label],
    *,
    lines: Sequence[Label] = (),
    steps: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Write each label near its point, with a line to it, and each of `lines` on its line at the left end.

    Greedy: each label takes the cheapest place while the others stay where they are, for a few rounds. The layout of
    the figure is fixed by this; call it last.

    Args:
        steps: corners of step lines (drawn with where="post"), which are not to be covered either.
    """
    if not labels:
        return
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # the constrained layout; then it is kept as it is
    figure.set_layout_engine("none")
    unit = figure.dpi / 72  # pixels in a point

    def box_of(text: Annotation) -> np.ndarray:
        return np.asarray(text.get_window_extent(renderer).extents) / unit

    def at(x: float, y: float) -> np.ndarray:
        return np.asarray(axes.transData.transform((x, y))) / unit

    solid = [box_of(axes.annotate(line.text, (line.x, line.y), (4, 3), **_OFFSET)) for line in lines]
    solid += [_box(at(label.x, label.y), np.full(2, _MARKER)) for label in labels]
    thin = []
    for label in labels:
        if label.low is not None and label.high is not None:
            half = np.array([_BAR / 2, 0])
            thin.append(np.concatenate([at(label.x, label.low) - half, at(label.x, label.high) + half]))
    for corners in steps:
        for (x0, y0), (x1, y1) in pairwise(corners):
            turns = [at(x0, y0), at(x1, y0), at(x1, y1)]
            thin += [np.concatenate([np.minimum(a, b) - 1, np.maximum(a, b) + 1]) for a, b in pairwise(turns)]
    inside = np.asarray(axes.get_window_extent(renderer).extents) / unit
    anchors = np.array([at(label.x, label.y) for label in labels])
    texts = [axes.annotate(label.text, (label.x, label.y), (0, 0), **_CENTRED) for label in labels]
    sizes = np.array([box[2:] - box[:2] for box in map(box_of, texts)]) + 3.0
    offsets = _offsets(anchors, sizes, np.array(solid), np.array(thin).reshape(-1, 4), inside)
    for label, text, offset in zip(labels, texts, offsets, strict=True):
        text.remove()
        line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(label.text, (label.x, label.y), tuple(offset.tolist()), arrowprops=line, **_CENTRED)


_OFFSET: Final[Any] = {"textcoords": "offset points", "fontsize": SMALL}
_CENTRED: Final[Any] = {**_OFFSET, "ha": "center", "va": "center"}


def _offsets(
    anchors: np.ndarray, sizes: np.ndarray, solid: np.ndarray, thin: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """Offsets (n, 2) of the centres of n labels from their points (n, 2), given their sizes (n, 2); all in points.

    Args:
        solid: boxes (k, 4) as x0, y0, x1, y1 that neither a label nor its line is to cover.
        thin: boxes that no label is to cover; its line may.
        inside: the box (4,) that is not to be left.
    """
    n = len(anchors)
    chosen = np.zeros((n, 2))
    placed: list[int] = []
    for _ in range(_ROUNDS):
        for i in np.argsort(-anchors[:, 1], kind="stable"):  # from the top
            others = [j for j in placed if j != i]
            boxes = np.array([*solid, *(_box(anchors[j] + chosen[j], sizes[j]) for j in others)])
            tips = np.array([anchors[j] + _edge(chosen[j], sizes[j]) for j in others]).reshape(-1, 2)
            offsets = _candidates(sizes[i])
            centres = anchors[i] + offsets
            at = np.concatenate([centres - sizes[i] / 2, centres + sizes[i] / 2], axis=1)
            ends = anchors[i] + np.array([_edge(offset, sizes[i]) for offset in offsets])
            cost = np.linalg.norm(ends - anchors[i], axis=1)
            cost += _COVERED * (
                _overlaps(at, np.concatenate([boxes, thin])).sum(1)
                + sizes[i].prod()
                - _overlaps(at, inside[None])[:, 0]
            )
            cost += _THROUGH * _inside(anchors[i], ends, boxes)
            cost += _CROSSED * _crossings(anchors[i], ends, anchors[others], tips)
            chosen[i] = offsets[int(cost.argmin())]
            if i not in placed:
                placed.append(int(i))
    return chosen


def _candidates(size: np.ndarray) -> np.ndarray:
    """Offsets (m, 2) of a label's centre from its point: its edge lies at each distance in each direction."""
    angles = 2 * math.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
    ways = np.round(np.stack([np.cos(angles), np.sin(angles)], axis=1), 9)
    found: np.ndarray = (np.array(_DISTANCES)[:, None, None] * ways + ways * size / 2).reshape(-1, 2)
    return found


def _edge(offset: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where the line from a point to the centre of its label, `offset` away, meets the label."""
    reach = np.divide(size / 2, np.abs(offset), out=np.full(2, np.inf), where=offset != 0).min()
    met: np.ndarray = offset * max(0.0, 1 - reach)
    return met


def _box(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.concatenate([centre - size / 2, centre + size / 2])


def _overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Areas (m, k) that boxes (m, 4) and (k, 4) share."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    shared: np.ndarray = np.maximum(high - low, 0).prod(-1)
    return shared


def _inside(start: np.ndarray, ends: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """How many of twenty places on each line from `start` to `ends` (m, 2) lie in a box (k, 4); (m,)."""
    places = start + np.linspace(0.05, 1, 20)[None, :, None] * (ends - start)[:, None, :]
    low, high = boxes[:, :2], boxes[:, 2:]
    within = ((places[:, :, None] > low) & (places[:, :, None] < high)).all(-1)
    count: np.ndarray = within.sum((1, 2))
    return count


def _crossings(start: np.ndarray, ends: np.ndarray, starts: np.ndarray, tips: np.ndarray) -> np.ndarray:
    """How many of the lines from `starts` (k, 2) to `tips` (k, 2) each line from `start` to `ends` (m, 2) crosses."""

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.sign((b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0])

    ours, theirs, tips = ends[:, None], starts[None], tips[None]
    apart = side(start, ours, theirs) * side(start, ours, tips) < 0
    count: np.ndarray = (apart & (side(theirs, tips, start[None, None]) * side(theirs, tips, ours) < 0)).sum(1)
    return count
