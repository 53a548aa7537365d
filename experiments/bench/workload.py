"""The work that is timed: synthetic images over clients, as a run of fedlp on its local engine, or on Ray.

As a program (``python workload.py NAME ROUNDS CLIENTS COHORT [ENGINE [WORKERS [BATCHED]]]``) it is one whole run, from
the start of Python to its end, and prints the seconds of every round as JSON: what ``simulation.py`` and ``peers.py``
compare with whole runs of others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 10
LR = 0.05
MEAN, STD = 0.5, 0.25  # what images are normalised by


@dataclass(frozen=True)
class Workload:
    """A model and what each client trains it on, for one epoch of plain SGD."""

    model: str
    input_shape: tuple[int, int, int]
    examples: int
    batch_size: int
    options: tuple[str, ...] = ()


WORKLOADS = {
    "cnn": Workload("small_cnn", (3, 32, 32), examples=500, batch_size=50),
    "cnn_short": Workload("small_cnn", (3, 32, 32), examples=50, batch_size=25),
    "linear": Workload("linear", (1, 28, 28), examples=10, batch_size=10),
    "mlp": Workload("fedlp_mlp", (1, 8, 8), examples=10, batch_size=10),
    "digits": Workload("fedlp_mlp", (1, 8, 8), examples=14, batch_size=10),
    "payload": Workload("bare:payload_mlp", (3, 32, 32), examples=1, batch_size=1),
    "resnet18": Workload("resnet18", (3, 32, 32), examples=1, batch_size=1),
}


def make_images(work: Workload, num_clients: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images (clients * examples, C, H, W) and their classes, client after client; always the same."""
    rng = np.random.default_rng(0)
    count = num_clients * work.examples
    images = rng.integers(0, 256, (count, *work.input_shape), dtype=np.uint8)
    return torch.from_numpy(images), torch.from_numpy(rng.integers(0, NUM_CLASSES, count))


def run_fedlp(
    work: Workload,
    num_clients: int,
    cohort: int,
    num_rounds: int,
    workers: int,
    observe: Callable[[float], None] = lambda seconds: None,
    batched: bool | str = False,
    engine: str = "local",
) -> None:
    """Run FedAvg through fedlp's strategy, messages and client app on one of its engines.

    ``observe`` is told the seconds of every round, as ``rounds.jsonl`` has them: cohort, messages, training, checks,
    averaging. The test set has one image and is looked at after the last round only.
    """
    from fedlp.apps.engines import open_grid
    from fedlp.apps.federate import Federation
    from fedlp.config import compose
    from fedlp.data.datasets import DataInfo, Examples
    from fedlp.data.examples import FederatedData
    from fedlp.federation.server.strategy import FedLPStrategy, RoundSettings
    from fedlp.federation.wire import messages

    overrides = [f"model={work.model}", "strategy=fedavg", f"num_clients={num_clients}", f"clients_per_round={cohort}"]
    overrides += [f"num_rounds={num_rounds}", f"eval_every={num_rounds}", f"local.batch_size={work.batch_size}"]
    overrides += [f"simulation={engine}", f"simulation.workers={workers}"]
    config = compose([*overrides, f"local.lr={LR}", f"simulation.batched={batched}", *work.options])
    channels = work.input_shape[0]
    count = num_clients * work.examples
    info = DataInfo(
        "synthetic", "classification", work.input_shape, NUM_CLASSES, count, 1, (MEAN,) * channels, (STD,) * channels
    )
    images, targets = make_images(work, num_clients)
    parts = np.split(np.arange(count), num_clients)
    test = Examples(images[:1], targets[:1], None)
    data = FederatedData(info, Examples(images, targets, None), test)
    federation = Federation(config, data=data, parts=parts)
    out = Path("unused").absolute()
    runtime = federation.runtime(str(out / "clients"))
    strategy = FedLPStrategy(
        federation.submodels,
        federation.policy,
        RoundSettings(num_clients, cohort, config.seed, eval_every=num_rounds),
        evaluate=runtime.evaluate,
        num_test=1,
        observers=[lambda record, state: observe(record.wall_time_s)],
    )
    with open_grid(federation, out) as grid:
        strategy.start(grid, messages.encode_params(federation.initial_params()), num_rounds)


def main(arguments: Sequence[str]) -> None:
    name, num_rounds, num_clients, cohort = arguments[0], *map(int, arguments[1:4])
    engine, workers, batched = [*arguments[4:], *("local", "2", "False")[len(arguments) - 4 :]]
    torch.set_num_threads(1)
    seconds: list[float] = []
    work, observe = WORKLOADS[name], seconds.append
    run_fedlp(work, num_clients, cohort, num_rounds, int(workers), observe, batched, engine)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
