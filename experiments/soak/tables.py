"""The table of the soak, from ``results/soak.json``."""

from __future__ import annotations

import json
from pathlib import Path

LEGS = {  # clients, clients a round, rounds, clients without data, whether clients train stacked, round of a stop
    "few-clients": (1_000, 50, 2_000, 0, False),
    "many-clients": (100_000, 50, 2_000, 0, False),
    "large-rounds": (100_000, 1_000, 100, 0, False),
    "long": (100_000, 1_000, 2_000, 10_000, False),
    "batched": (100_000, 1_000, 2_000, 10_000, True),
    "uninterrupted": (100_000, 1_000, 300, 10_000, True),
    "resumed": (100_000, 1_000, 300, 10_000, True, 250),
}
MEASURED = ("median_ms", "server_cpu_ms", "server_mb", "worker_mb", "handles")
HEAD = (
    *(
        "clients",
        "without data",
        "stacked",
        "processes",
        "a round",
        "rounds",
        "median ms a round",
        "server's CPU ms a round",
        "server MB",
        "worker MB",
    ),
    *("handles", "kB on record a round"),
)


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md``: the second twentieth of each leg that was run against its last."""
    rows = ["# Soak", "", "Second twentieth of the rounds → last twentieth.", ""]
    rows += ["| " + " | ".join(HEAD) + " |", "| --- |" + " --- |" * (len(HEAD) - 1)]
    legs = json.loads((results / "soak.json").read_text(encoding="utf-8"))
    for found in (legs[name] for name in LEGS if name in legs):
        first, last = found["points"][1], found["points"][-1]
        cells = [f"{found['num_clients']:,}", f"{found.get('without_data', 0):,}"]
        cells += ["yes" if found.get("batched") else "no", str(found.get("processes", 1))]
        cells += [f"{found[key]:,}" for key in ("clients_per_round", "num_rounds")]
        cells += [
            f"{first[key]:g} → {last[key]:g}"
            for key in ("median_ms", "server_cpu_ms", "server_mb", "worker_mb", "handles")
        ]
        rows.append("| " + " | ".join([*cells, f"{found['record_bytes_per_round'] / 1e3:.1f}"]) + " |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
