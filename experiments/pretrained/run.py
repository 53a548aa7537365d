"""Fine-tuning of a pretrained language model over devices of which most cannot hold it: slices against pruned models.

    python experiments/pretrained/run.py --data FOLDER       # FOLDER holds models/ and text/; resumable
    python experiments/pretrained/run.py --collect           # only pack finished runs into results/; new table

What it is to decide. ``lm-3.3m`` learns four domains of text that it has not seen (:mod:`domains`), spread over 8
clients in four tiers: they may use 100, 50, 35 and 25 % of the memory that training the whole model takes (20 % is the
least with its embeddings and residual stream whole). With correlation 1 a tier's clients alone hold a domain, with 0
all hold all. With equal rounds, clients, steps and 8-bit differences, everything trained that is held, and the better
of two learning rates for each method by seed 0:

1. Is each tier's own model better pruned and refitted (``plan-pruned``) than as slices (``heterofl``, ``fjord``,
   ``fedrolex``, ``plan-slices``), or with units by magnitude or chance? How much is the refit (``-no-refit``)?
2. Is the whole model better than what those alone learn that can hold it (``only-capable``), where small devices hold
   text that nobody else has, and where not? How far is it from FedAvg, if all could hold it (``fedavg``)?
3. Which allocator, and does refitting anew every second or every round (``-refit-2``, ``-refit-1``) help over the
   constant offset? On three seeds this decides the default of ``refit_every``.
4. Do whole attentions and MLPs as units (``-depth``) help a tier, and what are tiers of 100, 50, 25 and 10 % then
   (``low-``)?
5. With LoRA on a frozen base that travels once (``lora-...``): is a tier better off with adapters on a pruned base, a
   sliced base, or with full training of what it holds, per byte?

``start-...`` are the models before any training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.pretrained.domains import write_texts  # noqa: E402
from experiments.pretrained.tables import regenerate  # noqa: E402
from experiments.runs import collect, is_finished, run  # noqa: E402

PLAN = "strategy.sparsity=0"  # what is held is trained and sent
PRUNED = [PLAN, "strategy.submodels=pruned", "strategy.refit_every=0"]
SLICES = [PLAN, "strategy.submodels=slices"]
LEVELS = "strategy.widths=[1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1]"
NESTED = "strategy.widths=[0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0]"
STILL = ["num_rounds=1", "local.lr=1e-30"]
METHODS = {
    "start-pruned": [*PRUNED, *STILL],
    "start-heterofl": ["strategy=heterofl", LEVELS, *STILL],
    "plan-pruned": PRUNED,
    "only-capable": [*PRUNED, "strategy.refit_every=7", "fleet.only_whole=true"],
    "heterofl": ["strategy=heterofl", LEVELS],
    "plan-slices": SLICES,
    "fedavg": ["strategy=fedavg", "fleet.fractions=[1.0,1.0,1.0,1.0]"],
    "plan-pruned-no-refit": [*PRUNED, "pruner.recovery=none"],
    "plan-magnitude": [*PRUNED, "pruner=magnitude", "pruner.recovery=none", "allocator=uniform"],
    "plan-random": [*PRUNED, "pruner=random", "pruner.recovery=none", "allocator=uniform"],
    "fedrolex": ["strategy=fedrolex", LEVELS],
    "fjord": ["strategy=fjord", NESTED],
    "depth": ["strategy=fedlp_hetero"],
}
LORA = ["adapter=lora", "adapter.rank=8", "adapter.alpha=16"]
RANKED = [  # ranks 8, 4, 2, 1 on a 4-bit base that every client is taken to hold
    *("strategy=heterofl", "strategy.widths=[1.0,0.5,0.25,0.125]", "adapter.cut=ranks", "fleet.limited=[upload_bytes]"),
    *("fleet.fractions=[1.0,0.5,0.25,0.125]", "upload=float32", "upload.values=weights", "download=nf4", *LORA),
]
ADAPTERS = {
    "lora-plan-pruned": [*PRUNED, *LORA],
    "lora-plan-pruned-ffa": [*PRUNED, *LORA, "adapter.freeze_a=true"],
    "lora-plan-slices": [*SLICES, *LORA],
    "lora-heterofl": ["strategy=heterofl", LEVELS, *LORA],
    "lora-flexlora": [*RANKED, "aggregator=flexlora"],
    "lora-flora": [*RANKED, "aggregator=flora"],
    "lora-hetlora": [*RANKED, "aggregator=hetlora"],
    "lora-only-capable": [*PRUNED, "fleet.only_whole=true", *LORA],
    "lora-fedavg": ["strategy=fedavg", "fleet.fractions=[1.0,1.0,1.0,1.0]", *LORA],
}
ABLATIONS = {
    "plan-pruned-uniform": [*PRUNED, "allocator=uniform"],
    "plan-pruned-log": [*PRUNED, "allocator=log_depth"],
    "plan-pruned-owl": [*PRUNED, "allocator=owl"],
    "plan-pruned-dsa": [*PRUNED, "allocator=dsa"],
    "plan-pruned-refit-2": [*PRUNED, "strategy.refit_every=2"],
    "plan-pruned-refit-1": [*PRUNED, "strategy.refit_every=1"],
}
LOWER = "fleet.fractions=[1.0,0.5,0.25,0.1]"
LOW = [*PRUNED, "strategy.refit_every=2", LOWER]
DEPTH = {  # whole attentions and MLPs as units; the lowest of these tiers is out of reach without
    "plan-pruned-refit-2-depth": [*PRUNED, "strategy.refit_every=2", "pruner.depth=true"],
    "low-plan-pruned": LOW,
    "low-plan-pruned-depth": [*LOW, "pruner.depth=true"],
    "low-start-pruned-depth": [*LOW, "pruner.depth=true", *STILL],
    "low-heterofl": ["strategy=heterofl", LEVELS, LOWER],
    "low-fedrolex": ["strategy=fedrolex", LEVELS, LOWER],
    "low-fjord": ["strategy=fjord", NESTED, LOWER],
}
EVERY = {**METHODS, **ABLATIONS, **DEPTH, **ADAPTERS}
RATES = (0.001, 0.003)
LORA_RATES = (0.003, 0.01)
MODELS = {"stories260K": ["fleet.fractions=[1.0,0.75,0.55,0.42]", "local.batch_size=4", "local.accumulation=2"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds models/ and text/")
    parser.add_argument("--model", default="lm-3.3m", help="folder in models/; its name begins those of the groups")
    parser.add_argument("--texts", type=Path, nargs="+", help="one text file per domain; four by default")
    parser.add_argument("--options", nargs="+", default=[], help="further overrides of every run: local.batch_size=4")
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--methods", nargs="+", choices=list(EVERY), default=list(METHODS))
    parser.add_argument("--correlation", type=float, default=1.0, help="of tier and domain, in [0, 1]")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, instead of the better of two")
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
    os.environ["PYTHONPATH"] = str(HERE.parents[1])
    model, data = arguments.data / "models" / arguments.model, arguments.data
    texts = arguments.texts or write_texts(arguments.out / "texts", data / "text" / "wikitext2-test.txt")
    group = arguments.out / f"{arguments.model}-correlation-{arguments.correlation:g}"
    tuned = arguments.out / f"{arguments.model}-correlation-1"
    for seed in arguments.seeds:
        common = [
            *("experiment=pretrained", f"model.path={model}", f"dataset.tokenizer={model}"),
            *(
                "partition=natural",
                "dataset=experiments.pretrained.domains:Domains",
                "dataset.max_train_examples=null",
                f"dataset.files=[{','.join(map(str, texts))}]",
            ),
            *(
                f"dataset.correlation={arguments.correlation}",
                f"dataset.homes=[{','.join(map(str, _homes(seed)))}]",
                *MODELS.get(model.name, []),
                *arguments.options,
            ),
        ]
        for method in arguments.methods:
            options = EVERY[method]
            for rate in arguments.rates or _rates(tuned, method, seed):
                asked = [
                    *common,
                    f"local.lr={rate}",
                    *options,
                    f"seed={seed}",
                    f"label={method}@{rate:g}",
                    "dataset.windows=32",
                ]
                if code := run(group / f"{method}@{rate:g}/seed-{seed}", asked):
                    print(f"{method} failed with exit code {code}", flush=True)
    return 0


def _rates(group: Path, method: str, seed: int) -> Sequence[float]:
    """Return the learning rates to try: all of them at first, then the best by seed 0; variants take plan-pruned's."""
    if method.startswith(("start-", "low-start-")):
        return [RATES[0]]
    if method in ADAPTERS:
        return LORA_RATES
    asked = "plan-pruned" if method in {**ABLATIONS, **DEPTH} else method
    found = {rate: group / f"{asked}@{rate:g}/seed-0" for rate in RATES}
    if not all(map(is_finished, found.values())) or (seed == 0 and group.name.endswith("-1") and asked == method):
        return RATES
    losses = {
        rate: json.loads((run / "manifest.json").read_text())["final_metrics"]["loss"] for rate, run in found.items()
    }
    return [min(losses, key=losses.__getitem__)]


def _homes(seed: int) -> list[int]:
    """Return the domain of each client: the place of its tier."""
    from fedlp.config import compose
    from fedlp.federation.fleet import fleet_kinds

    config = compose(["experiment=pretrained", f"seed={seed}"])
    kinds = fleet_kinds(config.fleet, config.num_clients, seed)
    assert kinds is not None
    return [int(kind) for kind in kinds]


if __name__ == "__main__":
    sys.exit(main())
