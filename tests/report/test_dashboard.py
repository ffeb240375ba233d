"""The dashboard without a browser: its numbers are the tables', its charts draw, it needs nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from dashboards import CLAIMS, METHODS, data_of, record, rows, section_of, write_page, write_store

from kronlab.cell import CONFIG_DIR
from kronlab.dashboard import collect, write_dashboard
from kronlab.errors import CheckpointError, ConfigError
from kronlab.report.claim_tests import Effect
from kronlab.report.dashboard import html, page_data
from kronlab.report.dashboard.charts import drawable
from kronlab.report.figures import KINDS
from kronlab.report.figures.style import GROUP_COLOURS, METHOD_COLOURS
from kronlab.report.tables import RowResult

RESULTS = CONFIG_DIR.parent / "results"
SIX_MEGABYTES = 6_000_000


@pytest.fixture(scope="module")
def vl_convert() -> Any:
    return pytest.importorskip("vl_convert", reason="the plotting library (vl-convert-python) is not installed")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """Of our own records: a table of cells at two scales, one of a benchmark, one of an alignment."""
    return collect(RESULTS, ["table2", "table9", "table12"])


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._script = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id") or "" if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self._script = ""

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def embedded(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Parsed(text).scripts["data"])
    return found


# ------------------------------------------------------------------------------------------------------ numbers


def blocks_of(markdown: str) -> list[list[list[str]]]:
    """The pipe tables of a file: lines of cells, without heads' rules."""
    blocks: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if set(cells[0]) != {"-"}:
                blocks[-1].append(cells)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def written(section: dict[str, Any]) -> Path:
    """Where the table of a section is committed."""
    folders = [RESULTS / kind / section["scale"] for kind in ("tables", "bench", "align")]
    return next(path for folder in folders if (path := folder / f"{section['name']}.md").is_file())


def test_every_number_is_the_committed_tables(committed: dict[str, Any]) -> None:
    names = {section["id"] for section in committed["tables"]}
    assert {"table2-mini", "table2-small", "table9-mini", "table12-mini", "table12-training-mini"} <= names
    for section in committed["tables"]:
        blocks = blocks_of(written(section).read_text())
        assert len(blocks) == len(section["blocks"])
        for theirs, ours in zip(blocks, section["blocks"], strict=True):
            assert theirs[0][-len(ours["columns"]) :] == [column["title"] for column in ours["columns"]]
            for line, row in zip(theirs[1:], range(len(section["rows"])), strict=True):
                assert line[-len(ours["columns"]) - 1] == section["rows"][row]["label"]
                assert line[-len(ours["columns"]) :] == [column["cells"][row] for column in ours["columns"]]


def test_every_number_has_a_source_on_disk(committed: dict[str, Any]) -> None:
    for section in committed["tables"]:
        for place, row in enumerate(section["rows"]):
            if not any(column["cells"][place] for block in section["blocks"] for column in block["columns"]):
                continue
            if section["measured"]:
                assert (RESULTS / section["measured"]["path"]).is_file()
                continue
            sources = [committed["records"][at] for at in row["records"]]
            assert sources or row["published"]
            for one in sources:
                assert (
                    json.loads((RESULTS / "runs" / one["scale"] / f"{one['id']}.json").read_text())["id"] == one["id"]
                )
                assert one["command"]


def test_a_number_of_a_metric_is_made_of_the_values_of_its_records(committed: dict[str, Any]) -> None:
    section = next(s for s in committed["tables"] if s["id"] == "table2-mini")
    column = next(c for c in section["blocks"][0]["columns"] if c["parts"] == ["chain_sum · exact_match"])
    for place, row in enumerate(section["rows"]):
        (one,) = (committed["records"][at] for at in row["records"])
        assert column["values"][place] == pytest.approx(100 * one["metrics"]["chain_sum · exact_match"][0])


def test_claims_are_told_as_in_their_file(committed: dict[str, Any]) -> None:
    shipped = json.loads((RESULTS / "claims.json").read_text())
    assert [(c["key"], c["verdict"]) for c in committed["claims"]["claims"]] == [
        (c["key"], c["verdict"]) for c in shipped["claims"]
    ]
    told = " ".join((RESULTS / "claims.md").read_text().split())
    effects = [line["text"] for claim in committed["claims"]["claims"] for line in claim["evidence"] if line["text"]]
    assert len(effects) > 10
    assert [text for text in effects if text not in told] == []


def test_the_made_up_claim_is_in_points() -> None:
    (claim,) = page_data([], [], [], CLAIMS)["claims"]["claims"]
    assert claim["evidence"][0]["text"] == "+3.1 points [+1.2, +5.0]"
    assert claim["evidence"][0]["text"] == Effect(0.031, 0.012, 0.05, "points", 3, "seeds", "samples").text


def test_states_and_seeds_of_rows(tmp_path: Path) -> None:
    (section,) = data_of(rows(), tmp_path)["tables"]
    by_key = {row["key"]: row for row in section["rows"]}
    assert by_key["none"]["seeds"] == 0
    assert by_key["lora"]["seeds"] == 3
    assert (by_key["pissa"]["seeds"], len(by_key["pissa"]["records"])) == (2, 3)  # one failed
    assert (len(by_key["dora"]["records"]), by_key["dora"]["cells"]) == (2, 3)  # one not run
    column = section["blocks"][0]["columns"][2]
    assert column["cells"][METHODS.index("krona")] == "diverged"
    assert column["values"][METHODS.index("krona")] is None
    assert (section["recorded"], section["planned"]) == (21, 22)


# ------------------------------------------------------------------------------------------------------- charts


def drawn(vl_convert: Any, chart: dict[str, Any]) -> list[str]:
    pictures = []
    for panel in chart["panels"]:
        spec = {**drawable(panel["spec"], panel["title"], chart["points"]), "width": 500}
        text = json.dumps(spec).replace("$ink", "#000000").replace("$surface", "#ffffff")
        pictures.append(vl_convert.vegalite_to_svg(json.loads(text)))
    return pictures


def symbols(picture: str) -> int:
    return picture.count('aria-roledescription="point"')


@pytest.mark.parametrize("kind", ["curves", "pareto", "forest", "loss"])
def test_a_chart_draws_every_point_of_the_figure(vl_convert: Any, tmp_path: Path, kind: str) -> None:
    found = rows()
    write_store(tmp_path, found)
    (chart,) = (chart for chart in data_of(found, tmp_path)["tables"][0]["charts"] if chart["kind"] == kind)
    pictures = drawn(vl_convert, chart)
    assert all("NaN" not in picture for picture in pictures)
    means = [point for point in chart["points"] if point["kind"] == "mean"]
    if kind == "loss":
        assert sum(picture.count('aria-roledescription="line mark"') for picture in pictures) == 2
    else:
        seeds = sum(point["kind"] == "seed" for point in chart["points"])
        assert sum(map(symbols, pictures)) == len(means) + (seeds if kind == "curves" else 0)
    assert "scale mini" in chart["caption"]
    assert "seeds" in chart["caption"]


def test_the_charts_of_measurements_draw(vl_convert: Any, committed: dict[str, Any]) -> None:
    charts = [chart for section in committed["tables"] if section["measured"] for chart in section["charts"]]
    assert [chart["kind"] for chart in charts] == ["forest", "scatter", "lines"]
    for chart in charts:
        pictures = drawn(vl_convert, chart)
        assert all("NaN" not in picture for picture in pictures)
        if chart["kind"] != "lines":
            assert sum(map(symbols, pictures)) == len(chart["points"])


def test_points_are_those_of_the_matplotlib_figures(tmp_path: Path) -> None:
    """One way to compute what is drawn: `kronlab.report.figures` gathers the points of both."""
    found = rows()
    write_store(tmp_path, found)
    from dashboards import SPEC

    from kronlab.report.figures.points import Source

    source = Source(SPEC, "mini", found, tmp_path)
    for chart in section_of(found, tmp_path).charts:
        entry = next((f for f in SPEC["scales"]["mini"]["figures"] if f["kind"] == chart.kind), {"kind": chart.kind})
        if chart.kind == "pareto":
            entry = {"eval": "sums", "metric": "exact_match"}
        points = KINDS[chart.kind].gather(source, entry)
        ours = [mark.point for mark in chart.marks if mark.kind != "front"]
        assert ours == (points if chart.kind != "pareto" else [p for p in points if p in ours])
        assert {p.key for p in points} == {p.key for p in ours}


# --------------------------------------------------------------------------------------------------------- page


def test_the_page_needs_nothing_from_outside(vl_convert: Any, tmp_path: Path) -> None:
    parsed = Parsed(write_page(tmp_path, rows()).read_text())
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert not re.match(r"\s*(https?:)?//", attributes.get(name) or ""), (tag, attributes)
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    for name in ("program", "chart-library"):
        found = base64.b64encode(hashlib.sha256(parsed.scripts[name].encode()).digest()).decode()
        assert f"'sha256-{found}'" in policy
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert next(a for tag, a in parsed.elements if tag == "html")["lang"] == "en"


def test_labels_stay_text(vl_convert: Any, tmp_path: Path) -> None:
    label = "</script><script>alert(1)</script><!-- {{PROGRAM}} &amp; \u2028"
    found = rows(label=label)
    text = write_page(tmp_path, found).read_text()
    assert len([1 for tag, _ in Parsed(text).elements if tag == "script"]) == 3
    assert embedded(text)["tables"][0]["rows"][1]["label"] == f"{label} lora"


def test_a_thousand_records_stay_a_small_page(vl_convert: Any, tmp_path: Path) -> None:
    text = write_page(tmp_path, rows(seeds=145)).read_text()
    assert len(embedded(text)["records"]) > 1000
    assert len(text.encode()) < SIX_MEGABYTES


def test_the_same_records_give_the_same_bytes(vl_convert: Any, tmp_path: Path) -> None:
    found = rows()
    write_store(tmp_path, found)
    assert html(data_of(found, tmp_path), results=".") == html(data_of(found, tmp_path), results=".")


def test_an_empty_store(vl_convert: Any, tmp_path: Path) -> None:
    path = write_dashboard(tmp_path / "none", tmp_path / "page" / "d.html")
    data = embedded(path.read_text())
    assert (data["tables"], data["records"], data["claims"]) == ([], [], None)
    assert {"table1", "table13"} <= {one["name"] for one in data["absent"]}
    assert data["results"] == "../none"
    assert sorted(p.name for p in path.parent.iterdir()) == ["d.html"]


def test_a_record_of_no_table_is_on_the_page(tmp_path: Path) -> None:
    write_store(tmp_path, [RowResult("lora", "label", [record("lora", 0), record("lora", 1, status="failed")])])
    data = collect(tmp_path, ["table12"])
    assert [(one["status"], one["error"]) for one in data["records"]] == [
        ("done", None),
        ("failed", "RuntimeError: it failed"),
    ]


def test_what_a_user_can_get_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out=.* is a directory"):
        write_dashboard(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="there is no table99"):
        collect(tmp_path, ["table99"])
    (tmp_path / "claims.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"claims.json does not hold the claims"):
        collect(tmp_path, ["table12"])


# ------------------------------------------------------------------------------------------- program and style


def part(name: str) -> str:
    return resources.files("kronlab.report.dashboard").joinpath(name).read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_program_parses(tmp_path: Path) -> None:
    path = tmp_path / "page.mjs"
    path.write_text(part("page.js"))
    done = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_program_writes_text_and_never_markup() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", part("page.js")
    )


def luminance(colour: str) -> float:
    linear = []
    for at in (1, 3, 5):
        c = int(colour[at : at + 2], 16) / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2's ratio of two colours."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: str) -> None:
    """Text 4.5 to 1, marks and edges of controls 3 to 1, on every ground that they stand on."""
    block = re.search(
        r':root\[data-theme="dark"\] \{(.*?)\}' if theme == "dark" else r":root \{(.*?)\}", part("page.css"), re.S
    )
    assert block is not None
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block[1]))
    grounds = ("surface", "raised", "sunken", "hover")
    for ground in grounds:
        for text in ("ink", "soft", "accent", "good", "bad", "warn"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for ground in ("surface", "raised"):
        assert contrast(colours["edge"], colours[ground]) >= 3
    hues = re.search(rf"\n  {theme}: \{{(.*?)\}}", part("page.js"))
    assert hues is not None
    counterparts = dict(re.findall(r'"(#\w{6})": "(#\w{6})"', hues[1]))
    for colour in {*METHOD_COLOURS.values(), *GROUP_COLOURS}:
        assert contrast(counterparts.get(colour, colour), colours["raised"]) >= 3, colour
