"""The built book (run after `make book`): complete, offline, no residue of notebooks, and it renders in a browser."""
import csv
import html
import importlib.util
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "book/_build/html"
pytestmark = [pytest.mark.book, pytest.mark.skipif(not BUILT.exists(), reason="book/_build/html is absent: run `make book` first")]

SPEC = importlib.util.spec_from_file_location("stage", ROOT / "book/stage.py")
stage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(stage)
PAGES = stage.toc_files(ROOT)
every_page = pytest.mark.parametrize("page", PAGES)


def rendered(page):
    return (BUILT / f"{page}.html").read_text()


def cells(page):
    """Cells of a notebook page, or the page's text as one markdown cell."""
    path = ROOT / f"book/{page}.ipynb"
    if path.exists():
        return nbformat.read(path, as_version=4).cells
    return [nbformat.v4.new_markdown_cell((ROOT / f"book/{page}.md").read_text())]


def has_display_math(page):
    return any(cell.cell_type == "markdown" and "$$" in cell.source for cell in cells(page))


def visible_figures(page):
    shown = [cell for cell in cells(page) if not {"remove-cell", "remove-output"} & set(cell.metadata.get("tags", []))]
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for cell in shown for output in cell.get("outputs", []))


def test_front_page_search_index_and_math_script_are_there():
    assert (BUILT / "index.html").exists()
    assert '"compress":' in (BUILT / "searchindex.js").read_text()  # the index holds stems; a browser searches the word below
    script = re.search(r'src="(_static/[^"]*mathjax[^"]*\.js)', rendered("notation"))
    assert script and (BUILT / script[1]).stat().st_size > 100_000


def test_prose_pages_are_all_listed():
    prose = {path.stem for path in (ROOT / "book").glob("*.md")}
    assert prose == {page for page in PAGES if not page.startswith(("_staged/", "_generated/"))}


@every_page
def test_page_exists_with_title_and_content(page):
    text = re.sub(r"<script.*?</script>|<[^>]+>", " ", rendered(page).split("<article", 1)[1].split("</article>")[0], flags=re.S)
    assert "<h1" in rendered(page)
    assert len(text.split()) > 6  # an empty article still has its class attribute and a heading


@every_page
def test_code_shows_no_directive_and_no_traceback(page):
    for block in re.findall(r"<pre.*?</pre>", rendered(page), flags=re.S):
        shown = html.unescape(re.sub(r"<[^>]+>", "", block))
        assert not re.search(r"^\s*#\s*\|", shown, flags=re.M), f"a directive of nbdev is visible in:\n{shown}"
    assert "Traceback (most recent call last)" not in html.unescape(rendered(page))


@every_page
def test_page_asks_for_nothing_remote(page):
    remote = r'<(?:script|img|iframe|source|audio|video)\b[^>]*\bsrc="(?:https?:)?//[^"]*"|<link\b[^>]*\bhref="(?:https?:)?//[^"]*"'
    assert re.findall(remote, rendered(page)) == []


@every_page
def test_math_and_figures_reach_the_page(page):
    if has_display_math(page):
        assert re.search(r'class="math notranslate', rendered(page))
    images = re.findall(r'<img\b[^>]*\bsrc="([^"]+)"', rendered(page))
    assert len(images) >= visible_figures(page)
    assert all((BUILT / page).parent.joinpath(image).exists() for image in images)


@every_page
def test_a_page_that_plots_shows_a_figure(page):
    # With a plotting backend that draws into the void the notebook runs and its figures are silently gone
    staged = ROOT / "book" / f"{page}.ipynb"
    if staged.exists() and "IBMA_DATA" in staged.read_text() and not os.environ.get("IBMA_DATA"):
        pytest.skip("its figure shows files that are not here")
    if staged.exists() and re.search(r"plt\.subplots\(|\.plot\(", staged.read_text()):
        assert re.search(r'<img\b[^>]*src="[^"]*_images/', rendered(page))


def test_styles_ask_for_nothing_remote():
    for sheet in (BUILT / "_static").glob("*.css"):
        assert not re.search(r"@import[^;]*//|url\(\s*['\"]?(https?:)?//", sheet.read_text()), sheet.name


def chromium():
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not chromium():
        pytest.skip("no Chromium: install one or set CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        program = driver.chromium.launch(executable_path=chromium(), args=flags)
        context = program.new_context(offline=True)
        yield context
        program.close()


def problems_of(page, browser):
    """What a browser has to complain about when it opens the page from disk, without a network."""
    tab, found = browser.new_page(), []
    tab.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: found.append(str(error)))
    tab.on("requestfailed", lambda request: found.append(f"failed to load {request.url}"))
    tab.goto((BUILT / f"{page}.html").as_uri())
    if has_display_math(page):
        tab.wait_for_function("window.MathJax?.startup?.promise")
        tab.evaluate("MathJax.startup.promise")
        if not tab.evaluate("document.querySelectorAll('mjx-container').length"):
            found.append("no equation was typeset")
    errors = tab.evaluate("[...document.querySelectorAll('mjx-merror, [data-mml-node=merror]')].map(e => e.textContent)")
    broken = tab.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src)")
    tab.set_viewport_size({"width": 390, "height": 900})   # a phone
    if (width := tab.evaluate("document.documentElement.scrollWidth")) > 392:
        found.append(f"on a phone the page scrolls sideways, {width} pixels")
    tab.close()
    return found + [f"equation with an error: {e}" for e in errors] + [f"broken image: {b}" for b in broken]


def test_pages_render_in_a_browser_from_disk(browser):
    assert {page: found for page in PAGES if (found := problems_of(page, browser))} == {}


def test_all_runs_can_be_filtered_sorted_and_downloaded_from_disk(browser):
    page = BUILT / "_staged/6_reproduction/40_explorer.html"
    if not page.exists() or not list((ROOT / "results").glob("*.csv")):
        pytest.skip("no explorer in this book, or no committed results")
    tab = browser.new_page()
    tab.goto(page.as_uri())
    with open(ROOT / "results" / "temperature.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    tab.select_option("#runs select", "temperature")
    assert tab.inner_text("#runs .count") == f"{len(runs)} of {len(runs)} runs"
    tab.fill("#runs input", "accuracy>0.9")
    best = [r for r in runs if r["accuracy"] and float(f"{float(r['accuracy']):.5g}") > 0.9]
    assert tab.inner_text("#runs .count") == f"{len(best)} of {len(runs)} runs"
    heads = [text.rstrip(" \u25b4\u25be") for text in tab.locator("#runs th").all_inner_texts()]
    for _ in range(2):
        tab.locator("#runs th").nth(heads.index("accuracy")).click()
    top = float(tab.locator("#runs tbody tr").first.locator("td").nth(heads.index("accuracy")).inner_text())
    assert top == max(float(f"{float(r['accuracy']):.5g}") for r in best)
    with tab.expect_download() as download:
        tab.click("#runs button")
    assert len(Path(download.value.path()).read_text().splitlines()) == 1 + len(best)
    tab.close()


def test_search_finds_a_word_from_disk(browser):
    tab = browser.new_page()
    tab.goto((BUILT / "search.html").as_uri() + "?q=compression")
    tab.wait_for_selector("#search-results li")
    assert tab.locator("#search-results li a").count() >= 1
    tab.close()
