"""Figures from records, as SVG and PNG, with the numbers that are drawn as CSV. Reads records only.

A table's config lists what is drawn at each of its scales; a kind of figure gathers points from the rows and draws
them, and nothing but them. The same records give the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from kronlab.errors import ConfigError
from kronlab.report.figures import across, curves, forest, kept, loss, pareto
from kronlab.report.figures.alignment import alignment_figure
from kronlab.report.figures.cost import cost_figure
from kronlab.report.figures.points import Point, Source, as_csv
from kronlab.report.figures.style import write_figure, write_text
from kronlab.report.tables import RowResult

__all__ = ["KINDS", "Kind", "alignment_figure", "cost_figure", "draw", "entries", "write_figure"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        gather: from the rows and a figure's entry in the config to the points; none where nothing can be drawn yet.
        plot: draws these points.
        needs, may: keys of an entry, beside `kind` and `name`.
    """

    gather: Callable[[Source, Mapping[str, Any]], list[Point]]
    plot: Callable[[Source, Mapping[str, Any], Sequence[Point]], Figure]
    needs: frozenset[str]
    may: frozenset[str] = frozenset()


KINDS: Final[Mapping[str, Kind]] = {
    "curves": Kind(curves.gather, curves.plot, frozenset({"eval", "metric", "panels"}), frozenset({"baseline"})),
    "across": Kind(across.gather, across.plot, frozenset({"evals", "metric", "axis"}), frozenset({"rows", "title"})),
    "pareto": Kind(pareto.gather, pareto.plot, frozenset({"eval", "metric"}), frozenset({"rows"})),
    "loss": Kind(loss.gather, loss.plot, frozenset(), frozenset({"rows", "window"})),
    "kept": Kind(kept.gather, kept.plot, frozenset()),
    "forest": Kind(forest.gather, forest.plot, frozenset({"eval", "metric"}), frozenset({"rows"})),
}


def draw(
    spec: Mapping[str, Any], scale: str, rows: Sequence[RowResult], directory: Path, *, results: Path | None = None
) -> list[Path]:
    """Draw the figures of a table at a scale: `<table>[_<name>].{svg,png,csv}` for each entry of its `figures`.

    An entry of which nothing has been run yet is left out, and said so; what is partly there says what is not in it.

    Args:
        rows: as `kronlab.reproduce.load_rows` gives them.
        directory: where the files go.
        results: the results directory that the records are from, where the loss curves lie; None: the one that holds
            `directory` as `figures/<scale>`.

    Returns:
        The files written.

    Raises:
        ConfigError: an entry that cannot be drawn whatever the records say.
    """
    source = Source(spec, scale, rows, results if results is not None else directory.parents[1])
    written = []
    for name, entry in entries(spec, scale):
        kind = KINDS[entry["kind"]]
        points = kind.gather(source, entry)
        if not points:
            log.info("figure %s is left out: nothing of it has been run at scale %s", name, scale)
            continue
        written += write_figure(kind.plot(source, entry, points), directory, name)
        written.append(write_text(as_csv(points), directory, f"{name}.csv"))
    return written


def entries(spec: Mapping[str, Any], scale: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """File name and config of each figure of a table at a scale, checked.

    Raises:
        ConfigError: an unknown kind or key, a key that is missing, two figures of one name.
    """
    seen = set()
    for entry in spec["scales"][scale].get("figures", []):
        name = "_".join(filter(None, [spec["name"], entry.get("name")]))
        where = f"{spec['name']}, scale {scale}, figure {entry.get('name') or entry.get('kind')}"
        if name in seen:
            raise ConfigError(f"{where}: two figures would be {name}; give one of them another name")
        seen.add(name)
        if entry.get("kind") not in KINDS:
            raise ConfigError(f"{where}: kind={entry.get('kind')!r} is not known; use one of {', '.join(KINDS)}")
        kind, given = KINDS[entry["kind"]], set(entry) - {"kind", "name"}
        if lacking := sorted(kind.needs - given):
            raise ConfigError(f"{where}: {', '.join(lacking)} must be given")
        if unknown := sorted(given - kind.needs - kind.may):
            allowed = ", ".join(sorted(kind.needs | kind.may))
            raise ConfigError(f"{where}: {', '.join(unknown)} is no key of kind {entry['kind']}; known are {allowed}")
        yield name, entry
