"""report.html in a real browser: players, keyboard, no requests, and without JavaScript.

Needs Chromium with its driver (Debian's packages chromium and chromium-driver) and selenium.
"""

import json

import eval as eval_script
from input_data import open_dataset

import pytest

pytest.importorskip("selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_eval import make_untrained_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tiny_dataset, tmp_path_factory):
    """Return the address of a page about an untrained model."""
    folder = tmp_path_factory.mktemp("page")
    model = make_untrained_model(folder / "m" / "m.keras", open_dataset(tiny_dataset), seed=0)
    command = [str(model), "--data-dir", str(tiny_dataset), "--report", str(folder / "report")]
    assert eval_script.main(command) == 0
    return (folder / "report" / "report.html").as_uri()


def requests(browser):
    """Return the addresses that the page has requested since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own start page also makes requests.
    return {one["request"]["url"] for one in sent if one["documentURL"].startswith("file:")}


def column(browser, number):
    """Return the cells of a column of the table of tags, without hidden rows."""
    rows = browser.find_elements(By.CSS_SELECTOR, "#tag-table tbody tr")
    cells = [row.find_elements(By.TAG_NAME, "td")[number].text for row in rows]
    return [cell for cell, row in zip(cells, rows, strict=True) if row.is_displayed()]


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()
    return browser.switch_to.active_element


def tab_to(browser, is_wanted):
    for _ in range(60):
        if is_wanted(press(browser, Keys.TAB)):
            return browser.switch_to.active_element
    pytest.fail("the element cannot be reached with the keyboard")


def test_tags_are_sorted_filtered_chosen_and_heard_with_the_keyboard(page, browser):
    browser.get(page)
    tab_to(browser, lambda element: element.get_attribute("id") == "filter")
    header = tab_to(browser, lambda element: element.tag_name == "button")
    press(browser, Keys.ENTER)
    names = column(browser, 0)
    assert names == sorted(names) and len(names) == 12
    press(browser, Keys.SPACE)
    assert column(browser, 0) == names[::-1]
    assert header.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    tab_to(browser, lambda element: element.text.startswith("ROC AUC"))
    press(browser, Keys.ENTER)
    scores = [cell.split()[0] for cell in column(browser, 2)]
    assert scores[-1] == "–" and scores[:-1] == sorted(scores[:-1], reverse=True)

    browser.find_element(By.ID, "filter").send_keys("STR")
    assert column(browser, 0) == ["strings"]
    assert browser.find_element(By.ID, "count").text == "1 of 12 tags"
    tab_to(browser, lambda element: element.text == "strings")
    press(browser, Keys.ENTER)
    (chosen,) = WebDriverWait(browser, 10).until(
        lambda b: [tag for tag in b.find_elements(By.CLASS_NAME, "tag") if tag.is_displayed()]
    )
    assert chosen.find_element(By.TAG_NAME, "summary").text.startswith("strings")
    press(browser, Keys.ENTER)
    assert chosen.is_displayed()  # the chosen tag stays open
    assert {address for address in requests(browser) if address[:5] != "data:"} == {page}

    player = tab_to(browser, lambda element: element.tag_name == "audio")
    assert player.get_attribute("preload") == "none"
    press(browser, Keys.SPACE)
    playing = "return arguments[0].duration > 1 && arguments[0].currentTime > 0"
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(playing, player))
    played = requests(browser)
    assert player.get_attribute("src") in played
    assert all(address.startswith(("file:", "data:")) for address in played)


def test_the_page_is_readable_without_javascript(page, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(page)
    assert len(column(browser, 0)) == 12
    tags = browser.find_elements(By.CLASS_NAME, "tag")
    assert len(tags) == 12 and all(tag.is_displayed() for tag in tags)
    assert not browser.find_element(By.ID, "filter").is_displayed()
    tags[0].find_element(By.TAG_NAME, "summary").click()
    assert tags[0].find_element(By.CSS_SELECTOR, "a.audio").is_displayed()
