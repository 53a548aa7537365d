"""What the benchmarks share: clocks, paired ratios, memory of processes, and reports that say where they were made."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("fedlp", "flwr", "ray", "torch", "numpy", "safetensors")


def parse_args(description: str) -> argparse.Namespace:
    """Return ``--quick`` and ``--json FILE`` from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repetitions of small cases: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number there")
    return parser.parse_args()


def clock(action: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def alternate(actions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each action in each of ``repeats`` passes; a pass runs every action once, in order."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(-warmup, repeats):
        for name, action in actions.items():
            seconds = clock(action)
            if number >= 0:
                times[name].append(seconds)
    return times


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios of measurements that were made side by side."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "q1": quartiles[0], "q3": quartiles[2]}


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, the first one to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  " + "  ".join([line[0].ljust(widths[0]), *cells]), flush=True)


def write_report(path: Path | None, quick: bool, results: Mapping[str, Any]) -> None:
    """Write results with the machine, the versions and the commit they were measured on."""
    if path is not None:
        report = {
            "command": [_shown(part) for part in sys.argv],
            "quick": quick,
            **describe_machine(),
            "results": results,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {path}")


def _shown(argument: str) -> str:
    """Return an argument as another machine can give it: a path from the repository, or a folder's place alone."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f"FOLDER/{path.name}"


def note_machine(experiment: str) -> None:
    """Write the machine of the newest runs of an experiment to ``experiments/machines.json``."""
    path = ROOT / "experiments" / "machines.json"
    machines = json.loads(path.read_text()) | {experiment: describe_machine()}
    path.write_text(json.dumps(machines, indent=1, sort_keys=True) + "\n")


def describe_machine() -> dict[str, Any]:
    """Return hardware, load, versions and git commit."""
    lines = _read("/proc/cpuinfo").splitlines()
    cpu = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(ROOT)]
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu[0] if cpu else platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
        },
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changed.stdout.strip()),
    }


class MemoryPeak:
    """The most memory that a process and its descendants held at once, in bytes, while the context was open.

    Sums ``Pss`` of ``/proc``: a page that n processes share counts 1/n in each, so that forked workers are not counted
    twice.
    """

    def __init__(self, pid: int, every_s: float = 0.02) -> None:
        self.bytes = 0
        self._pid, self._every_s = pid, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._every_s):
            self.bytes = max(self.bytes, sum(_pss(pid) for pid in _family(self._pid)))


def processor_seconds(pid: int) -> float:
    """Return the processor seconds that a process and its descendants have used, to a hundredth."""
    fields = [_read(f"/proc/{one}/stat").rpartition(")")[2].split() for one in _family(pid)]
    return sum(int(field[11]) + int(field[12]) for field in fields if field) / os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for parent in found:
        for thread in _list(f"/proc/{parent}/task"):
            found += [int(child) for child in _read(f"/proc/{parent}/task/{thread}/children").split()]
    return found


def _pss(pid: int) -> int:
    lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # the process has ended
        return ""


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
