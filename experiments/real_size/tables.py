"""Table of one-shot pruning at real size: losses by kernel and allocator, from ``results/smollm2-135m.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path

METHODS = ("default", "SlimGPT", "Wanda", "FLAP", "magnitude")
RULES = ("uniform", "dp", "dsa", "owl", "log_depth")
RATIOS = (0.2, 0.33, 0.5)
TESTS = {"held out": "WikiText-2 test", "tinyshakespeare": "Shakespeare"}


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md``."""
    lines = [json.loads(line) for line in (results / "smollm2-135m.jsonl").read_text().splitlines()]
    losses = {(x["method"], x["rule"], x["ratio"]): x["losses"] for x in lines}
    dense = losses["dense", "none", 0.0]
    parts = ["# SmolLM2-135M, pruned in one shot: loss in nats per token, one seed\n"]
    for test, title in TESTS.items():
        parts.append(f"## {title} (dense {dense[test]:.3f})\n")
        parts.append("| removed | kernel | " + " | ".join(RULES) + " |\n|---|---|" + "---:|" * len(RULES))
        for ratio in RATIOS:
            for method in METHODS:
                found = [losses.get((method, rule, ratio)) for rule in RULES]
                if any(found):
                    cells = " | ".join("-" if x is None else f"{x[test]:.3f}" for x in found)
                    parts.append(f"| {ratio:.0%} | {method} | {cells} |")
        parts.append("")
    (out / "tables.md").write_text("\n".join(parts), encoding="utf-8")
