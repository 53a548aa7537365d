"""Seconds to an accuracy, energy and late clients by method and kind of round; accuracy against simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.tables import line, runs_by_method, spread
from fedlp.report import Group, Run
from fedlp.report.simulated import class_uses

METHODS = {"fedavg": "FedAvg", "heterofl": "HeteroFL", "plan": "FedLP-Plan"}
VARIANTS = {
    "plan-whole": "FedLP-Plan, scores of whole clients",
    "fedavg-down8": "FedAvg, 8 bits down",
    "heterofl-down8": "HeteroFL, 8 bits down",
    "plan-whole-down8": "FedLP-Plan, scores of whole clients, 8 bits down",
}
MODES = {"synchronous": "synchronous", "deadline": "deadline of 1 s", "asynchronous": "asynchronous"}
LEVELS = (50, 80, 90, 95)
_SHOWN = ("synchronous", "asynchronous")


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` and ``accuracy.png`` from the packed runs in ``results`` to ``out``."""
    runs = runs_by_method(results, "mixed")
    lines = [
        "# Accuracy against simulated time",
        "",
        "Means ± standard deviation over seeds. Seconds to an accuracy: of the global model, simulated, to the end of",
        "the first evaluated round that reached it; with the number of seeds that did, where not all.",
        "",
        *_times(runs),
        "",
        "## Device classes",
        "",
        "Utilisation in %: share of the simulated time in which the clients of a class took part; in brackets parts",
        "that were not finished in time or at the end, of all that began, mean over seeds.",
        "",
        *_classes(runs),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "accuracy.png").write_bytes(_figure(runs))


def _times(runs: dict[str, list[Run]]) -> list[str]:
    head = ["method", "rounds", "accuracy at the end, %", *(f"s to {level} %" for level in LEVELS)]
    head += ["s in all", "MB up", "MB down", "energy, J", "late"]
    rows = [line(head), line(["---"] * len(head))]
    for method, name in {**METHODS, **VARIANTS}.items():
        for mode, kind in MODES.items():
            found = runs[f"{method}-{mode}"]
            cells = [name, kind, spread([100 * run.rounds[-1].metrics["accuracy"] for run in found])]
            cells += [_reached([seconds_to(run, level) for run in found]) for level in LEVELS]
            cells += [spread([sum(_seconds(run)) for run in found])]
            cells += [f"{np.mean([sum(one.bytes_up for one in run.rounds) / 1e6 for run in found]):.1f}"]
            cells += [f"{np.mean([sum(one.bytes_down for one in run.rounds) / 1e6 for run in found]):.1f}"]
            uses = class_uses(Group(name, tuple(found)))
            cells += [f"{sum(use.energy_j or 0.0 for use in uses):.0f}"]
            late = [sum(failure.reason == "late" for one in run.rounds for failure in one.failures) for run in found]
            rows.append(line([*cells, f"{np.mean(late):.0f}"]))
    return rows


def _classes(runs: dict[str, list[Run]]) -> list[str]:
    columns = {
        f"{name}, {MODES[mode]}": {use.device: use for use in class_uses(Group(name, tuple(runs[f"{method}-{mode}"])))}
        for method, name in METHODS.items()
        for mode in MODES
    }
    devices = list(next(iter(columns.values())))
    rows = [line(["class", *columns]), line(["---"] * (1 + len(columns)))]
    for device in devices:
        cells = [device]
        for uses in columns.values():
            use = uses[device]
            lost = max(0.0, use.asked - use.finished)
            text = f"{100 * use.utilisation:.1f}" if use.asked else ""
            cells.append(f"{text} ({lost:.0f} of {use.asked:.0f})" if round(lost) else text)
        rows.append(line(cells))
    return rows


def seconds_to(run: Run, level: float) -> float:
    """Return the simulated seconds to the end of the first round with an accuracy of ``level`` %; infinity if none."""
    for record, seconds in zip(run.rounds, np.cumsum(_seconds(run)), strict=True):
        if 100 * record.metrics.get("accuracy", 0.0) >= level:
            return float(seconds)
    return float("inf")


def _seconds(run: Run) -> list[float]:
    return [0.0 if record.simulated is None else record.simulated.seconds for record in run.rounds]


def _reached(seconds: Sequence[float]) -> str:
    """Return mean and deviation over the seeds that reached a level, and how many did."""
    known = [value for value in seconds if value < float("inf")]
    if not known:
        return ""
    return spread(known) + ("" if len(known) == len(seconds) else f" ({len(known)} of {len(seconds)})")


def _figure(runs: dict[str, list[Run]]) -> bytes:
    """Return accuracy against simulated seconds, mean over seeds, as PNG."""
    from matplotlib import rc_context  # takes a second to load

    from fedlp.report.figures import COLOURS, MARKERS, STYLE, blank, to_png

    with rc_context(STYLE):
        figure = blank(4.2)
        axes = figure.subplots()
        for index, (method, name) in enumerate(METHODS.items()):
            for mode in _SHOWN:
                found = runs[f"{method}-{mode}"]
                seconds = np.mean([np.cumsum(_seconds(run)) for run in found], axis=0)
                values = np.array([[100 * one.metrics["accuracy"] for one in run.rounds] for run in found])
                dash = "-" if mode == "synchronous" else "--"
                (drawn,) = axes.plot(seconds, values.mean(axis=0), dash, color=COLOURS[index], lw=1.7)
                drawn.set(marker=MARKERS[index], markersize=4, markevery=2, label=f"{name}, {MODES[mode]}")
                low, high = values.min(axis=0), values.max(axis=0)
                axes.fill_between(seconds, low, high, color=COLOURS[index], alpha=0.12, lw=0)
        axes.set(xlabel="simulated time so far, s", ylabel="test accuracy, %", xlim=(0, None))
        axes.grid()
        figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=2.6)
        return to_png(figure)
