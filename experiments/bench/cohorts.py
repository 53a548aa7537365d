"""Speed of batched cohorts: ``python experiments/bench/cohorts.py [--quick] [--json FILE]``.

Rounds of many small clients (one epoch of SGD, batches of 10): fedlp on its local engine with two workers, clients one
by one and batched, against a bare loop over clients in one process (model copy, steps, weighted average). After each
round of fedlp comes one of the bare loop; ratios are of such pairs. The ratio of processor seconds, of all processes
and over all rounds, is given beside them: it does not depend on how many cores are free.

Before that, training alone in one process, of networks of several sizes: processor seconds of a client in a stack over
those of a client by itself. ``fedlp.training.stacked_rule`` is made of them.

With ``--adapters FOLDER`` (``FOLDER/models/NAME`` of transformers, ``FOLDER/text/tinystories.txt``) the same for LoRA
adapters on one frozen base, and whole runs of theirs, one by one and batched in turn: rounds of 32 clients on two
workers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare import BareLoop
from simulation import WORKERS, compare
from timing import clock, paired_ratio, print_table, processor_seconds, write_report
from workload import LR, MEAN, NUM_CLASSES, STD, WORKLOADS, Workload, make_images, run_fedlp

from fedlp.apps.federate import Federation
from fedlp.config import LocalConfig, RunConfig, compose
from fedlp.data.examples import DataInfo, Examples
from fedlp.federation.client.runtime import load_tensors
from fedlp.models import state_tensors
from fedlp.models.cnn import MLP
from fedlp.training.loop import train_locally
from fedlp.training.stacked import train_stacked
from fedlp.training.stacked_adapters import find_adapters
from fedlp.training.stacked_chain import find_chain
from fedlp.training.stacked_cohort import Trainee, Way
from fedlp.training.stacked_rule import adapter_stack_size, stack_size

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
ADAPTERS = {  # model, tokens of a window, batch size; each client takes two steps
    "stories260K, 2 windows of 64": ("stories260K", 64, 2),
    "lm-3.3m, 1 window of 32": ("lm-3.3m", 32, 1),
    "stories260K, 1 window of 64": ("stories260K", 64, 1),
    "stories260K, 4 windows of 64": ("stories260K", 64, 4),
    "stories260K, 4 windows of 256": ("stories260K", 256, 4),
    "lm-3.3m, 4 windows of 64": ("lm-3.3m", 64, 4),
}
COHORT = 32  # clients of a round of theirs


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

    return {"params": num_params, "clients": clients, **stack_over_alone(one_by_one, together, clients, repeats)}


def stack_over_alone(
    one_by_one: Callable[[], None], together: Callable[[], None], clients: int, repeats: int
) -> dict[str, Any]:
    """Return the processor seconds of a client, alone and in a stack, measured in turn, and their ratio."""
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for number in range(-1, repeats):
        for name, action, count in (("alone", one_by_one, ALONE), ("together", together, clients)):
            started = time.process_time()
            action()
            if number >= 0:
                times[name].append((time.process_time() - started) / count)
    return {"seconds_per_client": times, "ratio": paired_ratio(times["together"], times["alone"])}


def training_table(title: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print what was measured, and return it."""
    rows = [
        (name, one["params"], one["clients"], *(f"{one['ratio'][q]:.2f}" for q in ("median", "q1", "q3")))
        for name, one in found.items()
    ]
    print_table(title, ("", "params", "clients", "ratio", "q1", "q3"), rows)
    return found


# --------------------------------------------------------------------------------------------------------- the adapters
def adapter_config(folder: Path, case: tuple[str, int, int], options: Sequence[str] = ()) -> RunConfig:
    """Return the config of clients of two batches of TinyStories each, who train adapters of a model."""
    name, window, batch_size = case
    model, text = folder / "models" / name, folder / "text" / "tinystories.txt"
    config: RunConfig = compose(
        [
            *("model=hf", f"model.path={model}", "adapter=lora", "strategy=fedavg", "local.optimizer=sgd"),
            *("dataset=text", f"dataset.root={text}", f"dataset.tokenizer={model}", "eval_batch_size=8"),
            *(f"dataset.sequence_length={window}", f"local.batch_size={batch_size}", "dataset.max_test_examples=8"),
            *(f"dataset.max_train_examples={2 * batch_size * COHORT}", f"num_clients={COHORT}", *options),
            f"clients_per_round={COHORT}",
        ]
    )
    return config


def adapter_ratio(folder: Path, case: tuple[str, int, int], repeats: int) -> dict[str, Any]:
    """Return the processor seconds of the training of a client's adapters in a stack over those by itself."""
    federation = Federation(adapter_config(folder, case))
    model, info, local = federation.submodels.skeleton(), federation.info, federation.config.local
    state = state_tensors(model)
    values = {name: tensor.clone() for name, tensor in federation.initial_params().items()}
    _, window, batch_size = case
    num_params = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base_bytes = sum(tensor.nbytes for tensor in values.values()) - 4 * num_params
    clients = adapter_stack_size(4 * num_params, COHORT, window * batch_size, base_bytes)
    steps = np.arange(2 * batch_size)
    examples = [federation.data.train.select(i * len(steps) + steps) for i in range(max(clients, ALONE))]
    way = Way(adapters=find_adapters(model))

    def one_by_one() -> None:
        for i in range(ALONE):
            load_tensors(state, values)
            train_locally(model, examples[i], info, local, np.random.default_rng(i))

    def together() -> None:
        stack = [Trainee(values, examples[i], np.random.default_rng(i)) for i in range(clients)]
        train_stacked(model, stack, info, local, way=way)

    return {"params": num_params, "clients": clients, **stack_over_alone(one_by_one, together, clients, repeats)}


def adapter_rounds(folder: Path, case: tuple[str, int, int], repeats: int) -> dict[str, Any]:
    """Return wall and processor seconds of a client in whole rounds, one by one and batched, and their ratios."""
    wall: dict[str, list[float]] = {"one by one": [], "batched": []}
    processor: dict[str, list[float]] = {"one by one": [], "batched": []}
    num_rounds = 3
    for _ in range(repeats):
        for how, batched in (("one by one", "false"), ("batched", "true")):
            options = [f"num_rounds={num_rounds}", f"eval_every={num_rounds}", f"simulation.batched={batched}"]
            config = adapter_config(folder, case, [*options, f"simulation.workers={WORKERS}"])
            seconds: list[tuple[float, float]] = []

            def observe(record: Any, state: Any, seconds: list[tuple[float, float]] = seconds) -> None:
                seconds.append((record.wall_time_s, processor_seconds(os.getpid())))

            with tempfile.TemporaryDirectory() as out:
                Federation(config).run_locally(Path(out) / "run", [observe])
            wall[how].append(sum(one for one, _ in seconds[1:]) / COHORT / (num_rounds - 1))
            processor[how].append((seconds[-1][1] - seconds[0][1]) / COHORT / (num_rounds - 1))
    return {
        "wall": wall,
        "processor": processor,
        "ratio": paired_ratio(wall["batched"], wall["one by one"]),
        "processor_ratio": sum(processor["batched"]) / sum(processor["one by one"]),
    }


def adapters(folder: Path, quick: bool) -> dict[str, Any]:
    """Measure and print all cases of adapters."""
    cases = dict(list(ADAPTERS.items())[:1]) if quick else ADAPTERS
    found = {name: adapter_ratio(folder, case, 3 if quick else 5) for name, case in cases.items()}
    training_table("adapters in a stack over alone", found)
    rounds = {name: adapter_rounds(folder, cases[name], 2 if quick else 3) for name in list(cases)[:2]}
    for name, one in rounds.items():
        print(f"{name}: rounds, batched / one by one: {one['ratio']['median']:.2f}, {one['processor_ratio']:.2f}")
    return {"adapters": found, "adapter_rounds": rounds}


# ----------------------------------------------------------------------------------------------------------- the rounds
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number there")
    parser.add_argument("--adapters", type=Path, metavar="FOLDER", help="models and text of the cases with adapters")
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 3 if args.quick else 5
    networks = {name: training_ratio(*case, repeats) for name, case in NETWORKS.items()}
    results: dict[str, Any] = {"training": training_table("training in a stack over alone", networks)}
    if args.adapters is not None:
        results |= adapters(args.adapters.absolute(), args.quick)
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
