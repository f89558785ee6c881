"""The page in a browser: it sorts, switches, turns dark, fits a phone, and never touches the network."""

import re
import shutil

import pytest
from playwright.sync_api import sync_playwright
from records import METRICS, NAMES, broken_record, make_record

from minimand.report import write

pytestmark = pytest.mark.browser

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONG = [f"{name} with a long configuration suffix, number {k}" for k, name in enumerate((NAMES * 2)[:20])]


# Pairs of texts whose boxes lie on each other.
CLASHES = """() => {
    const seen = [...document.querySelectorAll(
        "h1, h2, h3 span, h3 b, .labels li, .board th, .board td.num, .chip, .rows th, .rows td.num, svg text"
    )].filter(one => one.checkVisibility() && !one.closest(".unseen, .bar") && one.textContent.trim());
    const boxes = seen.map(one => {
        const range = document.createRange();
        range.selectNodeContents(one);
        const inner = range.getBoundingClientRect(), outer = one.getBoundingClientRect();
        const cut = getComputedStyle(one).overflowX === "hidden" ? outer.right : Infinity;
        return {text: one.textContent.trim(), left: inner.left, right: Math.min(inner.right, cut),
            top: inner.top, bottom: inner.bottom};
    });
    const clashes = [];
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2) clashes.push([a.text, b.text]);
    }));
    return clashes;
}"""


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    assert path, "these tests need Chromium: apt-get install chromium (Debian's package)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    records = {
        "compare": make_record(),
        "reproduce": make_record(kind="reproduce"),
        "long": make_record(LONG, seeds=3, metrics=METRICS[:4]),
        "holes": broken_record(),
    }
    for name, record in records.items():
        write(record, folder / f"{name}.html")
    return folder


@pytest.fixture
def visit(chromium, written):
    """Open a page; afterwards, it must have asked for itself only and said nothing in the console."""
    contexts, requests, complaints = [], [], []

    def open_page(name="compare", *, width=1180, height=900, **options):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((written / f"{name}.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert len(requests) == len(contexts)
    assert all(re.fullmatch(r"file://.*/\w+\.html", url) for url in requests)
    assert complaints == []


def values(page, key):
    """Read the sort keys of the visible leaderboard, top to bottom."""
    cells = page.locator(f"table.board:visible tbody [data-key={key}]")
    return cells.evaluate_all("cells => cells.map(cell => cell.dataset.value)")


def sort(page, column):
    page.locator(f"table.board:visible thead button[data-column={column}]").click()
    return page.locator(f"table.board:visible th:has(button[data-column={column}])").get_attribute("aria-sort")


@pytest.mark.parametrize("column", ["mean", "gain", "seconds", "rank"])
def test_a_click_sorts_by_the_number_and_another_turns_the_order(visit, column):
    page = visit()
    for _ in range(2):
        order = sort(page, column)
        found = [float(value) for value in values(page, column)]
        assert len(found) == len(NAMES)
        assert found == sorted(found, reverse=order == "descending")
    assert {sort(page, column), sort(page, column)} == {"ascending", "descending"}
    assert page.locator("table.board:visible [aria-sort]").count() == 1


def test_better_comes_first_at_the_first_click(visit):
    page = visit()
    assert sort(page, "gain") == "descending"
    assert sort(page, "seconds") == "ascending"
    page.get_by_role("radio", name="log loss").check()
    assert sort(page, "mean") == "ascending"


def test_names_sort_as_words_and_rows_keep_together(visit):
    page = visit()
    before = dict(zip(values(page, "name"), values(page, "mean"), strict=True))
    assert sort(page, "name") == "ascending"
    assert values(page, "name") == sorted(NAMES, key=str.lower)
    assert dict(zip(values(page, "name"), values(page, "mean"), strict=True)) == before
    sort(page, "name")
    assert values(page, "name") == sorted(NAMES, key=str.lower, reverse=True)


def test_verdicts_sort_from_better_to_worse(visit):
    page = visit()
    sort(page, "verdict")
    words = page.locator("table.board:visible .judged").all_inner_texts()
    order = ["better", "no difference shown", "baseline", "worse"]
    assert [order.index(word) for word in words] == sorted(order.index(word) for word in words)


def test_a_contender_without_a_number_stays_last_both_ways(visit):
    page = visit("holes")
    for _ in range(2):
        sort(page, "mean")
        assert values(page, "mean")[-2:] == ["", ""]
        assert "" not in values(page, "mean")[:-2]


def test_the_metric_switch_changes_the_numbers_and_every_chart(visit):
    page = visit()
    parts = ("table.board", "#seeds ~ div", "#ranks ~ div", "#cost ~ div")
    before = [page.locator(f"{part}:visible").inner_html() for part in parts]
    page.get_by_role("radio", name="log loss").check()
    after = [page.locator(f"{part}:visible").inner_html() for part in parts]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert "log loss" in page.locator("table.board:visible thead").inner_text()
    assert "lower is better" in page.locator("table.board:visible caption").inner_text()
    page.get_by_role("radio", name="accuracy", exact=True).check()
    assert [page.locator(f"{part}:visible").inner_html() for part in parts] == before


def test_the_curve_switch_changes_the_curves_only(visit):
    page = visit()
    board, curves = page.locator("table.board:visible"), page.locator("#curves ~ [data-curve]:visible")
    before = board.inner_html(), curves.inner_html()
    page.get_by_role("radio", name="validation accuracy").check()
    assert board.inner_html() == before[0]
    assert curves.inner_html() != before[1]


@pytest.mark.parametrize("name", ["compare", "reproduce", "long", "holes"])
@pytest.mark.parametrize("width", [320, 390, 740, 940, 1180])
def test_nothing_overflows_the_page(visit, name, width):
    page = visit(name, width=width)
    for choice in page.locator("[data-switch=metric] input").all():
        choice.check()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for details in page.locator("details:visible summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [320, 390, 940, 1180])
@pytest.mark.parametrize("name", ["compare", "long", "holes"])
def test_no_two_texts_overlap(visit, name, width):
    page = visit(name, width=width)
    for choice in page.locator("[data-switch=metric] input").all():
        choice.check()
        assert page.evaluate(CLASHES) == []


def test_the_theme_follows_the_system_and_the_button_turns_it(visit):
    def ground(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    grounds = ground(light), ground(dark)
    assert grounds[0] != grounds[1]
    for page, other in ((light, grounds[1]), (dark, grounds[0])):
        own = ground(page)
        page.locator("#theme").click()
        assert ground(page) == other
        page.locator("#theme").click()
        assert ground(page) == own


def test_marks_take_the_colours_of_the_theme(visit):
    fills = [
        visit(color_scheme=scheme).evaluate("getComputedStyle(document.querySelector('.rows .better use')).fill")
        for scheme in ("light", "dark")
    ]
    assert fills[0] != fills[1]
    assert "rgb(0, 0, 0)" not in fills


def test_the_keyboard_sorts_switches_and_turns_the_theme(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-switch=metric] input:checked").get_attribute("value") == "2"
    assert "balanced accuracy" in page.locator("table.board:visible thead").inner_text()
    outline = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert page.evaluate(outline) == "solid"
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    assert values(page, "name") == sorted(NAMES, key=str.lower)


def test_the_code_is_copied(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#code").text_content()


def test_without_scripts_the_page_is_read(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("table.board:visible tbody tr").count() == len(NAMES)
    assert page.get_by_text("shows the first metric only").is_visible()
    assert page.locator("#theme, #copy, .switch").locator("visible=true").count() == 0


@pytest.mark.parametrize("width", [390, 1180])
def test_tables_are_tables_to_a_screen_reader_at_every_width(visit, width):
    page = visit("reproduce", width=width)
    board = page.get_by_role("table").first
    assert board.get_by_role("rowheader").count() == len(NAMES)
    assert page.get_by_role("img", name=re.compile("^Seconds a cell against accuracy")).is_visible()
