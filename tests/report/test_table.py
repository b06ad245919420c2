from __future__ import annotations

from dydit.report.summary import Summary
from dydit.report.table import align, format_table


def test_columns_line_up() -> None:
    text = align(("name", "a"), [("x", "1.00"), ("longer", "22")])
    assert text.splitlines() == ["name       a", "------  ----", "x       1.00", "longer    22"]


def test_shows_everything_that_was_measured(summary: Summary) -> None:
    text = format_table(summary)
    for words in (
        "GMACs",
        "GFLOPs",
        "speed-up, ideal",
        "digit-classifier features",
        "lower is better",
        "equal",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120
    assert "\t" not in text and not text.endswith("\n")


def test_a_failed_check_cannot_be_overlooked(summary: Summary) -> None:
    failed = summary.checks[1].model_copy(update={"max_relative_difference": 0.3})
    assert "DIFFERENT" in format_table(summary.model_copy(update={"checks": (failed,)}))


def test_a_bare_summary_is_all_dashes(bare_summary: Summary) -> None:
    lines = format_table(bare_summary).splitlines()[2:8]
    assert len(lines) == 6
    assert all(line.endswith("–") for line in lines)
