"""The dashboard in a headless Chromium, as a reader meets it: mouse, keyboard, phone, dark page, many records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Page, find_chromium
from dashboards import METHODS, data_of, rows, write_page

pytest.importorskip("vl_convert", reason="the plotting library (vl-convert-python) is not installed")
pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on PATH, and none named by KRONLAB_CHROMIUM"
)

LONG = "a-label-of-one-very-long-word-" * 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    page = Page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("results"), rows())


@pytest.fixture
def page(browser: Page, path: Path) -> Page:
    browser.requests.clear()
    browser.problems.clear()
    browser.open(path)
    return browser


def all_charts(page: Page) -> int:
    """Bring every chart into view, one after another; how many were drawn."""
    n = int(page.js("document.querySelectorAll('figure[data-chart]').length"))
    for at in range(n):
        figure = f"document.querySelectorAll('figure[data-chart]')[{at}]"
        page.js(f"{figure}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
        page.wait(f"[...{figure}.querySelectorAll('.canvas')].every((canvas) => canvas.querySelector('svg path'))")
    return n


def cells(page: Page, block: int) -> list[list[str]]:
    table = f"document.querySelectorAll('#table5-mini table[data-block]')[{block}]"
    found: list[list[str]] = page.js(
        f"[...{table}.querySelectorAll('tbody tr')].map((tr) => [...tr.children].map((cell) => cell.textContent))"
    )
    return found


def test_it_asks_for_nothing_and_nothing_goes_wrong(page: Page, path: Path) -> None:
    assert all_charts(page) == 4
    assert set(page.requests) <= {path.as_uri(), "data:,"}
    assert page.problems == []


def test_the_cells_are_those_of_the_table(page: Page, path: Path) -> None:
    (section,) = data_of(rows(), path.parent)["tables"]
    for number, block in enumerate(section["blocks"]):
        shown = cells(page, number)
        assert [line[1:] for line in shown] == [
            list(line) for line in zip(*(c["cells"] for c in block["columns"]), strict=True)
        ]
        for line, row in zip(shown, section["rows"], strict=True):
            assert line[0].startswith(row["label"])
            assert "mini" in line[0]  # scale and seeds stand beside every number
            assert "seed" in line[0] or "not run" in line[0]


def focus_and_press(page: Page, element: str) -> None:
    page.js(f"{element}.focus()")
    page.press("Enter", 13, "\r")


def test_columns_sort_by_keyboard(page: Page) -> None:
    head = "document.querySelectorAll('#table5-mini table[data-block]')[0].querySelectorAll('thead th')[3]"
    column = [line[3] for line in cells(page, 0)]
    known = sorted((c for c in column if c and c != "diverged"), key=lambda c: float(c.split(" ")[0]))
    focus_and_press(page, f"{head}.querySelector('button')")
    assert page.js(f"{head}.getAttribute('aria-sort')") == "ascending"
    values = [float(line[3].split(" ")[0]) for line in cells(page, 0)[: len(known)]]
    assert values == sorted(values)
    assert [line[3] for line in cells(page, 0)[len(known) :]] == ["diverged"]  # without a value: last
    focus_and_press(page, f"{head}.querySelector('button')")
    assert page.js(f"{head}.getAttribute('aria-sort')") == "descending"
    values = [float(line[3].split(" ")[0]) for line in cells(page, 0)[: len(known)]]
    assert values == sorted(values, reverse=True)
    assert cells(page, 0)[-1][3] == "diverged"
    focus_and_press(page, f"{head}.querySelector('button')")
    assert page.js(f"{head}.hasAttribute('aria-sort')") is False
    assert [line[3] for line in cells(page, 0)] == column


def choose(page: Page, name: str, value: str) -> None:
    field = f"document.getElementById('filter-{name}')"
    page.js(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_filters(page: Page) -> None:
    choose(page, "method", "cdka")
    page.wait("document.getElementById('shown').textContent.startsWith('1 of 8 rows and 3 of')")
    assert [line[0].startswith("label of cdka") for line in cells(page, 0)] == [True]
    choose(page, "text", "no such thing")
    page.wait("document.getElementById('shown').textContent.startsWith('0 of 8 rows and 0 of')")
    assert page.js("document.getElementById('table5').hidden") is True
    page.js("document.querySelector('#filters [type=reset]').click()")
    page.wait("document.getElementById('shown').textContent.startsWith('8 of 8 rows')")
    assert page.js("document.getElementById('table5').hidden") is False
    choose(page, "model", "toy")  # a row of which nothing was run has no model
    page.wait("document.getElementById('shown').textContent.startsWith('8 of 8 rows')")
    for name in ("text", "scale", "method", "model", "task"):
        assert page.js(f"document.getElementById('filter-{name}').labels.length") == 1


def test_a_number_leads_to_its_records_and_commands(page: Page, path: Path) -> None:
    row = METHODS.index("cdka")
    page.js(f"document.querySelectorAll('#table5-mini tbody')[0].rows[{row}].cells[3].querySelector('button').click()")
    assert page.js("document.getElementById('source').open") is True
    links: list[str] = page.js("[...document.querySelectorAll('#source a')].map((a) => a.href)")
    records = [one for one in rows()[row].records if one is not None]
    assert links == [(path.parent / "runs" / "mini" / f"{one['id']}.json").as_uri() for one in records]
    said = page.js("document.getElementById('source').innerText")
    for one in records:
        assert one["command"] in said
    assert "scale mini" in said
    assert "3 seeds" in said
    assert "make reproduce-table5 SCALE=mini" in said


def test_the_row_opens_by_keyboard_and_escape_gives_the_focus_back(page: Page) -> None:
    button = "document.querySelectorAll('#table5-mini tbody')[0].rows[1].querySelector('button.row')"
    focus_and_press(page, button)
    assert page.js("document.getElementById('source').open") is True
    assert page.js("document.getElementById('source').contains(document.activeElement)") is True
    page.press("Escape", 27)
    assert page.js("document.getElementById('source').open") is False
    assert page.js(f"document.activeElement === {button}") is True


def test_a_paired_difference_names_both_sides(page: Page) -> None:
    row = f"document.querySelectorAll('#table5-mini tbody')[1].rows[{METHODS.index('cdka')}]"
    page.js(f"{row}.cells[1].querySelector('button').click()")
    assert "Compared with label of lora" in page.js("document.getElementById('source').innerText")
    assert page.js("document.querySelectorAll('#source a').length") == 6


def test_the_skip_link_is_the_first_stop(page: Page) -> None:
    page.press("Tab", 9)
    assert page.js("document.activeElement.className") == "skip"
    assert page.js("document.activeElement.getBoundingClientRect().top >= 0") is True
    page.press("Enter", 13, "\r")
    assert page.js("document.activeElement.id") == "main"


def test_every_control_has_a_name(page: Page) -> None:
    unnamed = page.js(
        "[...document.querySelectorAll('button, a[href], input, select, [role=region]')].filter((e) => "
        "!(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    ids = page.js("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    levels: list[int] = page.js("[...document.querySelectorAll('h1, h2, h3, h4')].map((e) => +e.tagName[1])")
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_no_page_is_wider_than_the_window(browser: Page, tmp_path: Path, width: int) -> None:
    browser.open(write_page(tmp_path, rows(label=LONG)), width=width, height=700)
    all_charts(browser)
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser.js("document.querySelector('#table5-mini button.row').click()")
    assert (
        browser.js("document.getElementById('source').scrollWidth <= document.getElementById('source').clientWidth + 1")
        is True
    )
    assert browser.js("document.querySelector('#table5-mini .scroll').tabIndex") == 0  # scrolls by keyboard


def ground(page: Page) -> str:
    return str(page.js("getComputedStyle(document.body).backgroundColor"))


def test_light_and_dark(browser: Page, path: Path) -> None:
    browser.open(path, dark=True)
    browser.js("localStorage.clear()")
    browser.open(path, dark=True)
    dark = ground(browser)
    all_charts(browser)
    symbol = "document.querySelector('[data-chart$=forest] .mark-rule line')"
    hue = browser.js(f"{symbol}.getAttribute('stroke')")
    for name in ("light", "dark", "system"):
        browser.js("document.getElementById('theme').click()")
        assert browser.js("document.getElementById('theme').textContent") == f"Theme: {name}"
        assert (ground(browser) == dark) == (name != "light")
        if name == "light":
            browser.wait(f"{symbol} && {symbol}.getAttribute('stroke') !== {json.dumps(hue)}")
    browser.open(path, dark=False)
    assert ground(browser) != dark


def test_a_thousand_records_are_drawn_in_parts(browser: Page, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path, rows(seeds=145)))
    print("loaded after", browser.js("performance.getEntriesByType('navigation')[0].loadEventEnd"), "ms")
    assert browser.js("document.querySelectorAll('#records tbody tr').length") == 50
    assert browser.js("document.querySelectorAll('*').length") < 3000
    assert browser.js("document.querySelectorAll('.canvas svg').length") <= 2  # charts are drawn when they come near
    browser.js("document.querySelector('#records button.more').click()")
    assert browser.js("document.querySelectorAll('#records tbody tr').length") == 150


def test_no_records(browser: Page, tmp_path: Path) -> None:
    from kronlab.report.dashboard import html, page_data

    path = tmp_path / "d.html"
    path.write_text(html(page_data([], [], [], None), results="."), encoding="utf-8")
    browser.problems.clear()
    browser.open(path)
    said: Any = browser.js("document.body.innerText")
    assert "There are no records yet" in said
    assert "make claims" in said
    assert browser.problems == []
