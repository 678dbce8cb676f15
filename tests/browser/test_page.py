"""Pages in a real browser, on screens of a phone and of a desk, light and dark, and in print."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.chromium import Tab
from tests.browser.conftest import JOINT, SCREENSHOTS, STUDIES, Screen

pytestmark = [pytest.mark.browser, pytest.mark.slow]

Pages = Callable[[str], Path]

OUTSIDE = """(() => {
  const seen = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest(".wide")?.contains(element.parentElement) || !element.checkVisibility()) continue;
    const box = element.getBoundingClientRect(), width = document.documentElement.clientWidth;
    if (box.right > width + 1 || box.left < -1) seen.push(element.outerHTML.slice(0, 80));
  }
  return seen;
})()"""
"""Elements that reach beyond the screen, those aside that scroll inside a box of their own."""

TABLE = "[...document.querySelectorAll('#extra table')][0]"
"""The table with every kind of cell."""


def column(tab: Tab, place: int) -> list[str]:
    return tab.run(f"[...{TABLE}.tBodies[0].rows].map(row => row.cells[{place}].textContent.trim())")


def head(place: int) -> str:
    return f"{TABLE}.tHead.rows[0].cells[{place}]"


# -- every page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("name", [*STUDIES, JOINT])
def test_a_page_is_quiet_whole_and_within_its_screen(pages: Pages, screen: Screen, name: str, width: int):
    tab = screen.show(pages(name), width)
    tab.screenshot(SCREENSHOTS / f"{name}_{width}.png")
    assert tab.complaints == []
    assert tab.asked_for == [pages(name).resolve().as_uri()]
    images = tab.run("[...document.images].map(image => [image.alt, image.complete && image.naturalWidth])")
    assert len(images) > (0 if name == JOINT else 3)
    assert [alt for alt, size in images if not size] == []
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run(OUTSIDE) == []


@pytest.mark.parametrize("name", [*STUDIES, JOINT])
def test_a_dark_page_has_dark_figures(pages: Pages, screen: Screen, name: str):
    tab = screen.show(pages(name), dark=True)
    tab.screenshot(SCREENSHOTS / f"{name}_dark.png")
    assert brightness(tab.run("getComputedStyle(document.body).backgroundColor")) < 40
    assert brightness(tab.run("getComputedStyle(document.body).color")) > 200
    corners = """Promise.all([...document.querySelectorAll("figure img")].map(async image => {
      const drawn = new Image(); drawn.src = image.currentSrc; await drawn.decode();
      const canvas = document.createElement("canvas"); canvas.width = canvas.height = 1;
      const context = canvas.getContext("2d"); context.drawImage(drawn, 0, 0);
      return "rgb(" + context.getImageData(0, 0, 1, 1).data.slice(0, 3).join(", ") + ")";
    }))"""
    assert max(map(brightness, tab.run(corners))) < 40
    tab.show(pages(name), 1440)
    assert min(map(brightness, tab.run(corners))) > 240
    assert tab.complaints == []


def brightness(colour: str) -> float:
    """Of `rgb(0, 0, 0)`, from 0 to 255."""
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_prints(pages: Pages, screen: Screen, name: str):
    tab = screen.show(pages(name), dark=True)
    data = tab.pdf()
    (SCREENSHOTS / f"{name}.pdf").write_bytes(data)
    assert data.startswith(b"%PDF") and len(data) > 50_000
    assert len(re.findall(rb"/Type\s*/Page\b", data)) > 3
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert brightness(tab.run("getComputedStyle(document.body).backgroundColor")) > 240
    assert tab.run("document.querySelector('nav').checkVisibility()") is False
    assert tab.run("document.querySelector('#reproduce details pre').checkVisibility({contentVisibilityAuto: true})")


# -- tables ---------------------------------------------------------------------------------------------------------


def test_numbers_sort_as_numbers(pages: Pages, screen: Screen):
    tab = screen.show(pages("everything"))
    written = column(tab, 0)
    tab.click(f"{head(1)}.querySelector('button')")
    assert column(tab, 1) == ["85.5", "900", "1,200", "> budget"]
    assert tab.run(f"{head(1)}.getAttribute('aria-sort')") == "ascending"
    tab.screenshot(SCREENSHOTS / "sorted.png", whole=False)
    tab.click(f"{head(1)}.querySelector('button')")
    assert column(tab, 1) == ["> budget", "1,200", "900", "85.5"]
    assert tab.run(f"{head(1)}.getAttribute('aria-sort')") == "descending"
    tab.click(f"{head(1)}.querySelector('button')")
    assert column(tab, 0) == written
    assert tab.run(f"{head(1)}.getAttribute('aria-sort')") is None


def test_cells_without_a_value_are_last_in_either_direction(pages: Pages, screen: Screen):
    tab = screen.show(pages("everything"))
    for place, ascending in ((2, ["−12", "−3.5 [−4.0, −3.0]", "+0.25", "–"]), (5, ["1", "2", "10", "–"])):
        tab.click(f"{head(place)}.querySelector('button')")
        assert column(tab, place) == ascending
        tab.click(f"{head(place)}.querySelector('button')")
        assert column(tab, place) == [*ascending[-2::-1], "–"]


def test_words_sort_as_words_and_one_column_at_a_time_says_so(pages: Pages, screen: Screen):
    tab = screen.show(pages("everything"))
    tab.click(f"{head(4)}.querySelector('button')")
    assert [text.split(",")[0].split("3 of")[0] for text in column(tab, 0)] == ["sit", "repa", "vae_repa", "sra"]
    tab.click(f"{head(0)}.querySelector('button')")
    assert column(tab, 0) == ["repa", "sit", "sra", "vae_repa"]
    assert tab.run(f"[...{TABLE}.tHead.rows[0].cells].filter(cell => cell.ariaSort).length") == 1


@pytest.mark.parametrize("key", ["Enter", " "])
def test_tables_sort_by_keyboard(pages: Pages, screen: Screen, key: str):
    tab = screen.show(pages("everything"))
    tab.run(f"{head(0)}.querySelector('button').focus()")
    tab.press("Tab")
    assert tab.run(f"document.activeElement === {head(1)}.querySelector('button')")
    tab.press(key)
    assert column(tab, 1) == ["85.5", "900", "1,200", "> budget"]


def test_every_table_of_a_page_that_can_sort_does(pages: Pages, screen: Screen):
    """Pressing a head moves whole rows: each table holds the same rows before and after."""
    tab = screen.show(pages("comparison"))
    tables = tab.run("""[...document.querySelectorAll("table.sortable")].map(table => {
      const rows = () => [...table.tBodies[0].rows].map(row => row.textContent);
      const before = rows();
      const moved = [...table.tHead.rows[0].cells].map(cell => {
        cell.querySelector("button").click();
        const after = rows();
        return [after.toString() !== before.toString(), after.sort().toString() === [...before].sort().toString()];
      });
      return [before.length, moved.some(([moves]) => moves), moved.every(([, same]) => same)];
    })""")
    assert len(tables) > 4
    assert [table for table in tables if not (table[0] > 1 and table[1] and table[2])] == []


# -- figures --------------------------------------------------------------------------------------------------------

OPEN = "document.querySelector('dialog').open"
ENLARGED = """new Promise(done => {
  const image = document.querySelector("dialog img");
  const look = () => image.complete && image.naturalWidth
    ? done([image.getBoundingClientRect().width, image.alt]) : setTimeout(look, 20);
  look();
})"""
"""The figure's width and words once it is there."""


@pytest.mark.parametrize("screen_width", [1440, 390])
def test_figures_enlarge_and_close(pages: Pages, screen: Screen, screen_width: int):
    tab = screen.show(pages("comparison"), screen_width)
    for place in range(tab.run("document.querySelectorAll('a.enlarge').length")):
        link = f"document.querySelectorAll('a.enlarge')[{place}]"
        small = tab.run(f"{link}.querySelector('img').getBoundingClientRect().width")
        tab.click(link)
        assert tab.run(OPEN)
        width, alt = tab.run(ENLARGED)
        assert width > 1.3 * small
        assert alt == tab.run(f"{link}.querySelector('img').alt")
        if place == 0:
            tab.screenshot(SCREENSHOTS / f"enlarged_{screen_width}.png", whole=False)
        tab.press("Escape")
        assert not tab.run(OPEN)
        assert tab.run(f"document.activeElement === {link}"), "the reader goes on where they were"
    assert tab.complaints == []


@pytest.mark.parametrize("key", ["Enter", " "])
def test_figures_enlarge_by_keyboard(pages: Pages, screen: Screen, key: str):
    tab = screen.show(pages("comparison"))
    tab.run("document.querySelector('a.enlarge').focus()")
    tab.press(key)
    assert tab.run(OPEN)
    assert tab.run("document.activeElement.textContent") == "Close"
    tab.press(key)
    assert not tab.run(OPEN)


def test_a_click_closes_the_figure(pages: Pages, screen: Screen):
    tab = screen.show(pages("comparison"))
    for part in ("dialog button", "dialog img"):
        tab.click("document.querySelector('a.enlarge')")
        assert tab.run(OPEN)
        tab.click(f"document.querySelector('{part}')")
        assert not tab.run(OPEN)


# -- without script, and what may run -------------------------------------------------------------------------------


def test_without_script_the_page_shows_the_same(pages: Pages, screen: Screen):
    tab = screen.show(pages("comparison"))
    text = "document.querySelector('main').textContent"
    with_script = tab.run(text)
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    tab.show(pages("comparison"), 1440)
    assert tab.run(text) == with_script
    assert tab.run("document.querySelectorAll('button, dialog').length") == 0
    assert tab.run("document.querySelector('a.enlarge').getAttribute('href')") == "figures/main.png"


def test_another_script_does_not_run_and_is_seen(pages: Pages, screen: Screen, tmp_path: Path):
    """The policy holds against what a name might smuggle in, and these tests would notice."""
    added = "<script>document.title = 'changed'</script><img src=x onerror=\"document.title = 'changed'\"></main>"
    path = tmp_path / "page.html"
    path.write_text(pages("comparison").read_text().replace("</main>", added))
    tab = screen.show(path)
    assert tab.run("document.title") == "comparison: comparison of training methods"
    assert len([complaint for complaint in tab.complaints if "Content Security Policy" in complaint]) >= 3


def test_what_is_wider_than_the_screen_is_seen(screen: Screen, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><body><div class=wide style='overflow: auto'><p style='width: 2000px'>a</p></div>"
                    "<p style='width: 1500px'>b</p><img src='none.png' alt='c'></body>")  # fmt: skip
    tab = screen.show(path, 390)
    assert len(tab.run(OUTSIDE)) == 1
    assert tab.run("document.images[0].naturalWidth") == 0
    assert tab.asked_for[1:] == [(tmp_path / "none.png").as_uri()]
    assert tab.complaints
