"""One table: perplexity of the whole model and of each tier's own at the end; bytes up and down, MACs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from experiments.pretrained.figure import draw_tiers
from experiments.tables import runs_by_method
from fedlp.report import Run

MB, GMAC = 1e6, 1e9
DRAWN = "lm-3.3m-correlation-1"  # the group whose figure a page shows


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` from the packed runs in ``results`` to ``out``."""
    lines = [
        "# A pretrained language model that three of four tiers cannot hold",
        "",
        "Perplexity on held-out windows at the end: of the whole model, and of the sub-model that each tier's devices",
        "run (named by the share of memory that it may use). Bytes and MACs are those of all clients and rounds.",
    ]
    for file in sorted(results.glob("*.runs.jsonl.xz")):
        group = file.name.removesuffix(".runs.jsonl.xz")
        methods = runs_by_method(results, group)
        ranked = {name: runs for name, runs in methods.items() if _cuts_ranks(runs)}
        low = {name: runs for name, runs in methods.items() if name.startswith("low-")}
        others = methods.keys() - ranked.keys() - low.keys()
        lines += ["", f"## {group}", "", *_table({name: methods[name] for name in others})]
        if low:
            lines += ["", f"## {group}, lower tiers", "", *_table(low)]
        if ranked:
            lines += ["", f"## {group}, adapters of several ranks", ""]
            lines += ["Tiers are named by their share of the ranks; all hold the whole base.", "", *_table(ranked)]
        out.mkdir(parents=True, exist_ok=True)
        if group != DRAWN:
            continue
        draw_tiers(_best(runs_by_method(results, group)), out / f"{group}-tiers.png")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cuts_ranks(runs: list[Run]) -> bool:
    return any(run.config.get("adapter", {}).get("cut") == "ranks" for run in runs)


def _best(methods: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Return each method's runs at its best learning rate, by the method's name; names are METHOD or METHOD@RATE."""
    found: dict[str, list[Run]] = {}
    for name, runs in methods.items():
        base = name.partition("@")[0]
        if base not in found or _loss(runs) < _loss(found[base]):
            found[base] = runs
    return found


def _loss(runs: list[Run]) -> float:
    return mean(run.final_metrics["loss"] or float("inf") for run in runs)


def _table(methods: dict[str, list[Run]]) -> list[str]:
    names = {name for runs in methods.values() for run in runs for name in run.final_metrics}
    tiers = sorted((name for name in names if name.startswith("tier_") and name.endswith("_perplexity")), reverse=True)
    head = ["method", "seeds", "whole", *(name.split("_")[1] for name in tiers), "MB up", "MB down", "GMAC"]
    rows = [head, ["---"] * len(head)]
    for method, runs in sorted(methods.items()):
        values = [_cell([run.final_metrics.get(name) for run in runs]) for name in ("perplexity", *tiers)]
        costs = [
            _cell([run.totals.get(name, 0.0) / scale for run in runs])
            for name, scale in (("bytes_up", MB), ("bytes_down", MB), ("macs", GMAC))
        ]
        rows.append([method, str(len(runs)), *values, *costs])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _cell(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if len(found) < len(values) or not found:
        return "-"
    spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
    return f"{mean(found):.2f}{spread}"
