"""A federated run as one would write it down: one process, one client after another, no messages.

What is shared with the package is what a run is *about*: the initial model, the partition and the draws of cohorts,
depths and uploads. Training, loading, heads and averaging are written anew, the average in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.config import LocalConfig, RunConfig
from fedlp.data.datasets import DataInfo, Examples, describe_dataset, load_dataset
from fedlp.data.partition import partition_examples
from fedlp.federation.sampling import sample_cohort
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model
from fedlp.rng import Stream, generator
from tests.reference.policies import unlimited_policy

Train = Callable[[nn.Module, Examples, DataInfo, LocalConfig, np.random.Generator], object]


def train_plainly(
    model: nn.Module, examples: Examples, info: DataInfo, config: LocalConfig, rng: np.random.Generator
) -> None:
    """Plain SGD on normalised images; the order of the batches is the one the package draws."""
    rng.integers(2**63 - 1)  # the package seeds dropout with it
    mean = torch.tensor(info.mean).view(1, -1, 1, 1)
    std = torch.tensor(info.std).view(1, -1, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    model.train()
    for _ in range(config.epochs):
        order = rng.permutation(len(examples))
        for start in range(0, len(examples), config.batch_size):
            index = torch.from_numpy(order[start : start + config.batch_size])
            images = (examples.inputs[index].to(torch.float32) / 255 - mean) / std
            optimizer.zero_grad()
            F.cross_entropy(model(images), examples.targets[index]).backward()
            optimizer.step()


def run(config: RunConfig, train: Train = train_plainly, absent: Collection[tuple[int, int]] = ()) -> dict[str, Tensor]:
    """Return the final global model; ``absent`` are the (round, client) whose updates get lost."""
    info = describe_dataset(config.dataset)
    data = load_dataset(config.dataset, config.seed)
    parts = partition_examples(config.partition, data.train, config.num_clients, config.seed)
    spec = describe_model(config.model, info.input_shape, info.num_classes, info.task)
    policy = unlimited_policy(config.strategy.make(), config.seed, config.num_clients, SubModels(spec))
    params = {name: tensor.clone() for name, tensor in spec.build(config.seed).state_dict().items()}
    heads: dict[int, Mapping[str, Tensor]] = {}
    for server_round in range(1, config.num_rounds + 1):
        received: list[tuple[float, dict[str, Tensor]]] = []
        cohort = sample_cohort(config.seed, server_round, range(config.num_clients), config.clients_per_round)
        sizes = sorted(len(parts[client]) for client in cohort)
        multiple = config.aggregator.options.get("max_examples")
        most = math.inf if multiple is None or len(cohort) < 5 else multiple * sizes[(len(sizes) - 1) // 2]
        for client in cohort:
            submodel = policy.submodel(server_round, client)
            depth = submodel.depth
            model = spec.build(config.seed) if depth is None else spec.build_depth(depth, config.seed, client)
            state = model.state_dict()
            shared = {name: tensor for name, tensor in params.items() if name in state}
            model.load_state_dict({**state, **shared, **heads.get(client, {})})
            examples = data.train.select(parts[client])
            train(
                model, examples, info, config.local, generator(config.seed, Stream.LOCAL_TRAINING, server_round, client)
            )
            trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            if config.strategy.options.get("persist_heads", True):
                heads[client] = {name: tensor for name, tensor in trained.items() if name not in params}
            if (server_round, client) not in absent:
                uploads = policy.uploads(server_round, client, submodel)
                weight = min(len(examples), most) if config.aggregator.weighting == "examples" else 1
                received.append((weight, {name: trained[name] for name in uploads}))
        for name, old in params.items():
            got = [(weight, update[name].to(torch.float64)) for weight, update in received if name in update]
            if got:
                mean = sum(weight * value for weight, value in got) / sum(weight for weight, _ in got)
                params[name] = mean.to(old.dtype) if old.is_floating_point() else mean.round().to(old.dtype)
    return params
