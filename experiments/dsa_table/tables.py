"""Tables of pruned models, one line each in ``results/MODEL.jsonl``, and of the searches' check on held-out data."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.slimgpt_table.tables import write_results
from experiments.tables import line

SEARCHES = "searches.jsonl"
NAMES = {"uniform": "uniform", "dp": "dp", "evolution": "searched function", "random": "random function"}
NAMES |= {"vector": "searched vector"}


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` from the lines and searches in ``results`` to ``out``."""
    write_results([file for file in sorted(results.glob("*.jsonl")) if file.name != SEARCHES], out)
    head = ["search", *NAMES.values(), "winner", "seconds"]
    lines = ["", "## searches: divergence on held-out data, as a fraction of uniform's, mean over ratios", ""]
    lines += [line(head), line(["---"] * len(head))]
    for search in map(json.loads, (results / SEARCHES).read_text().splitlines()):
        found = [f"{search['held_out'][name]['mean']:.3f}" for name in NAMES]
        lines.append(
            line([f"{search['model']}-{search['seed']}", *found, NAMES[search["winner"]], f"{search['search_s']:.0f}"])
        )
    with (out / "tables.md").open("a") as tables:
        tables.write("\n".join(lines) + "\n")
