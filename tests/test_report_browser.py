"""The report's pages in a real browser: accessible, inside the screen, reachable by keyboard, whole on paper.

    scripts/uv run --group browser pytest -n 0 --runslow tests/test_report_browser.py

Any Chromium on the machine serves, or the one that `playwright install chromium` brings; without one, or without the
group `browser`, the tests are skipped with the reason.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_gsm8k.report import write_report
from tests.test_report import grpo_rows, jsonl, make_pipeline, stuck_rows
from tests.test_report_findings import chat_pipeline, collapsed, grpo_run

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGES = ("whole", "unfinished", "chat", "collapsed", "stuck", "compared")
PHONE, DESK = 390, 1200
PAPER = 703  # pixels between the margins of an A4 sheet


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the dependency group browser")
    with api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, NAMES)), None) or playwright.chromium.executable_path
        if not os.access(path, os.X_OK):
            pytest.skip("no Chromium on this machine: install Debian's chromium, or run `playwright install chromium`")
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox refuses root
        started = playwright.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page: a whole pipeline with hostile answers, one that was stopped, and so on."""
    root = tmp_path_factory.mktemp("runs")
    make_pipeline(root / "20260101T120000_abc1234")
    make_pipeline(root / "unfinished", n=40, steps=12)
    (root / "unfinished/evals/grpo.jsonl").unlink()
    (root / "unfinished/pipeline.json").unlink()
    chat_pipeline(root / "chat")
    jsonl(root / "collapsed/metrics.jsonl", collapsed())
    jsonl(root / "stuck/metrics.jsonl", stuck_rows(20))
    grpo_run(root / "a_run_with_a_long_name_and_another_learning_rate", lr=3e-4)
    whole, alone = root / "20260101T120000_abc1234", root / "a_run_with_a_long_name_and_another_learning_rate"
    found = {name: write_report([root / name]) for name in ("unfinished", "chat", "collapsed", "stuck")}
    compared = write_report([whole, alone, root / "unfinished"])
    return {"whole": write_report([whole]), "compared": compared, **found}


def opened(browser: Any, page: Path, width: int, scheme: str = "light", bypass_csp: bool = False) -> Any:
    """The page on a screen of this width; what it says on the console or asks of the network is kept in `faults`."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=bypass_csp)
    tab = context.new_page()
    tab.faults = []
    tab.on("console", lambda message: tab.faults.append(message.text))
    tab.on("dialog", lambda dialog: (tab.faults.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: None if request.url == page.as_uri() else tab.faults.append(request.url))
    tab.goto(page.as_uri())
    return tab


def unfold(tab: Any) -> None:
    """Open every collapsed section, so that what it holds is judged, too."""
    tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "light"), (PHONE, "dark"), (DESK, "light"), (DESK, "dark")])
def test_axe_has_no_complaint(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the dependency group browser")
    tab = opened(browser, pages[name], width, scheme, bypass_csp=True)
    unfold(tab)
    found = axe.Axe().run(tab).response
    told = [(one["id"], [node["html"][:160] for node in one["nodes"][:3]]) for one in found["violations"]]
    assert told == []
    assert len(found["passes"]) > 20  # it has looked
    tab.context.close()


def test_axe_would_complain(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the dependency group browser")
    worse = tmp_path / "worse.html"
    worse.write_text(pages["whole"].read_text().replace(' tabindex="0"', "").replace("<caption>", "<caption hidden>"))
    tab = opened(browser, worse, PHONE, bypass_csp=True)
    found = {one["id"] for one in axe.Axe().run(tab).response["violations"]}
    assert "scrollable-region-focusable" in found
    tab.context.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, PHONE, DESK])
def test_nothing_is_wider_than_the_screen(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    """Text and figures wrap or shrink; tables are cut by their own region alone, which scrolls to their end."""
    tab = opened(browser, pages[name], width)
    unfold(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    outside = """() => [...document.querySelectorAll('body *')].filter(one => {
        const box = one.getBoundingClientRect()
        return box.width && (box.right > innerWidth + 1 || box.left < -1) && !one.closest('.scroll, .long, figure svg')
    }).map(one => one.outerHTML.slice(0, 120))"""
    assert tab.evaluate(outside) == []
    cut = """() => [...document.querySelectorAll('.scroll')].filter(one => {
        one.scrollLeft = one.scrollWidth
        const last = one.querySelector('tbody tr').lastElementChild.getBoundingClientRect()
        return last.right > one.getBoundingClientRect().right + 1
    }).length"""
    assert tab.evaluate(cut) == 0
    assert tab.faults == []  # no script ran, nothing was fetched
    tab.context.close()


@pytest.mark.parametrize("name", ["whole", "compared"])
def test_the_keyboard_reaches_a_table_and_its_first_column_stays(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    tab = opened(browser, pages[name], PHONE)
    wide = "one => one.scrollWidth > one.clientWidth + 40"
    label = tab.evaluate(f"[...document.querySelectorAll('.scroll')].find({wide}).getAttribute('aria-label')")
    focused = "document.activeElement.getAttribute('aria-label')"
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate(focused) == label:
            break
    assert tab.evaluate(focused) == label
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    places = """() => {
        const one = document.activeElement, row = one.querySelector('tbody tr')
        const at = cell => cell.getBoundingClientRect().left - one.getBoundingClientRect().left
        return [one.scrollLeft, at(row.children[0]), at(row.children[row.children.length - 1])]
    }"""
    before = tab.evaluate(places)
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
        tab.wait_for_timeout(150)
    after = tab.evaluate(places)
    assert before[0] == 0 and after[0] > 30
    assert after[1] == before[1]  # the first column
    assert after[2] == pytest.approx(before[2] - after[0], abs=1)  # the others move
    share = "document.activeElement.querySelector('tbody th').offsetWidth / document.activeElement.clientWidth"
    assert tab.evaluate(share) < 0.6
    tab.context.close()


def squeezed(text: str) -> str:
    """Without white space and ligatures, which a PDF's text does not keep as they were."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKD", text))


@pytest.mark.parametrize("name", ["whole", "collapsed", "compared"])
def test_no_figure_is_split_on_paper(browser: Any, pages: dict[str, Path], name: str) -> None:
    pypdf = pytest.importorskip("pypdf", reason="needs the dependency group browser")
    tab = opened(browser, pages[name], DESK, "dark")
    figures = tab.evaluate(
        "[...document.querySelectorAll('figure')].map(f => [f.querySelector('h3').textContent, "
        "f.querySelector('figcaption').textContent])"
    )
    sheets = pypdf.PdfReader(io.BytesIO(tab.pdf(format="A4"))).pages
    text = "\f".join(squeezed(sheet.extract_text()) for sheet in sheets)
    assert len(sheets) > 1 and len(figures) > 5
    at = 0
    for title, caption in figures:
        begins = text.find(squeezed(title), at)
        ends = text.find(squeezed(caption), begins)
        assert 0 <= begins < ends, (title, caption)
        assert "\f" not in text[begins:ends], f"{title} is split"
        at = ends
    assert "Sections of this page" not in text
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    tab.set_viewport_size({"width": PAPER, "height": 1000})
    assert tab.evaluate("document.documentElement.scrollWidth") <= PAPER  # no table runs off the sheet
    tab.context.close()


def test_a_run_of_thousands_of_steps_is_drawn_within_the_screen(browser: Any, tmp_path: Path) -> None:
    jsonl(tmp_path / "metrics.jsonl", grpo_rows(random.Random(0), 3000))
    tab = opened(browser, write_report([tmp_path]), PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE
    sizes = tab.evaluate("[...document.querySelectorAll('figure svg')].map(one => one.getBoundingClientRect().width)")
    assert sizes and all(150 < size <= PHONE for size in sizes)
    tab.context.close()
