"""Federated fine-tuning of a causal language model with the same loop: perplexity, bytes, and what pruning costs.

    python experiments/federated_lm/run.py --data FOLDER       # FOLDER holds models/ and text/; resumable
    python experiments/federated_lm/run.py --collect           # only pack finished runs into results/; new tables

The pretrained ``stories260K`` learns Shakespeare, whose speakers are spread over 20 clients. ``full``: everybody holds
the whole model. ``mixed``: half of the clients hold 60 % of its parameters, so that FedAvg cannot take part. ``rates``:
from which learning rates the others' were chosen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.federated_lm.tables import regenerate  # noqa: E402
from experiments.runs import collect, run  # noqa: E402

BYTES = ["upload.values=deltas", "upload=int8"]
OURS = ["strategy=fedlp_plan", *BYTES, "upload.entropy_coding=false"]
CODED = ["upload=int4", "upload.entropy_coding=true"]
LOSSES = [*OURS, "strategy.spread=allocator", "strategy.regrow=1"]  # what moves is spread by the losses of units
RATES = ("0.001", "0.002", "0.004", "0.008")
TUNED = "local.lr=0.004"  # the best of RATES for half of the units; the experiment's own 0.002 is FedAvg's best
GROUPS = {
    "full": {
        "fedavg": ["strategy=fedavg"],
        "fedavg-int8": ["strategy=fedavg", *BYTES],
        "fedavg-int2": ["strategy=fedavg", *BYTES, "upload=int2"],
        "random": [*LOSSES, TUNED, "pruner=random", "allocator=uniform"],
        "ours": [*OURS, TUNED],
        "ours-int4": [*OURS, TUNED, "upload=int4"],
        "ours-int2": [*OURS, TUNED, "upload=int2"],
        "ours-20-rounds": [*OURS, TUNED, "num_rounds=20"],
        "ours-20-rounds-int4-coded": [*OURS, TUNED, *CODED, "num_rounds=20"],
        "by-losses": [*LOSSES, TUNED],
        "by-losses-int4": [*LOSSES, TUNED, "upload=int4"],
        "by-losses-int2": [*LOSSES, TUNED, "upload=int2"],
        "by-losses-20-rounds": [*LOSSES, TUNED, "num_rounds=20"],
    },
    "mixed": {
        "random": [*LOSSES, "pruner=random", "allocator=uniform", "strategy.sparsity=0"],
        "by-losses": [*LOSSES, "strategy.sparsity=0"],
    },
    "rates": {
        **{f"fedavg-int8-{rate}": ["strategy=fedavg", *BYTES, f"local.lr={rate}"] for rate in RATES},
        **{f"by-losses-{rate}": [*LOSSES, f"local.lr={rate}"] for rate in RATES},
    },
}
TIERS = ["fleet=tiers", "fleet.fractions=[1.0,0.6]", "fleet.limited=[params]"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds models/stories260K and text/tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--methods", nargs="+", help="all of a group where absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--collect", action="store_true", help="run nothing, only pack")
    arguments = parser.parse_args()
    code = 0 if arguments.collect else run_all(arguments)
    if code == 0:
        collect(arguments.out, HERE / "results")
        regenerate(HERE / "results", HERE / "results")
    return code


def run_all(arguments: argparse.Namespace) -> int:
    """Run what is wanted and not finished; return the first exit code that is not 0."""
    model = arguments.data / "models/stories260K"
    common = ["experiment=federated_lm", "model=hf", f"model.path={model}", f"dataset.tokenizer={model}"]
    common.append(f"dataset.root={arguments.data}/text/tinyshakespeare.txt")
    for seed in arguments.seeds:
        for group in arguments.groups:
            for method in arguments.methods or GROUPS[group]:
                overrides = GROUPS[group][method]
                fleet = TIERS if group == "mixed" else []
                asked = [*common, *fleet, *overrides, f"seed={seed}", f"label={method}"]
                if code := run(arguments.out / f"{group}/{method}/seed-{seed}", asked):
                    return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
