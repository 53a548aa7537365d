"""FedLP's table: accuracy of both partitions, bytes, and parameters a client and round as measured and expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.tables import line, runs_by_method, spread
from fedlp.report import Run

METHODS = {
    "fedavg": "FedAvg",
    "homo-0.7": "FedLP-Homo(0.7)",
    "homo-0.5": "FedLP-Homo(0.5)",
    "homo-0.3": "FedLP-Homo(0.3)",
    "hetero-u": "FedLP-Hetero(u)",
}
HEAD = ["method", "row", "seeds", "accuracy, %", "uplink, MB", "downlink, MB"]
HEAD += ["k params a client and round", "k params, expected", "client TMACs"]


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` from the packed runs in ``results`` to ``out``."""
    lines = [
        "# FedLP's table, 40 rounds",
        "",
        "Accuracy of the global model after the last round; bytes of all clients.",
    ]
    for group in ("iid", "dirichlet"):
        runs = runs_by_method(results, group)
        rows = [_row(name, runs) for name in METHODS if name in runs]
        lines += ["", f"## {group}", "", line(HEAD), line(["---"] * len(HEAD)), *map(line, rows)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    totals = {key: np.mean([run.totals[key] for run in runs[name]]) for key in runs[name][0].totals}
    expected = runs[name][0].expected
    return [
        *(METHODS[name], name, str(len(runs[name]))),
        spread([100 * run.final_metrics["accuracy"] for run in runs[name]], 2),
        *(f"{totals[key] / 1e6:.1f}" for key in ("bytes_up", "bytes_down")),
        f"{(totals['params_up'] + totals['params_down']) / totals['contacts'] / 1e3:.2f}",
        f"{(expected['params_up_per_client'] + expected['params_down_per_client']) / 1e3:.2f}",
        f"{totals['macs'] / 1e12:.1f}",
    ]
