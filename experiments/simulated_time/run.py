"""Accuracy against simulated time in ``fleet=mixed``: FedAvg, HeteroFL and FedLP-Plan, in rounds of three kinds.

    python experiments/simulated_time/run.py          # about a quarter of an hour on one core; skips what is finished

FedLP's CNN on digits, 40 clients in the eight device classes of ``conf/fleet/mixed.yaml``, iid, three seeds.
Synchronous rounds of 8 clients, with and without a deadline, and FedBuff with 8 clients at once and a buffer of 4: 96
parts of clients in all. FedAvg trains on the clients that hold the whole model.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.runs import collect, is_finished  # noqa: E402
from experiments.simulated_time.tables import MODES, regenerate  # noqa: E402
from fedlp.apps import runs  # noqa: E402
from fedlp.config import compose, to_yaml  # noqa: E402

BYTES = ["upload=int8", "upload.values=deltas"]
COMMON = [
    *(
        "model=fedlp_cnn",
        "dataset=digits",
        "fleet=mixed",
        "fleet.clock=virtual",
        "num_clients=40",
        "clients_per_round=8",
    ),
    *("local=adam", "local.lr=0.001", "local.batch_size=16", "aggregator.batch_norm=static", "checkpoint_every=100"),
    *("simulation.workers=1",),
]
DOWN = ["download=block8", "download.tensors=all"]
METHOD = {
    "fedavg": ["strategy=fedavg", "fleet.only_whole=true", *BYTES],
    "heterofl": ["strategy=heterofl", *BYTES],
    "plan": ["strategy=fedlp_plan"],
    "plan-whole": ["strategy=fedlp_plan", "strategy.measured_by=whole"],
    "fedavg-down8": ["strategy=fedavg", "fleet.only_whole=true", *BYTES, *DOWN],
    "heterofl-down8": ["strategy=heterofl", *BYTES, *DOWN],
    "plan-whole-down8": ["strategy=fedlp_plan", "strategy.measured_by=whole", *DOWN],
}
MODE = {
    "synchronous": ["num_rounds=12"],
    "deadline": ["num_rounds=12", "rounds.deadline_s=1"],
    "asynchronous": ["num_rounds=24", "rounds=asynchronous", "rounds.buffer_size=4"],
}


def main() -> None:
    out = HERE / "runs" / "mixed"
    for seed in range(3):
        for method in METHOD:
            for mode in MODES:
                folder = out / f"{method}-{mode}" / f"seed-{seed}"
                if is_finished(folder):
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                overrides = [*COMMON, *METHOD[method], *MODE[mode], f"seed={seed}"]
                runs.run_locally(to_yaml(compose(overrides)), folder)
                print(folder.relative_to(HERE), flush=True)
    collect(HERE / "runs", HERE / "results")
    regenerate(HERE / "results", HERE / "results")


if __name__ == "__main__":
    main()
