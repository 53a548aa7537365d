"""Figures of the page as plain data, which ``assets/page.js`` hands to Plotly: nothing here draws.

A figure is a mapping of ``id``, ``section``, ``title``, ``caption``, ``alt``, a description, ``kind`` and the values
of that kind. The script chooses colour, dash and marker by a curve's index, so that a method looks the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlp.report.budget_figures import budget_figures
from fedlp.report.figure_values import BOX, number, numbers, spoken_box
from fedlp.report.groups import Group, clean
from fedlp.report.simulated import utilisation_figure
from fedlp.report.summary import METRICS, Curve, FloatArray, Metric, coverage, curve, metric_of, spent_by, summarize
from fedlp.types import RoundRecord

Figure = dict[str, Any]

_AXES = (
    ("round", "round", 1.0),
    ("bytes_up", "uplink of all clients so far, MB", 1e6),
    ("bytes_down", "downlink of all clients so far, MB", 1e6),
    ("macs", "training of all clients so far, GMACs", 1e9),
    ("simulated_s", "simulated time so far, h", 3600.0),
    ("wall_time_s", "measured time of the rounds so far, s", 1.0),
)
_COSTS = (
    ("bytes_up_per_round", "uplink of a round, MB", 1e6),
    ("bytes_down_per_round", "downlink of a round, MB", 1e6),
    ("macs", "training in all, GMACs", 1e9),
    ("wall_time_s", "measured time in all, s", 1.0),
)
CURVES, CLIENTS, LAYERS, BUDGETS = "Learning curves", "Tiers and clients", "Layers: sparsity and coverage", "Budgets"
COST, CLOCK = "Cost of a round", "Simulated time"
SECTIONS = (CURVES, CLIENTS, LAYERS, BUDGETS)  # before failures; the others stand after them


def figures(groups: Sequence[Group]) -> list[Figure]:
    """Return every figure for which the groups have numbers, in the order in which a reader wants them."""
    metrics = dict.fromkeys([*METRICS, *filter(None, map(metric_of, groups))])
    found = {
        CURVES: [figure for metric in metrics if (figure := _curves(groups, metric))],
        CLIENTS: [*_clients(groups)],
        LAYERS: [*_coverage(groups)],
        BUDGETS: [*budget_figures(groups)],
        COST: [*_costs(groups)],
        CLOCK: [*utilisation_figure(groups)],
    }
    placed = [(section, figure) for section, some in found.items() for figure in some]
    return [{"id": f"figure-{index}", "section": name, **figure} for index, (name, figure) in enumerate(placed)]


# ---- metric against round, bytes, MACs, time
def _curves(groups: Sequence[Group], metric: Metric) -> Figure | None:
    """Return the figure of the groups' own metric; None where no group has it."""
    name = metric.name.replace("_", " ").capitalize()
    of_clients = metric.name.startswith("client_")
    where = "clients' sub-models on their own test examples" if of_clients else "the global model on the test set"
    caption = f"{name.removeprefix('Client ').capitalize()} of {where} after each evaluated round."
    label = metric.title.replace("_", " ") if of_clients else f"test {metric.title}"
    found = _known(groups, metric, own=True)
    return _curve_figure(groups, found, name, caption, label) if found else None


def _worst_tenth(groups: Sequence[Group], name: str, unit: str, scale: float) -> Figure | None:
    """Return the figure of the mean over the worst tenth of the clients; None where it is not on record."""
    metric = Metric(f"client_{name}_worst", unit, scale, None)
    found = _known(groups, metric, own=False)
    caption = f"Mean {name} of the worst tenth of the clients, each on its own test examples."
    label = f"{name} of the worst tenth{unit and ', '}{unit}"
    title = f"{name.capitalize()} of the worst tenth of clients"
    return _curve_figure(groups, found, title, caption, label) if found else None


def _known(groups: Sequence[Group], metric: Metric, *, own: bool) -> dict[int, Curve]:
    """Return the curves with finite values by the index of their group; only of a group's first metric if ``own``."""
    found = {index: curve(group, metric) for index, group in enumerate(groups) if not own or metric_of(group) == metric}
    return {index: one for index, one in found.items() if one is not None and np.isfinite(one.mean).any()}


def _curve_figure(groups: Sequence[Group], found: Mapping[int, Curve], title: str, caption: str, label: str) -> Figure:
    curves: list[dict[str, Any]] = [
        {
            "index": index,
            "label": groups[index].label,
            "x": {key: numbers(_spent(groups[index], key, one.rounds) / scale) for key, _, scale in _AXES},
            "y": numbers(one.mean),
            "low": numbers(one.low) if (one.high > one.low).any() else None,
            "high": numbers(one.high) if (one.high > one.low).any() else None,
        }
        for index, one in found.items()
    ]
    seeds = max(len(groups[index].counted) for index in found)
    band = f" Bands: {'± one standard deviation' if seeds > 2 else 'range'} over seeds." if seeds > 1 else ""
    axes = [{"key": key, "label": name} for key, name, _ in _AXES if max(max(one["x"][key]) for one in curves) > 0]
    return {
        "kind": "curves",
        "title": title,
        "caption": f"{caption}{band}",
        "alt": f"{title}: " + "; ".join(_spoken(one) for one in curves) + ".",
        "label": label,
        "axes": axes or [{"key": "round", "label": "round"}],
        "curves": curves,
    }


def _spoken(one: dict[str, Any]) -> str:
    known = [value for value in one["y"] if value is not None]
    end = f"{known[-1]:.4g} after {one['x']['bytes_up'][-1]:.3g} MB up"
    return f"{clean(one['label'])} starts at {known[0]:.4g} and ends at {end}"


def _spent(group: Group, key: str, rounds: NDArray[np.int64]) -> FloatArray:
    """Return the cumulative cost at the end of each round, mean over seeds."""
    if key == "round":
        return rounds.astype(np.float64)
    runs = [run for run in group.counted if run.rounds]
    return np.mean([spent_by(run, key, rounds) for run in runs], axis=0)  # type: ignore[no-any-return]


# ---- clients
def _clients(groups: Sequence[Group]) -> Iterator[Figure]:
    """Yield the spread over clients and tiers of the metric that clients measured last."""
    boxes = []
    names: dict[str, None] = {}
    for index, group in enumerate(groups):
        for record in _last_evaluated(group):
            for one in record.evaluations:
                name = next(iter(one.metrics), None) if "accuracy" not in one.metrics else "accuracy"
                if name is not None and np.isfinite(one.metrics[name]):
                    names[name] = None
                    boxes.append((index, group.label, one.tier, name, one.metrics[name]))
    for name in names:
        rows = [row for row in boxes if row[3] == name]
        tiers = list(dict.fromkeys(row[2] for row in rows))
        scale, unit = (100.0, ", %") if name == "accuracy" else (1.0, "")
        series = [
            {"index": index, "label": groups[index].label, "x": [_tier(row) for row in mine], "y": _values(mine, scale)}
            for index in dict.fromkeys(row[0] for row in rows)
            if (mine := [row for row in rows if row[0] == index])
        ]
        yield {
            "kind": "boxes",
            "title": f"{name.capitalize()} by tier and client",
            "caption": "Each client's sub-model on the client's own test examples, in the last round that evaluated on "
            f"clients. {BOX}",
            "alt": f"{name} of clients in {len(tiers)} tiers: " + "; ".join(map(spoken_box, series)) + ".",
            "label": f"{name} of one client{unit}",
            "series": series,
        }
        worst = _worst_tenth(groups, name, unit.removeprefix(", "), scale)
        if worst:
            yield worst


def _last_evaluated(group: Group) -> Iterator[RoundRecord]:
    for run in group.counted:
        record = next((one for one in reversed(run.rounds) if one.evaluations), None)
        if record is not None:
            yield record


def _tier(row: tuple[Any, ...]) -> str:
    return f"tier {clean(row[2])}"


def _values(rows: Sequence[tuple[Any, ...]], scale: float) -> list[float | None]:
    return numbers(np.array([row[4] for row in rows]) * scale)


# ---- cost of a round
def _costs(groups: Sequence[Group]) -> Iterator[Figure]:
    rows = [(index, summarize(group)) for index, group in enumerate(groups)]
    parts = []
    for key, label, scale in _COSTS:
        values = {index: getattr(row, key) for index, row in rows}
        if any(values.values()):
            parts.append({"label": label, "values": [number(values[index], scale) for index, _ in rows]})
    if parts:
        yield {
            "kind": "bars",
            "title": "Cost by part",
            "caption": "Means over seeds. Bytes are of encoded messages, all clients of a round together; MACs are of "
            "training; time is measured on the machine of the run, so compare it between runs of one machine only.",
            "alt": "Cost by part: " + "; ".join(_spoken_part(part, groups) for part in parts) + ".",
            "labels": [group.label for group in groups],
            "parts": parts,
        }


def _spoken_part(part: dict[str, Any], groups: Sequence[Group]) -> str:
    pairs = zip(groups, part["values"], strict=True)
    return f"{part['label']}: " + ", ".join(f"{clean(g.label)} {v:.3g}" for g, v in pairs if v is not None)


# ---- layers
def _coverage(groups: Sequence[Group]) -> Iterator[Figure]:
    maps = []
    for group in groups:
        layers, rounds, values = coverage(group)
        if layers:
            maps.append(
                {
                    "label": group.label,
                    "layers": [clean(layer) for layer in layers],
                    "rounds": rounds.tolist(),
                    "values": [numbers(row, 4) for row in values],
                }
            )
    if maps:
        yield {
            "kind": "maps",
            "title": "Coverage of each layer",
            "caption": "Fraction of each layer's entries that at least one client returned, mean over seeds. One minus "
            "it is the share of the layer that kept its old values: its sparsity in the round.",
            "alt": "Mean coverage over layers and rounds: " + "; ".join(map(_spoken_map, maps)) + ".",
            "maps": maps,
        }


def _spoken_map(one: dict[str, Any]) -> str:
    known = [value for row in one["values"] for value in row if value is not None]
    return f"{clean(one['label'])} {np.mean(known):.0%}" if known else f"{clean(one['label'])} is not on record"
