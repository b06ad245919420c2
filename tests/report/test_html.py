from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dydit.errors import DataError
from dydit.report.html import render_page, render_report
from dydit.report.page_figures import page_figures
from dydit.report.storage import write_summary
from dydit.report.summary import Summary


def without_plotly(page: str) -> str:
    """The page without scripts: what is left is ours."""
    return re.sub(r"<script>.*?</script>|<script type.*?</script>", "", page, flags=re.S)


@pytest.fixture(scope="module")
def ours(page_path: Path) -> str:
    return without_plotly(page_path.read_text())


def test_renders_from_the_folder_alone_and_again_to_the_same(folder: Path, page_path: Path) -> None:
    assert render_report(folder) == folder / "report.html"
    assert (folder / "report.html").read_bytes() == page_path.read_bytes()
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert pictures == {
        f"{n}.png" for n in ("samples", "compute_and_time", "width", "token_pictures", "training")
    }
    assert not list(folder.rglob(".*"))


def test_page_is_self_contained_and_forbids_requests(page_path: Path, ours: str) -> None:
    page = page_path.read_text()
    assert page.count("* plotly.js v") == 1  # inlined once
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", ours)
    assert "url(" not in ours and "@import" not in ours


def test_page_tells_results_with_conditions_and_honest_names(ours: str) -> None:
    for words in (
        "GMACs per image and step",
        "GFLOPs per image and step",
        "Fréchet distance (digit-classifier features)",
        "lower is better",
        "There is no control row",
        "median of 20 rounds",
        "dydit quickstart --seed 0",
    ):
        assert words in ours


def test_every_picture_and_chart_is_told_in_words(ours: str) -> None:
    images = re.findall(r"<img[^>]*>", ours)
    assert images and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    charts = re.findall(r'<div role="img"[^>]*>', ours)
    assert len(charts) == 5 and all(re.search(r'aria-label="[^"]{20,}"', chart) for chart in charts)
    assert ours.count("<figcaption>") == ours.count("<figure>") == 7
    assert '<html lang="en">' in ours and ours.count("<h1>") == 1


def test_a_bare_summary_shows_dashes_and_needs_no_plotly(bare_summary: Summary) -> None:
    page = render_page(bare_summary, page_figures(bare_summary))
    assert "<script" not in page
    assert page.count("not recorded in this run") == 7
    assert "Compute was not counted." in page
    assert "drew from the same noise" not in page
    assert "None" not in page


def test_text_of_a_summary_is_escaped(summary: Summary) -> None:
    hostile = "<script>alert(1)</script>"
    row = summary.quality[0].model_copy(update={"label": hostile, "conditions": hostile})
    conditions = summary.conditions.model_copy(
        update={"model": hostile, "command": hostile, "sampler": hostile}
    )
    changed = summary.model_copy(
        update={"title": hostile, "notes": (hostile,), "quality": (row,), "conditions": conditions}
    )
    page = render_page(changed, ())
    assert hostile not in page
    assert "&lt;script&gt;alert(1)" in page


def test_uncounted_operators_and_failed_checks_are_prominent(summary: Summary) -> None:
    failed = summary.checks[1].model_copy(update={"max_relative_difference": 0.3})
    compute = summary.compute.model_copy(update={"unsupported": {"aten::mystery": 3}})
    changed = summary.model_copy(update={"checks": (failed,), "compute": compute})
    page = without_plotly(render_page(changed, ()))
    assert "The MACs are a lower bound" in page and "aten::mystery" in page
    assert '<td data-label="Result" class="fail">DIFFERENT' in page


def test_a_folder_without_a_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="summary.json"):
        render_report(tmp_path)


def test_notes_are_shown(tmp_path: Path, bare_summary: Summary) -> None:
    write_summary(bare_summary.model_copy(update={"notes": ("Timed on a busy machine.",)}), tmp_path)
    assert "Timed on a busy machine." in render_report(tmp_path).read_text()


def test_rendering_needs_no_torch() -> None:
    code = "import sys, dydit.report.html; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
