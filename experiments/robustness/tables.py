"""The table of hostile clients, from ``results/runs.jsonl``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

RULES = {
    "coverage average": "coverage_average",
    "norm clipping": "norm_clipping",
    "norm filter": "norm_filter",
    "trimmed mean (0.3)": "trimmed_mean aggregator.fraction=0.3",
    "median": "median",
    "multi-Krum (0.3)": "krum aggregator.hostile=0.3",
    "centred clipping": "centred_clipping",
}
SETTINGS = {
    "iid": "",
    "Dirichlet(0.3)": "partition=dirichlet partition.alpha=0.3",
    "tiers": "strategy=fedlp_plan fleet=tiers fleet.fractions=[1.0,0.5]",
    "sign flip, 1 of 10": "",
    "sign flip, 3 of 10": "",
    "sign flip, 10^6 examples": "",
}
SEEDS = (0, 1, 2)


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md``: mean accuracy in % with the population standard deviation over seeds."""
    lines = [json.loads(line) for line in (results / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        "# Hostile clients",
        "",
        "Accuracy in % after 10 rounds, mean ± population standard deviation over seeds 0, 1, 2.",
        "",
    ]
    rows += ["## digits", "", "| aggregator | " + " | ".join(SETTINGS) + " |", "| --- |" + " --- |" * len(SETTINGS)]
    for rule in RULES:
        cells = []
        for setting in SETTINGS:
            found = [100 * line["accuracy"] for line in lines if (line["rule"], line["setting"]) == (rule, setting)]
            cells.append(f"{statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f}" if found else "")
        rows.append(f"| {rule} | " + " | ".join(cells) + " |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
