"""One table per group: accuracy at the end and at budgets of uplink and of client MACs, bytes and MACs in all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

BUDGETS = ((3, 5, 10, 15, 20, 30, 40, 55, 110), (1, 2, 3, 4))  # MB of uplink, TMACs of all clients
RESNET_BUDGETS = ((100, 200, 300, 400, 550, 1000), (10, 16, 22, 28, 34))


def write_tables(results: Path, groups: tuple[str, ...]) -> None:
    """Write ``tables.md`` from the runs under ``results``."""
    lines = [
        "# Accuracy per uplink byte",
        "",
        "Accuracy in % of the global model, mean ± standard deviation over seeds; at a budget: in the last evaluated",
        "round that had sent, or computed, no more in all. Sorted by accuracy at the end.",
    ]
    for group in groups:
        up, macs = RESNET_BUDGETS if group.startswith("resnet") else BUDGETS
        rows = [
            _row(folder, up, macs)
            for folder in sorted((results / group).glob("*"))
            if any(folder.glob("*/rounds.jsonl"))
        ]
        if rows:
            head = ["method", "seeds", "end", "uplink, MB", "client TMACs"]
            head += [*(f"at {mb} MB" for mb in up), *(f"at {tera} TMACs" for tera in macs)]
            lines += ["", f"## {group}", "", _line(head), _line(["---"] * len(head))]
            lines += [_line(cells) for _, cells in sorted(rows, key=lambda row: -row[0])]
    (results / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(folder: Path, up: tuple[int, ...], macs: tuple[int, ...]) -> tuple[float, list[str]]:
    runs = [_read(path) for path in sorted(folder.glob("*/rounds.jsonl"))]
    final = [accuracy[-1] for accuracy, *_ in runs]
    cells = [folder.name, str(len(runs)), _spread(final)]
    cells += [f"{np.mean([sent[-1] for _, sent, _ in runs]):.1f}", f"{np.mean([spent[-1] for *_, spent in runs]):.2f}"]
    for budget, which in [*((mb, 1) for mb in up), *((tera, 2) for tera in macs)]:
        reached = [[a for a, cost in zip(run[0], run[which], strict=True) if cost <= budget] for run in runs]
        cells.append(_spread([values[-1] for values in reached]) if all(reached) else "")
    return float(np.mean(final)), cells


def _read(path: Path) -> tuple[list[float], list[float], list[float]]:
    """Return accuracies, and MB sent and TMACs computed up to each of them."""
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    sent, spent = (np.cumsum([entry[key] for entry in rounds]) for key in ("bytes_up", "macs"))
    evaluated = [i for i, entry in enumerate(rounds) if "accuracy" in entry["metrics"]]
    accuracy = [100 * rounds[i]["metrics"]["accuracy"] for i in evaluated]
    return accuracy, [float(sent[i]) / 1e6 for i in evaluated], [float(spent[i]) / 1e12 for i in evaluated]


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
