"""The HTML report in a headless Chromium: it opens quietly, its tables and trees work, hostile texts stay texts."""

from __future__ import annotations

import pytest

from lib.reporting.page.build import open_model, write_page
from lib.reporting.page.inputs import PageOptions
from tests.browser import MISSING, browser_paths, console, open_browser, open_report, wait_for
from tests.report_tree import ReportWorld
from tests.reporting.test_page import ANSWERS, HOSTILE

N_NEURONS = 30  # more than one sheet of a table


@pytest.fixture(scope="module")
def driver():
    if browser_paths() is None:
        pytest.skip(MISSING)
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def world():
    return ReportWorld(n_neurons=N_NEURONS, texts=HOSTILE, answers=ANSWERS, description="<svg onload=alert(1)>")


@pytest.fixture(scope="module")
def page(world, tmp_path_factory):
    model = world.write(tmp_path_factory.mktemp("browser"))
    return write_page(open_model(model), None, None, PageOptions()).path


@pytest.fixture
def opened(driver, page):
    """The page, freshly opened; whatever a test does to it must leave the console empty."""
    open_report(driver, page)
    yield driver
    assert console(driver) == []


def grid(driver, name):
    return driver.find_element("css selector", f'[data-grid="{name}"]')


def column(driver, name, number):
    """Texts of a column of the visible rows."""
    rows = grid(driver, name).find_elements("css selector", "tbody > tr[data-row]")
    return [row.find_elements("css selector", ":scope > th, :scope > td")[number].text for row in rows]


def head(driver, name, number):
    return grid(driver, name).find_elements("css selector", "thead th")[number]


def press(driver, element, key):
    """Reach an element with the keyboard's focus and press a key on it."""
    driver.execute_script("arguments[0].focus()", element)
    driver.switch_to.active_element.send_keys(key)


def test_opens_with_an_empty_console(opened):
    assert console(opened) == []
    assert opened.title.startswith("MechaRule: Arithmetic on Tiny")
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_tables_sort_both_ways_and_say_so(opened):
    for direction, reverse in (("descending", True), ("ascending", False)):
        press(opened, head(opened, "flips", 5).find_element("css selector", "button"), "\n")
        assert head(opened, "flips", 5).get_attribute("aria-sort") == direction
        shown = [float(text.partition(" ")[0]) for text in column(opened, "flips", 5)]
        assert len(shown) == 25 and shown == sorted(shown, reverse=reverse)
    press(opened, head(opened, "flips", 0).find_element("css selector", "button"), " ")
    assert head(opened, "flips", 5).get_attribute("aria-sort") == "none"
    names = [tuple(int(part) for part in text[1:].split(":")) for text in column(opened, "flips", 0)]
    assert names == sorted(names)


def test_search_and_sheets_reach_every_row(opened, world):
    tools = grid(opened, "flips").find_element("css selector", ".tools")
    back, following = tools.find_elements("css selector", "button")
    assert tools.find_element("css selector", "output").text == "1 to 25 of 30 neurons" and not back.is_enabled()
    press(opened, following, "\n")
    assert len(column(opened, "flips", 0)) == 5 and not following.is_enabled()
    name = str(world.neurons[7])
    tools.find_element("css selector", "input").send_keys(name)
    assert name in column(opened, "flips", 0)
    assert all(name in text for text in column(opened, "flips", 0))
    tools.find_element("css selector", "input").send_keys(" no such thing")
    assert column(opened, "flips", 0) == []
    assert tools.find_element("css selector", "output").text == "0 neurons"


def test_a_neuron_opens_with_the_keyboard_and_closes_again(opened):
    row = grid(opened, "anchored").find_element("css selector", "tbody > tr button")
    press(opened, row, "\n")
    button = opened.switch_to.active_element
    assert button.get_attribute("aria-expanded") == "true"
    detail = opened.find_element("id", button.get_attribute("aria-controls"))
    assert "answer after ablation" in detail.text and "10 after" in detail.text or "{{ 7 * 7 }}" in detail.text
    button.send_keys(" ")
    assert opened.switch_to.active_element.get_attribute("aria-expanded") == "false"


def test_a_neuron_in_another_table_leads_to_its_rule(opened, world):
    name = column(opened, "flips", 0)[24]
    grid(opened, "flips").find_elements("css selector", "tbody > tr button")[24].click()
    button = opened.switch_to.active_element
    assert button.text.endswith(name) and button.get_attribute("aria-expanded") == "true"
    assert opened.execute_script("return decodeURIComponent(location.hash)") == f"#neuron={name}"


def test_the_tree_opens_down_to_every_agonist(opened, world):
    circuit = opened.find_element("css selector", ".circuit")
    press(opened, circuit.find_element("css selector", ":scope > summary"), "\n")
    tree = circuit.find_element("css selector", ".tree")
    # An opened <details> says so in an event of its own, after the key press: what grows then is waited for.
    root = wait_for(opened, lambda _: tree.find_elements("css selector", "ul > li > details"))[0]
    assert root.get_attribute("open") is None
    press(opened, root.find_element("css selector", "summary"), "\n")
    assert len(wait_for(opened, lambda _: root.find_elements("css selector", ":scope > ul > li"))) == 2
    tree.find_element("css selector", ".tools button").click()
    found = [item.text for item in tree.find_elements("css selector", ".fate-3 + .link")]
    assert sorted(found) == sorted(map(str, world.neurons))


def test_hostile_texts_run_nothing_and_can_be_read(opened):
    opened.execute_script("for (const row of data.grids.anchored.rows.slice(0, 3)) showNeuron(row[0])")
    assert opened.execute_script("return window.owned === undefined")
    assert opened.find_elements("css selector", "img, main script, svg[onload]") == []
    text = grid(opened, "anchored").text
    assert "<script>window.owned = 1</script>" in text and "nul ⟨U+0000⟩ here" in text
    assert opened.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_on_paper_everything_is_open(opened):
    opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    closed = opened.find_elements("css selector", "main details:not([open])")
    # A search may have thousands of groups: on paper its tree stays as it is, and its levels are a table.
    assert all(item.find_elements("xpath", "ancestor::*[@data-tree]") for item in closed)
    opened.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert len(opened.find_elements("css selector", "main details:not([open])")) > 5
