"""What it costs a client to score its units: ``python experiments/bench/scoring.py [--quick] [--json FILE]``.

CIFAR-10 shapes, one thread. In turn, call by call: OBS scores of every unit of a model from 32 images, as
``strategy=fedlp_plan`` asks for every ten rounds, and a client's local epoch: 200 images in batches of 16. Beside the
ratio of times stands that of multiply-accumulates.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from timing import alternate, paired_ratio, parse_args, print_table, write_report
from workload import LR, MEAN, NUM_CLASSES, STD, Workload, make_images

from fedlp.config import compose
from fedlp.data.datasets import DataInfo, Examples
from fedlp.federation.client.unit_choice import score_units
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model
from fedlp.models.cost import count_macs
from fedlp.rng import Stream, generator
from fedlp.training.calibration_data import batch_calibration, make_method
from fedlp.training.loop import train_locally

INPUT_SHAPE, IMAGES, BATCH_SIZE = (3, 32, 32), 200, 16


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Return one row of the report."""
    config = compose([f"model={name}", "local=sgd", f"local.batch_size={BATCH_SIZE}", f"local.lr={LR}"])
    examples = Examples(*make_images(Workload(name, INPUT_SHAPE, IMAGES, BATCH_SIZE), 1), None)
    info = DataInfo("synthetic", "classification", INPUT_SHAPE, NUM_CLASSES, IMAGES, 1, (MEAN,) * 3, (STD,) * 3)
    spec = describe_model(config.model, INPUT_SHAPE, NUM_CLASSES, info.task)
    submodels, model = SubModels(spec), spec.build(config.seed)
    macs = count_macs(model, spec.example_inputs(1))
    wanted, device = config.calibration, torch.device("cpu")
    data = batch_calibration(examples.select(list(range(wanted.examples))), info, wanted.batch_size, 0, device)
    method, spent = make_method(config.pruner), []

    def score() -> None:
        model.eval()
        spent.append(score_units(model, model, submodels.widths, submodels.layers, data, method, macs)[1])

    def train() -> None:
        train_locally(model.train(), examples, info, config.local, generator(0, Stream.LOCAL_TRAINING))

    times = alternate({"scoring": score, "epoch": train}, repeats)
    return {
        "model": name,
        "time_ratio": paired_ratio(times["scoring"], times["epoch"]),
        "macs_ratio": spent[0] / (IMAGES * macs.training),
        "scoring_macs": spent[0],
        "seconds": times,
    }


def main() -> int:
    args = parse_args(__doc__.partition("\n")[0])
    torch.set_num_threads(1)
    rows = [measure(name, 1 if args.quick else 3) for name in ("fedlp_cnn", "resnet18")]
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
    write_report(args.json, args.quick, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
