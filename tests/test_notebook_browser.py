"""The notebook in a real browser, opened by `jupyter notebook` and by `jupyter lab`.

Needs Chromium with its driver (Debian's packages chromium and chromium-driver) and selenium.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest

pytest.importorskip("selenium")

from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_notebook import NOTEBOOK, make_table, write_table

pytestmark = pytest.mark.slow


@pytest.fixture(params=["notebook", "lab"])
def address(request, tmp_path):
    """Start Jupyter as the README does; yield the address that Jupyter opens in a browser."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(NOTEBOOK, folder)
    write_table(folder / "excitations.pkl", make_table())
    # Replace the browser by a program that writes the address to a file.
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.new\nmv {opened}.new {opened}\n')
    browser.chmod(0o755)
    runtime = str(tmp_path / "runtime")
    environment = os.environ | {"HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": runtime}
    environment["BROWSER"] = str(browser)
    for name in ("EXCITATIONS", "EXCITATIONS_SEGMENTS", "DATA_DIR", "FIGURES_DIR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "jupyter", request.param, NOTEBOOK.name, "--allow-root"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=folder, env=environment, **quiet)
    try:
        deadline = time.monotonic() + 90
        while not opened.exists():
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.3)
        yield opened.read_text().strip()
    finally:
        server.terminate()
        server.wait(30)


def test_the_controls_change_the_picture(browser, address):
    browser.get(address)
    # Elements move while the page loads, so retry clicks that fail.
    wait = WebDriverWait(browser, 120, ignored_exceptions=[WebDriverException])
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell"))
    for item in ("Run", "Run All Cells"):
        wait.until(lambda b, item=item: click_menu(b, item))

    picture = wait.until(
        lambda b: b.find_element(By.CSS_SELECTOR, ".jp-OutputArea-output img.widget-image")
    )
    browser.execute_script("arguments[0].scrollIntoView()", picture)
    wait.until(lambda b: picture.size["width"] > 400)
    first = picture.get_attribute("src")

    browser.find_element(By.CSS_SELECTOR, ".widget-checkbox input").click()
    wait.until(lambda b: picture.get_attribute("src") != first)
    second = picture.get_attribute("src")

    tags = browser.find_element(By.CSS_SELECTOR, ".widget-select-multiple select")
    Select(tags).deselect_all()
    Select(tags).select_by_visible_text("loud")
    wait.until(lambda b: picture.get_attribute("src") != second)


def click_menu(browser, text):
    """Click the item of the menu bar or of the open menu; return whether it exists."""
    labels = browser.find_elements(By.CSS_SELECTOR, ".lm-MenuBar-itemLabel, .lm-Menu-itemLabel")
    for label in labels:
        if label.text == text:
            label.click()
            return True
    return False
