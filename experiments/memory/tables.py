"""The table of the memory experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` from ``memory.json`` in ``results`` to ``out``."""
    found = json.loads((results / "memory.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(table(found), encoding="utf-8")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        f"| {x['case']} | {x['tier']} | {100 * x['share']:.0f} % | {x['estimate'] / 1e6:.1f} | "
        f"{x['measured'] / 1e6:.1f} | "
        f"{100 * (x['estimate'] / x['measured'] - 1):+.0f} % |"
        for x in results
    ]
    head = ["| case | tier | parameters held | estimate, MB | measured, MB | difference |", "|---|---|---|---|---|---|"]
    return "# Peak memory of a client in one round\n\n## memory\n\n" + "\n".join([*head, *rows]) + "\n"
