"""The summary as a short table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from dydit.report.results import metric_text, number, result_rows, verdict
from dydit.report.summary import Summary


def format_table(summary: Summary) -> str:
    """Plain text, no colours, no trailing newline; a dash where something was not measured."""
    blocks = [_compute_and_time(summary)]
    if summary.quality:
        blocks.append(_quality(summary))
    if summary.checks:
        blocks.append(_checks(summary))
    return "\n\n".join([*blocks, "\n".join(verdict(summary))])


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def pad(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([pad(header), rule, *(pad(row) for row in rows)])


def _compute_and_time(summary: Summary) -> str:
    rows = [(row.quantity, row.backbone, row.dydit) for row in result_rows(summary)]
    return align(("compute and time", "backbone", "DyDiT"), rows)


def _quality(summary: Summary) -> str:
    names = [metric.name for metric in summary.quality[0].metrics]
    rows = []
    for index, name in enumerate(names):
        better = summary.quality[0].metrics[index].better
        cells = [metric_text(row.metrics[index]) for row in summary.quality]
        rows.append((f"{name}, {better} is better", *cells))
    return align(("quality", *(row.label for row in summary.quality)), rows)


def _checks(summary: Summary) -> str:
    rows = [
        (check.name, number(check.max_relative_difference), number(check.tolerance), outcome(check.passed))
        for check in summary.checks
    ]
    return align(("what must agree", "max rel. diff.", "allowed", "result"), rows)


def outcome(passed: bool | None) -> str:
    """The result of a check in a word."""
    return "not checked" if passed is None else ("equal" if passed else "DIFFERENT")
