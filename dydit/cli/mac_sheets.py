"""The tables of ``dydit macs``: rows of networks, as text, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dydit.cli.mac_networks import NetworkMacs
from dydit.compute.table import MacTable
from dydit.models.presets import PAPER_GMACS
from dydit.report.table import align
from dydit.shapes import ModelShape

UNITS = "1 GMAC = 1e9 multiply-adds = 2 GFLOPs"
_DASH = "–"
# The paper's models: latents of 256 px images, adaLN-Zero.
_PAPER = ((32, 32), "adaln_zero")
_STEP_COLUMNS = {
    "heads_on": ("heads on", ".1%"),
    "groups_on": ("groups on", ".1%"),
    "tokens_kept": ("tokens kept", ".1%"),
}


@dataclass(frozen=True)
class Row:
    """One line: MACs by closed form, and counted (None: nothing was run), with further columns."""

    name: str
    macs: float
    counted: float | None
    columns: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """For programs."""
        gmacs = self.macs / 1e9
        figures = {"macs": _whole(self.macs), "gmacs": gmacs, "gflops": 2 * gmacs}
        return {**figures, "counted_macs": _whole(self.counted), **self.columns}


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: what its figures are of, and under which ``conditions``.
        key: what the rows are: part, block, timestep or preset.
        total: the last line; None where the rows do not add up to anything.
        shown: the further columns that the text has room for -> their header and number format.
        facts: more about the whole, for programs; ``summary``: the same in words.
    """

    name: str
    conditions: str
    key: str
    rows: tuple[Row, ...]
    total: Row | None = None
    shown: dict[str, tuple[str, str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


def network_sheet(network: NetworkMacs, by: str, static: NetworkMacs) -> Sheet:
    """A network's MACs by "part", "block" or "timestep"; means over its timesteps, except by timestep.

    Args:
        static: what its total is compared with.
    """
    facts: dict[str, Any] = {
        "analytic_equals_counted": None if network.counted is None else not network.differences
    }
    summary = []
    if network is not static:
        facts["of_static"] = network.mean_macs / static.mean_macs
        summary.append(f"{facts['of_static']:.1%} of the static backbone")
    if network.steps:
        gmacs = [table.total / 1e9 for table in network.analytic]
        facts |= {"timesteps": len(gmacs), "gmacs_range": [min(gmacs), max(gmacs)]}
        summary.append(f"from {_figure(min(gmacs))} to {_figure(max(gmacs))} GMACs")
    about: dict[str, Any] = {"facts": facts, "summary": "; ".join(summary)}
    total = Row("total", *_means(network, lambda table: table.total))
    if by == "timestep":
        rows = [
            Row(
                f"{step.timestep:g}",
                analytic.total,
                None if network.counted is None else network.counted[i].total,
                {"heads_on": step.heads, "groups_on": step.groups, "tokens_kept": step.tokens},
            )
            for i, (step, analytic) in enumerate(zip(network.steps, network.analytic, strict=True))
        ]
        mean = Row("mean", total.macs, total.counted)
        return Sheet(network.name, network.conditions, by, tuple(rows), mean, _STEP_COLUMNS, **about)
    rows = [
        Row(
            name,
            *_means(network, lambda table, name=name: _axis(table, by).get(name, 0)),
            _parts(network, by, name),
        )
        for name in _names(network, by)
    ]
    return Sheet(network.name, network.conditions, by, tuple(rows), total, **about)


def preset_sheet(presets: Sequence[tuple[ModelShape, NetworkMacs]]) -> Sheet:
    """One line per preset, with the paper's figure where it has one."""
    shape = presets[0][0]
    published = (shape.sample_size, shape.conditioning) == _PAPER
    rows = [
        Row(
            network.name,
            *_means(network, lambda table: table.total),
            {"paper_gmacs": PAPER_GMACS.get(network.name) if published else None},
        )
        for _, network in presets
    ]
    paper = (
        "Peebles & Xie 2023 leave small terms out" if published else "the paper's are at 256 px, adaln_zero"
    )
    return Sheet(
        "presets",
        f"{describe(shape, patch=False)}; {paper}",
        "preset",
        tuple(rows),
        shown={"paper_gmacs": ("paper's GMACs", ".2f")},
        facts={"analytic_equals_counted": not any(network.differences for _, network in presets)},
    )


def describe(shape: ModelShape, patch: bool = True) -> str:
    """The shape in words."""
    height, width = shape.sample_size
    text = f", {shape.context_length} text tokens of {shape.context_dim}" if shape.context_length else ""
    size = f", patch {shape.patch_size}" if patch else ""
    return f"latent {shape.in_channels} x {height} x {width}{size}, {shape.conditioning}{text}"


def as_text(title: str, sheets: Sequence[Sheet]) -> str:
    """Tables to read."""
    blocks = [f"{title}\none image, one forward; {UNITS}"]
    for sheet in sheets:
        lines = [*sheet.rows, *([sheet.total] if sheet.total else [])]
        whole = sheet.total.macs if sheet.total and sheet.key != "timestep" else None
        header = [sheet.key, "GMACs", "GFLOPs", *(["share"] if whole else []), "counted GMACs"]
        body = [
            [
                row.name,
                _figure(row.macs / 1e9),
                _figure(2 * row.macs / 1e9),
                *([f"{row.macs / whole:.1%}"] if whole else []),
                _DASH if row.counted is None else _figure(row.counted / 1e9),
                *(_cell(row, name, form) for name, (_, form) in sheet.shown.items()),
            ]
            for row in lines
        ]
        header += [words for words, _ in sheet.shown.values()]
        heading = [f"{sheet.name}: {sheet.conditions}", *([sheet.summary] if sheet.summary else [])]
        blocks.append("\n".join([*heading, align(header, body)]))
    return "\n\n".join([*blocks, _verdict(sheets)])


def as_json(title: str, sheets: Sequence[Sheet]) -> str:
    """The same for programs, with exact MACs."""
    networks = [
        {
            "name": sheet.name,
            "conditions": sheet.conditions,
            **sheet.facts,
            **({} if sheet.total is None else sheet.total.figures()),
            "rows": [{sheet.key: row.name, **row.figures()} for row in sheet.rows],
        }
        for sheet in sheets
    ]
    return json.dumps(
        {"title": title, "per": "image and forward", "units": UNITS, "networks": networks}, indent=1
    )


def as_csv(sheets: Sequence[Sheet]) -> str:
    """One line per row and total; a cell is empty where nothing was counted."""
    key = sheets[0].key
    lines = [
        {"network": sheet.name, key: row.name, **row.figures()}
        for sheet in sheets
        for row in (*sheet.rows, *([sheet.total] if sheet.total else []))
    ]
    out = io.StringIO()
    fields = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue().rstrip("\n")


def _verdict(sheets: Sequence[Sheet]) -> str:
    equal = {sheet.facts["analytic_equals_counted"] for sheet in sheets}
    if None in equal:
        return (
            f"GMACs by closed form. {_DASH}: not counted, for a schedule has no weights; give its model too."
        )
    verdict = "DIFFERENT" if False in equal else "equal in every block and part, to the last MAC"
    return f"GMACs by closed form, and counted by fvcore: {verdict}."


def _means(network: NetworkMacs, figure: Any) -> tuple[float, float | None]:
    """Mean over the timesteps of a figure of the tables: by closed form, and counted."""
    analytic = sum(figure(table) for table in network.analytic) / len(network.analytic)
    if network.counted is None:
        return analytic, None
    return analytic, sum(figure(table) for table in network.counted) / len(network.counted)


def _axis(table: MacTable, by: str) -> dict[str, int]:
    return table.by_part if by == "part" else table.by_block


def _names(network: NetworkMacs, by: str) -> list[str]:
    """Rows that either way of counting has, in order."""
    names: list[str] = []
    for tables in (network.analytic, network.counted or ()):
        names += _axis(MacTable.sum(tables), by)
    return list(dict.fromkeys(names))


def _parts(network: NetworkMacs, by: str, block: str) -> dict[str, Any]:
    """MACs of each part of a block, mean over the timesteps."""
    if by != "block":
        return {}
    parts = MacTable.sum(network.analytic).cells[block]
    return {part: _whole(macs / len(network.analytic)) for part, macs in parts.items() if macs}


def _cell(row: Row, column: str, form: str) -> str:
    """A further column of a row: empty where the row has none, a dash where there is no figure."""
    if column not in row.columns:
        return ""
    value = row.columns[column]
    return _DASH if value is None else format(value, form)


def _whole(macs: float | None) -> float | None:
    return int(macs) if macs is not None and float(macs).is_integer() else macs


def _figure(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:#.4g}"
