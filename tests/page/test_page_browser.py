"""The report page in headless Chromium: figures are there, nothing overflows, the table sorts, all is silent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minibert.errors import pip_install
from minibert.page import Recorded, write_page
from tests.page_facts import small_facts, with_steps

for library in ("matplotlib", "jinja2"):
    pytest.importorskip(library, reason=f"the page needs {library}: {pip_install('[report]')}")
sync_api = pytest.importorskip("playwright.sync_api", reason=f"drives the browser: {pip_install('playwright')}")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FIGURES = ("stages", "peaks", "memory", "roofline", "headroom", "losses", "bounds", "ulp0", "scaling-0", "scaling-1")
PHONE, DESKTOP = (375, 812), (1280, 900)
SMALLEST_TEXT = 11.0  # pixels


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of a real comparison, with the same beside it as if it came from elsewhere."""
    folder = tmp_path_factory.mktemp("report")
    return write_page(folder, small_facts(), [Recorded("other.json", "compare", small_facts())]).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Seen:
    """The page, opened, and all that the browser complained of or asked for."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *raised: object) -> None:
        self.page.close()

    def column(self, number: int) -> list[str]:
        """What the rows of the table of ops are sorted by in a column."""
        told: list[str] = self.page.eval_on_selector_all(
            "#op-table tbody tr", f"rows => rows.map(row => row.children[{number}].dataset.value)"
        )
        return told


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_figures_are_there_and_nothing_overflows(
    browser: Any, address: str, size: tuple[int, int], scheme: str
) -> None:
    with Seen(browser, address, size, scheme) as seen:
        assert seen.requests == [address]
        for name in FIGURES:
            drawing = seen.page.locator(f"#figure-{name} svg:visible")
            assert drawing.count() == 1, name
            box = drawing.bounding_box()
            assert box["width"] > 100 and box["height"] > 60, (name, box)
            assert box["x"] >= 0 and box["x"] + box["width"] <= size[0], (name, box)
        width = seen.page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0]
        assert seen.complaints == []


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_text_in_figures_can_be_read(browser: Any, address: str, size: tuple[int, int]) -> None:
    with Seen(browser, address, size) as seen:
        sizes = seen.page.eval_on_selector_all(
            "svg.figure text",
            """texts => texts.filter(text => text.checkVisibility()).map(text => {
                const drawing = text.closest("svg");
                return parseFloat(getComputedStyle(text).fontSize) * drawing.getScreenCTM().a;
            })""",
        )
        assert len(sizes) > 100
        assert min(sizes) >= SMALLEST_TEXT


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One slow step, a result that is not finite, and figures of many digits, as long as they come."""
    facts = with_steps(small_facts(ulps=False), 50.0)
    facts["ops"][0] |= {"ok": False, "bound_share": None}
    for row in facts["ops"]:
        row["ms"], row["predicted_ms"] = 999.4, 0.001
    for row in facts["stages"]:
        row["ms_per_sample"], row["peak_bytes"] = 1234.5e3, 999.9e6
    return write_page(tmp_path_factory.mktemp("hard"), facts, [Recorded("hard.json", "compare", facts)]).as_uri()


WHERE = """texts => texts.filter(text => text.checkVisibility()).flatMap(text => {
    const box = text.getBoundingClientRect(), card = text.closest(".card").getBoundingClientRect();
    const inside = box.left >= card.left && box.right <= card.right && box.top >= card.top && box.bottom <= card.bottom;
    return inside ? [] : [`${text.textContent}: ${box.left} to ${box.right} in ${card.left} to ${card.right}`];
})"""


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_labels_stay_within_their_card(browser: Any, address: str, hard: str, size: tuple[int, int]) -> None:
    for page in (address, hard):
        with Seen(browser, page, size) as seen:
            assert seen.page.locator("svg.figure text").count() > 60
            assert seen.page.eval_on_selector_all("svg.figure text", WHERE) == []
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_dark_is_dark(browser: Any, address: str) -> None:
    """Background and text change places, in figures too."""
    shades = {}
    for scheme in ("light", "dark"):
        with Seen(browser, address, scheme=scheme) as seen:
            look = "element => { const c = getComputedStyle(element); return [c.backgroundColor, c.fill]; }"
            page = seen.page.locator("body").evaluate(look)[0]
            text = seen.page.locator("#figure-stages svg text").first.evaluate(look)[1]
            shades[scheme] = [sum(map(int, colour.strip("rgb()").split(","))) for colour in (page, text)]
    (light_page, light_text), (dark_page, dark_text) = shades["light"], shades["dark"]
    assert light_page > 600 > 150 > light_text
    assert dark_page < 150 < 600 < dark_text


def test_a_click_on_a_header_sorts_and_another_turns_round(browser: Any, address: str) -> None:
    with Seen(browser, address) as seen:
        headers = seen.page.locator("#op-table thead th")
        names = headers.all_inner_texts()
        for name in ("of bound", "time", "of limit"):
            number = next(i for i, said in enumerate(names) if said.strip() == name)
            before = headers.nth(number).get_attribute("aria-sort")
            for _ in range(2):
                headers.nth(number).locator("button").click()
                order = headers.nth(number).get_attribute("aria-sort")
                assert order == ("ascending" if before == "descending" else "descending")
                values = [float(value) for value in seen.column(number) if value]
                assert values == sorted(values, reverse=order == "descending")
                assert len(set(values)) > 5
                assert headers.evaluate_all("all => all.filter(one => one.ariaSort !== 'none').length") == 1, (
                    "one column says that it is sorted by"
                )
                before = order
        assert seen.complaints == []


def test_the_table_sorts_by_keyboard(browser: Any, address: str) -> None:
    with Seen(browser, address) as seen:
        seen.page.locator("#op-table thead th button").first.focus()
        seen.page.keyboard.press("Enter")
        assert seen.column(0) == sorted(seen.column(0))
        seen.page.keyboard.press("Space")
        assert seen.column(0) == sorted(seen.column(0), reverse=True)


def test_what_was_not_measured_stays_at_the_end(browser: Any, tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    for row in facts["ops"][:5]:
        row["limit_share"] = None
    with Seen(browser, write_page(tmp_path, facts).as_uri()) as seen:
        header = seen.page.locator('#op-table th[data-key="limit_share"]')
        number = header.evaluate("one => [...one.parentNode.children].indexOf(one)")
        for _ in range(2):
            header.locator("button").click()
            assert seen.column(number)[-5:] == [""] * 5
            assert "" not in seen.column(number)[:-5]


def test_a_backend_can_be_seen_alone(browser: Any, address: str) -> None:
    with Seen(browser, address) as seen:
        rows = seen.page.locator("#op-table tbody tr:visible")
        all_rows = rows.count()
        button = seen.page.locator(".legend button", has_text="numba")
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert 0 < rows.count() < all_rows
        assert seen.page.locator('main .mark[data-colour="0"].faint').count() > 10
        assert seen.page.locator('main .mark[data-colour="1"].faint').count() == 0
        button.click()
        assert rows.count() == all_rows
        assert seen.page.locator("main .mark.faint").count() == 0


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    facts = small_facts(ulps=False)
    hostile = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    facts["machine"]["processor"] = facts["versions"]["numpy"] = hostile
    for row in facts["backends"]:
        row["what"] = hostile
    with Seen(browser, write_page(tmp_path, facts).as_uri()) as seen:
        assert seen.page.title().startswith("minibert:")
        assert seen.page.locator("img").count() == 0
        assert len(seen.requests) == 1
        assert hostile in seen.page.locator("footer").inner_text()
        assert seen.complaints == []
