"""Speed of batched cohorts: ``python experiments/bench/cohorts.py [--quick] [--json FILE]``.

Rounds of many small clients (one epoch of SGD, batches of 10): fedlp on its local engine with two workers, clients one
by one and batched, against a bare loop over clients in one process (model copy, steps, weighted average). After each
round of fedlp comes one of the bare loop; ratios are of such pairs. The ratio of processor seconds, of all processes
and over all rounds, is given beside them: it does not depend on how many cores are free.

Before that, training alone in one process, of networks of several sizes: processor seconds of a client in a stack over
those of a client by itself. ``fedlp.training.stacked_rule`` is made of them.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from bare import BareLoop
from simulation import WORKERS, compare
from timing import clock, paired_ratio, parse_args, print_table, processor_seconds, write_report
from workload import LR, MEAN, NUM_CLASSES, STD, WORKLOADS, Workload, make_images, run_fedlp

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.federation.client.runtime import load_tensors
from fedlp.models import state_tensors
from fedlp.models.cnn import MLP
from fedlp.training.loop import train_locally
from fedlp.training.stacked import train_stacked
from fedlp.training.stacked_chain import find_chain
from fedlp.training.stacked_cohort import Trainee, Way
from fedlp.training.stacked_rule import stack_size

CASES = {
    "linear_1000": ("linear", 1000),
    "mlp_1000": ("mlp", 1000),
    "digits_100": ("digits", 100),
    "linear_10": ("linear", 10),
}


NETWORKS = {  # inputs (height and width), hidden layers, batch size; each client takes two steps
    "784-10, batches of 10": (28, (), 10),
    "784-10, batches of 32": (28, (), 32),
    "64-500-10, batches of 10": (8, (500,), 10),
    "64-500-10, batches of 32": (8, (500,), 32),
    "64-512-128-128-64-32-10, batches of 10": (8, (512, 128, 128, 64, 32), 10),
    "784-200-10, batches of 10": (28, (200,), 10),
    "784-500-10, batches of 10": (28, (500,), 10),
}
ALONE = 8  # clients that are timed one by one


def training_ratio(side: int, hidden: tuple[int, ...], batch_size: int, repeats: int) -> dict[str, Any]:
    """Return the processor seconds of a client's training in a stack over those by itself."""
    work = Workload("", (1, side, side), 2 * batch_size, batch_size)
    info = DataInfo("synthetic", "classification", work.input_shape, NUM_CLASSES, None, None, (MEAN,), (STD,))
    config = LocalConfig(optimizer="sgd", lr=LR, batch_size=batch_size)
    model = MLP(side * side, hidden, NUM_CLASSES, personal=False)
    state = state_tensors(model)
    values = {name: tensor.clone() for name, tensor in state.items()}
    way = Way(pads=True, chain=find_chain(model))
    num_params = sum(tensor.numel() for tensor in values.values())
    clients = stack_size(4 * num_params, 1000)
    images, targets = make_images(work, max(clients, ALONE))
    parts = zip(images.split(work.examples), targets.split(work.examples), strict=True)
    examples = [Examples(*part, None) for part in parts]

    def one_by_one() -> None:
        for i in range(ALONE):
            load_tensors(state, values)
            train_locally(model, examples[i], info, config, np.random.default_rng(i))

    def together() -> None:
        stack = [Trainee(values, examples[i], np.random.default_rng(i)) for i in range(clients)]
        train_stacked(model, stack, info, config, way=way)

    times: dict[str, list[float]] = {"alone": [], "together": []}
    for number in range(-1, repeats):
        for name, action, count in (("alone", one_by_one, ALONE), ("together", together, clients)):
            started = time.process_time()
            action()
            if number >= 0:
                times[name].append((time.process_time() - started) / count)
    return {
        "params": num_params,
        "clients": clients,
        "seconds_per_client": times,
        "ratio": paired_ratio(times["together"], times["alone"]),
    }


def training_table(repeats: int) -> dict[str, Any]:
    """Measure and print all networks."""
    found = {name: training_ratio(*case, repeats) for name, case in NETWORKS.items()}
    rows = [
        (name, one["params"], one["clients"], *(f"{one['ratio'][q]:.2f}" for q in ("median", "q1", "q3")))
        for name, one in found.items()
    ]
    print_table("training in a stack over alone", ("", "params", "clients", "ratio", "q1", "q3"), rows)
    return found


def paired_rounds(name: str, num_clients: int, num_rounds: int, batched: bool) -> dict[str, Any]:
    """Return the seconds of rounds of fedlp and of the bare loop, side by side, and the ratio of processor seconds."""
    bare = BareLoop(WORKLOADS[name], num_clients)
    wall: dict[str, list[float]] = {"fedlp": [], "bare loop": []}
    processor: dict[str, list[float]] = {"fedlp": [], "bare loop": []}
    last = [0.0]

    def observe(seconds: float) -> None:
        used = processor_seconds(os.getpid())
        wall["fedlp"].append(seconds)
        processor["fedlp"].append(used - last[0])
        started = time.process_time()
        wall["bare loop"].append(clock(bare.run_round))
        processor["bare loop"].append(time.process_time() - started)
        last[0] = processor_seconds(os.getpid())

    run_fedlp(WORKLOADS[name], num_clients, num_clients, num_rounds + 2, WORKERS, observe, batched)
    counted = {key: values[1:-1] for key, values in wall.items()}
    spent = {key: sum(values[1:-1]) for key, values in processor.items()}
    return {"wall": counted, "processor_ratio": spent["fedlp"] / spent["bare loop"]}


def main() -> None:
    args = parse_args(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    results: dict[str, Any] = {"training": training_table(3 if args.quick else 5)}
    for case, (name, num_clients) in CASES.items():
        for batched in (False, True):
            how = "batched" if batched else "one by one"
            found = paired_rounds(name, num_clients, 3 if args.quick else 5, batched)
            report = compare(f"{case}, {how}", found["wall"], "ms")
            ratio = 1 / report["ratio_over_fedlp"]["bare loop"]["median"]
            spent = found["processor_ratio"]
            print(f"fedlp / bare loop: {ratio:.2f} of its time, {spent:.2f} of its processor seconds")
            results[f"{case}, {how}"] = report | {"processor_ratio": spent}
    write_report(args.json, args.quick, results)


if __name__ == "__main__":
    main()
