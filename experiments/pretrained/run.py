"""Fine-tuning of a pretrained language model over devices of which most cannot hold it: slices against pruned models.

    python experiments/pretrained/run.py --data FOLDER       # FOLDER holds models/ and text/; resumable
    python experiments/pretrained/run.py --collect           # only pack finished runs into results/; new table

What it is to decide: ``stories260K`` learns Shakespeare, whose speakers are spread over 16 clients; a quarter each may
use 100, 80, 60 and 40 % of the memory that training the whole model takes. With equal rounds, clients a round, steps,
learning rate and 8-bit differences, and everything trained that is held:

1. Is each tier's own model better where sub-models are pruned and refitted (``plan-pruned``) than as slices
   (``heterofl``, ``plan-slices``)? How much of that is the refit (``plan-pruned-no-refit``)?
2. Is the whole model, or a tier's own, better than what those alone learn that can hold the whole (``only-capable``:
   the tiers then get that model pruned before the last round)?

``start-...`` are the models before any training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.pretrained.tables import regenerate  # noqa: E402
from experiments.runs import collect, run  # noqa: E402

PLAN = "strategy.sparsity=0"  # what is held is trained and sent
PRUNED = [PLAN, "strategy.submodels=pruned"]
LEVELS = "strategy.widths=[1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1]"
STILL = ["num_rounds=1", "local.lr=1e-30"]
METHODS = {
    "start-pruned": [*PRUNED, *STILL],
    "start-heterofl": ["strategy=heterofl", LEVELS, *STILL],
    "only-capable": [*PRUNED, "strategy.refit_every=7", "fleet.only_whole=true"],
    "heterofl": ["strategy=heterofl", LEVELS],
    "plan-slices": [PLAN],
    "plan-pruned": PRUNED,
    "plan-pruned-no-refit": [*PRUNED, "pruner.recovery=none"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds models/ and text/")
    parser.add_argument("--model", default="stories260K", help="folder in models/; its name is that of the group")
    parser.add_argument("--text", default="tinyshakespeare.txt", help="file in text/")
    parser.add_argument("--options", nargs="+", default=[], help="further overrides of every run: local.lr=0.001")
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="run nothing, only pack")
    arguments = parser.parse_args()
    code = 0 if arguments.collect else run_all(arguments)
    if code == 0:
        collect(arguments.out, HERE / "results")
        regenerate(HERE / "results", HERE / "results")
    return code


def run_all(arguments: argparse.Namespace) -> int:
    """Run what is wanted and not finished; return the first exit code that is not 0."""
    model = arguments.data / "models" / arguments.model
    common = ["experiment=pretrained", "model=hf", f"model.path={model}", f"dataset.tokenizer={model}"]
    common.append(f"dataset.root={arguments.data}/text/{arguments.text}")
    for seed in arguments.seeds:
        for method in arguments.methods:
            asked = [*common, *METHODS[method], *arguments.options, f"seed={seed}", f"label={method}"]
            if code := run(arguments.out / f"{arguments.model}/{method}/seed-{seed}", asked):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
