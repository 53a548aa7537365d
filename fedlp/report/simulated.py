"""Simulated time of runs on a virtual clock: use of device classes, and classes of which no client ever finishes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlp.report.groups import ABSENT, Group, clean
from fedlp.report.html import number_table, text
from fedlp.report.runs import Run

_MOST_OPEN = 12  # rows of a table that is shown without being asked for


@dataclass(frozen=True, slots=True)
class ClassUse:
    """Use of a device class in a group's runs, means over seeds.

    Attributes
    ----------
    utilisation : float
        Share of the simulated time in which the class's clients took part, in [0, 1].
    asked, finished : float
        Parts that began, and parts that were complete in time.
    never : float
        Clients that were asked and never finished.
    energy_j : float or None
        None for a class without watts.
    """

    device: str
    clients: int
    utilisation: float
    asked: float
    finished: float
    never: float
    energy_j: float | None


def class_uses(group: Group) -> list[ClassUse]:
    """Return the use of each device class; empty without a virtual clock."""
    found = [uses for run in group.counted if (uses := _run_uses(run))]
    names = dict.fromkeys(name for uses in found for name in uses)
    return [_mean([uses[name] for uses in found if name in uses]) for name in names]


def simulated_section(groups: Sequence[Group]) -> str:
    """Return the table of device classes; empty without a virtual clock."""
    rows, idle = [], []
    for group in groups:
        for use in class_uses(group):
            energy = ABSENT if use.energy_j is None else f"{use.energy_j:.4g}"
            counts = [f"{count:.4g}" for count in (use.asked, use.finished, use.never)]
            cells = [f"{100 * use.utilisation:.2f}", *counts, energy]
            rows.append([group.label, use.device, str(use.clients), *cells])
            if use.asked and not use.finished:
                idle.append(f"{group.label}: {use.device}")
    if not rows:
        return ""
    head = ["method", "device class", "clients", "utilisation, %", "asked", "finished", "never finished", "energy, J"]
    caption = (
        "Means over seeds. Utilisation: share of the simulated time in which the class's clients took part; never "
        "finished: clients that were asked and never answered in time."
    )
    never = f"<p>No client finishes in: {text('; '.join(idle))}.</p>" if idle else ""
    found = number_table([(title, False) for title in head], rows, caption)
    return never + (
        found if len(rows) <= _MOST_OPEN else f"<details><summary>Device classes</summary>{found}</details>"
    )


def utilisation_figure(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Yield the utilisation of each device class by method."""
    found = {index: {use.device: use for use in class_uses(group)} for index, group in enumerate(groups)}
    names = list(dict.fromkeys(name for uses in found.values() for name in uses))
    parts: list[dict[str, Any]] = []
    for name in names:
        uses = [found[index].get(name) for index in range(len(groups))]
        values = [None if use is None else float(f"{100 * use.utilisation:.6g}") for use in uses]
        parts.append({"label": f"{clean(name)}: utilisation, %", "values": values})
    if parts:
        spoken = [f"{part['label']}: {_spoken(groups, part['values'])}" for part in parts]
        yield {
            "kind": "bars",
            "title": "Utilisation by device class",
            "caption": "Share of the simulated time in which the clients of a class took part, mean over seeds.",
            "alt": "; ".join(spoken) + ".",
            "labels": [group.label for group in groups],
            "parts": parts,
        }


def _spoken(groups: Sequence[Group], values: Sequence[float | None]) -> str:
    pairs = zip(groups, values, strict=True)
    return ", ".join(f"{clean(group.label)} {value:.3g}" for group, value in pairs if value is not None)


def _run_uses(run: Run) -> dict[str, ClassUse]:
    times = [record.simulated for record in run.rounds if record.simulated is not None]
    seconds = sum(time.seconds for time in times)
    asked: dict[str, set[int]] = {}
    done: dict[str, set[int]] = {}
    for client in (client for time in times for client in time.clients):
        asked.setdefault(client.device, set()).add(client.client_id)
        if client.finished:
            done.setdefault(client.device, set()).add(client.client_id)
    found = {}
    for name in dict.fromkeys(name for time in times for name in time.devices):
        uses = [time.devices[name] for time in times if name in time.devices]
        energies = [use.energy_j for use in uses if use.energy_j is not None]
        available = seconds * uses[0].clients
        found[name] = ClassUse(
            device=name,
            clients=uses[0].clients,
            utilisation=sum(use.busy_s for use in uses) / available if available else 0.0,
            asked=float(sum(use.asked for use in uses)),
            finished=float(sum(use.finished for use in uses)),
            never=float(len(asked.get(name, set()) - done.get(name, set()))),
            energy_j=sum(energies) if energies else None,
        )
    return found


def _mean(uses: Sequence[ClassUse]) -> ClassUse:
    energies = [use.energy_j for use in uses if use.energy_j is not None]
    utilisation, asked, finished, never = (
        float(np.mean([getattr(use, name) for use in uses])) for name in ("utilisation", "asked", "finished", "never")
    )
    energy = float(np.mean(energies)) if energies else None
    return ClassUse(uses[0].device, uses[0].clients, utilisation, asked, finished, never, energy)
