"""The table of the hostile bench, from ``results/figures.json``, which ``make test-hostile`` writes."""

from __future__ import annotations

import json
from pathlib import Path


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md``: cases, what was refused, time and memory, by kind of message."""
    found = json.loads((results / "figures.json").read_text(encoding="utf-8"))
    about, cases = found["about"], found["cases"]
    total = sum(row["cases"] for row in cases.values())
    rows = [
        "# Hostile bench",
        "",
        f"{total:,} cases, {about['cpu_s']:,.0f} s of one core, {about['peak_memory_mb']:,} MB at most; Python "
        f"{about['python']} on {about['machine']}.",
        "",
        "| kind | cases | refused | cpu s | slowest, ms | memory grown, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, row in cases.items():
        slowest = f"{1e3 * row['slowest_s']:.0f}" if "slowest_s" in row else ""
        cells = [f"{row['cases']:,}", f"{row['refused']:,}" if "refused" in row else "", str(row.get("cpu_s", ""))]
        rows.append("| " + " | ".join([kind, *cells, slowest, str(row.get("grown_mb", ""))]) + " |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
