"""One table per group: perplexity at the end and at budgets of uplink, and bytes in all."""

from __future__ import annotations

from pathlib import Path

from experiments.tables import Budgets, budget_table, runs_by_method, write_figures

BUDGETS = Budgets((3, 3.5, 5, 8.5, 9.6, 11.2, 16, 17, 63))
FULL = {
    "ours-20-rounds-int4-coded": "FedLP-Plan, coded 4 bits, 20 rounds",
    "ours-20-rounds": "FedLP-Plan, 8 bits, 20 rounds",
    "random": "random units, 8 bits",
    "fedavg-int8": "FedAvg, 8 bits",
    "fedavg-int2": "FedAvg, 2 bits",
}
MIXED = {"by-losses": "FedLP-Plan, spread by losses, 8 bits", "random": "random units, 8 bits"}


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` and the figures that documents show from the packed runs in ``results`` to ``out``."""
    groups = {group: runs_by_method(results, group) for group in ("full", "mixed", "rates")}
    lines = [
        "# Perplexity per uplink byte",
        "",
        "Perplexity of the global model on held-out windows, mean ± standard deviation over seeds; at a budget: in the",
        "last evaluated round that had sent no more in all. Sorted by perplexity at the end.",
    ]
    for group, runs in groups.items():
        lines += ["", f"## {group}", "", *budget_table(runs, "perplexity", BUDGETS)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_figures(groups["full"], FULL, ["perplexity_vs_uplink.png"], out / "report-full")
    write_figures(groups["mixed"], MIXED, ["perplexity_vs_uplink.png"], out / "report-mixed")
