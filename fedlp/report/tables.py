"""The summary table, for a terminal and as cells for the page, and the notes that belong under it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlp.report.groups import ABSENT, Group
from fedlp.report.runs import Run
from fedlp.report.summary import MB, Metric, Spread, Summary, coverage, evaluations, metric_of, summarize

WIDTH = 110
_LONGEST_METHOD = 38
_SHORTEST_METHOD = 16
_MOST_LAYERS = 6


@dataclass(frozen=True, slots=True)
class Column:
    """One column: a title of two lines, the cell of a row, and whether it also stands in the terminal's table."""

    title: tuple[str, str]
    cell: Callable[[Summary], str]
    in_terminal: bool = True


def columns(rows: Sequence[Summary]) -> list[Column]:
    """Return the columns, headed by the rows' metric where they share one."""
    metrics = {row.metric for row in rows if row.metric}
    shared = next(iter(metrics)) if len(metrics) == 1 else None
    name, unit = (shared.name, shared.unit) if shared else ("metric", "")
    spent = [Column(("epsilon", ""), lambda row: number(row.epsilon))] if any(row.epsilon for row in rows) else []
    return [
        Column(("method", ""), lambda row: row.group.label),
        Column(("seeds", ""), _seeds),
        Column(("rounds", ""), _rounds),
        Column((name, f"final, {unit}" if unit else "final"), lambda row: _result(row, row.final, shared)),
        Column(("", "best"), lambda row: _best(row, shared)),
        *spent,
        Column(("MB up", "a round"), _cost("bytes_up_per_round", MB)),
        Column(("MB down", "a round"), _cost("bytes_down_per_round", MB)),
        Column(("MB up", "in all"), _cost("bytes_up", MB), in_terminal=False),
        Column(("MB down", "in all"), _cost("bytes_down", MB), in_terminal=False),
        Column(("k params", "a client"), _params),
        Column(("k params", "expected"), lambda row: number(row.expected_params_per_client, 1e3), in_terminal=False),
        Column(("GMACs", "in all"), _cost("macs", 1e9)),
        Column(("time", ""), lambda row: duration(row.wall_time_s)),
        Column(("failures", ""), lambda row: str(row.failures), in_terminal=False),
    ]


def summary_table(groups: Sequence[Group]) -> str:
    """Return the groups as a plain-text table of at most 110 columns, with notes under it.

    One row a group: means over the seeds that count (see :class:`~fedlp.report.groups.Group`), the final metric with
    its sample standard deviation. MB are 1e6 bytes; parameters are those sent to and from one client in one round;
    ``~`` marks expected values, which are not measured.
    """
    rows = [summarize(group) for group in groups]
    shown = [column for column in columns(rows) if column.in_terminal]
    cells = [[column.cell(row) for column in shown] for row in rows]
    widths = [max(map(len, (*column.title, *(line[i] for line in cells)))) for i, column in enumerate(shown)]
    room = WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(min(room, _LONGEST_METHOD), _SHORTEST_METHOD))
    lines = [_line(list(title), widths) for title in zip(*(column.title for column in shown), strict=True)]
    lines.append("-" * len(_line([""] * len(widths), widths, strip=False)))
    for method, *values in cells:
        first, *rest = textwrap.wrap(method, widths[0]) or [""]
        lines.append(_line([first, *values], widths))
        lines += rest
    for note in notes(groups):
        lines += textwrap.wrap(note, WIDTH, initial_indent="* ", subsequent_indent="  ")
    return "\n".join(lines) + "\n"


def notes(groups: Sequence[Group]) -> list[str]:
    """Return caveats of the numbers, one sentence each; empty if there are none."""
    return [note for group in groups for note in _notes(group)]


def number(value: float | None, unit: float = 1.0) -> str:
    """Return ``value / unit`` with about three significant digits."""
    if value is None:
        return ABSENT
    scaled = value / unit
    if not math.isfinite(scaled):
        return "nan"
    size = abs(scaled)
    if size >= 1e7 or 0 < size < 1e-3:
        return f"{scaled:.2e}"
    return f"{scaled:,.0f}" if size >= 1e4 else f"{scaled:.2f}" if size >= 0.1 or size == 0 else f"{scaled:.3g}"


def plus_minus(value: Spread) -> str:
    """Return mean ± standard deviation, both with the mean's digits."""
    mean = number(value.mean)
    if value.std is None:
        return mean
    plain = "e" not in mean and math.isfinite(value.std)
    return f"{mean} ± " + (f"{value.std:,.{len(mean.partition('.')[2])}f}" if plain else number(value.std))


def duration(seconds: float | None) -> str:
    """Return a time in its natural unit."""
    if seconds is None:
        return ABSENT
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _line(cells: list[str], widths: list[int], *, strip: bool = True) -> str:
    line = "  ".join(
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
    )
    return line.rstrip() if strip else line


def _cost(name: str, unit: float) -> Callable[[Summary], str]:
    return lambda row: _mark(row, getattr(row, name)) + number(getattr(row, name), unit)


def _mark(row: Summary, value: float | None) -> str:
    return "~" if row.group.dry and value is not None else ""


def _seeds(row: Summary) -> str:
    counted, known = len(row.group.counted), len({run.seed for run in row.group.runs})
    return str(known) if counted == known or row.group.dry else f"{counted}/{known}"


def _rounds(row: Summary) -> str:
    asked = row.group.runs[0].num_rounds
    return str(asked) if row.rounds == asked or row.group.dry else f"{row.rounds}/{asked}"


def _result(row: Summary, value: Spread | None, shared: Metric | None) -> str:
    if row.group.dry:
        return "dry run"
    if value is None or row.metric is None:
        return ABSENT
    text = plus_minus(value)
    return text if shared else f"{text} {row.metric.unit or row.metric.name}"


def _best(row: Summary, shared: Metric | None) -> str:
    return ABSENT if row.best is None else _result(row, Spread(row.best.mean, None), shared)


def _params(row: Summary) -> str:
    value = row.expected_params_per_client if row.group.dry else row.params_per_client
    return _mark(row, value) + number(value, 1e3)


def _notes(group: Group) -> list[str]:
    if group.dry:
        return [f"{group.label}: figures marked ~ are expected, none is measured."]
    counted, metric = group.counted, metric_of(group)
    found = [_run_note(group, run) for run in group.runs]
    for run in counted:
        values = evaluations(run, metric) if metric else {}
        bad = [server_round for server_round, value in values.items() if not np.isfinite(value)]
        if metric and bad:
            found.append(
                f"{group.label}, seed {run.seed}: {metric.name} is not a finite number, first in round {bad[0]}."
            )
    failures = sum(len(record.failures) for run in counted for record in run.rounds)
    if failures:
        found.append(f"{group.label}: {failures} client failure{'s' if failures > 1 else ''}.")
    layers, _, values_by_round = coverage(group)
    never = [layer for layer, row in zip(layers, values_by_round, strict=True) if not row.any()]
    if never:
        more = f" and {len(never) - _MOST_LAYERS} more" if len(never) > _MOST_LAYERS else ""
        found.append(f"{group.label}: never updated: {', '.join(never[:_MOST_LAYERS])}{more}.")
    return [note for note in found if note]


def _run_note(group: Group, run: Run) -> str:
    who = f"{group.label}, seed {run.seed}"
    counts = any(run is other for other in group.counted)
    if run.dry or (run.finished and counts):
        return ""
    if run.finished:
        return f"{who}: {run.path} repeats a seed and is not counted."
    return f"{who}: stopped after round {run.last_round} of {run.num_rounds}{'' if counts else '; not counted'}."
