"""Charts of what is measured and made of no cells: the cost of a step, and alignment with full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from kronlab.report.alignment import layers_by_kind, measured, predicted
from kronlab.report.alignment_training import adapters, overlap_over_chance, series
from kronlab.report.cost import cases_of, setting, time_ratio
from kronlab.report.dashboard.charts import (
    DIM,
    Chart,
    Mark,
    Series,
    Spec,
    base,
    lying,
    only,
    quantity,
    tooltip,
    whisker,
)
from kronlab.report.figures.points import Point
from kronlab.report.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    METHOD_COLOURS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Look,
    looks,
)

Record = Mapping[str, Any]

_STEPS: Final = (BLUE, GREEN, PURPLE, VERMILLION, SKY)
_MARKERS: Final = "os^vP<>"
_DASHES: Final[tuple[Any, ...]] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))


def cost_chart(spec: Mapping[str, Any], record: Record) -> Chart | None:
    """Time of a step over the baseline's with its interval, as table 9 has it; a panel a batch and precision."""
    points = []
    for case in cases_of(record, "step"):
        for key, peer in case["peers"].items():
            ratio = time_ratio(case, key, spec["baseline"])
            if ratio is not None and key != spec["baseline"]:
                value, low, high = ratio
                points.append(Point(setting(case), "", key, peer["label"], None, value, low, high, len(peer["wall"])))
    if not points:
        return None
    labels = {point.key: point.label for point in points}
    drawn = looks({key: _method(record, key) for key in labels}, dict.fromkeys(labels, ""))
    shown = [Series(key, label, drawn[key]) for key, label in labels.items()]
    baseline = next(
        (c["peers"][spec["baseline"]]["label"] for c in record["cases"] if spec["baseline"] in c["peers"]), ""
    )
    title = [f"time / {baseline}", "left is better"]
    panels = {
        panel: lying(
            shown, [p for p in points if p.panel == panel], title, 1.0, hollow="!(datum.low > 1 || datum.high < 1)"
        )
        for panel in dict.fromkeys(point.panel for point in points)
    }
    caption = (
        f"{record['name']}, scale {record['scale']}; ratio of medians over interleaved rounds; intervals: 95 %, "
        "over rounds (bootstrap); filled: the interval excludes 1."
    )
    marks = [Mark(point, point.key, "mean") for point in points]
    return Chart(
        f"{record['name']}_time", "forest", f"Time of a step / {baseline}", "", title[0], caption, marks, shown, panels
    )


def _method(record: Record, key: str) -> str:
    settings = next(case["settings"]["peers"][key] for case in record["cases"] if key in case["settings"]["peers"])
    named = [text.removeprefix("method=") for text in settings.get("overrides", []) if text.startswith("method=")]
    return named[0] if named else "none"


def alignment_chart(record: Record) -> Chart:
    """Measured against predicted cosine of the first step, a panel an optimiser; as the figure of table 12."""
    points, marks = record["settings"]["points"], []
    groups = {key: "Kron-LoRA" if p["method"] == "kron_lora" else f"r1 = {p.get('r1', 1)}" for key, p in points.items()}
    widths = sorted({name for name in groups.values() if name != "Kron-LoRA"}, key=lambda name: int(name[5:]))
    shown = [Series(w, w, Look(_STEPS[i % len(_STEPS)], _MARKERS[i % len(_MARKERS)])) for i, w in enumerate(widths)]
    if "Kron-LoRA" in groups.values():
        shown.append(Series("Kron-LoRA", "Kron-LoRA", Look(ORANGE, "D")))
    panels: dict[str, Spec] = {}
    x_title, y_title = "predicted √(r / (r + r1·d_in/r2))", "measured cosine with the full gradient"
    x = quantity("x", x_title, scale={"type": "log", "nice": False, "padding": 10}, axis=_LOG)
    y = quantity("value", y_title, scale={"type": "log", "nice": False, "padding": 10}, axis=_LOG)
    for optimiser, title in {"sgd": "gradient descent", "adamw": "AdamW"}.items():
        found = []
        for key, group in groups.items():
            cosines, finite = measured(record, key, optimiser), predicted(record, key, "finite")
            for (kind, *_), chosen in layers_by_kind(record).items():
                value, spread = float(cosines[chosen].mean()), float(cosines[chosen].std())
                at = float(finite[chosen].mean())
                found.append(Mark(Point(title, "", key, f"{key}, {kind}", at, value, value - spread, value + spread,
                                        how="± standard deviation over layers and draws"), group, "mean"))  # fmt: skip
        marks += found
        ends = [mark.point.position for mark in found]
        diagonal = [{"x": min(ends), "value": min(ends)}, {"x": max(ends), "value": max(ends)}]
        layers: list[Spec] = [
            {"looks": (), "data": {"values": diagonal}, "encoding": {"x": x, "y": y},
             "mark": {"type": "line", "strokeDash": [5, 4], "color": "$ink", "strokeWidth": 1}},
            {**whisker(x, y, ("mean",)), "mark": {"type": "rule", "strokeWidth": 0.7, "clip": True}},
            {"looks": ("color", "shape"), "mark": {"type": "point", "filled": True, "size": 28},
             "transform": only("mean"),
             "encoding": {"x": x, "y": y, "opacity": DIM, "tooltip": tooltip(y_title, x_title)}},
        ]  # fmt: skip
        layers[1]["transform"] = [*layers[1]["transform"], {"filter": "datum.low > 0"}]
        panels[title] = base(shown, 300, layers, f"{title}: {y_title} against {x_title}")
    caption = (
        f"{record['name']}, scale {record['scale']}; a dot is a grid point in one kind of layer, its bar the standard "
        "deviation over layers and draws; dashed: measured as predicted."
    )
    return Chart(record["name"], "scatter", "Alignment of the first step with the full gradient", x_title, y_title,
                 caption, marks, shown, panels)  # fmt: skip


_LOG: Final = {"format": "~g", "tickCount": 5, "labelOverlap": True}


def training_chart(record: Record) -> Chart:
    """Cosine, and overlap over what chance gives, at every kept step; one line an adapter, bands over seeds."""
    keys = adapters(record)
    labels = {key: str(record["rows"][key]["label"]) for key in keys}
    shown = [
        Series(key, label, look) for (key, label), look in zip(labels.items(), _training_looks(labels), strict=True)
    ]
    panels, marks = {}, []
    whats: dict[str, tuple[str, Callable[[str], np.ndarray]]] = {
        "cosine": ("cosine with the update of full fine-tuning", lambda key: series(record, key, "cosine")),
        "overlap": ("overlap of leading singular vectors / chance", lambda key: overlap_over_chance(record, key)),
    }
    x = quantity("x", "optimizer step", scale={"type": "log", "base": 2, "nice": False},
                 axis={"values": list(record["steps"]), "format": "~g", "labelOverlap": True,
                       "grid": False})  # fmt: skip
    for title, (y_title, values_of) in whats.items():
        for key in keys:
            marks += _along(record, title, key, labels[key], values_of(key))
        y = quantity("value", y_title, scale={"zero": False})
        layers: list[Spec] = [
            {"mark": {"type": "area"}, "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"},
                                                    "opacity": {**DIM, "value": 0.02, "condition": _FAINT}}},
            {"looks": ("color", "strokeDash"), "mark": {"type": "line", "strokeWidth": 1.7},
             "encoding": {"x": x, "y": y, "opacity": DIM, "tooltip": tooltip(y_title, "optimizer step")}},
        ]  # fmt: skip
        panels[title] = base(shown, 300, layers, f"{y_title} against steps")
    seeds = len(next(iter(record["rows"].values()))["seeds"])
    caption = (
        f"{record['name']}, scale {record['scale']}, {seeds} seeds; means over layers and seeds; bands: their range."
    )
    return Chart(record["name"], "lines", "Adapters against full fine-tuning along training", "optimizer step",
                 "cosine or overlap", caption, marks, shown, panels)  # fmt: skip


_FAINT: Final = {"test": "lit === '' || datum.series === lit", "value": 0.1}


def _along(record: Record, panel: str, key: str, label: str, values: np.ndarray) -> list[Mark]:
    """values: (seeds, steps)."""
    found = []
    for step, at in zip(record["steps"], values.T, strict=True):
        point = Point(panel, "", key, label, float(step), float(at.mean()), float(at.min()), float(at.max()), len(at),
                      "lowest and highest seed")  # fmt: skip
        found.append(Mark(point, key, "mean"))
    return found


def _training_looks(labels: Mapping[str, str]) -> Sequence[Look]:
    """LoRA and Kron-LoRA in their colours, CDKA by colour and dash in the order of the rows."""
    found, ours = [], 0
    for label in labels.values():
        if label.startswith("CDKA"):
            found.append(Look(_STEPS[1:][ours % 4], dash=_DASHES[ours // 4 % len(_DASHES)]))
            ours += 1
        else:
            found.append(Look(BLACK if label.startswith("LoRA") else METHOD_COLOURS["kron_lora"]))
    return found
