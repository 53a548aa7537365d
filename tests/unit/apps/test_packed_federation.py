"""A federation as JSON values and arrays: an equal one comes back, and wrong values are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlp.apps.federate import Federation
from fedlp.apps.packed_federation import find_obstacle, pack, unpack
from fedlp.apps.rebuild import rebuild
from fedlp.config import RunConfig, compose
from fedlp.data.datasets import DataInfo, Examples, FederatedData
from fedlp.errors import FedLPError

Packed = tuple[dict[str, Any], dict[str, NDArray[Any]]]
CASE = ["model=linear", "num_clients=3", "clients_per_round=2", "strategy=fedavg", "local.lr=0.1"]


def data_in_memory() -> FederatedData:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=draws), torch.arange(12) % 3
    info = DataInfo("own", "classification", (5,), 3, 12, 4, mean=(0.1,), std=(1 / 3,), labels=("a", "ä", "c"))
    return FederatedData(info, Examples(x, y, np.arange(12) // 4), Examples(x[:4], y[:4], None))


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(CASE)


@pytest.fixture(scope="module")
def packed(config: RunConfig) -> Packed:
    parts = [np.array([0, 5]), np.array([], dtype=np.int64), np.array([1, 2, 3])]
    about, arrays = pack(Federation(config, data=data_in_memory(), parts=parts))
    return json.loads(json.dumps(about)), arrays


def test_an_equal_federation_comes_back(config: RunConfig, packed: Packed) -> None:
    found, data = rebuild(*packed), data_in_memory()
    assert replace(found.config, tracker=config.tracker) == config
    assert found.data.info == data.info
    for read, given in ((found.data.train, data.train), (found.data.test, data.test)):
        assert torch.equal(read.inputs, given.inputs)
        assert torch.equal(read.targets, given.targets)
        assert (read.groups is None) == (given.groups is None)
    assert [part.tolist() for part in found.parts] == [[0, 5], [], [1, 2, 3]]
    assert found.data.train.inputs.data_ptr() == packed[1]["train.inputs"].ctypes.data  # mapped, not copied


def without(key: str) -> Callable[[Any], None]:
    return lambda node: node.pop(key)


def having(key: str, value: object) -> Callable[[Any], None]:
    return lambda node: node.update({key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        without("config"),
        having("more", 1),
        having("config", 1),
        having("config", "num_rounds: -1"),
        having("own", {}),
        having("own", [["model", "x"]]),
        having("own", [["model", "x", "os:<lambda>"]]),
        having("own", [["no_kind", "x", "os:getpid"]]),
        having("info", []),
    ],
)
def test_wrong_values(spoil: Callable[[Any], None], packed: Packed) -> None:
    about = dict(packed[0])
    spoil(about)
    refuse(about, packed[1])


@pytest.mark.parametrize(
    "spoil",
    [
        without("task"),
        having("more", 1),
        having("name", 1),
        having("task", {}),
        having("num_classes", -1),
        having("num_classes", True),
        having("num_train", 0.5),
        having("input_shape", 5),
        having("input_shape", ["5"]),
        having("mean", ["x"]),
        having("labels", [1]),
        having("augment", 1),
    ],
)
def test_wrong_facts(spoil: Callable[[Any], None], packed: Packed) -> None:
    about = packed[0] | {"info": dict(packed[0]["info"])}
    spoil(about["info"])
    refuse(about, packed[1])


@pytest.mark.parametrize(
    "spoil",
    [
        without("train.inputs"),
        without("test.targets"),
        having("train.inputs", np.array(1.0)),
        having("train.targets", np.arange(3)),
        having("train.groups", np.arange(12, dtype=np.int32)),
        having("train.groups", np.arange(3)),
        without("parts.lengths"),
        having("parts.indices", np.arange(5.0)),
        having("parts.indices", np.array([0, 1, 2, 3, 12])),
        having("parts.indices", np.array([0, 1, 2, 3, -1])),
        having("parts.lengths", np.array([2, 0, 4])),
        having("parts.lengths", np.array([6, -1, 0])),
        having("parts.lengths", np.array([2, 3])),
    ],
)
def test_wrong_arrays(spoil: Callable[[Any], None], packed: Packed) -> None:
    arrays = dict(packed[1])
    spoil(arrays)
    refuse(packed[0], arrays)


def refuse(about: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(FedLPError) as found:
        unpack(about, arrays)
    assert "\n" not in str(found.value)


def test_a_task_that_is_an_object(config: RunConfig) -> None:
    from fedlp.tasks import task_of

    data = data_in_memory()
    data = replace(data, info=replace(data.info, task=task_of(data.info)))
    federation = Federation(config, data=data, parts=[np.arange(4)] * 3)
    assert find_obstacle(federation) == (
        "the task of the data set own is an object; give the name of a registered task"
    )
