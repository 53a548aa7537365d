"""The table of hostile clients, from ``results/runs.jsonl``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

RULES = {
    "coverage average, no bounds": "coverage_average aggregator.max_norm=null aggregator.max_examples=null",
    "coverage average (default)": "coverage_average",
    "coverage average, max_norm=5": "coverage_average aggregator.max_norm=5",
    "norm clipping": "norm_clipping",
    "norm filter": "norm_filter",
    "trimmed mean (0.3)": "trimmed_mean aggregator.fraction=0.3",
    "median": "median",
    "multi-Krum (0.3)": "krum aggregator.hostile=0.3",
    "centred clipping": "centred_clipping",
}
DIRICHLET = "partition=dirichlet partition.alpha=0.3"
TIERS = "strategy=fedlp_plan fleet=tiers fleet.fractions=[1.0,0.5]"
PLAIN_TIERS = f"{TIERS} upload=float32 upload.entropy_coding=false"  # differences that an attacker can turn round
SETTINGS: dict[
    str, tuple[str, int, int | None, float]
] = {  # name: (options, hostile clients, examples that they claim, factor of their differences)
    "iid": ("", 0, None, 0),
    "Dirichlet(0.3)": (DIRICHLET, 0, None, 0),
    "tiers": (TIERS, 0, None, 0),
    "tiers, Dirichlet(0.3)": (f"{TIERS} {DIRICHLET}", 0, None, 0),
    "CNN, Dirichlet(0.1)": (f"model=fedlp_cnn {DIRICHLET} partition.alpha=0.1 local.lr=0.05", 0, None, 0),
    "sign flip, 1 of 10": ("", 1, None, -10),
    "sign flip, 3 of 10": ("", 3, None, -10),
    "sign flip, 10^6 examples": ("", 1, 10**6, -10),
    "Dirichlet(0.3), sign flip, 1 of 10": (DIRICHLET, 1, None, -10),
    "Dirichlet(0.3), sign flip, 3 of 10": (DIRICHLET, 3, None, -10),
    "tiers, sign flip, 1 of 10": (PLAIN_TIERS, 1, None, -10),
    "tiers, sign flip, 3 of 10": (PLAIN_TIERS, 3, None, -10),
    "Dirichlet(0.3), flip of ordinary size, 3 of 10": (DIRICHLET, 3, None, -1),
}
HONEST = tuple(name for name, setting in SETTINGS.items() if not setting[1])
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
    for title, part in (("No attackers", {0}), ("Attackers", {1, 3})):
        chosen = [name for name, setting in SETTINGS.items() if setting[1] in part]
        rows += [f"## {title}", "", "| aggregator | " + " | ".join(chosen) + " |", "| --- |" + " --- |" * len(chosen)]
        for rule in RULES:
            cells = []
            for name in chosen:
                found = [100 * line["accuracy"] for line in lines if (line["rule"], line["setting"]) == (rule, name)]
                cells.append(f"{statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f}" if found else "")
            rows.append(f"| {rule} | " + " | ".join(cells) + " |")
        rows.append("")
    rows += ["## Clients scaled down without attackers", ""]
    rows += ["Updates beyond the bound, of 100 a run, all seeds.", "", "| aggregator | " + " | ".join(HONEST) + " |"]
    rows.append("| --- |" + " --- |" * len(HONEST))
    for rule in RULES:
        counts = [
            [line["clipped"] for line in lines if (line["rule"], line["setting"]) == (rule, name)] for name in HONEST
        ]
        if rule.startswith("coverage") and "no bounds" not in rule:
            rows.append(f"| {rule} | " + " | ".join(str(sum(found)) for found in counts) + " |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
