"""The page in a real browser: no error, no request, nothing wider than the window, text that can be read, sorting."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import HOSTILE, classes_run, labels_run, values_run

from pyft.explain.explanation import Explanation, together
from pyft.report.page import render

RUNS = {"classes": classes_run, "values": values_run, "labels": labels_run}

# The contrast of WCAG 2: of every text that is seen, its colour over all backgrounds below it, whole or in part clear.
CONTRAST = """() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return found.length === 3 ? [...found, 1] : found;
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (color) => {
    const part = color.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const behind = (node) => {
    const layers = [];
    for (let e = node; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    let color = [255, 255, 255];
    for (const layer of layers) color = over(layer, color);
    const cell = node.classList.contains("count") && node.previousElementSibling;
    if (cell) {
      const style = getComputedStyle(cell);
      color = over([...parse(style.fill).slice(0, 3), Number(style.fillOpacity)], color);
    }
    return color;
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || !parent.getClientRects().length || parent.closest("script, style, title")) continue;
    count += 1;
    const style = getComputedStyle(parent), under = behind(parent);
    let opacity = 1;
    for (let e = parent; e; e = e.parentElement) opacity *= Number(getComputedStyle(e).opacity);
    const color = parse(parent.closest("svg") ? style.fill : style.color);
    color[3] *= opacity;
    const a = light(over(color, under)), b = light(under);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)}: ${node.data.trim().slice(0, 40)}`);
  }
  return [count, poor];
}"""
# Elements whose right edge is outside the window, but for what scrolls inside a box of its own.
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter((e) => {
  for (let box = e.parentElement; box; box = box.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) return false;
  const edge = e.getBoundingClientRect();
  const block = getComputedStyle(e).display !== "inline";
  return block && edge.width && edge.right > document.documentElement.clientWidth + 0.5;
}).map((e) => e.tagName + "." + e.className).slice(0, 5)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of this machine, or a skip that says how to get one."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install 'pyft[test]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync.sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """show(html, width, scheme): the page, whose errors, requests and dialogs fail the test."""
    heard: list[str] = []
    pages = []

    def opened(html: str, width: int = 1400, scheme: str = "light") -> Any:
        path = tmp_path / "report.html"
        path.write_text(html, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: heard.append(request.url) if not _is_own(request.url, path) else None)
        page.goto(path.as_uri())
        return page

    yield opened
    for page in pages:
        page.close()
    assert heard == []


def _is_own(url: str, path: Path) -> bool:
    return url.startswith("data:") or url.partition("#")[0] == path.as_uri()


def explanations() -> list[Any]:
    import numpy as np

    values = np.array([0.9, -0.9, 0.1])
    facts: dict[str, Any] = {"method": "occlusion", "target": HOSTILE, "target_index": 0, "score": 0.9, "output": 1.0}
    tokens = Explanation(kind="tokens", attributions=values, features=["[CLS]", "a", "<b>"], text="a <b> " * 9,
                         spans=[(0, 0), (0, 1), (2, 5)], **facts)  # fmt: skip
    features = Explanation(kind="features", attributions=values, features=["x" * 80, HOSTILE, "c"],
                           values=[1.0, 2.0, 3.0], **facts)  # fmt: skip
    picture = np.zeros((16, 16, 3), np.uint8)
    pixels = Explanation(kind="pixels", attributions=np.ones((3, 16, 16)), picture=picture, **facts)
    return together([("one", tokens), (HOSTILE, features), ("three", pixels)])


SCREENS = [
    *(("classes", width, scheme) for width in (400, 1400) for scheme in ("light", "dark")),
    *((name, width, scheme) for name in ("values", "labels") for width, scheme in ((400, "dark"), (1400, "light"))),
]


@pytest.mark.parametrize(("name", "width", "scheme"), SCREENS)
def test_readable_on_any_screen(name: str, width: int, scheme: str, show: Callable[..., Any]) -> None:
    page = show(render(RUNS[name](), explanations() if name == "classes" else []), width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_WIDE) == []
    count, poor = page.evaluate(CONTRAST)
    assert count > 100
    assert poor == []
    background = [
        int(part) for part in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    ]
    assert (max(background[:3]) < 60) == (scheme == "dark")
    assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")


def test_the_checks_find_what_they_look_for(show: Callable[..., Any]) -> None:
    page = show(render(values_run()), 400)
    page.evaluate("document.querySelector('h1').style.color = '#999'")
    page.evaluate("document.querySelector('.tiles').style.width = '600px'")
    assert any("regression" in one for one in page.evaluate(CONTRAST)[1])
    assert page.evaluate(TOO_WIDE) != []


def test_a_table_is_sorted_by_its_heads(show: Callable[..., Any]) -> None:
    page = show(render(classes_run()))
    table = page.locator("#classes table")

    def column(place: int) -> list[str]:
        return table.evaluate(f"(table) => [...table.tBodies[0].rows].map((row) => row.cells[{place}].textContent)")

    before = column(0)
    numbers = [float(value) for value in column(3)]
    head = table.locator("th button", has_text="F1")
    head.click()
    assert [float(value) for value in column(3)] == sorted(numbers)
    assert table.locator("th", has_text="F1").get_attribute("aria-sort") == "ascending"
    head.click()
    assert [float(value) for value in column(3)] == sorted(numbers, reverse=True)
    table.locator("th button", has_text="class").click()
    assert sorted(column(0)) == sorted(before)
    assert column(0) != before


def test_on_paper_nothing_is_cut_off(show: Callable[..., Any]) -> None:
    page = show(render(classes_run()), 800, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = page.evaluate(
        "[...document.querySelectorAll('.tall')].filter((e) => e.scrollHeight > e.clientHeight + 2).length"
    )
    assert hidden == 0
    assert page.evaluate(CONTRAST)[1] == []
