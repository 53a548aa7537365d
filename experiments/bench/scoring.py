"""What it costs a client to score its units, and what it chooses: ``python experiments/bench/scoring.py [--quick]``.

Time: CIFAR-10 shapes, one thread. In turn, call by call: OBS scores of every unit of a model from 32 images, as
``strategy=fedlp_plan`` asks for every ten rounds, and a client's local epoch: 200 images in batches of 16. Beside the
ratio of times stands that of multiply-accumulates.

Choice, with ``--data ROOT`` (a folder with CIFAR-10): a model trained for an epoch on 4,500 images, and clients with 32
other ones. Their scores are compared with the exact ones: all positions of the same images, one unit removed at a time.
``own`` is the mean over clients, layers, and the fractions 1/4, 1/2 and 3/4 of |A ∩ B| / |A ∪ B|, for the units A and B
that both keep; ``pooled`` that of the mean scores of all clients. ``as before`` are sample, steps and damping until
November 2026, in today's kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import alternate, paired_ratio, print_table, write_report
from torch import Tensor
from workload import LR, MEAN, NUM_CLASSES, STD, Workload, make_images

from fedlp.config import RunConfig, compose
from fedlp.data.datasets import DataInfo, Examples, load_dataset
from fedlp.federation.client.unit_choice import best_units, score_units
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model
from fedlp.models.cost import count_macs
from fedlp.pruning.kernels.sampled_rows import DAMPING
from fedlp.pruning.sampled_inputs import SAMPLE, SampleSize
from fedlp.pruning.scores.evidence import COARSE, EXACT, Precision
from fedlp.rng import Stream, generator
from fedlp.training.calibration_data import batch_calibration, make_method
from fedlp.training.loop import train_locally

INPUT_SHAPE, IMAGES, BATCH_SIZE = (3, 32, 32), 200, 16
NOW = "now"
EVERYTHING = SampleSize(per_column=10**6, most_columns=10**6)
BEFORE = "as before"
HOWS: dict[str, tuple[Precision, SampleSize]] = {
    BEFORE: (Precision(parts=32, block=256), SampleSize(per_column=1, most_columns=512, few=512)),
    NOW: (COARSE, SAMPLE),
    "128 rows, 16 steps": (Precision(parts=8, most_steps=16, rank_tolerance=1e-2), SampleSize(1, 128, 128)),
}
CHOSEN = ("fedlp_mlp", "fedlp_cnn", "resnet20")  # models whose choice of units is compared
TRAINED, CLIENTS = 4_500, 8
FRACTIONS = (0.25, 0.5, 0.75)


class Case:
    """A model, and how a client scores and trains it."""

    def __init__(self, name: str, info: DataInfo) -> None:
        choice = ["model=cifar_resnet"] if name == "resnet20" else [f"model={name}"]
        config = compose([*choice, "local=sgd", f"local.batch_size={BATCH_SIZE}", f"local.lr={LR}"])
        assert isinstance(config, RunConfig)
        self.config, self.info = config, info
        self.spec = describe_model(config.model, INPUT_SHAPE, NUM_CLASSES, info.task)
        self.submodels, self.model = SubModels(self.spec), self.spec.build(config.seed)
        self.macs = count_macs(self.model, self.spec.example_inputs(1))
        self.method = make_method(config.pruner)

    def train(self, examples: Examples) -> None:
        """Train for an epoch."""
        rng = generator(0, Stream.LOCAL_TRAINING)
        train_locally(self.model.train(), examples, self.info, self.config.local, rng)

    def score(
        self, examples: Examples, precision: Precision, size: SampleSize, damping: float | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """Return the scores from some examples, and their multiply-accumulates."""
        method = replace(self.method, damping=damping)
        wanted, device, model = self.config.calibration, torch.device("cpu"), self.model.eval()
        data = batch_calibration(examples, self.info, wanted.batch_size, 0, device)
        widths, layers = self.submodels.widths, self.submodels.layers
        return score_units(model, model, widths, layers, data, method, self.macs, precision, size)


def measure_time(name: str, repeats: int) -> dict[str, Any]:
    """Return one row of the report."""
    examples = Examples(*make_images(Workload(name, INPUT_SHAPE, IMAGES, BATCH_SIZE), 1), None)
    info = DataInfo("synthetic", "classification", INPUT_SHAPE, NUM_CLASSES, IMAGES, 1, (MEAN,) * 3, (STD,) * 3)
    case = Case(name, info)
    few, spent = examples.select(list(range(case.config.calibration.examples))), dict[str, float]()

    def score(way: str) -> None:
        spent[way] = case.score(few, *HOWS[way])[1]

    ways = [way for way in HOWS if way != BEFORE]  # whose kernels were other ones
    actions = {way: partial(score, way) for way in ways} | {"epoch": lambda: case.train(examples)}
    times = alternate(actions, repeats)
    return {
        "model": name,
        "time_ratio": paired_ratio(times[NOW], times["epoch"]),
        "macs_ratio": spent[NOW] / (IMAGES * case.macs.training),
        "scoring_macs": spent[NOW],
        "other_ways": {way: paired_ratio(times[way], times["epoch"]) for way in ways if way != NOW},
        "seconds": times,
    }


def measure_choice(name: str, root: Path, clients: int) -> list[dict[str, Any]]:
    """Return one row per way to score: how far its choice of units is the exact one."""
    config = compose(["dataset=cifar10", f"dataset.root={root}"])
    assert isinstance(config, RunConfig)
    data = load_dataset(config.dataset, config.seed)
    case, few = Case(name, data.info), config.calibration.examples
    case.train(data.train.select(list(range(TRAINED))))
    shards = [
        data.train.select(list(range(first, first + few))) for first in range(TRAINED, TRAINED + clients * few, few)
    ]
    exact = [case.score(shard, EXACT, EVERYTHING)[0] for shard in shards]
    rows = []
    for label, how in HOWS.items():
        found = [case.score(shard, *how, damping=DAMPING if label == BEFORE else None)[0] for shard in shards]
        own = [overlap(*pair) for pair in zip(found, exact, strict=True)]
        rows.append({"model": name, "way": label, "own": own, "pooled": overlap(pool(found), pool(exact))})
    half = clients // 2
    rows.append(
        {
            "model": name,
            "way": "exact, other clients",
            "own": [overlap(exact[i], exact[(i + 1) % clients]) for i in range(clients)],
            "pooled": overlap(pool(exact[:half]), pool(exact[half:])),
        }
    )
    return rows


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the mean overlap of the units that two sets of scores keep, in [0, 1]."""
    found = []
    for name, scores in first.items():
        for fraction in FRACTIONS:
            count = max(1, round(fraction * len(scores)))
            a, b = (set(best_units(one, count).indices().tolist()) for one in (scores, second[name]))
            found.append(len(a & b) / len(a | b))
    return statistics.mean(found)


def pool(clients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of clients' scores, each layer's divided by their sum."""
    return {name: sum(one[name] / one[name].sum() for one in clients) / len(clients) for name in clients[0]}  # type: ignore[misc]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions of small cases: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number there")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder with CIFAR-10, for the choice of units")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = CHOSEN[:2] if args.quick else (*CHOSEN, "resnet18")
    rows = [measure_time(name, 1 if args.quick else 5) for name in names]
    print_table(
        "scoring, beside a local epoch",
        ("model, way", "s", "epoch, s", "ratio"),
        [
            (
                f"{row['model']}, {way}",
                *(f"{statistics.median(row['seconds'][key]):.3f}" for key in (way, "epoch")),
                f"{ratio['median']:.2f}",
            )
            for row in rows
            for way, ratio in {NOW: row["time_ratio"], **row["other_ways"]}.items()
        ],
    )
    measure = partial(measure_choice, root=args.data, clients=2 if args.quick else CLIENTS)
    choices = [row for name in CHOSEN for row in measure(name)] if args.data else []
    print_table(
        "overlap with the exact choice",
        ("model, way", "own", "pooled"),
        [
            (f"{row['model']}, {row['way']}", f"{statistics.mean(row['own']):.2f}", f"{row['pooled']:.2f}")
            for row in choices
        ],
    )
    write_report(args.json, args.quick, {"rows": rows, "choice": choices})
    return 0


if __name__ == "__main__":
    sys.exit(main())
