"""House style of the figures: sizes, colours, captions, and the files that they are written to.

A method has the same colour in every figure. The hues are those of Okabe and Ito (jfly.uni-koeln.de/color), which
colour-blind readers tell apart; their yellow is left out, because it is hardly seen on white. There are more methods
than hues: methods that are akin share one, and marker and dash tell them apart within a figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Text stays text in SVG; ids are drawn from this salt instead of a random one. White is painted, so that a figure can
# be read on a dark page too.
STYLE: Final[Any] = {
    "svg.hashsalt": "kronlab",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d0d0d0",
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.3,
    "errorbar.capsize": 2,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}
WIDTH: Final = 7.2  # inches: a column of a README or of a page
SMALL: Final = 8  # points, the smallest text there is

BLACK, GREY = "#000000", "#767676"
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
METHOD_COLOURS: Final[Mapping[str, str]] = {
    "none": GREY,
    "full": BLACK,
    "cdka": VERMILLION,
    "kron_lora": ORANGE,
    **dict.fromkeys(("lora", "rslora", "lora_plus"), BLUE),  # LoRA with another scale or other rates
    **dict.fromkeys(("dora", "adalora"), SKY),  # of another shape
    **dict.fromkeys(("pissa", "lora_ga"), GREEN),  # from another start
    **dict.fromkeys(("krona", "lokr", "vera"), PURPLE),  # other factors
}
GROUP_COLOURS: Final = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_MARKERS: Final = "osD^vP<>Xhp*"
_DASHES: Final[tuple[Any, ...]] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (2, 1)))


@dataclass(frozen=True)
class Look:
    """How a row is drawn: colour, marker of its points, dash of its line."""

    colour: str
    marker: str = "o"
    dash: Any = "-"


def looks(methods: Mapping[str, str], groups: Mapping[str, str]) -> dict[str, Look]:
    """The look of each row of a table; no two rows of one colour share marker and dash.

    Args:
        methods: row key -> name of its method; an unknown method is grey.
        groups: row key -> its group. Where there are several groups, these give the colours, and a method the marker.
    """
    names = list(dict.fromkeys(groups.values()))
    several = len(names) > 1
    found: dict[str, Look] = {}
    used: dict[str, int] = {}
    for key, method in methods.items():
        if several:
            colour = GROUP_COLOURS[names.index(groups[key]) % len(GROUP_COLOURS)]
        else:
            colour = METHOD_COLOURS.get(method, GREY)
        place = used.get(colour, 0)
        used[colour] = place + 1
        found[key] = Look(colour, _MARKERS[place % len(_MARKERS)], _DASHES[place % len(_DASHES)])
    return found


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on a colour (relative luminance, WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if luminance > 0.179 else "#ffffff"


def caption(figure: Figure, sentences: Iterable[str]) -> None:
    """A few sentences below the figure, wrapped to its width: what its intervals are, and what is not in it."""
    letters = round(figure.get_figwidth() * 72 / (0.53 * SMALL))  # of DejaVu Sans, on average
    text = textwrap.fill(" ".join(sentence.rstrip(".") + "." for sentence in sentences), letters)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, color="#444444")


def log_ticks(axis: Axis, text: Callable[[float], str] = "{:g}".format) -> None:
    """Label a logarithmic axis, whose limits are final, at 1, 2 and 5 of each decade; evenly if it is a short one."""
    low, high = axis.get_view_interval()
    if high < 4 * low:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def write_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write `<name>.svg` and `<name>.png`, each in one step, without date or version in them."""
    written = []
    for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        scratch = _scratch(directory, f"{name}.{suffix}")
        with rc_context(STYLE):
            figure.savefig(scratch, format=suffix, dpi=150, metadata=metadata)
        written.append(scratch.replace(directory / f"{name}.{suffix}"))
    return written


def write_text(text: str, directory: Path, name: str) -> Path:
    """Write a text file in one step."""
    scratch = _scratch(directory, name)
    scratch.write_text(text)
    return scratch.replace(directory / name)


def _scratch(directory: Path, name: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f".{name}.tmp"
