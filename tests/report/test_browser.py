from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver

from dydit.report.html import render_report
from dydit.report.storage import write_summary
from dydit.report.summary import Summary

from . import browser as browser_module
from .browser import check_page, foreign_requests, open_browser, page_state


def test_complete_page_opens_from_disk_with_every_figure_drawn(browser: WebDriver, page_path: Path) -> None:
    check_page(browser, page_path, charts=5, images=2)


def test_bare_page_opens(browser: WebDriver, tmp_path: Path, bare_summary: Summary) -> None:
    write_summary(bare_summary, tmp_path)
    check_page(browser, render_report(tmp_path), charts=0, images=0)


def test_nothing_sticks_out_of_a_narrow_screen(browser: WebDriver, page_path: Path) -> None:
    narrow = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        assert page_state(browser, page_path)["overflow"] <= 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<img alt='nothing there' src='data:,'>", "empty or untold"),
        ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>", "empty or untold"),
        ("", "pictures on the page"),
        ("<img alt='from outside' src='https://example.invalid/a.png'>", "empty or untold"),
    ],
)
def test_the_check_sees_a_bad_picture(browser: WebDriver, tmp_path: Path, body: str, complaint: str) -> None:
    page = tmp_path / "bad.html"
    page.write_text(body)
    with pytest.raises(AssertionError, match=complaint):
        check_page(browser, page, charts=0, images=1)


def test_the_check_sees_script_errors_and_requests(browser: WebDriver, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>missing()</script>")
    with pytest.raises(AssertionError, match="missing is not defined"):
        check_page(browser, page, charts=0, images=0)
    page.write_text("<script src='https://example.invalid/plotly.js'></script>")
    page_state(browser, page)
    assert foreign_requests(browser) == ["https://example.invalid/plotly.js"]


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_browser_ci_fails_and_others_skip(
    ci: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(browser_module.shutil, "which", lambda _: None)
    with pytest.raises(outcome, match="chromium .* not found: install it"), open_browser(tmp_path):
        pass
