"""The table of pruned models, one line each in ``results/MODEL.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

RATIOS = (0.25, 0.5)
METHOD_NAMES = ("SlimGPT", "OBS", "OBS, Fisher")
WAYS = ("pooled, float32", "pooled, float64", "central", "votes", "alone 0", "alone 7")


def wanted_results() -> list[tuple[str, str, float]]:
    """Return every way, method and ratio of one case."""
    return [("dense", "", 0.0), *((way, method, ratio) for ratio in RATIOS for method in METHOD_NAMES for way in WAYS)]


def regenerate(results: Path, out: Path) -> None:
    """Write ``table.md`` from the lines in ``results`` to ``out``: means over seeds."""
    text = ["Loss in nats per token on held-out text; bytes are one client's, in all.", ""]
    for file in sorted(results.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for split in dict.fromkeys(line["split"] for line in lines):
            chosen = [line for line in lines if line["split"] == split]
            dense = mean(line["metrics"]["loss"] for line in chosen if line["way"] == "dense")
            text += [f"**{file.stem}, {split}**: dense {dense:.4f}, {len({line['seed'] for line in chosen})} seeds", ""]
            text += [
                "| method | ratio | way | loss | perplexity | largest difference | up | of one model upload | seconds |"
            ]
            text += ["|---|---|---|---|---|---|---|---|---|"]
            keys = {(line["ratio"], line["method"], line["way"]) for line in chosen if line["ratio"]}
            for way, method, ratio in wanted_results():
                if (ratio, method, way) not in keys:
                    continue
                same = [line for line in chosen if (line["ratio"], line["method"], line["way"]) == (ratio, method, way)]
                text.append(f"| {method} | {ratio} | {way} | {row(same)} |")
            text.append("")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join(text))


def row(same: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers of one row of the table."""
    loss, perplexity = (mean(line["metrics"][key] for line in same) for key in ("loss", "perplexity"))
    difference = max(line["max_difference"] for line in same) if "max_difference" in same[0] else None
    up = mean(line["bytes_up_per_client"] for line in same) if "bytes_up_per_client" in same[0] else None
    shown = [
        *(f"{loss:.4f}", f"{perplexity:.2f}", "" if difference is None else f"{difference:.1e}"),
        *(("", "") if up is None else (f"{up / 1e3:,.1f} kB", f"{up / same[0]['bytes_of_one_model_upload']:.1%}")),
        f"{mean(line['seconds'] for line in same):.1f}",
    ]
    return " | ".join(shown)
