"""Soak: memory, handles and time per round of long runs on the local engine, one worker, logistic regression.

    python experiments/soak/run.py            (hours of one core; each run goes on where it was stopped)

To decide: whether a round costs the same however many came before it, and however many clients the federation has.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.soak.tables import LEGS, regenerate  # noqa: E402
from fedlp.apps.federate import Federation  # noqa: E402
from fedlp.config import compose  # noqa: E402
from fedlp.types import RoundRecord  # noqa: E402

HERE = Path(__file__).resolve().parent
COMMON = (
    *("model=experiments.soak.run:Linear", "dataset=experiments.soak.run:examples", "strategy=fedavg"),
    *("local.lr=0.1", "eval_every=100", "checkpoint_every=50", "simulation.workers=1"),
)
SAMPLES = 20  # points of each leg


class Linear(nn.Module):
    """Logistic regression."""

    def __init__(self, num_classes: int = 2, in_features: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.fc(x.flatten(1))


def examples(count: int = 100_000, seed: int = 0):  # type: ignore[no-untyped-def]
    """Two classes on both sides of a plane, with noise; the last 500 are the test set."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count + 500, 8)).astype(np.float32)
    y = (x @ rng.normal(size=8) + 0.5 * rng.normal(size=count + 500) > 0).astype(np.int64)
    return (x[:count], y[:count]), (x[count:], y[count:])


def resident(pid: int | str) -> float:
    """Return the memory that a process holds, in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def children() -> list[str]:
    """Return the ids of this process's children."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def soak(
    folder: Path, num_clients: int, per_round: int, num_rounds: int, without_data: int, batched: bool, stop: int = 0
) -> dict[str, Any]:
    """Return what each of some stretches of a run took; a run that was stopped goes on from its last checkpoint.

    A new run ends after round ``stop``, if that is given: it is to be started again.
    """
    out, kept = folder / "run", folder / "points.jsonl"
    goes_on = (out / "checkpoint").is_dir()
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    options = (f"num_clients={num_clients}", f"clients_per_round={per_round}", f"num_rounds={num_rounds}")
    data = (f"dataset.count={num_clients - without_data}", f"partition.min_examples={0 if without_data else 1}")
    config = compose((*COMMON, *data, *options, f"simulation.batched={str(batched).lower()}"))
    times: list[float] = []
    spent = [time.process_time()]
    step = num_rounds // SAMPLES

    def watch(record: RoundRecord, _: object) -> None:
        assert not record.failures
        times.append(record.wall_time_s)
        if record.server_round % step == 0:
            point = {
                "round": record.server_round,
                "process": os.getpid(),
                "rounds": len(times),
                "median_ms": round(1e3 * statistics.median(times), 2),
                "server_cpu_ms": round(1e3 * (time.process_time() - spent[0]) / len(times), 2),
                "server_mb": round(resident("self"), 1),
                "worker_mb": round(sum(map(resident, children())), 1),
                "handles": len(os.listdir("/proc/self/fd")),
            }
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
            times.clear()
            spent[0] = time.process_time()
        if record.server_round == stop and not goes_on:
            raise SystemExit(f"stopped after round {stop}; start again to go on")

    federation = Federation(replace(config, resume=str(out)) if goes_on else config)
    manifest = federation.run_locally(out, [watch])
    lines = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
    points = {point["round"]: point for point in lines}  # a stretch that was done again counts once
    processes = list(dict.fromkeys(point["process"] for point in points.values()))
    size = (out / "rounds.jsonl").stat().st_size
    shutil.rmtree(folder)
    return {
        "num_clients": num_clients,
        "without_data": without_data,
        "batched": batched,
        "clients_per_round": per_round,
        "num_rounds": num_rounds,
        "accuracy": manifest["final_metrics"]["accuracy"],
        "wall_s": round(manifest["totals"]["wall_time_s"], 1),
        "processes": len(processes),
        "record_bytes_per_round": size // num_rounds,
        "points": [{**point, "process": processes.index(point["process"])} for point in points.values()],
    }


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one leg, by name")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rounds of each leg")
    given = parser.parse_args()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    path = results / "soak.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, leg in LEGS.items():
        if name in done or given.only not in (None, name):
            continue
        num_clients, per_round, num_rounds, *how = leg
        found = soak(HERE / "runs" / name, num_clients, per_round, max(SAMPLES, int(given.scale * num_rounds)), *how)
        done[name] = found
        path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        print(name, found, flush=True)
    regenerate(results, results)


if __name__ == "__main__":
    main()
