"""Tables and plots of pruned models, one line each in ``results/MODEL.jsonl``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedlp.report.figures import COLOURS, DASHES, MARKERS

METRICS = {
    "accuracy": "accuracy, %",
    "loss": "loss, nats per token, mean over unseen texts",
    "divergence": "KL divergence from the dense model, nats per token, mean over unseen texts",
    "tinystories, seen": "loss on text that it was trained on",
}
Cells = dict[tuple[str, float], list[float]]  # (method, ratio) -> score of each seed


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` and the figures that documents show from the lines in ``results`` to ``out``."""
    write_results(sorted(results.glob("*.jsonl")), out, figures=("lm-3.3m", "resnet20"))


def write_results(files: Sequence[Path], out: Path, figures: Collection[str] = ()) -> None:
    """Write ``tables.md`` and a plot of some models, one file of lines each; scores are means and ranges over seeds."""
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for file in files:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        shared = set.intersection(*(set(line["metrics"]) for line in lines))
        for metric, title in METRICS.items():
            if metric in shared and not (metric in ("loss", "divergence") and "accuracy" in shared):
                cells: Cells = defaultdict(list)
                for line in lines:
                    scale = 100 if metric == "accuracy" else 1
                    cells[line["method"], line["ratio"]].append(scale * line["metrics"][metric])
                sections.append(_table(file.stem, cells, lines, metric == "accuracy", title))
                if metric in ("loss", "accuracy") and file.stem in figures:
                    _plot(out / f"{file.stem}.png", file.stem, cells, metric == "accuracy")
    (out / "tables.md").write_text("\n".join(sections))


def _table(model: str, cells: Cells, lines: list[dict[str, Any]], is_classifier: bool, what: str) -> str:
    ratios = sorted({ratio for _, ratio in cells if ratio})
    methods = list(dict.fromkeys(line["method"] for line in lines if line["method"] != "dense"))
    dense = statistics.mean(cells["dense", 0.0])
    seeds = len({line["seed"] for line in lines})
    best = {
        ratio: _best([cells[m, ratio] for m in methods if cells.get((m, ratio))], is_classifier) for ratio in ratios
    }
    rows = [
        f"## {model}: {what}; dense {dense:.4g}; {seeds} seeds\n",
        "| method | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |",
        "|---|" + "---|" * len(ratios),
    ]
    for method in sorted(methods, key=lambda m: _order(m, cells, ratios, is_classifier)):
        entries = [_cell(cells.get((method, ratio), []), best[ratio], is_classifier) for ratio in ratios]
        rows.append(f"| {method} | " + " | ".join(entries) + " |")
    return "\n".join(rows) + "\n"


def _best(scores: list[list[float]], is_classifier: bool) -> float:
    means = [statistics.mean(values) for values in scores]
    return max(means) if is_classifier else min(means)


def _order(method: str, cells: Cells, ratios: list[float], is_classifier: bool) -> float:
    values = cells.get((method, 0.5)) or cells.get((method, ratios[0])) or [0.0]
    return statistics.mean(values) * (-1 if is_classifier else 1)


def _cell(values: list[float], best: float, is_classifier: bool) -> str:
    if not values:
        return ""
    mean, digits = statistics.mean(values), 2 if is_classifier else 3
    spread = (max(values) - min(values)) / 2
    text = f"{mean:.{digits}f} ± {spread:.{digits}f}"
    return f"**{text}**" if mean == best else text


def _plot(path: Path, model: str, cells: Cells, is_classifier: bool) -> None:
    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dense = statistics.mean(cells["dense", 0.0])
    shown = (
        "ours",
        "dp",
        "uniform",
        "log_depth",
        "owl",
        "searched function",
        "SlimGPT",
        "FLAP",
        "Wanda-sp",
        "Taylor",
        "magnitude",
        "random",
    )
    for index, method in enumerate(shown):
        points = sorted((ratio, values) for (name, ratio), values in cells.items() if name == method)
        if points:
            ratios = [ratio for ratio, _ in points]
            means = [statistics.mean(values) for _, values in points]
            (line,) = axes.plot(ratios, means, label=method, linewidth=2.5 if method in ("ours", "dp") else 1.2)
            line.set(color=COLOURS[index % 7], linestyle=DASHES[index % 4], marker=MARKERS[index % 9], markersize=5)
            low, high = [min(values) for _, values in points], [max(values) for _, values in points]
            axes.fill_between(ratios, low, high, color=line.get_color(), alpha=0.2)
    axes.axhline(dense, color="#888888", linestyle=":", label="dense")
    if not is_classifier:
        axes.set_ylim(dense - 0.05, dense + 1.5)
    axes.set_xlabel("fraction of prunable parameters removed")
    axes.set_ylabel("accuracy, %" if is_classifier else "loss, nats per token")
    axes.set_title(f"{model}: one shot, no training afterwards", loc="left")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})
