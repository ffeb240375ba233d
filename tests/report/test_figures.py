"""Figures: points against formulas of the test's own; what is drawn is what the CSV says, the same bytes each time."""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from omegaconf import OmegaConf
from scipy import stats

from kronlab.cell import CONFIG_DIR, compose_config
from kronlab.errors import ConfigError
from kronlab.report.figures import KINDS, cost_figure, draw, entries, write_figure
from kronlab.report.figures.pareto import front
from kronlab.report.figures.points import Point, Source
from kronlab.report.figures.style import BLUE, METHOD_COLOURS, VERMILLION, ink_on, looks
from kronlab.report.tables import RowResult

METHODS = [path.stem for path in sorted((CONFIG_DIR / "method").glob("*.yaml")) if path.stem != "adapter"]
CURVES = {
    "kind": "curves",
    "name": "curves",
    "eval": "sums",
    "metric": "exact_match",
    "baseline": "lora",
    "panels": [
        {"axis": "method.r1", "rows": ["c28", "c48"], "title": "r1, r2 = 8"},
        {"axis": "method.r2", "rows": ["c22", "c28"]},
    ],
}
PARETO = {"kind": "pareto", "name": "pareto", "eval": "sums", "metric": "nll_per_token"}
FOREST = {"kind": "forest", "name": "forest", "eval": "sums", "metric": "exact_match"}
LOSS = {"kind": "loss", "name": "loss", "rows": ["lora", "c28"], "window": 4}
ROWS = {
    "base": {"overrides": ["method=none"]},
    "lora": {"overrides": ["method=lora"]},
    "c22": {"overrides": ["method=cdka", "method.r2=2"]},
    "c28": {"overrides": ["method=cdka"]},
    "c48": {"overrides": ["method=cdka", "method.r1=4"]},
}
SIZES = {"lora": {"r": 8}, "c22": {"r1": 2, "r2": 2}, "c28": {"r1": 2, "r2": 8}, "c48": {"r1": 4, "r2": 8}}
PARAMETERS = {"base": 0, "lora": 4000, "c22": 1000, "c28": 2000, "c48": 8000}


def spec(*figures: dict[str, Any], rows: dict[str, Any] = ROWS) -> dict[str, Any]:
    columns = [{"eval": "sums", "metric": "exact_match", "title": "two sums"}]
    return {
        "name": "table5",
        "baseline": "lora",
        "rows": rows,
        "scales": {"mini": {"common": [], "columns": columns, "figures": list(figures)}},
    }


def one(key: str, seed: int | None, accuracy: float, *, group: str = "", n: int = 50, **more: Any) -> dict[str, Any]:
    """A record of which round(accuracy * n) test samples are right."""
    right = [1] * round(accuracy * n) + [0] * (n - round(accuracy * n))
    mean = sum(right) / n
    config: dict[str, Any] = {"method": {"name": "cdka", **SIZES.get(key, {})}, "task": {"name": "sums"}}
    if seed is not None:
        config["seed"] = seed
    nll = [2 * (1 - mean)] * n
    metrics = {
        "exact_match": {"value": mean, "n": n, "stderr": math.sqrt(mean * (1 - mean) / (n - 1))},
        "nll_per_token": {"value": 1 - mean, "n": n, "stderr": 0.01},
    }
    samples = {"id": [f"{i}" for i in range(n)], "correct": right, "nll": nll, "nll_tokens": [2] * n}
    return {
        "id": f"{group}{key}{seed}",
        "scale": "mini",
        "status": "done",
        "config": config,
        "parameters": {"trainable": PARAMETERS.get(key, 4000)},
        "eval": {"sums": {"metrics": metrics, "data_sha": "s", "samples": samples}},
    } | more


def row(key: str, *records: dict[str, Any] | None, group: str = "") -> RowResult:
    return RowResult(f"{group}/{key}" if group else key, f"label of {key}", records, group=group)


def rows(seeds: int = 3) -> list[RowResult]:
    accuracy = {"lora": 0.5, "c22": 0.4, "c28": 0.6, "c48": 0.5}
    found = [row("base", one("base", None, 0.1))]
    return found + [
        row(key, *[one(key, seed, mean + 0.02 * seed) for seed in range(seeds)]) for key, mean in accuracy.items()
    ]


def write_losses(results: Path, record: dict[str, Any], losses: Sequence[float]) -> None:
    path = results / "runs" / "mini" / record["id"] / "loss.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses, start=1)))


def plotted(entry: dict[str, Any], found: Sequence[RowResult], results: Path = Path()) -> tuple[Figure, list[Point]]:
    source = Source(spec(entry), "mini", found, results)
    kind = KINDS[entry["kind"]]
    points = kind.gather(source, entry)
    return kind.plot(source, entry, points), points


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


# ---- curves ----


def test_curves_are_means_over_seeds_with_student_intervals() -> None:
    figure, points = plotted(CURVES, rows())
    for key, accuracies in {"c28": [60, 62, 64], "lora": [50, 52, 54]}.items():
        mean = next(point for point in points if point.key == key and point.is_mean)
        low, high = stats.t.interval(0.95, 2, loc=np.mean(accuracies), scale=stats.sem(accuracies))
        assert (mean.value, mean.low, mean.high) == pytest.approx((np.mean(accuracies), low, high))
        each = [point.value for point in points if point.key == key and not point.is_mean]
        assert each[:3] == pytest.approx(accuracies)
    left, right = figure.axes
    assert list(left.containers[0].lines[0].get_xdata()) == [2, 4]
    assert list(left.containers[0].lines[0].get_ydata()) == pytest.approx([62, 52])
    assert list(right.containers[0].lines[0].get_ydata()) == pytest.approx([42, 62])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["2", "4"]
    assert [tick.get_text() for tick in left.get_xticklabels(minor=True)] == []
    dots = next(line for line in left.lines if line.get_alpha() == 0.4)
    assert sorted(dots.get_ydata()) == pytest.approx([50, 52, 54, 60, 62, 64])
    (band,) = left.patches
    low, high = stats.t.interval(0.95, 2, loc=52, scale=stats.sem([50, 52, 54]))
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((low, high))
    said = words(figure)
    for part in ("two sums (%)", "higher is better", "r1, r2 = 8", "label of lora", "Student's t", "3 seeds"):
        assert part in said


def test_one_seed_has_the_interval_of_its_test_samples_and_no_dot() -> None:
    figure, points = plotted(CURVES, rows(seeds=1))
    mean = next(point for point in points if point.key == "c28" and point.is_mean)
    half = 1.96 * 100 * math.sqrt(0.6 * 0.4 / 49)
    assert (mean.low, mean.high) == pytest.approx((60 - half, 60 + half))
    assert all(len(line.get_xdata()) == 0 for axes in figure.axes for line in axes.lines if line.get_alpha() == 0.4)
    assert "1 seed; intervals: 95 %, over test samples" in words(figure)


def test_a_figure_says_which_cells_are_not_in_it() -> None:
    found = rows()
    found[3] = row("c28", one("c28", 0, 0.6), None, one("c28", 2, 0.0, status="diverged"))
    found[4] = row("c48", None, None, None)
    figure, points = plotted(CURVES, found)
    assert {point.key for point in points} == {"lora", "c22", "c28"}
    said = words(figure).replace("\n", " ")
    assert "Not run yet: label of c28 (1 of 3), label of c48 (3 of 3)." in said
    assert "Diverged, in no mean: label of c28 (1 of 3)." in said
    assert "1 to 3 seeds" in said


def test_a_panel_that_has_not_been_run_is_no_panel() -> None:
    figure, _ = plotted(CURVES, [r for r in rows() if r.key in ("lora", "c22")])
    assert [axes.get_xlabel() for axes in figure.axes] == ["r2"]


def test_an_axis_that_is_no_number_is_one_clear_line() -> None:
    entry = CURVES | {"panels": [{"axis": "method.r1", "rows": ["lora", "c28"]}]}
    with pytest.raises(ConfigError, match=r"^table5: row lora has method.r1=None; a curve needs a positive number$"):
        plotted(entry, rows())


def test_two_panels_of_one_title_are_one_clear_line() -> None:
    entry = CURVES | {"panels": [{"axis": "method.r2", "rows": ["c22"]}, {"axis": "method.r2", "rows": ["c28"]}]}
    with pytest.raises(ConfigError, match="two panels of a figure are called alike; give each its own title"):
        plotted(entry, rows())


# ---- pareto ----


def test_pareto_has_a_marker_for_each_row_and_the_base_model_across() -> None:
    named = PARETO | {"rows": list(ROWS)}
    figure, points = plotted(named, rows())
    (axes,) = figure.axes
    markers = [line for line in axes.lines if line.get_markersize() == 7]
    drawn = {(float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6)) for line in markers}
    assert drawn == {(4000, 0.48), (1000, 0.58), (2000, 0.38), (8000, 0.48)}
    across = [line for line in axes.lines if list(line.get_ydata()) == pytest.approx([0.9, 0.9])]
    assert len(across) == 1
    steps = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(steps.get_xdata()) == [1000, 2000]
    said = words(figure)
    assert all(f"label of {key}" in said for key in ROWS)
    assert "sums, nll per token (nats/token), lower is better" in said
    default = KINDS["pareto"].gather(Source(spec(PARETO), "mini", rows(), Path()), PARETO)
    assert {point.key for point in points} - {point.key for point in default} == {"base"}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_no_other_point_beats(pairs: list[tuple[int, int]], less_is_better: bool) -> None:
    points = [Point("", "", str(i), "", float(x), float(y)) for i, (x, y) in enumerate(pairs)]

    def beats(a: Point, b: Point) -> bool:
        assert a.x is not None
        assert b.x is not None
        as_good = a.value <= b.value if less_is_better else a.value >= b.value
        return a.x <= b.x and as_good and (a.x, a.value) != (b.x, b.value)

    best = {(p.x, p.value) for p in points if not any(beats(other, p) for other in points)}
    found = front(points, less_is_better=less_is_better)
    assert {(p.x, p.value) for p in found} == best
    assert [p.x for p in found] == sorted(p.x for p in found if p.x is not None)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.2])
def test_labels_of_many_rows_at_one_budget_cover_nothing(spread: float) -> None:
    keys = [f"row {i} with a long label" for i in range(14)]
    found = [
        RowResult(key, key, [one("lora", seed, 0.5 + spread * (i % 5 - 2) / 2 + 0.02 * seed) for seed in range(2)])
        for i, key in enumerate(keys)
    ]
    entry = PARETO | {"metric": "exact_match"}
    source = Source(spec(entry, rows={key: {"overrides": ["method=lora"]} for key in keys}), "mini", found, Path())
    figure = KINDS["pareto"].plot(source, entry, KINDS["pareto"].gather(source, entry))
    renderer = FigureCanvasAgg(figure).get_renderer()
    (axes,) = figure.axes
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == sorted(keys)
    for one_box, other in combinations([Text.get_window_extent(text, renderer) for text in axes.texts], 2):
        assert not one_box.overlaps(other)
    inside = axes.get_window_extent(renderer)
    assert all(box.x0 >= inside.x0 and box.x1 <= inside.x1 for box in boxes)


# ---- loss ----


def test_loss_is_the_mean_over_windows_and_seeds(tmp_path: Path) -> None:
    found = rows(seeds=2)
    lora, cdka = found[1], found[3]
    losses = np.random.default_rng(0).uniform(0.1, 2, size=(3, 10))
    for record, values in zip([*lora.records, cdka.records[0]], losses, strict=True):
        assert record is not None
        write_losses(tmp_path, dict(record), values.tolist())
    figure, points = plotted(LOSS, found, tmp_path)
    means = losses[:, :8].reshape(3, 2, 4).mean(2)
    of_lora = [point for point in points if point.key == "lora"]
    assert [point.x for point in of_lora] == [4, 8], "two whole windows of four; the last two steps are no window"
    for place, point in enumerate(of_lora):
        both = means[:2, place]
        assert (point.value, point.low, point.high) == pytest.approx((both.mean(), both.min(), both.max()))
    of_cdka = [point for point in points if point.key == "c28"]
    assert [point.value for point in of_cdka] == pytest.approx(means[2])
    assert all(point.low is None and point.seeds == 1 for point in of_cdka)
    last = {"lora": means[:2, 1].mean(), "c28": means[2, 1]}
    shown = [text.get_text().split("  ")[0] for text in figure.legends[0].get_texts()]
    assert shown == [f"label of {key}" for key in sorted(last, key=lambda key: -last[key])]
    assert "windows of 4 steps" in words(figure).replace("\n", " ")
    without, _ = plotted(LOSS | {"rows": ["lora", "c48"]}, found, tmp_path)
    assert "No loss curve kept: label of c48." in words(without).replace("\n", " ")


def test_without_a_window_a_curve_has_at_most_25_points(tmp_path: Path) -> None:
    found = rows(seeds=1)
    record = found[1].records[0]
    assert record is not None
    write_losses(tmp_path, dict(record), [1.0] * 399)
    _, points = plotted({"kind": "loss"}, found, tmp_path)
    assert [point.x for point in points] == [16.0 * k for k in range(1, 25)]


# ---- forest ----


def test_forest_is_filled_where_the_interval_excludes_zero() -> None:
    figure, points = plotted(FOREST, rows(seeds=1))
    by_key = {point.key: point for point in points}
    assert list(by_key) == ["c22", "c28", "c48"], "the baseline and the untrained model are not in it"
    assert {key: round(point.value, 6) for key, point in by_key.items()} == {"c22": -10, "c28": 10, "c48": 0}
    (axes,) = figure.axes
    for container, point in zip(axes.containers, points, strict=True):
        assert point.low is not None
        assert point.high is not None
        marker = container.lines[0]
        apart = point.low > 0 or point.high < 0
        assert (to_hex(marker.get_markerfacecolor()) != "#ffffff") == apart
    assert by_key["c28"].low is not None
    assert by_key["c28"].low > 0
    assert (by_key["c48"].low, by_key["c48"].high) == (0, 0)
    assert "two sums: difference to label of lora (percentage points); right is better" in words(figure)


def test_every_group_is_compared_with_its_own_baseline() -> None:
    found = []
    for group, shift in (("small", 0.0), ("large", 0.3)):
        for key, accuracy in (("lora", 0.4), ("c28", 0.5)):
            record = one(key, 0, accuracy + shift, group=group)
            found.append(row(key, record, group=group))
    figure, points = plotted(FOREST, found)
    assert [(point.panel, round(point.value, 6)) for point in points] == [("small", 10), ("large", 10)]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["small", "large"]


# ---- colours ----


def test_all_methods_have_a_colour_and_no_two_rows_look_alike() -> None:
    assert set(METHODS) <= set(METHOD_COLOURS), "give a new method a colour in report/figures/style.py"
    keys = {f"{name} {i}": name for name in METHOD_COLOURS for i in range(2)}
    found = looks(keys, dict.fromkeys(keys, ""))
    assert len({(look.colour, look.marker) for look in found.values()}) == len(found)
    assert all(found[key].colour == METHOD_COLOURS[name] for key, name in keys.items())
    grouped = looks({"a/x": "lora", "a/y": "cdka", "b/x": "lora"}, {"a/x": "a", "a/y": "a", "b/x": "b"})
    assert grouped["a/x"].colour == grouped["a/y"].colour != grouped["b/x"].colour
    assert grouped["a/x"].marker != grouped["a/y"].marker


def test_text_on_a_bar_can_be_read() -> None:
    def luminance(colour: str) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], channels))

    for colour in set(METHOD_COLOURS.values()):
        light, dark = sorted((luminance(colour), luminance(ink_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_a_method_is_coloured_the_same_in_every_figure() -> None:
    curves, _ = plotted(CURVES, rows())
    forest, _ = plotted(FOREST, rows())
    assert to_hex(curves.axes[0].containers[0].lines[0].get_color()).upper() == VERMILLION
    assert {to_hex(c.lines[0].get_color()).upper() for c in forest.axes[0].containers} == {VERMILLION}
    assert to_hex(curves.axes[0].patches[0].get_facecolor()).upper() == BLUE


# ---- files ----


def test_draw_writes_picture_and_data_the_same_bytes_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = spec(CURVES, PARETO, FOREST, LOSS)
    found = rows()
    record = found[1].records[0]
    assert record is not None
    write_losses(tmp_path / "one", dict(record), [3.0, 2.0, 1.0, 1.0])
    directories = [tmp_path / "one" / "figures" / "mini", tmp_path / "two"]
    written = [
        draw(table, "mini", found, d, results=r) for d, r in zip(directories, [None, tmp_path / "one"], strict=True)
    ]
    names = [
        f"table5_{kind}.{suffix}" for kind in ("curves", "pareto", "forest", "loss") for suffix in ("svg", "png", "csv")
    ]
    assert [path.name for path in written[0]] == names
    assert sorted(path.name for path in directories[0].iterdir()) == sorted(names)
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    with (directories[0] / "table5_forest.csv").open() as file:
        read = {line["key"]: line for line in csv.DictReader(file)}
    assert float(read["c28"]["value"]) == pytest.approx(10)
    assert read["c28"]["seeds"] == "3"
    with (directories[0] / "table5_curves.csv").open() as file:
        seeds = [line for line in csv.DictReader(file) if line["panel"] == "r1, r2 = 8" and line["seed"]]
    assert {line["record"] for line in seeds} == {f"{key}{seed}" for key in ("c28", "c48") for seed in range(3)}
    assert not caplog.records


def test_what_has_not_been_run_is_left_out_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = [row(key, None) for key in ROWS]
    with caplog.at_level(logging.INFO):
        written = draw(spec(CURVES, PARETO, FOREST, LOSS), "mini", nothing, tmp_path / "figures" / "mini")
    assert written == []
    assert not (tmp_path / "figures").exists()
    assert caplog.messages == [
        f"figure table5_{name} is left out: nothing of it has been run at scale mini"
        for name in ("curves", "pareto", "forest", "loss")
    ]
    assert draw(spec(), "mini", nothing, tmp_path) == []


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"kind": "pie"},
            "table5, scale mini, figure pie: kind='pie' is not known; "
            "use one of curves, across, pareto, loss, kept, forest",
        ),
        (
            {"name": "x"},
            "table5, scale mini, figure x: kind=None is not known; "
            "use one of curves, across, pareto, loss, kept, forest",
        ),
        ({"kind": "pareto"}, "table5, scale mini, figure pareto: eval, metric must be given"),
        (
            LOSS | {"rows": ["lora", "cdak"]},
            "table5: a figure names row 'cdak'; the table has base, lora, c22, c28, c48",
        ),
        (
            PARETO | {"baseline": "lora"},
            "table5, scale mini, figure pareto: baseline is no key of kind pareto; known are eval, metric, rows",
        ),
    ],
)
def test_a_wrong_entry_is_one_clear_line(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        draw(spec(entry), "mini", rows(), tmp_path)
    assert str(error.value) == said


def test_two_figures_cannot_have_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two figures would be table5_loss; give one of them another name"):
        draw(spec(LOSS, LOSS), "mini", rows(), tmp_path)


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "table").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_figures_of_every_table_are_well_formed(path: Path) -> None:
    table = OmegaConf.to_container(compose_config([f"table={path.stem}"], name="tables").table, resolve=True)
    assert isinstance(table, dict)
    for scale in table["scales"]:
        for _, entry in entries(table, scale):  # type: ignore[arg-type]
            named = [key for panel in entry.get("panels", []) for key in panel["rows"]]
            named += [*entry.get("rows", []), *filter(None, [entry.get("baseline")])]
            assert set(named) <= set(table["rows"]), f"{path.stem}, {scale}: rows that the table does not have"
            if "eval" in entry:
                shown = {(c.get("eval"), c.get("metric")) for c in table["scales"][scale]["columns"]}
                assert (entry["eval"], entry["metric"]) in shown, f"{path.stem}, {scale}: a figure of no column"


# ---- cost ----

COST = {"baseline": "lora", "rows": {key: {} for key in ("base", "lora", "cdka", "other")}}


def bench() -> dict[str, Any]:
    """Two batches; `other` could not be measured, and in the second batch neither could `cdka`."""

    def measured(label: str, factor: float) -> dict[str, Any]:
        return {"label": label, "wall": [factor * t for t in (1.0, 1.1, 0.9)], "saved_bytes": int(1000 * factor)}

    peers = {
        "base": measured("frozen base", 0.5),
        "lora": measured("LoRA r=8", 1.0),
        "cdka": measured("CDKA (2,2,8)", 0.8),
        "other": {"label": "Other", "absent": "not installed"},
    }
    configs = {key: {"overrides": [f"method={key}"]} for key in peers}
    first = {"part": "step", "settings": {"rows": 8, "length": 128, "dtype": "bf16", "peers": configs}, "peers": peers}
    second = copy.deepcopy(first)
    second["settings"]["length"] = 512
    del second["peers"]["cdka"]
    return {"name": "cost", "cases": [first, {"part": "layer"}, second]}


def test_bars_are_the_ratios_to_the_baseline() -> None:
    figure = cost_figure(COST, bench())
    time, kept, later, _ = figure.axes
    assert [bar.get_width() for bar in time.containers[1]] == pytest.approx([0.5, 1.0, 0.8])
    assert [bar.get_width() for bar in kept.containers[0]] == pytest.approx([0.5, 1.0, 0.8])
    assert [label.get_text() for label in time.get_yticklabels()] == ["frozen base", "LoRA r=8", "CDKA (2,2,8)"]
    assert [label.get_text() for label in later.get_yticklabels()] == ["frozen base", "LoRA r=8"]
    assert later.get_title() == "8x512 bf16"
    assert time.get_xlabel() == "time of a step / LoRA r=8 (1 s)"
    colours = [to_hex(bar.get_facecolor()).upper() for bar in time.containers[1]]
    assert colours[1:] == [BLUE, VERMILLION]


def test_without_the_baseline_there_are_no_ratios_and_no_crash() -> None:
    alone = bench()
    for case in alone["cases"]:
        case.get("peers", {}).pop("lora", None)
    figure = cost_figure(COST, alone)
    assert all(not axes.patches for axes in figure.axes)


def test_same_record_same_bytes(tmp_path: Path) -> None:
    first = write_figure(cost_figure(COST, bench()), tmp_path / "a", "cost")
    second = write_figure(cost_figure(COST, bench()), tmp_path / "b", "cost")
    assert [path.name for path in first] == ["cost.svg", "cost.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["cost.png", "cost.svg"]
    for one_path, other in zip(first, second, strict=True):
        assert one_path.read_bytes() == other.read_bytes()
    text = first[0].read_text()
    assert "CDKA (2,2,8)" in text, "text stays text"
    assert "Other" not in text
