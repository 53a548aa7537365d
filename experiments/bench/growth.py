"""How the cost of a round grows, and where it goes: ``python experiments/bench/growth.py [--quick] [--json FILE]``.

* ``clients``: rounds of 10 of 10 to 100,000 clients; ``cohort``: rounds of 10 to 1,000 of 1,000; ``model``: rounds of
  10 clients on networks of 8 thousand to 11 million parameters. FedAvg on the local engine in one process
  (``simulation.workers=0``), one thread, whole rounds as ``fedlp`` makes them: messages, training, checks, average,
  evaluation, line of ``rounds.jsonl``, checkpoint. Processor seconds of the process, wall seconds beside them.
* Each of these rounds by parts: seconds within the functions that do them, less those of parts within.
* ``aggregation``: processor seconds of a dense update of 11 million numbers in the average, from a decoded message,
  beside what memory gives: NumPy's copy of it, its sum in place (one read, one read and write), and that in float64,
  as the average has it; and beside the same sums and products made by NumPy, block by block.

Clients have ten images of 8 x 8 and take one step; the networks of a million parameters and more one image.
"""

from __future__ import annotations

import functools
import gc
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aggregation import make_update, resnet18_shapes
from timing import paired_ratio, parse_args, print_table, write_report
from workload import LR, MEAN, NUM_CLASSES, STD, WORKLOADS, Workload

from fedlp.apps import round_keeping
from fedlp.apps.federate import Federation
from fedlp.config import RunConfig, compose
from fedlp.data.datasets import DataInfo, Examples
from fedlp.data.examples import FederatedData
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.client import runtime
from fedlp.federation.server import cohorts, device_budgets, server_step, strategy, update_collector
from fedlp.federation.wire import messages
from fedlp.simulation import local, worker

EXAMPLES = 10  # of a client; all clients share a thousand images
POOL = 1000
TEST = 100
SMALL = Workload("fedlp_mlp", (1, 8, 8), EXAMPLES, EXAMPLES)
MODELS = {
    "linear": Workload("linear", (1, 28, 28), EXAMPLES, EXAMPLES),
    "small_cnn": Workload("small_cnn", (3, 32, 32), 1, 1),
    "resnet18": WORKLOADS["resnet18"],
}
Sums = dict[str, float]


class Stopwatch:
    """Processor seconds by part of a round, each without those of the parts within."""

    def __init__(self) -> None:
        self._spent: Sums = defaultdict(float)
        self._open = ["rest"]
        self._since = time.process_time()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count a function of a module or class; of a generator, the seconds of each step."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with_result = self._within(part, lambda: inner(*args, **kwargs))
            return self._steps(part, with_result) if isinstance(with_result, Iterator) else with_result

        setattr(owner, name, timed)

    def take(self) -> Sums:
        """Return the seconds since the last call."""
        self._turn()
        found, self._spent = dict(self._spent), defaultdict(float)
        return found

    def _steps(self, part: str, inner: Iterator[Any]) -> Iterator[Any]:
        nothing = object()
        while (found := self._within(part, lambda: next(inner, nothing))) is not nothing:
            yield found

    def _within(self, part: str, action: Callable[[], Any]) -> Any:
        self._turn()
        self._open.append(part)
        try:
            return action()
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.process_time()
        self._spent[self._open[-1]] += now - self._since
        self._since = now


def watch() -> Stopwatch:
    """Return a stopwatch of the parts of a round, from now on."""
    found = Stopwatch()
    server = strategy.FedLPStrategy
    for owner, name, part in (
        (runtime, "train_locally", "training"),
        (runtime.ClientRuntime, "evaluate", "evaluate"),
        (runtime.ClientRuntime, "_prepare", "load, gather on clients"),
        (runtime.ClientRuntime, "_train_alone", "load, gather on clients"),
        (runtime.ClientRuntime, "_finish", "load, gather on clients"),
        (device_budgets.DeviceBudgets, "welcome", "roster, cohort"),
        (server, "_begin_round", "roster, cohort"),
        (server, "_instruct", "assign, encode"),
        (server, "_encode_model", "assign, encode"),
        (cohorts.Packer, "single", "assign, encode"),
        (messages, "encode_update", "encode on clients"),
        (messages, "decode_instruction", "decode on clients"),
        (messages, "decode_update", "decode, check"),
        (update_collector.UpdateCollector, "receive", "decode, check"),
        (strategy.RoundGuard, "accept", "decode, check"),
        (update_collector.UpdateCollector, "add", "aggregate"),
        (server_step.ServerStep, "begin", "aggregate"),
        (server_step.ServerStep, "apply", "aggregate"),
        (round_keeping.RoundKeeper, "__call__", "record"),
        (local.LocalGrid, "stream", "transport"),
        (worker.Node, "answer", "transport"),
        (worker, "_answer", "Flower's ClientApp"),
    ):
        found.wrap(owner, name, part)
    return found


# ----------------------------------------------------------------------------------------------------------- the rounds
def make_federation(work: Workload, num_clients: int, cohort: int, num_rounds: int) -> Federation:
    """Return a federation whose clients share a pool of images, so that memory does not grow with their number."""
    config: RunConfig = compose(
        [
            *(f"model={work.model}", "strategy=fedavg", f"num_clients={num_clients}", f"clients_per_round={cohort}"),
            *(f"num_rounds={num_rounds}", f"local.batch_size={work.batch_size}", f"local.lr={LR}"),
            "simulation.workers=0",
        ]
    )
    rng, channels = np.random.default_rng(0), work.input_shape[0]
    images = torch.from_numpy(rng.integers(0, 256, (POOL, *work.input_shape), dtype=np.uint8))
    targets = torch.from_numpy(rng.integers(0, NUM_CLASSES, POOL))
    info = DataInfo(
        *("synthetic", "classification", work.input_shape, NUM_CLASSES, POOL, TEST),
        *((MEAN,) * channels, (STD,) * channels),
    )
    test = TEST if work.examples > 1 else 1
    data = FederatedData(info, Examples(images, targets, None), Examples(images[:test], targets[:test], None))
    steps = np.arange(work.examples)
    parts = [(i * work.examples + steps) % POOL for i in range(num_clients)]
    return Federation(config, data=data, parts=parts)


def measure(stopwatch: Stopwatch, work: Workload, num_clients: int, cohort: int, num_rounds: int) -> dict[str, Any]:
    """Return processor and wall seconds of whole rounds, parts of them, and the seconds before the first.

    The first round is not counted: it builds models and imports.
    """
    rounds: list[dict[str, Any]] = []
    begun = time.process_time()
    federation = make_federation(work, num_clients, cohort, num_rounds + 1)
    gc.collect()

    def observe(record: Any, state: Any) -> None:
        parts = stopwatch.take()
        rounds.append({"processor": sum(parts.values()), "wall": record.wall_time_s, "parts": parts, "now": begun})

    with tempfile.TemporaryDirectory() as folder:
        federation.run_locally(Path(folder) / "run", [observe])
    first, *others = rounds
    return {
        "model": work.model,
        "params": federation.submodels.spec.num_params,
        "clients": num_clients,
        "cohort": cohort,
        "start_and_first_round": first["processor"],
        "processor": [one["processor"] for one in others],
        "wall": [one["wall"] for one in others],
        "parts": {
            part: statistics.median(one["parts"].get(part, 0.0) for one in others)
            for part in sorted({part for one in others for part in one["parts"]})
        },
    }


def show(title: str, cases: list[dict[str, Any]]) -> None:
    """Print the milliseconds of a client of each case, and the shares of the parts."""
    parts = sorted({part for one in cases for part in one["parts"]})
    rows = []
    for one in cases:
        total, each = sum(one["parts"].values()), 1e3 / one["cohort"]
        seconds = f"{each * statistics.median(one['processor']):.2f}", f"{each * statistics.median(one['wall']):.2f}"
        shares = [f"{one['parts'].get(part, 0.0) / total:.0%}" for part in parts]
        rows.append((f"{one['model']}, {one['cohort']} of {one['clients']}", *seconds, *shares))
    print_table(f"{title}: ms per client", ("", "processor", "wall", *parts), rows)


# ------------------------------------------------------------------------------------------------------- the bandwidth
def measure_bandwidth(repeats: int) -> dict[str, Any]:
    """Return processor seconds of one dense update: in the average, and in NumPy's copy and sum of as many numbers."""
    worker.keep_freed_memory()  # as in every round of the local engine
    shapes = resnet18_shapes()
    params = make_update(shapes, seed=0)
    updates = [make_update(shapes, seed=k + 1) for k in range(10)]
    flat = [np.concatenate([x.numpy().ravel() for x in one.values() if x.is_floating_point()]) for one in updates]
    total, place, wide = np.zeros_like(flat[0]), np.zeros_like(flat[0]), np.zeros(flat[0].size)

    def average() -> None:
        found = CoverageAverage(params)
        for update in updates:
            found.add(update, {}, 100.0)
        found.result()

    def add() -> None:
        for one in flat:
            np.add(total, one, out=total)

    def copy() -> None:
        for one in flat:
            np.copyto(place, one)

    def add_wide() -> None:
        for one in flat:
            np.add(wide, one, out=wide)

    scratch = np.empty(1 << 18)

    def weigh() -> None:
        for one in flat:
            for lo in range(0, one.size, scratch.size):
                block = one[lo : lo + scratch.size]
                product = np.multiply(block, 100.0, out=scratch[: block.size], dtype=np.float64)
                np.add(wide[lo : lo + block.size], product, out=wide[lo : lo + block.size])
        np.divide(wide, 100.0 * len(flat)).astype(np.float32)

    actions = {"average": average, "add": add, "copy": copy, "add_wide": add_wide, "weigh": weigh}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(-1, repeats):
        for name, action in actions.items():
            started = time.process_time()
            action()
            if number >= 0:
                seconds[name].append((time.process_time() - started) / len(updates))
    return {
        "params": flat[0].size,
        "processor": seconds,
        "share_of_bandwidth": paired_ratio(seconds["add"], seconds["average"]),
        "copy_over_average": paired_ratio(seconds["copy"], seconds["average"]),
        "add_wide_over_average": paired_ratio(seconds["add_wide"], seconds["average"]),
        "weigh_over_average": paired_ratio(seconds["weigh"], seconds["average"]),
    }


def main() -> None:
    args = parse_args((__doc__ or "").splitlines()[0])
    torch.set_num_threads(1)
    logging.getLogger("fedlp").setLevel(logging.ERROR)
    quick = args.quick
    results: dict[str, Any] = {"aggregation": measure_bandwidth(3 if quick else 5)}
    share = results["aggregation"]["share_of_bandwidth"]
    print(f"a dense update takes {1 / share['median']:.2f} of NumPy's sum in place")
    stopwatch = watch()
    num_rounds = 3 if quick else 12
    counts, sizes, names = (10, 100, 1000, 10_000, 100_000), (100, 1000), ("linear", "small_cnn", "resnet18")
    if quick:
        counts, sizes, names = counts[:2], sizes[:1], names[:1]
    results["clients"] = [measure(stopwatch, SMALL, count, 10, num_rounds) for count in counts]
    show("clients", results["clients"])
    results["cohort"] = [measure(stopwatch, SMALL, 1000, size, min(num_rounds, 3000 // size)) for size in sizes]
    show("cohort", results["cohort"])
    results["model"] = [measure(stopwatch, MODELS[name], 10, 10, min(num_rounds, 4)) for name in names]
    show("model", results["model"])
    write_report(args.json, quick, results)


if __name__ == "__main__":
    main()
