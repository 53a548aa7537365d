"""Distribution of a metric over clients: by round, and the worst tenth against the mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedlp.report.figures import COLOURS, DASHES, Plot, blank, plain, to_png
from fedlp.report.groups import Group
from fedlp.types import RoundRecord

_PREFIX, _WORST = "client_", "_worst"
_FIRST = ("accuracy", "perplexity")
_LAST = "loss"
_SCALES = {"accuracy": 100.0}
_UNITS = {"accuracy": ", %"}


@dataclass(frozen=True, slots=True)
class Spreads:
    """A metric over clients in the rounds that every counted run evaluated; means over seeds, (rounds,) each."""

    rounds: NDArray[np.int64]
    mean: NDArray[np.float64]
    worst: NDArray[np.float64]
    best: NDArray[np.float64]


def client_plots(groups: Sequence[Group]) -> list[Plot]:
    """Return the plot of the metric that clients measured on their own test examples; none where they did not."""
    name = _metric_of(groups)
    if name is None:
        return []
    spreads = {index: found for index, group in enumerate(groups) if (found := _spreads(group, name)) is not None}
    if not spreads:
        return []
    caption = (
        f"{name.capitalize()} of each client's sub-model on the client's own test examples. Left: mean over clients "
        "(line), mean of the worst tenth (dotted), and the range from the worst to the best tenth (band). Right: the "
        "worst tenth against the mean, round by round; the marker is the last round."
    )
    labels = {index: groups[index].label for index in spreads}
    return [Plot(f"client_{name}.png", f"{name.capitalize()} over clients", caption, _draw(spreads, labels, name))]


def _metric_of(groups: Sequence[Group]) -> str | None:
    """Return the metric that is drawn: accuracy or perplexity where clients report it, loss where nothing else is."""
    keys = {key for group in groups for record in _records(group) for key in record.metrics}
    names = {key.removeprefix(_PREFIX).removesuffix(_WORST) for key in keys if _is_spread(key)}
    ordered = [*(name for name in _FIRST if name in names), *sorted(names - {*_FIRST, _LAST}), _LAST]
    return ordered[0] if names else None


def _is_spread(key: str) -> bool:
    return key.startswith(_PREFIX) and key.endswith(_WORST)


def _records(group: Group) -> Iterator[RoundRecord]:
    for run in group.counted:
        yield from run.rounds


def _spreads(group: Group, name: str) -> Spreads | None:
    keys = [f"{_PREFIX}{name}{end}" for end in ("_mean", _WORST, "_best")]
    runs = [
        {record.server_round: record.metrics for record in run.rounds if all(key in record.metrics for key in keys)}
        for run in group.counted
    ]
    rounds = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not rounds:
        return None
    scale = _SCALES.get(name, 1.0)
    mean, worst, best = (
        np.array([np.mean([run[server_round][key] for run in runs]) * scale for server_round in rounds]) for key in keys
    )
    return Spreads(np.array(rounds, dtype=np.int64), mean, worst, best)


def _draw(spreads: Mapping[int, Spreads], labels: Mapping[int, str], name: str) -> bytes:
    figure = blank(3.6 + 0.22 * len(spreads))
    left, right = figure.subplots(1, 2)
    for index, one in spreads.items():
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        left.plot(one.rounds, one.mean, color=colour, linestyle=dash, marker="o", ms=2.5, label=plain(labels[index]))
        left.plot(one.rounds, one.worst, color=colour, linestyle=":", marker="o", ms=2.5)
        left.fill_between(one.rounds, one.worst, one.best, color=colour, alpha=0.12, lw=0)
        right.plot(one.mean, one.worst, color=colour, linestyle=dash, lw=1.2)
        right.plot(one.mean[-1:], one.worst[-1:], color=colour, marker="o", ms=6)
    _draw_equal_line(right)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    unit = _UNITS.get(name, "")
    left.set_xlabel("round")
    left.set_ylabel(f"{name} of clients{unit}")
    right.set_xlabel(f"mean over clients{unit}")
    right.set_ylabel(f"worst tenth{unit}")
    for axes in (left, right):
        axes.grid()
    if len(spreads) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return to_png(figure)


def _draw_equal_line(axes: Axes) -> None:
    """Draw where the worst tenth would be as good as the mean."""
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="#888888", lw=0.8, linestyle="--")
    axes.set_xlim(low, high)
