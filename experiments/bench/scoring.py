"""What it costs a client to score its units: ``python experiments/bench/scoring.py [--quick] [--json FILE]``.

CIFAR-10 shapes, one thread. In turn, call by call: OBS scores of every unit of a model from 32 images, fine and coarse
(``strategy.scores``), as ``strategy=fedlp_plan`` asks for every ten rounds, and a client's local epoch: 200 images in
batches of 16. Beside the ratio of times stands that of multiply-accumulates.

What is saved must not cost the choice of units. Networks that were trained on the embedded digits are scored by 32
images so, and exactly (greedy order, all outputs, up to 2,048 input vectors a layer). The output error of
the units that each keeps, refitted, is measured on 256 other images; beside it that of exact choices by 32 other
images, and of random units. Numbers are means over layers and three samples, relative to the exact choice by the same
images.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timing import alternate, paired_ratio, parse_args, print_table, write_report
from torch import Tensor
from workload import LR, MEAN, NUM_CLASSES, STD, Workload, make_images

from fedlp.apps.federate import Federation
from fedlp.config import compose
from fedlp.data.datasets import DataInfo, Examples
from fedlp.federation.client.unit_choice import score_units
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model
from fedlp.models.cost import Macs, count_macs
from fedlp.pruning.kernels.obs import Problem
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.scores.criterion import FunctionScore
from fedlp.pruning.scores.evidence import COARSE, FINE, Precision
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.view import LayerView
from fedlp.rng import Stream, generator
from fedlp.training.calibration_data import batch_calibration, make_method
from fedlp.training.loop import train_locally

INPUT_SHAPE, IMAGES, BATCH_SIZE = (3, 32, 32), 200, 16
EXACT, PRECISIONS = Precision(vectors=2048), {"fine": FINE, "coarse": COARSE}
JUDGES, JUDGED = ("fedlp_cnn", "resnet18", "fedlp_mlp"), 256  # models, and images of the judge


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Return the rows of a model."""
    config = compose([f"model={name}", "local=sgd", f"local.batch_size={BATCH_SIZE}", f"local.lr={LR}"])
    examples = Examples(*make_images(Workload(name, INPUT_SHAPE, IMAGES, BATCH_SIZE), 1), None)
    info = DataInfo("synthetic", "classification", INPUT_SHAPE, NUM_CLASSES, IMAGES, 1, (MEAN,) * 3, (STD,) * 3)
    spec = describe_model(config.model, INPUT_SHAPE, NUM_CLASSES, info.task)
    submodels, model = SubModels(spec), spec.build(config.seed)
    macs = count_macs(model, spec.example_inputs(1))
    wanted, device = config.calibration, torch.device("cpu")
    data = batch_calibration(examples.select(list(range(wanted.examples))), info, wanted.batch_size, 0, device)
    method, spent = make_method(config.pruner), dict[str, float]()

    def score(how: str) -> None:
        model.eval()
        asked = submodels.widths, submodels.layers, data, method, macs, PRECISIONS[how]
        spent[how] = score_units(model, model, *asked)[1]

    def train() -> None:
        train_locally(model.train(), examples, info, config.local, generator(0, Stream.LOCAL_TRAINING))

    times = alternate({**{how: partial(score, how) for how in PRECISIONS}, "epoch": train}, repeats)
    return [
        {
            "model": f"{name}, {how}",
            "time_ratio": paired_ratio(times[how], times["epoch"]),
            "macs_ratio": spent[how] / (IMAGES * macs.training),
            "scoring_macs": spent[how],
            "seconds": {"scoring": times[how], "epoch": times["epoch"]},
        }
        for how in PRECISIONS
    ]


# ---- the choice of units
class Judge:
    """Judge of choices of units in a model trained on digits, by their output error on 256 images."""

    def __init__(self, name: str) -> None:
        config = compose([f"model={name}", "dataset=digits", "local=sgd", "local.epochs=3", f"local.lr={LR}"])
        federation = Federation(config)
        self.data, self.submodels = federation.data, federation.submodels
        self.model, self.method = self.submodels.spec.build(config.seed), make_method(config.pruner)
        rng = generator(0, Stream.LOCAL_TRAINING)
        train_locally(self.model.train(), self.data.train, self.data.info, config.local, rng)
        self.problems: dict[str, list[Problem]] = {}

        def keep(view: LayerView) -> Tensor:
            self.problems[view.layer.name] = [reader.problem() for reader in view.readers]
            return torch.zeros(view.num_units)

        judge = replace(self.method, score=FunctionScore(keep, OBS.needs, "judge"))
        self._score(range(JUDGED), judge, EXACT, 0)

    def scores(self, sample: int, precision: Precision) -> dict[str, Tensor]:
        """Return the scores of each layer's units by one sample of 32 images."""
        start = JUDGED + 32 * sample
        return self._score(range(start, start + 32), self.method, precision, sample)

    def _score(self, images: range, method: Method, precision: Precision, seed: int) -> dict[str, Tensor]:
        chosen, device = self.data.train.select(list(images)), torch.device("cpu")
        data = batch_calibration(chosen, self.data.info, len(images), seed, device)
        layers, widths = self.submodels.layers, self.submodels.widths
        return score_units(self.model, self.model, widths, layers, data, method, Macs(0.0, 0.0), precision)[0]

    def errors(self, scores: dict[str, Tensor], share: float) -> list[float]:
        """Return the output error of each layer with its best units alone, refitted."""
        return [sum(_error(x, share, problem) for problem in self.problems[name]) for name, x in scores.items()]


def _error(scores: Tensor, share: float, problem: Problem) -> float:
    """Return the loss of a reader without the units of low scores: half the trace of W (H⁻¹)⁻¹ Wᵀ of their columns."""
    gone = torch.sort(scores, stable=True).indices[: len(scores) - max(1, round(share * len(scores)))]
    columns = (gone[:, None] * problem.unit_size + torch.arange(problem.unit_size)).flatten()
    inverse = problem.hessian_inv
    rows = inverse[columns] if isinstance(inverse, Tensor) else inverse.rows(columns)
    weight = problem.weight[:, columns].to(torch.float64)
    factor = torch.linalg.cholesky(rows[:, columns].to(torch.float64))
    return 0.5 * float((torch.cholesky_solve(weight.T, factor) * weight.T).sum())


def judge(name: str, samples: int) -> list[dict[str, Any]]:
    """Return the output errors of choices over those of exact ones by the same images, for three shares of units."""
    one = Judge(name)
    exact = [one.scores(sample, EXACT) for sample in range(samples + 1)]
    rng = torch.Generator().manual_seed(0)
    choices = {
        **{how: [one.scores(sample, p) for sample in range(samples)] for how, p in PRECISIONS.items()},
        "exact, other images": exact[1:],
        "random": [{key: torch.rand(len(x), generator=rng) for key, x in found.items()} for found in exact[1:]],
    }
    found = []
    for share in (0.25, 0.5, 0.75):
        own = [one.errors(scores, share) for scores in exact[:samples]]
        ratios = {
            how: statistics.mean(
                a / b
                for scores, base in zip(chosen, own, strict=True)
                for a, b in zip(one.errors(scores, share), base, strict=True)
            )
            for how, chosen in choices.items()
        }
        found.append({"model": name, "kept": share, **ratios})
    return found


def main() -> int:
    args = parse_args(__doc__.partition("\n")[0])
    torch.set_num_threads(1)
    rows = [row for name in ("fedlp_cnn", "resnet18") for row in measure(name, 1 if args.quick else 3)]
    print_table(
        "scoring, beside a local epoch",
        ("model", "s", "epoch, s", "ratio", "of MACs"),
        [
            (
                row["model"],
                *(f"{statistics.median(row['seconds'][key]):.2f}" for key in ("scoring", "epoch")),
                f"{row['time_ratio']['median']:.2f}",
                f"{row['macs_ratio']:.2f}",
            )
            for row in rows
        ],
    )
    choices = [row for name in JUDGES[: 1 if args.quick else None] for row in judge(name, 1 if args.quick else 3)]
    keys = *PRECISIONS, "exact, other images", "random"
    shown = [(row["model"], f"{row['kept']:.0%}", *(f"{row[key]:.3f}" for key in keys)) for row in choices]
    print_table("output error of the units kept, over that of an exact choice", ("model", "kept", *keys), shown)
    write_report(args.json, args.quick, {"rows": rows, "choices": choices})
    return 0


if __name__ == "__main__":
    sys.exit(main())
