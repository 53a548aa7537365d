"""Plots of a report, one figure a file. Importing this module loads matplotlib; no display is ever needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fedlp.report.client_plots import client_plots
from fedlp.report.figures import (
    COLOURS,
    DASHES,
    MARKERS,
    STYLE,
    Plot,
    blank,
    label_ends,
    plain,
    scale_amounts,
    to_png,
    unit_for,
)
from fedlp.report.groups import Group
from fedlp.report.heatmaps import coverage_plots
from fedlp.report.palette import PALE
from fedlp.report.summary import METRICS, Curve, FloatArray, Metric, client_uploads, curve, metric_of

_MOST_MARKERS = 12
_MOST_LABELS = 5  # written beside their curves; a legend where there are more


@dataclass(frozen=True, slots=True)
class _Axis:
    """Horizontal axis of a metric."""

    key: str
    title: str
    label: str
    caption: str
    units: tuple[tuple[float, str], ...]
    values: Callable[[Curve], FloatArray]


_AXES = (
    _Axis(
        "rounds",
        "by round",
        "round",
        "of the global model on the test set after each evaluated round",
        ((1.0, ""),),
        lambda one: one.rounds.astype(np.float64),
    ),
    _Axis(
        "uplink",
        "by uplink",
        "uplink of all clients so far",
        "against all that clients have sent so far, in bytes of the encoded messages",
        ((1e6, "MB"), (1e9, "GB")),
        lambda one: one.bytes_up,
    ),
    _Axis(
        "macs",
        "by training cost",
        "training of all clients so far",
        "against the multiply-accumulates that clients have spent on training so far",
        ((1e9, "GMACs"), (1e12, "TMACs")),
        lambda one: one.macs,
    ),
    _Axis(
        "time",
        "by simulated time",
        "simulated time so far",
        "against the seconds that the fleet's devices need, on its virtual clock",
        ((1.0, "s"), (60.0, "min"), (3600.0, "h")),
        lambda one: one.simulated_s,
    ),
)


def draw_plots(groups: Sequence[Group]) -> list[Plot]:
    """Draw every plot for which the groups have numbers, in order of importance."""
    with rc_context(STYLE):
        reported = dict.fromkeys([*METRICS, *filter(None, map(metric_of, groups))])  # with metrics of a user's own
        plots = [plot for metric in reported for plot in _curve_plots(groups, metric)]
        return [*plots, *client_plots(groups), *_upload_plots(groups), *coverage_plots(groups)]


def _curve_plots(groups: Sequence[Group], metric: Metric) -> list[Plot]:
    found = [curve(group, metric) if metric_of(group) == metric else None for group in groups]
    curves = {index: one for index, one in enumerate(found) if one is not None and np.isfinite(one.mean).any()}
    if not curves:
        return []
    labels = {index: groups[index].label for index in curves}
    band = _band_caption({len(groups[index].counted) for index in curves})
    name = metric.name.replace("_", " ").capitalize()
    return [
        Plot(
            f"{re.sub(r'[^A-Za-z0-9_.-]', '_', metric.name)}_vs_{axis.key}.png",
            f"{name} {axis.title}",
            f"{name} {axis.caption}{band}.",
            _draw_curves(curves, labels, metric, axis),
        )
        for axis in _AXES
        if max(axis.values(one)[-1] for one in curves.values()) > 0
    ]


def _band_caption(counts: set[int]) -> str:
    if max(counts) == 1:
        return ""
    if max(counts) == 2:
        return "; bands show the range of two seeds"
    return "; bands show ± one standard deviation over seeds" + (" (the range, where there are two)" * (2 in counts))


def _draw_curves(curves: Mapping[int, Curve], labels: Mapping[int, str], metric: Metric, axis: _Axis) -> bytes:
    columns, rows = _legend_shape(list(labels.values()))
    figure = blank(3.9 + 0.22 * rows)
    axes = figure.subplots()
    unit, unit_name = unit_for(max(axis.values(one)[-1] for one in curves.values()), axis.units)
    for index, one in curves.items():
        colour, x = COLOURS[index % len(COLOURS)], axis.values(one) / unit
        every = max(1, -(-one.rounds.size // _MOST_MARKERS))
        dash = DASHES[(index // len(COLOURS) + index) % len(DASHES)]
        (line,) = axes.plot(x, one.mean, color=colour, linestyle=dash, lw=1.7, label=plain(labels[index]))
        line.set(marker=MARKERS[index % len(MARKERS)], markersize=4.5, markevery=every)
        if (one.high > one.low).any():
            axes.fill_between(x, one.low, one.high, color=colour, alpha=0.16, lw=0)
    means = np.concatenate([one.mean[np.isfinite(one.mean)] for one in curves.values()])
    if metric.name == "perplexity" and means.max() > 10 * means.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if unit_name:
        scale_amounts(axes, [axis.values(one)[np.isfinite(one.mean)] / unit for one in curves.values()])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid()
    axes.set_xlabel(f"{axis.label}, {unit_name}" if unit_name else axis.label)
    axes.set_ylabel(f"test {metric.title}")
    ends = [
        (axis.values(one)[-1] / unit, one.mean[-1], plain(labels[index], 22), COLOURS[index % len(COLOURS)])
        for index, one in curves.items()
    ]
    direct = 1 < len(curves) <= _MOST_LABELS and bool(np.isfinite([end[1] for end in ends]).all())
    if len(curves) > 1 and not (direct and label_ends(axes, ends)):
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, handlelength=2.4)
    return to_png(figure)


def _legend_shape(labels: Sequence[str]) -> tuple[int, int]:
    """Return columns and rows of a legend that fits the figure's width."""
    columns = max(1, min(len(labels), 84 // (max(map(len, labels)) + 8), 4))
    return columns, -(-len(labels) // columns)


def _upload_plots(groups: Sequence[Group]) -> list[Plot]:
    samples = [(group.label, client_uploads(group)) for group in groups]
    samples = [(label, sizes) for label, sizes in samples if sizes.size]
    if len(samples) < 2:
        return []
    caption = (
        "What one client sends in one round, over all clients, rounds and seeds: median (line), quartiles (box), "
        "5th and 95th percentile (whiskers) and mean (diamond)."
    )
    return [Plot("uplink_per_client.png", "Uplink of one client", caption, _draw_uploads(samples))]


def _draw_uploads(samples: Sequence[tuple[str, FloatArray]]) -> bytes:
    largest = max(float(sizes.max()) for _, sizes in samples)
    unit, unit_name = unit_for(10 * largest, ((1e3, "kB"), (1e6, "MB")))
    figure = blank(1.1 + 0.42 * len(samples))
    axes = figure.subplots()
    axes.boxplot(
        [sizes / unit for _, sizes in samples],
        orientation="horizontal",
        whis=(5, 95),
        widths=0.55,
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        boxprops={"facecolor": PALE, "edgecolor": COLOURS[0]},
        whiskerprops={"color": COLOURS[0]},
        capprops={"color": COLOURS[0]},
        medianprops={"color": COLOURS[0], "linewidth": 2},
        meanprops={"marker": "D", "markerfacecolor": COLOURS[1], "markeredgecolor": "white", "markersize": 6},
    )
    axes.set_yticks(range(1, len(samples) + 1), [plain(label, 34) for label, _ in samples])
    axes.invert_yaxis()
    axes.set_xlim(-0.01 * largest / unit, 1.04 * largest / unit)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"uplink of one client in one round, {unit_name}")
    return to_png(figure)
