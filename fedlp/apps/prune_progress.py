"""Progress of pruning, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from fedlp.pruning.pruner import LayerReport
from fedlp.types import PrunableLayer


def show_progress(layers: Sequence[PrunableLayer]) -> Callable[[LayerReport], None]:
    """Return a function that prints a pruned layer, and the time left for the others."""
    started, done = time.monotonic(), 0

    def show(report: LayerReport) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - started) / done * (len(layers) - done)
        kept = f"{report.kept_units} of {report.num_units} units"
        line = f"layer {done}/{len(layers)} {report.name}: {kept}, {left:.0f}s left"
        end = "\r" if sys.stderr.isatty() and done < len(layers) else "\n"
        print(line.ljust(100) if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)

    return show


def show_step(number: int, loss: float) -> None:
    """Print a Newton step."""
    print(f"Newton step {number}: held-out loss {loss:.4f}", file=sys.stderr, flush=True)
