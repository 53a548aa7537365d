"""One table per group: accuracy at the end and at budgets of uplink and of client MACs, bytes and MACs in all.

The table of ``batch-norm`` has accuracies of tiers instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.tables import Budgets, budget_table, line, runs_by_method, spread, write_figures
from fedlp.report import Run
from fedlp.report.files import PACKED

STATISTICS = "batch-norm"  # the group whose tiers are evaluated
ORDER = (  # of the tables; other groups come last
    *("full-iid", "long-iid", "mixed-iid", "mixed-macs-iid", "mixed-devices", "mixed-devices-0.8"),
    *("full-dirichlet", "mixed-dirichlet", "full-dirichlet-plain", "mixed-dirichlet-plain"),
    *("resnet18-batch", "resnet18-group", "resnet18-mixed-batch", "resnet18-mixed-group"),
    *("resnet18-dirichlet", "resnet18-mixed-dirichlet", STATISTICS, "ablation-full", "ablation-mixed", "first-look"),
)
BUDGETS = Budgets((3, 5, 10, 15, 20, 30, 40, 55, 110), (1, 2, 3, 4))
LONG_BUDGETS = Budgets((15, 30, 55, 110, 145, 200, 290), (4, 8, 12, 16, 20, 24))
RESNET_BUDGETS = Budgets((100, 200, 300, 400, 550, 1000), (10, 16, 22, 28, 34))
TIER = re.compile(r"tier_([^_]+)_accuracy")
FULL = {
    "ours-int2-coded": "FedLP-Plan, coded 2 bits",
    "ours-int4": "FedLP-Plan, 4 bits",
    "fedavg-int4": "FedAvg, 4 bits",
    "fedavg": "FedAvg",
    "homo-0.5": "FedLP-Homo(0.5)",
}
MIXED = {
    "ours-int2-coded": "FedLP-Plan, coded 2 bits",
    "ours-int4": "FedLP-Plan, 4 bits",
    "ours-uniform-int4": "FedLP-Plan, 4 bits, uniform",
    "heterofl": "HeteroFL, 8 bits",
    "fedrolex": "FedRolex, 8 bits",
}


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` and the figures that documents show from the packed runs in ``results`` to ``out``."""
    lines = [
        "# Accuracy per uplink byte",
        "",
        "Accuracy in % of the global model, mean ± standard deviation over seeds; at a budget: in the last evaluated",
        "round that had sent, or computed, no more in all. Sorted by accuracy at the end.",
    ]
    found = sorted(file.name.removesuffix(PACKED) for file in results.glob(f"*{PACKED}"))
    for group in [*(name for name in ORDER if name in found), *(name for name in found if name not in ORDER)]:
        budgets = {"resnet": RESNET_BUDGETS, "long": LONG_BUDGETS}.get(re.split(r"[0-9-]", group)[0], BUDGETS)
        runs = runs_by_method(results, group)
        table = tier_table(runs) if group == STATISTICS else budget_table(runs, "accuracy", budgets)
        lines += ["", f"## {group}", "", *table]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    full, mixed = (runs_by_method(results, group) for group in ("full-iid", "mixed-iid"))
    write_figures(full, FULL, ["accuracy_vs_uplink.png"], out / "report-full-iid")
    write_figures(mixed, MIXED, ["accuracy_vs_uplink.png", "coverage.png"], out / "report-mixed-iid")


def tier_table(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return one row a method: accuracy, %, and loss of the evaluated model, and accuracy, %, of each tier's sub-model.

    Tiers come in descending order of their share of the model, which stands in brackets.
    """
    ends = {name: [run.manifest["final_metrics"] for run in found] for name, found in runs.items()}
    rows = []
    for name, found in sorted(ends.items()):
        shares = sorted((match[1] for key in found[0] if (match := TIER.fullmatch(key))), key=float, reverse=True)
        cells = [name, str(len(found)), spread([100 * one["accuracy"] for one in found])]
        cells.append(spread([one["loss"] for one in found], 2))
        cells += [f"{spread([100 * one[f'tier_{share}_accuracy'] for one in found])} ({share})" for share in shares]
        rows.append(cells)
    width = max(map(len, rows))
    head = ["method", "seeds", "accuracy", "loss", *(f"tier {number}" for number in range(1, width - 3))]
    return [line(head), line(["---"] * width), *(line([*cells, *[""] * (width - len(cells))]) for cells in rows)]
