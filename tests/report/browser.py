"""Open a report page in headless Chromium and tell what is wrong with it.

Chromium and its driver are system packages. Where they are missing the check skips with the reason, but
on a CI machine (environment variable ``CI``) it fails: there a page nobody opened must not look tested.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome")
DRIVER_NAME = "chromedriver"
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing outside this machine can be reached
)
DRAW_SECONDS = 30.0

# A chart is drawn when its main drawing has a plot area; a picture when it has pixels.
PAGE_STATE = """
const charts = [...document.querySelectorAll('.plotly-graph-div')];
const images = [...document.querySelectorAll('img')];
return {
  ready: document.readyState === 'complete',
  charts: charts.map(c => [c.id, c.querySelectorAll('.main-svg').length > 0
                                 && c.querySelectorAll('.trace, .heatmaplayer image').length > 0]),
  images: images.map(i => [i.alt, i.naturalWidth]),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
"""


@contextmanager
def open_browser(profile: Path, width: int = 1200, height: int = 900) -> Iterator[WebDriver]:
    """A headless Chromium with an empty profile in the folder ``profile``; skips or fails without one."""
    browser = next(filter(None, map(shutil.which, BROWSER_NAMES)), None)
    driver_path = shutil.which(DRIVER_NAME)
    if browser is None or driver_path is None:
        missing = (
            f"{DRIVER_NAME if browser else ' / '.join(BROWSER_NAMES)} not found: install it to check pages"
        )
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (*SWITCHES, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        yield driver
    finally:
        driver.quit()


def page_state(driver: WebDriver, page: Path) -> dict[str, Any]:
    """Open ``page`` from disk, wait until every chart is drawn, and return what is on it."""
    driver.get(page.resolve().as_uri())

    def drawn(_: WebDriver) -> dict[str, Any] | Literal[False]:
        state = driver.execute_script(PAGE_STATE)
        return state if state["ready"] and all(done for _, done in state["charts"]) else False

    # The state is polled; where a chart never appears the last state is returned and tells which.
    try:
        return WebDriverWait(driver, DRAW_SECONDS).until(drawn)
    except TimeoutException:
        return driver.execute_script(PAGE_STATE)


def check_page(driver: WebDriver, page: Path, charts: int, images: int) -> None:
    """Assert that ``page`` draws ``charts`` charts and ``images`` pictures, without errors or the network."""
    (
        driver.get_log("browser"),
        driver.get_log("performance"),
    )  # reading empties them: earlier pages do not count
    state = page_state(driver, page)
    assert len(state["charts"]) == charts, f"charts on the page: {state['charts']}"
    assert all(done for _, done in state["charts"]), f"not drawn: {state['charts']}"
    assert len(state["images"]) == images, f"pictures on the page: {state['images']}"
    assert all(alt and width > 0 for alt, width in state["images"]), f"empty or untold: {state['images']}"
    errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, f"the browser reports: {errors}"
    foreign = foreign_requests(driver)  # reading empties the log: once
    assert not foreign, f"the page asks the network for {foreign}"


def foreign_requests(driver: WebDriver) -> list[str]:
    """Addresses that pages from disk asked for, apart from files; the browser itself may ask for others.

    Reading empties the log.
    """
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    asked = [params["request"]["url"] for params in sent if params["documentURL"].startswith("file:")]
    return [url for url in asked if url.split(":", 1)[0] not in ("file", "data", "blob", "about")]
