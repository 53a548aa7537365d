"""Clients as a Flower app, written as Flower's users write it, on Flower's simulation runtime (Ray).

As a program (``python plain_flower.py NAME ROUNDS CLIENTS``) it is one whole run, from the start of Python to its end,
with two actors of one CPU and one torch thread, and prints the seconds of every round as JSON.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
import warnings
from functools import lru_cache

import torch
from bare import normalise, plain_net, train_plain
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor
from workload import WORKLOADS, make_images

client_app, server_app = ClientApp(), ServerApp()
times: list[float] = []


@lru_cache
def load_shards(name: str, num_clients: int) -> list[tuple[Tensor, Tensor]]:
    """Return the float images and classes of each client; made once in every actor."""
    work = WORKLOADS[name]
    images, targets = make_images(work, num_clients)
    return list(zip(normalise(images).split(work.examples), targets.split(work.examples), strict=True))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    name, node = str(message.content["config"]["workload"]), context.node_config
    inputs, targets = load_shards(name, int(node["num-partitions"]))[int(node["partition-id"])]
    model = plain_net(WORKLOADS[name])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train_plain(model, inputs, targets, WORKLOADS[name].batch_size)
    metrics = MetricRecord({"num-examples": len(targets)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    name, num_rounds, num_clients = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

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
    result = strategy.start(
        grid,
        ArrayRecord(plain_net(WORKLOADS[name]).state_dict()),
        num_rounds,
        train_config=ConfigRecord({"workload": name}),
        evaluate_fn=note_time,
    )
    if len(result.train_metrics_clientapp) != num_rounds:  # where all clients fail, Flower goes on in silence
        raise RuntimeError(f"{len(result.train_metrics_clientapp)} of {num_rounds} rounds had replies")


def main() -> None:
    os.environ["PYTHONPATH"] = os.path.dirname(__file__)
    os.environ |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    warnings.simplefilter("ignore")
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app, client_app, num_supernodes=int(sys.argv[3]), backend_config=resources)
    print(json.dumps([end - start for start, end in itertools.pairwise(times)]))


if __name__ == "__main__":
    import plain_flower  # Ray's actors cannot import what is defined in __main__

    plain_flower.main()
