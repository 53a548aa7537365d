"""Speed of batched cohorts: ``python experiments/bench/cohorts.py [--quick] [--json FILE]``.

Rounds of many small clients (one epoch of SGD, batches of 10): fedlp on its local engine with two workers, clients one
by one and batched, against a bare loop over clients in one process (model copy, steps, weighted average). After each
round of fedlp comes one of the bare loop; ratios are of such pairs. The ratio of processor seconds, of all processes
and over all rounds, is given beside them: it does not depend on how many cores are free.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from bare import BareLoop
from simulation import WORKERS, compare
from timing import clock, parse_args, processor_seconds, write_report
from workload import WORKLOADS, run_fedlp

CASES = {
    "linear_1000": ("linear", 1000),
    "mlp_1000": ("mlp", 1000),
    "digits_100": ("digits", 100),
    "linear_10": ("linear", 10),
}


def paired_rounds(name: str, num_clients: int, num_rounds: int, batched: bool) -> dict[str, Any]:
    """Return the seconds of rounds of fedlp and of the bare loop, side by side, and the ratio of processor seconds."""
    bare = BareLoop(WORKLOADS[name], num_clients)
    wall: dict[str, list[float]] = {"fedlp": [], "bare loop": []}
    processor: dict[str, list[float]] = {"fedlp": [], "bare loop": []}
    last = [0.0]

    def observe(seconds: float) -> None:
        used = processor_seconds(os.getpid())
        wall["fedlp"].append(seconds)
        processor["fedlp"].append(used - last[0])
        started = time.process_time()
        wall["bare loop"].append(clock(bare.run_round))
        processor["bare loop"].append(time.process_time() - started)
        last[0] = processor_seconds(os.getpid())

    run_fedlp(WORKLOADS[name], num_clients, num_clients, num_rounds + 2, WORKERS, observe, batched)
    counted = {key: values[1:-1] for key, values in wall.items()}
    spent = {key: sum(values[1:-1]) for key, values in processor.items()}
    return {"wall": counted, "processor_ratio": spent["fedlp"] / spent["bare loop"]}


def main() -> None:
    args = parse_args(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for case, (name, num_clients) in CASES.items():
        for batched in (False, True):
            how = "batched" if batched else "one by one"
            found = paired_rounds(name, num_clients, 3 if args.quick else 9, batched)
            report = compare(f"{case}, {how}", found["wall"], "ms")
            ratio = 1 / report["ratio_over_fedlp"]["bare loop"]["median"]
            spent = found["processor_ratio"]
            print(f"fedlp / bare loop: {ratio:.2f} of its time, {spent:.2f} of its processor seconds")
            results[f"{case}, {how}"] = report | {"processor_ratio": spent}
    write_report(args.json, args.quick, results)


if __name__ == "__main__":
    main()
