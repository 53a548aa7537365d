"""One table per group: accuracy at the end and at uplink budgets, bytes and client MACs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

BUDGETS = (5, 10, 15, 20, 30, 40, 55, 110)  # MB of uplink


def write_tables(results: Path, groups: tuple[str, ...]) -> None:
    """Write ``tables.md`` from the runs under ``results``."""
    lines = [
        "# Accuracy per uplink byte",
        "",
        "Accuracy in % of the global model, mean ± standard deviation over seeds; at a budget: in the last evaluated",
        "round that had sent no more in all. Sorted by accuracy at the end.",
    ]
    for group in groups:
        rows = [_row(folder) for folder in sorted((results / group).glob("*")) if any(folder.glob("*/rounds.jsonl"))]
        if rows:
            head = ["method", "seeds", "end", "uplink, MB", "client TMACs", *(f"at {mb} MB" for mb in BUDGETS)]
            lines += ["", f"## {group}", "", _line(head), _line(["---"] * len(head))]
            lines += [_line(cells) for _, cells in sorted(rows, key=lambda row: -row[0])]
    (results / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(folder: Path) -> tuple[float, list[str]]:
    runs = [_read(path) for path in sorted(folder.glob("*/rounds.jsonl"))]
    final = [accuracy[-1] for accuracy, _, _ in runs]
    cells = [folder.name, str(len(runs)), _spread(final)]
    cells += [f"{np.mean([up[-1] for _, up, _ in runs]):.1f}", f"{np.mean([macs for *_, macs in runs]):.2f}"]
    for budget in BUDGETS:
        reached = [[a for a, mb in zip(accuracy, up, strict=True) if mb <= budget] for accuracy, up, _ in runs]
        cells.append(_spread([values[-1] for values in reached]) if all(reached) else "")
    return float(np.mean(final)), cells


def _read(path: Path) -> tuple[list[float], list[float], float]:
    """Return accuracies, MB sent up to each of them, and TMACs of all."""
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    sent = np.cumsum([entry["bytes_up"] for entry in rounds]) / 1e6
    evaluated = [i for i, entry in enumerate(rounds) if "accuracy" in entry["metrics"]]
    accuracy = [100 * rounds[i]["metrics"]["accuracy"] for i in evaluated]
    return accuracy, [float(sent[i]) for i in evaluated], sum(entry["macs"] for entry in rounds) / 1e12


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
