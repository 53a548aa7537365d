"""The CNN's clients as a Flower app, written as Flower's users write it, on Flower's simulation runtime (Ray).

As a program (``python plain_flower.py ROUNDS CLIENTS``) it is one whole run, from the start of Python to its end, with
two actors of one CPU and one torch thread, and prints the seconds of every round as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from functools import lru_cache

import torch
from bare import normalise, plain_cnn, train_plain
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor
from workload import WORKLOADS, make_images

WORK = WORKLOADS["cnn"]
client_app, server_app = ClientApp(), ServerApp()
times: list[float] = []


@lru_cache
def load_shards(num_clients: int) -> list[tuple[Tensor, Tensor]]:
    """Return the float images and classes of each client; made once in every actor."""
    images, targets = make_images(WORK, num_clients)
    return list(zip(normalise(images).split(WORK.examples), targets.split(WORK.examples), strict=True))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    inputs, targets = load_shards(int(context.node_config["num-partitions"]))[int(context.node_config["partition-id"])]
    model = plain_cnn()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train_plain(model, inputs, targets, WORK.batch_size)
    metrics = MetricRecord({"num-examples": len(targets)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    num_rounds, num_clients = map(int, sys.argv[1:])

    def check(replies: list[RecordDict], weight_key: str) -> MetricRecord:
        if len(replies) != num_clients:
            raise RuntimeError(f"{len(replies)} of {num_clients} clients replied")
        return MetricRecord({"replies": len(replies)})

    def note_time(server_round: int, arrays: ArrayRecord) -> None:
        times.append(time.perf_counter())

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
        train_metrics_aggr_fn=check,
    )
    result = strategy.start(grid, ArrayRecord(plain_cnn().state_dict()), num_rounds, evaluate_fn=note_time)
    if len(result.train_metrics_clientapp) != num_rounds:  # where all clients fail, Flower goes on in silence
        raise RuntimeError(f"{len(result.train_metrics_clientapp)} of {num_rounds} rounds had replies")


def main() -> None:
    os.environ["PYTHONPATH"] = os.path.dirname(__file__)
    os.environ |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    warnings.simplefilter("ignore")
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app, client_app, num_supernodes=int(sys.argv[2]), backend_config=resources)
    seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
    if len(seconds) != int(sys.argv[1]):
        raise RuntimeError(f"{len(seconds)} of {sys.argv[1]} rounds were run")
    print(json.dumps(seconds))


if __name__ == "__main__":
    import plain_flower  # Ray's actors cannot import what is defined in __main__

    plain_flower.main()
