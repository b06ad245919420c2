from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver

from dydit.report.html import render_report
from dydit.report.storage import write_summary
from dydit.report.summary import Summary

from . import synthetic
from .browser import open_browser


@pytest.fixture(scope="session")
def summary() -> Summary:
    return synthetic.summary()


@pytest.fixture(scope="session")
def bare_summary() -> Summary:
    return synthetic.bare_summary()


@pytest.fixture
def folder(tmp_path: Path, summary: Summary) -> Path:
    """A run folder with a complete summary."""
    write_summary(summary, tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def page_path(tmp_path_factory: pytest.TempPathFactory, summary: Summary) -> Path:
    """The page of the complete summary, rendered once for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("rendered")
    write_summary(summary, folder)
    return render_report(folder)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with open_browser(tmp_path_factory.mktemp("browser_profile")) as driver:
        yield driver
