"""FedBuff as one would write it down: one process, a list of events, no messages; whole models, plain averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlp.config import RunConfig
from fedlp.data.datasets import describe_dataset, load_dataset
from fedlp.data.partition import partition_examples
from fedlp.federation.sampling import sample_cohort
from fedlp.models import describe_model
from fedlp.rng import Stream, generator
from tests.reference.federated_loop import Train, train_plainly


def run(
    config: RunConfig, seconds: Sequence[float], train: Train = train_plainly
) -> tuple[dict[str, Tensor], list[list[tuple[int, int]]]]:
    """Return the final global model, and clients and staleness of each step.

    Parameters
    ----------
    seconds : sequence of float
        Duration of each client's part.
    """
    info = describe_dataset(config.dataset)
    data = load_dataset(config.dataset, config.seed)
    parts = partition_examples(config.partition, data.train, config.num_clients, config.seed)
    spec = describe_model(config.model, info.input_shape, info.num_classes, info.task)
    params = {name: tensor.double() for name, tensor in spec.build(config.seed).state_dict().items()}
    size = config.rounds.buffer_size or config.clients_per_round
    flying: list[tuple[float, int, int, Mapping[str, Tensor]]] = []  # end, client, step of its model, model
    now, steps = 0.0, []
    for step in range(1, config.num_rounds + 1):
        buffer: list[tuple[int, int, Mapping[str, Tensor]]] = []
        draw = 0
        while len(buffer) < size:
            if not flying or min(flying)[0] > now:
                taken = {one[1] for one in flying} | {one[0] for one in buffer}
                free = [client for client in range(config.num_clients) if client not in taken]
                count = config.clients_per_round - len(flying)
                if free and count:
                    for client in sample_cohort(config.seed, step, free, count, draw=draw):
                        flying.append((now + seconds[client], client, step, params))
                    draw += 1
            first = min(flying, key=lambda one: one[:2])
            flying.remove(first)
            now = first[0]
            buffer.append(first[1:])
        total, change = 0, {name: torch.zeros_like(values) for name, values in params.items()}
        for client, began, received in sorted(buffer, key=lambda one: one[0]):
            model = spec.build(config.seed)
            model.load_state_dict({name: values.float() for name, values in received.items()})
            examples = data.train.select(parts[client])
            rng = generator(config.seed, Stream.LOCAL_TRAINING, began, client)
            train(model, examples, info, config.local, rng)
            factor = (1 + step - began) ** -config.rounds.staleness_exponent
            for name, values in model.state_dict().items():
                change[name] += len(examples) * factor * (values.double() - received[name].float().double())
            total += len(examples)
        params = {name: (values + change[name] / total).float().double() for name, values in params.items()}
        steps.append(sorted((client, step - began) for client, began, _ in buffer))
    return {name: values.float() for name, values in params.items()}, steps
