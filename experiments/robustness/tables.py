"""The table of hostile clients, from ``results/runs.jsonl``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RULES = {
    "coverage average, no bounds": "coverage_average aggregator.max_norm=null aggregator.max_examples=null",
    "coverage average (default)": "coverage_average",
    "norm clipping": "norm_clipping",
    "norm filter": "norm_filter",
    "trimmed mean (0.3)": "trimmed_mean aggregator.fraction=0.3",
    "median": "median",
    "multi-Krum (0.3)": "krum aggregator.hostile=0.3",
    "centred clipping": "centred_clipping",
}
DIRICHLET = "partition=dirichlet partition.alpha=0.3"
CNN = "model=fedlp_cnn local.lr=0.05"
MIXED = "strategy=fedlp_plan fleet=mixed"
OWN_TESTS = "evaluation=clients dataset.client_test_fraction=0.2"
TIERS = "strategy=fedlp_plan fleet=tiers fleet.fractions=[1.0,0.5]"
PLAIN_TIERS = f"{TIERS} upload=float32 upload.entropy_coding=false"  # differences that an attacker can turn round
HUGE, NEGATIVE = "3e38", "negative running_var"
SETTINGS: dict[
    str, tuple[str, int, int | None, float | str]
] = {  # name: (options, hostile clients, examples that they claim, factor of their differences, or other change)
    "iid": ("", 0, None, 0),
    "Dirichlet(0.3)": (DIRICHLET, 0, None, 0),
    "tiers": (TIERS, 0, None, 0),
    "tiers, Dirichlet(0.3)": (f"{TIERS} {DIRICHLET}", 0, None, 0),
    "mixed": (MIXED, 0, None, 0),
    "mixed, Dirichlet(0.3)": (f"{MIXED} {DIRICHLET}", 0, None, 0),
    "CNN": (CNN, 0, None, 0),
    "CNN, mixed": (f"{CNN} {MIXED}", 0, None, 0),
    "CNN, mixed, Dirichlet(0.3)": (f"{CNN} {MIXED} {DIRICHLET}", 0, None, 0),
    "CNN, Dirichlet(0.1)": (f"model=fedlp_cnn {DIRICHLET} partition.alpha=0.1 local.lr=0.05", 0, None, 0),
    "sign flip, 1 of 10": ("", 1, None, -10),
    "sign flip, 3 of 10": ("", 3, None, -10),
    "sign flip, 10^6 examples": ("", 1, 10**6, -10),
    "Dirichlet(0.3), sign flip, 1 of 10": (DIRICHLET, 1, None, -10),
    "Dirichlet(0.3), sign flip, 3 of 10": (DIRICHLET, 3, None, -10),
    "tiers, sign flip, 1 of 10": (PLAIN_TIERS, 1, None, -10),
    "tiers, sign flip, 3 of 10": (PLAIN_TIERS, 3, None, -10),
    "Dirichlet(0.3), flip of ordinary size, 3 of 10": (DIRICHLET, 3, None, -1),
    "values of 3e38, 1 of 10": ("", 1, None, HUGE),
    "CNN, negative running_var, 1 of 10": (CNN, 1, None, NEGATIVE),
}
CHOICES: dict[str, str] = {  # other seeds and clients, which had no part in the choice of the default
    "MLP, HeteroFL, Dirichlet(0.3)": f"strategy=heterofl fleet=tiers {DIRICHLET}",
    "deep MLP, depth prefixes": f"model.variant=deep strategy=fedlp_hetero {OWN_TESTS}",
    "CNN, mixed": f"{CNN} {MIXED}",
}
MULTIPLES = (None, 3, 5)
CHOICE_SEEDS = (11, 12, 13)
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
                cells.append(spread(found))
            rows.append(f"| {rule} | " + " | ".join(cells) + " |")
        rows.append("")
    rows += ["## Clients scaled down without attackers", ""]
    rows += ["Updates beyond the bound.", "", "| aggregator | " + " | ".join(HONEST) + " |"]
    rows.append("| --- |" + " --- |" * len(HONEST))
    for rule in RULES:
        counts = [
            [line["clipped"] for line in lines if (line["rule"], line["setting"]) == (rule, name)] for name in HONEST
        ]
        if rule.startswith("coverage") and "no bounds" not in rule:
            rows.append(
                f"| {rule} | "
                + " | ".join(f"{sum(found)} of {100 * len(found)}" if found else "" for found in counts)
                + " |"
            )
    if any(line["setting"].startswith("choice") for line in lines):
        rows += ["", *choices(lines)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(rows) + "\n", encoding="utf-8")


def spread(found: list[float]) -> str:
    """Return the mean and the population standard deviation; empty without values."""
    if not found:
        return ""
    seeds = f" ({len(found)} of {len(SEEDS)} seeds)" if len(found) < len(SEEDS) else ""
    return f"{statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f}{seeds}"


def choices(lines: list[dict[str, Any]]) -> list[str]:
    """Return the table of other multiples on other seeds, without attackers."""
    capped = sum(line.get("capped", 0) for line in lines if line["setting"].startswith("choice"))
    rows = [
        "## Choice of max_norm",
        "",
        "No attackers, 20 clients, 10 a round, 15 rounds, seeds 11, 12, 13. Accuracy in %,",
    ]
    rows += ["mean ± population standard deviation (with depth prefixes on clients' own test examples), and updates"]
    rows += ["beyond the bound, of the 450 of each cell."]
    rows += [f"Updates with more than 10 times the cohort's median of examples: {capped}.", ""]
    rows += ["| setting | " + " | ".join(f"{multiple or 'no bound'}" for multiple in MULTIPLES) + " |"]
    rows.append("| --- |" + " --- |" * len(MULTIPLES))
    for name in CHOICES:
        cells = []
        for multiple in MULTIPLES:
            key = f"choice: {name}", f"max_norm={multiple}"
            found = [line for line in lines if (line["setting"], line["rule"]) == key]
            accuracies = [100 * line["accuracy"] for line in found]
            counted = f", {sum(line['clipped'] for line in found)}" if multiple else ""
            cells.append(spread(accuracies) + counted if found else "")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows
