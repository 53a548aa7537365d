"""Figures of budgets: limits and their use by tier, sub-models and uploads of clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedlp.report.figure_values import BOX, number, numbers, spoken_box
from fedlp.report.groups import Group, clean
from fedlp.report.summary import FloatArray

_LIMITS = {
    "params": "parameters",
    "macs": "operations",
    "memory_bytes": "memory",
    "upload_bytes": "uploads",
}
_MOST_BOXED = 5_000  # values of one box; beyond it an even selection


def budget_figures(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Yield the figures of budgets for which the groups have numbers."""
    yield from _used(groups)
    yield from _client_costs(groups)


def _client_costs(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Yield what one client got and sent in one round, beside what its budget was where fractions say so."""
    for key, title in (("params_down", "What a client held"), ("bytes_up", "What a client sent")):
        unit, label = (1e3, "thousand parameters down") if key == "params_down" else (1e3, "kB up")
        series = [
            {"index": index, "label": group.label, "x": [group.label] * len(values), "y": numbers(values / unit)}
            for index, group in enumerate(groups)
            if (values := _costs_of(group, key)).size
        ]
        if not series:
            continue
        limits = _limits(groups, series) if key == "params_down" else []
        more = " Dotted lines: the fleet's budgets, as fractions of the largest sub-model here." if limits else ""
        yield {
            "kind": "boxes",
            "title": title,
            "caption": f"One client in one round, over clients, rounds and seeds. {BOX}{more}",
            "alt": f"{title}: " + "; ".join(map(spoken_box, series)) + f" ({label}).",
            "label": label,
            "series": series,
            "limits": limits,
        }


def _used(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Yield how much of each limit each tier used: the mean over runs, in percent of the limit."""
    rows: dict[tuple[int, str], dict[str, list[float]]] = {}
    for index, group in enumerate(groups):
        for run in group.counted:
            for tier, limits in run.budgets.items():
                row = rows.setdefault((index, tier), {})
                for name, one in limits.items():
                    row.setdefault(name, []).append(100 * one["used"] / one["limit"])
    labels = [f"{groups[index].label}, {tier}" if len(groups) > 1 else tier for index, tier in rows]
    parts = [
        {"label": f"used of the limit on {words}, %", "values": [_mean(row.get(name)) for row in rows.values()]}
        for name, words in _LIMITS.items()
        if any(name in row for row in rows.values())
    ]
    if parts:
        yield {
            "kind": "bars",
            "title": "Budgets and their use",
            "caption": "By tier, device class or device: cost of the last round's sub-model, or the most that one "
            "client sent in a round, in percent of the limit. Memory is the estimate by which sub-models are chosen. "
            "No bar: no such limit.",
            "alt": "Use of budgets: " + "; ".join(_spoken_use(part, labels) for part in parts) + ".",
            "labels": labels,
            "colours": [index for index, _ in rows],
            "parts": parts,
            "limit": {"value": 100.0, "label": "budget"},
        }


def _mean(values: Sequence[float] | None) -> float | None:
    return number(float(np.mean(values)), 1.0) if values else None


def _spoken_use(part: dict[str, Any], labels: Sequence[str]) -> str:
    pairs = zip(labels, part["values"], strict=True)
    words = ", ".join(f"{clean(label)} {value:.3g}" for label, value in pairs if value is not None)
    return f"{part['label']}: {words}"


def _costs_of(group: Group, key: str) -> FloatArray:
    values = [float(getattr(cost, key)) for run in group.counted for record in run.rounds for cost in record.clients]
    step = -(-len(values) // _MOST_BOXED) or 1
    return np.array(values[::step])


def _limits(groups: Sequence[Group], series: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    fleets = [group.config.get("fleet") or {} for group in groups]
    fractions = [fleet.get("fractions") or [] for fleet in fleets if "params" in (fleet.get("limited") or ["params"])]
    if not fractions or any(one != fractions[0] for one in fractions) or not fractions[0]:
        return []
    largest = max(value for one in series for value in one["y"])
    return [{"value": fraction * largest, "label": f"budget {fraction:g}"} for fraction in fractions[0]]
