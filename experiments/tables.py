"""Tables and figures of packed runs, for every experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlp.report import Group, Run, find_runs
from fedlp.report.files import PACKED

Curve = tuple[list[float], list[float], list[float]]  # values, MB of uplink and TMACs up to each of them


def runs_by_method(results: Path, group: str) -> dict[str, list[Run]]:
    """Return the runs of a group by method: the first folder of each run's name."""
    file = results / f"{group}{PACKED}"
    runs: dict[str, list[Run]] = {}
    for run in find_runs([file]):
        runs.setdefault(run.path.relative_to(file).parts[0], []).append(run)
    return runs


@dataclass(frozen=True)
class Budgets:
    """At which MB of uplink and at which TMACs of all clients a table says how far a method is."""

    up: Sequence[float]
    macs: Sequence[float] = ()


def budget_table(runs: Mapping[str, Sequence[Run]], metric: str, budgets: Budgets) -> list[str]:
    """Return one row a method: the metric at the end and at budgets, uplink and MACs in all; the best comes first.

    Values are mean ± population standard deviation over seeds; ``accuracy`` is in %. At a budget: of the last evaluated
    round that had sent, or computed, no more in all.
    """
    scale = 100 if metric == "accuracy" else 1
    rows = [_row(name, runs[name], metric, budgets, scale) for name in sorted(runs)]
    head = ["method", "seeds", "end", "uplink, MB", "downlink, MB", "client TMACs"]
    head += [*(f"at {mb} MB" for mb in budgets.up), *(f"at {tera} TMACs" for tera in budgets.macs)]
    ordered = sorted(rows, key=lambda row: -row[0] if metric == "accuracy" else row[0])
    return [line(head), line(["---"] * len(head)), *(line(cells) for _, cells in ordered)]


def _row(name: str, runs: Sequence[Run], metric: str, budgets: Budgets, scale: float) -> tuple[float, list[str]]:
    digits, curves = 1 if scale == 100 else 2, [_curve(run, metric, scale) for run in runs]
    final = [values[-1] for values, *_ in curves]
    cells = [name, str(len(curves)), spread(final, digits)]
    cells += [f"{np.mean([sent[-1] for _, sent, _ in curves]):.1f}"]
    cells += [f"{np.mean([sum(one.bytes_down for one in run.rounds) for run in runs]) / 1e6:.1f}"]
    cells += [f"{np.mean([spent[-1] for *_, spent in curves]):.2f}"]
    for budget, which in [*((mb, 1) for mb in budgets.up), *((tera, 2) for tera in budgets.macs)]:
        reached = [[a for a, cost in zip(one[0], one[which], strict=True) if cost <= budget] for one in curves]
        cells.append(spread([values[-1] for values in reached], digits) if all(reached) else "")
    return float(np.mean(final)), cells


def _curve(run: Run, metric: str, scale: float) -> Curve:
    sent, spent = np.cumsum([one.bytes_up for one in run.rounds]), np.cumsum([one.macs for one in run.rounds])
    evaluated = [index for index, one in enumerate(run.rounds) if metric in one.metrics]
    values = [scale * run.rounds[index].metrics[metric] for index in evaluated]
    return (
        values,
        [float(sent[index]) / 1e6 for index in evaluated],
        [float(spent[index]) / 1e12 for index in evaluated],
    )


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± population standard deviation; the value alone where there is one."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values):.{digits}f}" if len(values) > 1 else mean


def line(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def write_figures(
    runs: Mapping[str, Sequence[Run]], labels: Mapping[str, str], files: Sequence[str], out: Path
) -> None:
    """Draw some plots of a report, by their file names, of the methods in ``labels``, into ``out``."""
    from fedlp.report.plots import draw_plots  # matplotlib takes a second to load

    groups = [Group(label, tuple(runs[method])) for method, label in labels.items()]
    plots = {plot.file: plot.png for plot in draw_plots(groups)}
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        (out / file).write_bytes(plots[file])
