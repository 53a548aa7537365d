"""The floor: the same clients trained by bare PyTorch, with nothing around it."""

from __future__ import annotations

import multiprocessing
from collections import OrderedDict
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workload import LR, MEAN, NUM_CLASSES, STD, Workload, make_images


def plain_cnn() -> nn.Module:
    """Return the CNN of federated benchmarks as it is usually written."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 32, 3),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 3),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            dropout1=nn.Dropout(0.25),
            flatten=nn.Flatten(),
            fc1=nn.Linear(12544, 128),
            relu3=nn.ReLU(),
            dropout2=nn.Dropout(0.5),
            fc2=nn.Linear(128, NUM_CLASSES),
        )
    )


def plain_mlp(work: Workload) -> nn.Module:
    """Return softmax regression, or FedLP's MLP with one hidden layer."""
    features = torch.Size(work.input_shape).numel()
    if work.model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(features, NUM_CLASSES))
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 500), nn.ReLU(), nn.Linear(500, NUM_CLASSES))


def payload_mlp() -> nn.Module:
    """Return a network of 11 million parameters that costs little to train on one image."""
    return nn.Sequential(
        OrderedDict(flatten=nn.Flatten(), fc1=nn.Linear(3072, 3600), relu=nn.ReLU(), fc2=nn.Linear(3600, NUM_CLASSES))
    )


def plain_net(work: Workload) -> nn.Module:
    """Return the network of a workload as it is usually written."""
    match work.model:
        case "small_cnn":
            return plain_cnn()
        case "bare:payload_mlp":
            return payload_mlp()
        case _:
            return plain_mlp(work)


def normalise(images: Tensor) -> Tensor:
    """Return uint8 images as floats."""
    return images.float().div_(255).sub_(MEAN).div_(STD)


def train_plain(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> None:
    """Train for one epoch of SGD on float images, as everybody writes it."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for index in torch.randperm(len(targets)).split(batch_size):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[index]), targets[index]).backward()
        optimizer.step()


def train_fast(model: nn.Module, images: Tensor, targets: Tensor, batch_size: int) -> None:
    """Train for one epoch of SGD on uint8 images, in the form that is fastest on a CPU: fedlp's."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for index in torch.randperm(len(targets)).split(batch_size):
        optimizer.zero_grad()
        inputs = images[index].float().sub_(255 * MEAN).div_(255 * STD).contiguous(memory_format=torch.channels_last)
        F.cross_entropy(model(inputs), targets[index]).backward()
        optimizer.step()


class BareRounds:
    """FedAvg rounds of the CNN over forked processes of one thread; models go through shared memory.

    Parameters
    ----------
    fast : bool
        fedlp's step (channels last, ReLU behind the pool, memory kept) in place of the plain one.
    """

    def __init__(self, work: Workload, num_clients: int, workers: int, fast: bool) -> None:
        self._work, self._fast, self._num_clients, self._workers = work, fast, num_clients, workers
        model = self._make_model()
        self._params = nn.utils.parameters_to_vector(model.parameters()).detach().share_memory_()
        self._sums = torch.zeros(workers, len(self._params), dtype=torch.float64).share_memory_()
        images, targets = make_images(work, num_clients)
        inputs = images if fast else normalise(images)
        self._shards = list(zip(inputs.split(work.examples), targets.split(work.examples), strict=True))
        fork = multiprocessing.get_context("fork")
        self._pipes = []
        for number in range(workers):
            parent, child = fork.Pipe()
            fork.Process(target=self._serve, args=(child, number), daemon=True).start()
            self._pipes.append(parent)

    def run_round(self) -> None:
        """Train all clients and average their models."""
        for pipe in self._pipes:
            pipe.send_bytes(b"go")
        for pipe in self._pipes:
            pipe.recv_bytes()
        self._params.copy_(self._sums.sum(dim=0) / self._num_clients)

    def _serve(self, pipe: Connection, number: int) -> None:
        from fedlp.simulation.worker import settle_process

        torch.set_num_threads(1)
        if self._fast:
            settle_process()
        model, total = self._make_model(), self._sums[number]
        train = train_fast if self._fast else train_plain
        while pipe.recv_bytes():
            total.zero_()
            for inputs, targets in self._shards[number :: self._workers]:
                nn.utils.vector_to_parameters(self._params.clone(), model.parameters())
                train(model, inputs, targets, self._work.batch_size)
                total += nn.utils.parameters_to_vector(model.parameters()).detach()
            pipe.send_bytes(b"done")

    def _make_model(self) -> nn.Module:
        from fedlp.models.cnn import SmallCNN

        return SmallCNN(self._work.input_shape, NUM_CLASSES) if self._fast else plain_cnn()


class BareLoop:
    """FedAvg rounds: one loop in this process, with the model handed over by name."""

    def __init__(self, work: Workload, num_clients: int) -> None:
        self._model = plain_net(work)
        self._params = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        images, targets = make_images(work, num_clients)
        self._shards = list(zip(normalise(images).split(work.examples), targets.split(work.examples), strict=True))
        self._batch_size = work.batch_size

    def run_round(self) -> None:
        """Train all clients and average their models."""
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self._params.items()}
        count = 0
        for inputs, targets in self._shards:
            self._model.load_state_dict(self._params)
            train_plain(self._model, inputs, targets, self._batch_size)
            for name, tensor in self._model.state_dict().items():
                sums[name].add_(tensor, alpha=len(targets))
            count += len(targets)
        self._params = {name: (total / count).float() for name, total in sums.items()}
