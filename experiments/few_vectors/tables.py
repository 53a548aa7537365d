"""Tables of models pruned with few calibration vectors, from one line each in ``results/runs.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tables import line, spread

Line = dict[str, Any]


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` from the lines in ``results`` to ``out``."""
    text = ["# Few calibration vectors", ""]
    rows: list[Line] = [json.loads(one) for one in (results / "runs.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: str(row["model"]))
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == model]
        for test in [test for test in found[0]["losses"] if test != "accuracy"]:
            text += _loss_table(found, test)
    text += _wins(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def _loss_table(rows: list[Line], test: str) -> list[str]:
    """Return the losses on one test: a row a method, a column per number of vectors, widths and ratio."""
    dense = np.mean([row["losses"][test] for row in rows if row["method"] == "dense"])
    pruned = [row for row in rows if row["method"] != "dense"]
    cells = sorted({(row["rule"], row["ratio"], row["vectors"]) for row in pruned})
    seeds = len({row["seed"] for row in pruned})
    head = ["method", *(f"{rule} {100 * ratio:.0f}%, {vectors:g}" for rule, ratio, vectors in cells)]
    text = [f"## {rows[0]['model']}, {test}: loss, dense {dense:.3f}; up to {seeds} seeds", ""]
    text += [line(head), line(["---"] * len(head))]
    for method in dict.fromkeys(row["method"] for row in pruned):
        values = [
            [x["losses"][test] for x in pruned if (x["method"], x["rule"], x["ratio"], x["vectors"]) == (method, *cell)]
            for cell in cells
        ]
        text.append(line([method, *(spread(found, 3) if found else "" for found in values)]))
    return [*text, ""]


def _wins(rows: list[Line]) -> list[str]:
    """Return in how many settings the default's mean loss over seeds is no higher, by model, rival, widths and test."""
    text = ["## Tests and settings (ratio, vectors) in which the default's mean loss is no higher", ""]
    kinds = [(rule, is_held_out) for rule in ("dp", "uniform") for is_held_out in (True, False)]
    names = [f"{rule}, {'held out' if is_held_out else 'other texts'}" for rule, is_held_out in kinds]
    head = ["model", "rival", *names, "largest lead", "largest lag"]
    text += [line(head), line(["---"] * len(head))]
    for model in dict.fromkeys(row["model"] for row in rows):
        for rival in [
            name for name in dict.fromkeys(row["method"] for row in rows) if name not in ("dense", "default")
        ]:
            found = [_gaps([row for row in rows if row["model"] == model], rival, *kind) for kind in kinds]
            gaps = [gap for some in found for gap in some]
            if gaps:
                counts = [f"{sum(gap >= 0 for gap in some)} of {len(some)}" if some else "" for some in found]
                text.append(line([model, rival, *counts, f"{max(gaps):.3f}", f"{max(-min(gaps), 0.0):.3f}"]))
    return text


def _gaps(rows: list[Line], rival: str, rule: str, is_held_out: bool) -> list[float]:
    """Return by test and setting the rival's mean loss less the default's, over seeds that both have."""
    found: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for row in [row for row in rows if row["rule"] == rule]:
        for test, loss in row["losses"].items():
            if test != "accuracy" and (test == "held out") == is_held_out:
                key = test, row["ratio"], row["vectors"]
                found.setdefault(key, {}).setdefault(row["seed"], {})[row["method"]] = loss
    gaps = []
    for seeds in found.values():
        pairs = [own[rival] - own["default"] for own in seeds.values() if {"default", rival} <= own.keys()]
        gaps += [float(np.mean(pairs))] if pairs else []
    return gaps
