"""The figure of a group: perplexity of the model that each tier runs at the end, one curve per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from fedlp.report import Run
from fedlp.report.figures import COLOURS, DASHES, MARKERS, STYLE, blank, label_ends, to_png

CURVES = {  # at most five, by the name of the method's folder
    "heterofl": "HeteroFL",
    "only-capable": "only devices that hold it train",
    "plan-slices": "FedLP-Plan, slices",
    "plan-pruned-refit-2": "FedLP-Plan, pruned",
    "plan-pruned-refit-2-depth": "FedLP-Plan, pruned, depth too",
}


def draw_tiers(methods: Mapping[str, Sequence[Run]], out: Path) -> None:
    """Write the figure to ``out``; nothing where a method or its tiers are missing."""
    found = {name: _by_tier(methods[name]) for name in CURVES if methods.get(name)}
    found = {name: values for name, values in found.items() if values}
    if not found:
        return
    tiers = sorted({tier for values in found.values() for tier in values}, reverse=True)
    with rc_context(STYLE):
        figure = blank(3.7)
        axes = figure.subplots()
        ends = []
        for index, (name, values) in enumerate(found.items()):
            rows = np.array([values[tier] for tier in tiers])  # (tiers, seeds)
            look = {"color": COLOURS[index], "linestyle": DASHES[index % 4], "marker": MARKERS[index], "ms": 6}
            spread = rows.std(axis=1, ddof=1) if rows.shape[1] > 1 else None
            axes.errorbar(range(len(tiers)), rows.mean(axis=1), yerr=spread, capsize=3, lw=1.8, **look)
            uplink = np.mean([run.totals["bytes_up"] for run in methods[name]]) / 1e6
            ends.append((len(tiers) - 1, rows[-1].mean(), f"{CURVES[name]}\n{uplink:.1f} MB up", COLOURS[index]))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(tiers)), [f"{float(tier):.0%}" for tier in tiers])
        axes.set_xlim(-0.2, len(tiers) - 0.9)
        axes.grid(axis="y")
        axes.set_xlabel("memory of the tier, of what training the whole takes")
        axes.set_ylabel("perplexity of the tier's own model")
        label_ends(axes, ends, gap=0.12)
        out.write_bytes(to_png(figure))


def _by_tier(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Return the last perplexity of each tier's sub-model, one value a seed; empty where a seed lacks one."""
    names = sorted({name for run in runs for name in run.final_metrics if _is_tier(name)})
    if not all(name in run.final_metrics for run in runs for name in names):
        return {}
    return {name.split("_")[1]: [run.final_metrics[name] for run in runs] for name in names}


def _is_tier(name: str) -> bool:
    return name.startswith("tier_") and name.endswith("_perplexity")
