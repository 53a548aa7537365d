"""FedLP's table on real CIFAR-10: FedAvg, FedLP-Homo and FedLP-Hetero, iid and Dirichlet, one after another.

    python experiments/fedlp_table/run.py --data ROOT            # two hours on two cores; stop and go on as you like
    python experiments/fedlp_table/run.py --data ROOT --collect  # only pack finished runs into results/; new tables

Every run is an ordinary run directory under ``--out``. Finished ones are skipped, stopped ones are resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.fedlp_table.tables import regenerate  # noqa: E402
from experiments.runs import collect, run  # noqa: E402

METHODS = {
    "fedavg": ["strategy=fedavg"],
    "homo-0.3": ["strategy=fedlp_homo", "strategy.layer_preserving_rate=0.3"],
    "homo-0.5": ["strategy=fedlp_homo", "strategy.layer_preserving_rate=0.5"],
    "homo-0.7": ["strategy=fedlp_homo", "strategy.layer_preserving_rate=0.7"],
    "hetero-u": ["strategy=fedlp_hetero", "strategy.depths=u"],
}
PARTITIONS = {"iid": ["partition=iid"], "dirichlet": ["partition=dirichlet", "partition.alpha=1.0"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="run nothing, only pack")
    arguments = parser.parse_args()
    if not arguments.collect:
        for seed in arguments.seeds:
            for partition, partition_overrides in PARTITIONS.items():
                for method, overrides in METHODS.items():
                    out = arguments.out / f"{partition}/{method}/seed-{seed}"
                    common = ["experiment=fedlp_table", f"dataset.root={arguments.data}", f"seed={seed}"]
                    code = run(out, [*common, *overrides, *partition_overrides])
                    if code:
                        return code
    collect(arguments.out, HERE / "results")
    regenerate(HERE / "results", HERE / "results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
