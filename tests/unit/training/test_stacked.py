"""Stacked training: each client's numbers are those of training alone, and nobody else's business."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.models import state_tensors
from fedlp.models.cnn import MLP, SmallCNN
from fedlp.models.dropout import ByteDropout
from fedlp.models.layers import masked_gradients
from fedlp.tasks.classification import Classification
from fedlp.tasks.regression import Regression
from fedlp.training.loop import train_locally
from fedlp.training.schedules import Moment
from fedlp.training.stacked import train_stacked
from fedlp.training.stacked_chain import find_chain
from fedlp.training.stacked_cohort import Trained, Trainee, Way
from fedlp.training.stacked_pass import find_obstacle

SHAPE, CLASSES = (1, 4, 4), 5
LENGTHS = (10, 23, 7, 41, 20, 1)
MOMENT = Moment(2, 5)


def describe(task: object = "classification", **facts: Any) -> DataInfo:
    return DataInfo("noise", task, SHAPE, CLASSES, None, None, (0.5,), (0.25,), **facts)


def draw(info: DataInfo, count: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8))
    if isinstance(info.task, Regression):
        return Examples(images, torch.from_numpy(rng.standard_normal((count, CLASSES), dtype=np.float32)), None)
    return Examples(images, torch.from_numpy(rng.integers(0, CLASSES, count)), None)


def mlp() -> nn.Module:
    return MLP(16, (12,), CLASSES, False)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), ByteDropout(0.25), nn.Linear(12, CLASSES))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES))


def trainees(
    values: dict[str, Tensor], info: DataInfo, lengths: tuple[int, ...], masks: list[dict[str, Tensor]] | None = None
) -> list[Trainee]:
    return [
        Trainee(values, draw(info, count, i), np.random.default_rng(i), {} if masks is None else masks[i])
        for i, count in enumerate(lengths)
    ]


def alone(
    model: nn.Module, values: dict[str, Tensor], trainee: Trainee, info: DataInfo, config: LocalConfig, frozen: Any
) -> Trained:
    for name, tensor in state_tensors(model).items():
        tensor.copy_(values[name])
    with masked_gradients(model, trainee.masks):
        result = train_locally(model, trainee.examples, info, config, trainee.rng, (), frozen, MOMENT)
    return result, {name: tensor.clone() for name, tensor in state_tensors(model).items()}


def check(
    model: nn.Module,
    info: DataInfo,
    lengths: tuple[int, ...] = LENGTHS,
    frozen: tuple[str, ...] = (),
    masks: list[dict[str, Tensor]] | None = None,
    bitwise: bool = True,
    **options: Any,
) -> None:
    config = LocalConfig(**{"optimizer": "sgd", "batch_size": 10, "lr": 0.05, "epochs": 2, **options})
    values = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    assert find_obstacle(model, info, config, frozenset(frozen), pads=False) == ""
    way = Way(True, not find_obstacle(model, info, config, frozenset(frozen), pads=True), find_chain(model))

    def together(chosen: slice) -> list[Trained]:
        return train_stacked(model, trainees(values, info, lengths, masks)[chosen], info, config, frozen, MOMENT, way)

    stacked = together(slice(None))
    for trainee, (result, found) in zip(trainees(values, info, lengths, masks), stacked, strict=True):
        wanted_result, wanted = alone(model, values, trainee, info, config, frozen)
        assert result.num_processed == wanted_result.num_processed
        assert result.train_loss == pytest.approx(wanted_result.train_loss, rel=1e-5)
        assert list(found) == list(wanted)  # messages hold tensors in this order
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5 * max(1e-3, float(tensor.abs().max())))
    # Who else is in the stack changes no bit.
    for (result, found), (same_result, same) in zip(stacked[1:3], together(slice(1, 3)), strict=True):
        assert result == same_result or not bitwise
        for name in found:
            torch.testing.assert_close(same[name], found[name], rtol=0, atol=0.0 if bitwise else 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"max_grad_norm": 0.5},
        {"proximal": 0.5},
        {"optimizer": "adam", "lr": 1e-3},
        {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        {"schedule": "cosine"},
        {"logit_adjustment": 1.0},
        {"batch_size": 4, "epochs": 3},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_clients_of_unequal_lengths_train_as_alone(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(mlp(), describe(), **options)


def test_label_smoothing() -> None:
    check(mlp(), describe(Classification(label_smoothing=0.1)))


def test_class_weights_are_no_mean_over_examples() -> None:
    info = describe(Classification(class_weights=(1.0, 2.0, 3.0, 1.0, 0.5)))
    assert find_obstacle(mlp(), info, LocalConfig(optimizer="sgd"), frozenset(), pads=True)
    check(mlp(), info)


@pytest.mark.parametrize("huber", [None, 0.5])
def test_regression(huber: float | None) -> None:
    check(mlp(), describe(Regression(huber=huber)))


def test_augmented_images() -> None:
    check(mlp(), describe(augment=True, padding=1, flip=True))


def test_frozen_layers() -> None:
    check(mlp(), describe(), frozen=("fc1.weight", "fc1.bias"), momentum=0.9)


def test_masked_gradients() -> None:
    noise = torch.Generator().manual_seed(0)
    model = mlp()
    masks = [
        {name: (torch.rand(x.shape, generator=noise) < 0.5).to(x) for name, x in model.named_parameters()}
        for _ in LENGTHS
    ]
    check(model, describe(), masks=masks, momentum=0.9)


def test_dropout_comes_from_each_clients_own_stream() -> None:
    check(with_dropout(), describe())


def test_batch_norm_statistics_are_each_clients_own() -> None:
    # vmap makes one normalisation of all clients' channels, whose rounding depends on their number.
    check(with_batch_norm(), describe(), lengths=(10, 23, 7, 40, 20), bitwise=False)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (SmallCNN((1, 8, 8), CLASSES), {}, "convolutions"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, CLASSES)), {}, "random"),
        (mlp(), {"accumulation": 2}, "accumulation"),
        (mlp(), {"precision": "bfloat16"}, "precision"),
        (mlp(), {"optimizer": "torch.optim:LBFGS"}, "optimizer"),
    ],
    ids=["convolutions", "torch's dropout", "accumulation", "precision", "optimizer"],
)
def test_what_cannot_be_stacked_is_told_why(model: nn.Module, options: dict[str, Any], reason: str) -> None:
    config = LocalConfig(**{"optimizer": "sgd", **options})
    assert reason in find_obstacle(model, describe(), config, frozenset(), pads=False)


class ByBatch(nn.Linear):
    """Linear layer whose outputs are centred over the batch: no stack can pad it."""

    def forward(self, input: Tensor) -> Tensor:
        outputs = super().forward(input.flatten(1))
        return outputs - outputs.mean(dim=0)


def test_a_model_that_mixes_examples_is_not_padded() -> None:
    model, config = ByBatch(16, CLASSES), LocalConfig(optimizer="sgd")
    assert "comes out otherwise" in find_obstacle(model, describe(), config, frozenset(), pads=True)
    check(model, describe())


@pytest.mark.parametrize(
    ("model", "length"),
    [
        (mlp(), 2),
        (MLP(16, (), CLASSES, False), 1),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.Identity(), nn.Linear(8, CLASSES)), 2),
        (with_dropout(), 0),
        (with_batch_norm(), 0),
        (ByBatch(16, CLASSES), 0),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES)), 0),
        (SmallCNN((1, 8, 8), CLASSES), 0),
    ],
)
def test_chains_are_found(model: nn.Module, length: int) -> None:
    assert len(find_chain(model)) == length


def test_layers_used_twice_and_layers_with_hooks_are_no_chain() -> None:
    layer = nn.Linear(16, 16)
    assert find_chain(nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)) == ()
    tied = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16))
    tied[2].weight = tied[1].weight
    assert find_chain(tied) == ()
    hooked = mlp()
    hooked.fc1.register_forward_hook(lambda *_: None)
    assert find_chain(hooked) == ()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["fused", "with gradients"])
def test_chains_without_biases_and_last_layers_alone(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    check(model, describe(), **options)
    check(model, describe(), frozen=("1.weight", "3.weight"), **options)


def test_a_chain_trains_as_vmap_does() -> None:
    model, info, config = mlp(), describe(), LocalConfig(optimizer="sgd", batch_size=10, lr=0.05, epochs=2)
    values = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    ways = [Way(True, True, chain) for chain in (find_chain(model), ())]
    one, other = (train_stacked(model, trainees(values, info, LENGTHS), info, config, way=way) for way in ways)
    for (_, found), (_, wanted) in zip(one, other, strict=True):
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
