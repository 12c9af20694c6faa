"""The notebook's controls, moved in JupyterLab by a real browser.

Needs Chromium with its driver (Debian's packages chromium and chromium-driver) and selenium.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402
from test_notebook import NOTEBOOK, write_excitations  # noqa: E402

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DRIVER and BROWSER), reason="Chromium and its driver are not installed"
    ),
]


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the notebook and small excitations; gives its address."""
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copy(NOTEBOOK, folder)
    write_excitations(folder / "excitations.pkl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()
    environment = os.environ | {
        "HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "PYTHONPATH": str(NOTEBOOK.parent), "EXCITATIONS": "excitations.pkl",
    }  # fmt: skip
    environment.pop("DATA_DIR", None)
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root",
            "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
            f"--IdentityProvider.token={token}",
        ],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/api?token={token}"), 90)
        yield f"{address}/lab/tree/{NOTEBOOK.name}?token={token}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--window-size=1400,2400", f"--user-data-dir={tmp_path / 'browser'}",
    ):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def wait_for(is_true, seconds):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_a_moved_control_changes_the_figure(lab, browser):
    browser.get(lab)
    wait = WebDriverWait(browser, 120)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell"))
    # The command that the menu Run has; it waits for the kernel by itself.
    wait.until(
        lambda b: (
            b.find_element(By.CSS_SELECTOR, ".jp-Notebook-ExecutionIndicator").get_attribute(
                "data-status"
            )
            == "idle"
        )
    )
    run_all_cells(browser, wait)

    picture = wait.until(
        lambda b: b.find_element(By.CSS_SELECTOR, ".jp-OutputArea-output img.widget-image")
    )
    browser.execute_script("arguments[0].scrollIntoView()", picture)
    wait.until(lambda b: picture.size["width"] > 400)
    first = picture.get_attribute("src")

    order = next(
        element
        for element in browser.find_elements(By.CSS_SELECTOR, ".widget-dropdown select")
        if "channel number" in element.text
    )
    Select(order).select_by_visible_text("channel number")
    wait.until(lambda b: picture.get_attribute("src") != first)
    second = picture.get_attribute("src")

    tags = browser.find_element(By.CSS_SELECTOR, ".widget-select-multiple select")
    Select(tags).deselect_all()
    Select(tags).select_by_visible_text("ex")
    wait.until(lambda b: picture.get_attribute("src") != second)


def run_all_cells(browser, wait):
    for text in ("Run", "Run All Cells"):
        selector = (
            ".lm-MenuBar-itemLabel" if text == "Run" else ".lm-Menu-content .lm-Menu-itemLabel"
        )
        item = wait.until(
            lambda b, selector=selector, text=text: next(
                (e for e in b.find_elements(By.CSS_SELECTOR, selector) if e.text == text), None
            )
        )
        item.click()
