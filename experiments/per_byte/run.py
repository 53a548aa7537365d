"""Accuracy per uplink byte and per client MAC on real CIFAR-10: every method, two fleets, one after another.

    python experiments/per_byte/run.py --data ROOT               # hours on two cores; stop and go on as you like
    python experiments/per_byte/run.py --data ROOT --groups mixed-iid --methods ours heterofl --seeds 0 1
    python experiments/per_byte/run.py --collect                 # only pack finished runs into results/; new tables

``full``: every client can hold the whole model. ``mixed``: a quarter of the clients each can hold 100, 50, 25 and 10 %
of its parameters, in ``mixed-macs`` also of its MACs; only methods of sub-models can take part. ``long``: 200 rounds.
``resnet18``: half as many rounds of a model twenty times as large. ``batch-norm``: whose running statistics are kept.

Every run is an ordinary run directory under ``--out``; finished ones are skipped, stopped ones are resumed. At the end
finished runs are packed into ``results/GROUP.runs.jsonl.xz``, where they replace runs of the same name. ``--part 0/2``
and ``--part 1/2`` share the work of two processes; then ``--collect`` packs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.per_byte.tables import regenerate  # noqa: E402
from experiments.runs import collect, run  # noqa: E402

BYTES = ["upload.values=deltas", "upload=int8"]  # a byte a weight, as ours
FOUR, TWO = "upload=int4", "upload=int2"  # bits a weight
CODED = [TWO, "upload.entropy_coding=true"]  # about 1.2
MOMENTUM = ["server_optimizer=momentum", "server_optimizer.momentum=0.5"]
COARSE = [*CODED, "upload.coarseness=4"]  # about 0.5
DOWN8, DOWN4 = (["download.tensors=all", f"download=block{bits}"] for bits in (8, 4))  # bits a weight on its way down
HEAD = "model.frozen=[fc*]"  # the linear layers keep their first values, and only convolutions travel
CAPABLE = ["num_clients=25", "dataset.max_train_examples=5000", "fleet.fractions=[1.0]"]  # of a mixed fleet, no others
WIDTHS = [*BYTES, "strategy.widths=[1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1]"]
OURS = ["strategy=fedlp_plan", *BYTES, "upload.entropy_coding=false"]
LOSSES = [
    *OURS,
    "strategy.spread=allocator",
    "strategy.regrow=1",
]  # what moves is spread by the scores of units, as what is held
EVERYTHING = [*LOSSES, "strategy.train_sent=false"]  # is trained, also what is not sent
CLIENTS = [*EVERYTHING, "strategy.unit_selection=client", "strategy.refresh_every=1"]
NARROW = [*LOSSES, "aggregator.weighting=held", "strategy.regrow=0.5"]
DRAWN = [*CLIENTS, "allocator=uniform"]
FULL = {
    "fedavg": ["strategy=fedavg"],
    "fedavg-int8": ["strategy=fedavg", *BYTES],
    "fedavg-int8-momentum": ["strategy=fedavg", *BYTES, *MOMENTUM],
    "fedavg-int4": ["strategy=fedavg", *BYTES, FOUR],
    "fedavg-int4-down4": ["strategy=fedavg", *BYTES, FOUR, *DOWN4],
    "fedavg-int2": ["strategy=fedavg", *BYTES, TWO],
    "fedavg-int2-coded": ["strategy=fedavg", *BYTES, *CODED],
    "fedavg-int2-coded-4": ["strategy=fedavg", *BYTES, *COARSE],
    "fedavg-frozen-head-int4": ["strategy=fedavg", *BYTES, FOUR, HEAD],
    "fedavg-topk": ["strategy=fedavg", "upload=topk"],  # 2 % of the entries in 2 bits, error feedback
    "homo-0.5": ["strategy=fedlp_homo"],
    "homo-0.5-int8": ["strategy=fedlp_homo", *BYTES],
    "hetero-u": ["strategy=fedlp_hetero"],
    "random": [*DRAWN, "pruner=random"],
    "magnitude": [*DRAWN, "pruner=magnitude"],
    "ours": [*OURS],
    "ours-int4": [*OURS, FOUR],
    "ours-int4-coarse-scores": [*OURS, FOUR, "strategy.scores=coarse"],
    "ours-int4-down8": [*OURS, FOUR, *DOWN8],
    "ours-int4-down4": [*OURS, FOUR, *DOWN4],
    "ours-int2": [*OURS, TWO],
    "ours-int2-coded": [*OURS, *CODED],
    "ours-int2-coded-momentum": [*OURS, *CODED, *MOMENTUM],
    "ours-int2-coded-4": [*OURS, *COARSE],
    "ours-0.75-int2": [*OURS, TWO, "strategy.sparsity=0.75"],
    "ours-int2-coded-25-rounds": [*OURS, *CODED, "num_rounds=25"],
}
BY_SCORES = {
    "by-losses": [*LOSSES],
    "by-losses-int4": [*LOSSES, FOUR],
    "by-losses-int2": [*LOSSES, TWO],
    "by-losses-0.75": [*LOSSES, "strategy.sparsity=0.75"],
    "by-losses-0.75-int2": [*LOSSES, TWO, "strategy.sparsity=0.75"],
    "by-losses-0.75-to-0.5": [*LOSSES, "strategy.ramp_from=0.75", "strategy.ramp_rounds=30"],
    "by-wanda-int4": [*LOSSES, FOUR, "pruner=wanda"],
    "by-wanda-int2": [*LOSSES, TWO, "pruner=wanda"],
}
MIXED = {
    "heterofl": ["strategy=heterofl", *WIDTHS],
    "heterofl-momentum": ["strategy=heterofl", *WIDTHS, *MOMENTUM],
    "fjord": ["strategy=fjord", *WIDTHS],
    "fedrolex": ["strategy=fedrolex", *WIDTHS],
    "random": [*DRAWN, "pruner=random"],
    "magnitude": [*DRAWN, "pruner=magnitude"],
    "heterofl-frozen-head-int4": ["strategy=heterofl", *WIDTHS, FOUR, HEAD],
    "heterofl-int2": ["strategy=heterofl", *WIDTHS, TWO],
    "heterofl-down4": ["strategy=heterofl", *WIDTHS, *DOWN4],
    "heterofl-int2-coded": ["strategy=heterofl", *WIDTHS, *CODED],
    "ours": [*OURS],
    "ours-int4": [*OURS, FOUR],
    "ours-int4-coarse-scores": [*OURS, FOUR, "strategy.scores=coarse"],
    "ours-int4-down8": [*OURS, FOUR, *DOWN8],
    "ours-int4-down4": [*OURS, FOUR, *DOWN4],
    "ours-int2": [*OURS, TWO],
    "ours-int2-coded": [*OURS, *CODED],
    "ours-int2-coded-momentum": [*OURS, *CODED, *MOMENTUM],
    "ours-int2-coded-4": [*OURS, *COARSE],
    "ours-uniform-int4": [*OURS, FOUR, "allocator=uniform"],
    "fedavg-capable-int4": ["strategy=fedavg", *BYTES, FOUR, *CAPABLE],
    "ours-capable-int4": [*OURS, FOUR, *CAPABLE],
    "ours-capable-drawn-int4": [*OURS, FOUR, *CAPABLE, "clients_per_round=1", "num_rounds=50"],  # 1.25 in 40 rounds
}
MIXED_BY_SCORES = {
    "by-losses": [*NARROW],
    "by-losses-int4": [*NARROW, FOUR],
    "by-losses-int2": [*NARROW, TWO],
    "by-wanda-int4": [*NARROW, FOUR, "pruner=wanda"],
}
ABLATIONS = {
    **BY_SCORES,
    "ours-int2-coded-2": [*OURS, *CODED, "upload.coarseness=2"],
    "ours-int2-coded-4-momentum": [*OURS, *COARSE, *MOMENTUM],
    "ours-int2-coded-4-momentum-0.8": [*OURS, *COARSE, *MOMENTUM, "server_optimizer.momentum=0.8"],
    "trains-everything": [*EVERYTHING],
    "masks-random": [*LOSSES, "strategy.unit_selection=random"],
    "masks-client": [*CLIENTS],
    "masks-client-compensated": [*CLIENTS, "strategy.compensate=true", "pruner.damping=0.01"],  # the default then
    "masks-client-seldom": [*CLIENTS, "strategy.refresh_every=10"],
    "masks-client-update": [*CLIENTS, "strategy.criterion=update"],
    "masks-client-error-feedback": [*CLIENTS, "upload.error_feedback=true"],
    "allocator-uniform": [*LOSSES, "allocator=uniform"],
    "allocator-log_depth": [*LOSSES, "allocator=log_depth"],
    "pruner-magnitude": [*LOSSES, "pruner=magnitude"],
    "pruner-wanda": [*LOSSES, "pruner=wanda"],
    "pruner-taylor": [*LOSSES, "pruner=taylor"],
    "criterion-update": [*LOSSES, "strategy.criterion=update"],
    "refresh-2": [*LOSSES, "strategy.refresh_every=2"],
    "regrow-0": [*LOSSES, "strategy.regrow=0"],
    "regrow-0.5": [*LOSSES, "strategy.regrow=0.5"],
    "warmup-10": [*LOSSES, "strategy.warmup_rounds=10"],
    "ramp-20": [*LOSSES, "strategy.ramp_rounds=20"],
    "ramp-0.9-to-0.5": [*LOSSES, "strategy.ramp_from=0.9", "strategy.ramp_rounds=39"],
    "sparsity-0.25": [*LOSSES, "strategy.sparsity=0.25"],
    "sparsity-0.9": [*LOSSES, "strategy.sparsity=0.9"],
    "encoding-float32": [*LOSSES, "upload=float32"],
    "encoding-bfloat16": [*LOSSES, "upload=bfloat16"],
    "values-weights": [*LOSSES, "upload.values=weights"],
    "error-feedback": [*LOSSES, "upload.error_feedback=true"],
    "draws": [*EVERYTHING, "strategy.layer_preserving_rate=0.5", "strategy.sparsity=0"],
    "draws-skip-backward": [
        *[*EVERYTHING, "strategy.layer_preserving_rate=0.5", "strategy.sparsity=0", "local.skip_backward=true"],
    ],
}
MIXED_ABLATIONS = {
    **MIXED_BY_SCORES,
    "ours-int2-coded-4-momentum": [*OURS, *COARSE, *MOMENTUM],
    "ours-int4-regrow-1": [*OURS, FOUR, "strategy.regrow=1"],
    "ours-int4-regrow-0.5": [*OURS, FOUR, "strategy.regrow=0.5"],
    "ours-int4-held": [*OURS, FOUR, "aggregator.weighting=held"],
    "ours-int4-held-regrow-0.5": [*OURS, FOUR, "aggregator.weighting=held", "strategy.regrow=0.5"],
    "ours-int4-held-regrow-1": [*OURS, FOUR, "aggregator.weighting=held", "strategy.regrow=1"],
    "ours-uniform-int4-held-regrow-0.5": [
        *[*OURS, FOUR, "aggregator.weighting=held", "strategy.regrow=0.5", "allocator=uniform"],
    ],
    "batch-norm-average": [*NARROW, "aggregator.batch_norm=average"],
    "batch-norm-whole": [*NARROW, "aggregator.batch_norm=whole"],
    "regrow-0": [*NARROW, "strategy.regrow=0"],
    "regrow-1": [*NARROW, "strategy.regrow=1"],
    "sparsity-0": [*NARROW, "strategy.sparsity=0"],
    "sparsity-0.75": [*NARROW, "strategy.sparsity=0.75"],
    "weighting-examples": [*NARROW, "aggregator.weighting=examples"],
    "allocator-uniform": [*NARROW, "allocator=uniform"],
    "masks-client": [*CLIENTS],
    "width-multiple-8": [*NARROW, "strategy.width_multiple=8"],
}
TIERS = ["fleet=tiers", "fleet.fractions=[1.0,0.5,0.25,0.1]", "fleet.limited=[params]"]
BOTH = [*TIERS, "fleet.limited=[params,macs]"]
PLAIN = ["partition=dirichlet", "partition.alpha=0.3", "partition.min_examples=10"]
DIRICHLET = [*PLAIN, "local.logit_adjustment=1.0"]  # for every method
DEVICES = ["partition=devices", "local.logit_adjustment=1.0"]
RESNET18 = ["model=resnet18", "num_rounds=20", "dataset.max_test_examples=1000"]
GROUP_NORM = [*RESNET18, "model.norm=group", "aggregator.batch_norm=average"]


OURS_RESNET18 = ["random", "magnitude", "ours", "ours-int2-coded", "by-losses"]
WHOLE_RESNET18 = ["fedavg-int8", "fedavg-int2-coded", "homo-0.5-int8", "hetero-u", *OURS_RESNET18]
GROUP_RESNET18 = [*WHOLE_RESNET18, "ours-int2-coded-25-rounds"]
MIXED_RESNET18 = ["heterofl", "heterofl-int2-coded", "fjord", "fedrolex", "ours-uniform-int4", *OURS_RESNET18]


STATISTICS = ("auto", "static", "average", "whole")  # aggregator.batch_norm
SLICES = {  # nothing but the defaults of each method
    "plan": ["strategy=fedlp_plan", "fleet=tiers", "fleet.fractions=[1.0,0.5,0.25]"],
    "heterofl": ["strategy=heterofl", "strategy.widths=[1.0,0.5,0.25]"],
    "heterofl-nobody-whole": ["strategy=heterofl", "strategy.widths=[0.5,0.25]"],
}
OF_SLICES = {
    f"{name}-{kept}": [*method, f"aggregator.batch_norm={kept}"]
    for name, method in SLICES.items()
    for kept in STATISTICS
}
RESNET20 = [
    *("model=cifar_resnet", "model.name=resnet20", "num_clients=20", "clients_per_round=6", "num_rounds=12"),
    *("dataset.max_train_examples=8000", "dataset.max_test_examples=2000", "evaluation.tiers=true"),
    "checkpoint_every=1",
]


def _some(methods: dict[str, list[str]], names: list[str]) -> dict[str, list[str]]:
    return {name: methods[name] for name in names}


LONG = ["fedavg-int4", "ours-int4", "ours-int2-coded", "fedavg-topk", "fedavg-frozen-head-int4"]
ALL_WHOLE = {  # the same clients and data, but all can hold the model
    f"{name}-all-whole": [*FULL[name], "fleet.limited=[]"] for name in ("fedavg-int8", "ours-int4")
}
DEVICE_METHODS = _some(MIXED, ["heterofl", "fedrolex", "random", "ours-int4", "ours-uniform-int4"]) | {
    "heterofl-held": [*MIXED["heterofl"], "aggregator.weighting=held"],
    "ours-int4-regrow-1": [*OURS, FOUR, "strategy.regrow=1"],
    "ours-int4-held": [*OURS, FOUR, "aggregator.weighting=held"],
    "ours-int4-sparsity-0": [*OURS, FOUR, "strategy.sparsity=0"],
}


GROUPS = {
    "full-iid": (FULL, []),
    "long-iid": (_some(FULL, LONG), ["num_rounds=200"]),
    "mixed-iid": (MIXED, TIERS),
    "mixed-macs-iid": (
        _some(MIXED | MIXED_BY_SCORES, ["heterofl", "random", "ours-int4", "ours-uniform-int4", "by-losses"]),
        BOTH,
    ),
    "mixed-devices": (DEVICE_METHODS | ALL_WHOLE, [*TIERS, *DEVICES, "partition.mixrate=1"]),
    "mixed-devices-0.8": (DEVICE_METHODS | ALL_WHOLE, [*TIERS, *DEVICES, "partition.mixrate=0.8"]),
    "full-dirichlet": (FULL | BY_SCORES, DIRICHLET),
    "mixed-dirichlet": (MIXED | MIXED_BY_SCORES, [*TIERS, *DIRICHLET]),
    "full-dirichlet-plain": (FULL | BY_SCORES, PLAIN),
    "mixed-dirichlet-plain": (MIXED | MIXED_BY_SCORES, [*TIERS, *PLAIN]),
    "resnet18-batch": (_some(FULL | BY_SCORES, WHOLE_RESNET18), RESNET18),
    "resnet18-group": (_some(FULL | BY_SCORES, GROUP_RESNET18), GROUP_NORM),
    "resnet18-mixed-batch": (_some(MIXED | MIXED_BY_SCORES, MIXED_RESNET18), [*TIERS, *RESNET18]),
    "resnet18-mixed-group": (_some(MIXED | MIXED_BY_SCORES, MIXED_RESNET18), [*TIERS, *GROUP_NORM]),
    "resnet18-dirichlet": (_some(FULL | BY_SCORES, WHOLE_RESNET18), [*RESNET18, *DIRICHLET]),
    "resnet18-mixed-dirichlet": (_some(MIXED | MIXED_BY_SCORES, MIXED_RESNET18), [*TIERS, *RESNET18, *DIRICHLET]),
    "batch-norm": (OF_SLICES, RESNET20),
    "ablation-full": (ABLATIONS, []),
    "ablation-mixed": (MIXED_ABLATIONS, [*TIERS]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--methods", nargs="+", help="all of a group where absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--part", default="0/1", help="which of how many processes this is")
    parser.add_argument("--collect", action="store_true", help="run nothing, only pack")
    arguments = parser.parse_args()
    part, parts = (int(number) for number in arguments.part.split("/"))
    wanted = [
        (group, method, seed)
        for seed in arguments.seeds
        for group in arguments.groups
        for method in GROUPS[group][0]
        if not arguments.methods or method in arguments.methods
    ]
    for group, method, seed in () if arguments.collect else wanted[part::parts]:
        methods, common = GROUPS[group]
        overrides = ["experiment=per_byte", f"dataset.root={arguments.data}", f"seed={seed}", *common, *methods[method]]
        code = run(arguments.out / f"{group}/{method}/seed-{seed}", [*overrides, f"label={method}"])
        if code:
            return code
    if arguments.collect or parts == 1:
        collect(arguments.out, HERE / "results")
        regenerate(HERE / "results", HERE / "results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
