"""Cost of a client's training step by width: ``python experiments/bench/step_time.py [--quick] [--json FILE]``.

A client of half the width trains a smaller dense model, not a masked one, so its step costs a fraction of the whole
model's. CIFAR-10 shapes, batches of 32, plain SGD, one thread, memory kept as fedlp's workers keep it; every step is
one of ``train_locally``. Takes four to six minutes.

* ``widths``: every axis cut to a share of its units. Each width runs in turn with the whole model, call by call; ratios
  are of neighbours. ``peak_memory_bytes`` is by how much the resident memory of a fresh process grows from before the
  sub-model is made (data and the whole model are there, and a step of the smallest one has been run) to its peak in
  three steps, with glibc's own settings: weights, gradients, activations and the kernels' workspaces. Beside it stands
  ``estimated_memory_bytes``, what fedlp holds against a client's budget.
* ``multiples``: the same width with one unit less in every axis, so that no axis has a multiple of 8 units any more,
  against the width itself. Above 1, the smaller model is the slower one.
* ``frozen``: the first half of the CNN's layers frozen, so that the backward pass ends there, against none.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timing import alternate, paired_ratio, parse_args, print_table, write_report
from workload import LR, MEAN, NUM_CLASSES, STD, Workload, make_images

from fedlp.config import compose
from fedlp.data.datasets import DataInfo, Examples
from fedlp.federation.budgets import submodel_costs
from fedlp.federation.costs import Costs
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model, leading_layers
from fedlp.pruning.tracing.widths import cut_model
from fedlp.rng import Stream, generator
from fedlp.simulation.worker import settle_process
from fedlp.training.loop import train_locally
from fedlp.types import Keep, SubModel

INPUT_SHAPE = (3, 32, 32)
BATCH_SIZE = 32
STEPS = {"resnet18": 1, "fedlp_cnn": 5}  # that are timed together
WIDTHS = (0.75, 0.5, 0.25, 0.1)  # and the whole
MULTIPLES = (0.5, 0.25)  # of which every axis has a multiple of 8 units
CLAIM = {"model": "resnet18", "width": 0.5, "highest_ratio": 0.33}


class Subject:
    """A model of fedlp's and one client's data."""

    def __init__(self, name: str) -> None:
        self.name = name
        config = compose([f"model={name}", "local=sgd", f"local.batch_size={BATCH_SIZE}", f"local.lr={LR}"])
        self.local = config.local
        count = STEPS[name] * BATCH_SIZE
        self.examples = Examples(*make_images(Workload(name, INPUT_SHAPE, count, BATCH_SIZE), 1), None)
        self.info = DataInfo("synthetic", "classification", INPUT_SHAPE, NUM_CLASSES, count, 1, (MEAN,) * 3, (STD,) * 3)
        self.spec = describe_model(config.model, INPUT_SHAPE, NUM_CLASSES, self.info.task)
        self.submodels = SubModels(self.spec)
        self.model = self.spec.build(config.seed)

    def units(self, width: float, less: int = 0) -> dict[str, int]:
        """Return the units of each axis at a width, or so many less."""
        return {axis: max(1, round(width * size) - less) for axis, size in self.submodels.widths.axes.items()}

    def keeps(self, units: Mapping[str, int]) -> dict[str, Keep]:
        """Return the first so many units of each axis."""
        return {axis: Keep.first(units[axis], size) for axis, size in self.submodels.widths.axes.items()}

    def trainer(self, units: Mapping[str, int], frozen: tuple[str, ...] = ()) -> Callable[[], object]:
        """Return what trains a sub-model of its own for the number of steps that are timed together."""
        model = cut_model(self.model, self.submodels.widths, self.keeps(units))
        return lambda: train_locally(
            model, self.examples, self.info, self.local, generator(0, Stream.LOCAL_TRAINING), frozen=frozen
        )

    def time_pair(
        self, first: Callable[[], object], second: Callable[[], object], repeats: int
    ) -> tuple[list[float], list[float]]:
        """Return the seconds of a step of each, measured in turn."""
        times = alternate({"first": first, "second": second}, repeats)
        per_step = {name: [value / STEPS[self.name] for value in values] for name, values in times.items()}
        return per_step["first"], per_step["second"]


def measure_widths(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each width; that of the whole model has its steps from all pairs."""
    whole = subject.trainer(subject.units(1.0))
    pairs = {width: subject.time_pair(whole, subject.trainer(subject.units(width)), repeats) for width in WIDTHS}
    steps = [seconds for dense, _ in pairs.values() for seconds in dense]
    costs = Costs(subject.submodels)
    return [width_row(subject, costs, width, *pair) for width, pair in {1.0: (steps, steps), **pairs}.items()]


def width_row(subject: Subject, costs: Costs, width: float, dense: list[float], cut: list[float]) -> dict[str, Any]:
    """Return what a width costs: seconds measured beside the whole model's, numbers, MACs and memory."""
    units = subject.units(width)
    cost = submodel_costs(SubModel(widths=subject.keeps(units)), subject.submodels, costs, subject.local)
    return {
        "model": subject.name,
        "width": width,
        "units": units,
        "step_s": statistics.median(cut),
        "ratio": paired_ratio(cut, dense),
        "params": cost["params"],
        "macs": cost["macs"],
        "estimated_memory_bytes": cost["memory_bytes"],
        "peak_memory_bytes": peak_memory(subject.name, width),
        "seconds": {"dense": dense, "cut": cut},
    }


def measure_multiples(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each width at which all axes have a multiple of 8 units: one unit less against it."""
    rows = []
    for width in MULTIPLES:
        units, fewer = subject.units(width), subject.units(width, less=1)
        odd, even = subject.time_pair(subject.trainer(fewer), subject.trainer(units), repeats)
        rows.append(
            {
                "model": subject.name,
                "width": width,
                "is_multiple_of_8": all(count % 8 == 0 for count in units.values()),
                "step_s": statistics.median(even),
                "fewer_step_s": statistics.median(odd),
                "ratio": paired_ratio(odd, even),
                "macs_ratio": count_macs_of(subject, fewer) / count_macs_of(subject, units),
                "seconds": {"units": even, "one_fewer": odd},
            }
        )
    return rows


def count_macs_of(subject: Subject, units: Mapping[str, int]) -> float:
    return Costs(subject.submodels).macs(SubModel(widths=subject.keeps(units))).forward


def measure_frozen(subject: Subject, repeats: int) -> dict[str, Any]:
    """Return the step with the first half of the layers frozen against none."""
    layers = subject.spec.layers
    frozen = leading_layers(subject.spec, layers[len(layers) // 2].tensors)
    units = subject.units(1.0)
    half, none = subject.time_pair(subject.trainer(units, frozen), subject.trainer(units), repeats)
    return {
        "model": subject.name,
        "frozen_layers": len(layers) // 2,
        "layers": len(layers),
        "step_s": statistics.median(none),
        "frozen_step_s": statistics.median(half),
        "ratio": paired_ratio(half, none),
        "seconds": {"none": none, "frozen": half},
    }


def peak_memory(name: str, width: float) -> int:
    """Return by how much a fresh process grows as it makes and trains a sub-model."""
    code = f"import step_time; print(step_time.grow({name!r}, {width}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return int(done.stdout)


def grow(name: str, width: float) -> int:
    """Return the growth of this process up to its peak, in bytes, over three steps of a sub-model."""
    torch.set_num_threads(1)
    STEPS[name] = 3
    subject = Subject(name)
    subject.trainer(subject.units(0.0))()
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    subject.trainer(subject.units(width))()
    return (_status("VmHWM") - before) * 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def print_results(results: Mapping[str, Any]) -> None:
    """Print one table for each part."""
    print_table(
        "a training step by width",
        ("", "width", "ms", "over dense", "q1", "q3", "params", "MMACs", "peak MB", "estimated MB"),
        [
            (
                *(row["model"], row["width"], f"{1e3 * row['step_s']:.1f}"),
                *(f"{row['ratio'][q]:.3f}" for q in ("median", "q1", "q3")),
                *(f"{row['params']:,.0f}", f"{row['macs'] / 1e6:.1f}"),
                *(f"{row[key] / 1e6:.1f}" for key in ("peak_memory_bytes", "estimated_memory_bytes")),
            )
            for row in results["widths"]
        ],
    )
    print_table(
        "one unit less in every axis",
        ("", "width", "ms", "one less, ms", "over it", "q1", "q3", "MACs over it"),
        [
            (
                *(row["model"], row["width"], f"{1e3 * row['step_s']:.1f}", f"{1e3 * row['fewer_step_s']:.1f}"),
                *(f"{row['ratio'][q]:.3f}" for q in ("median", "q1", "q3")),
                f"{row['macs_ratio']:.3f}",
            )
            for row in results["multiples"]
        ],
    )
    frozen = results["frozen"]
    print(
        f"\n{frozen['model']} with {frozen['frozen_layers']} of {frozen['layers']} layers frozen: "
        f"{frozen['ratio']['median']:.3f} of {1e3 * frozen['step_s']:.1f} ms"
    )


def main() -> None:
    args = parse_args(__doc__.splitlines()[0])
    settle_process()
    repeats = 2 if args.quick else 7
    results: dict[str, Any] = {"widths": [], "multiples": []}
    for name in STEPS:
        subject = Subject(name)
        results["widths"] += measure_widths(subject, repeats)
        results["multiples"] += measure_multiples(subject, 3 * repeats)
    results["frozen"] = measure_frozen(subject, 2 * repeats)
    row = next(row for row in results["widths"] if (row["model"], row["width"]) == (CLAIM["model"], CLAIM["width"]))
    results["claim"] = {**CLAIM, "ratio": row["ratio"], "holds": row["ratio"]["median"] <= CLAIM["highest_ratio"]}
    print_results(results)
    write_report(args.json, args.quick, results)


if __name__ == "__main__":
    main()
