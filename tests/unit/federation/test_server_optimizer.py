"""Server optimisers against their formulas, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.aggregation.server_optimizer import apply_server_optimizer
from fedlp.types import Keep


@dataclass
class Config:
    server_optimizer: str = "none"
    server_lr: float = 1.0
    server_momentum: float = 0.9
    server_beta2: float = 0.99
    server_epsilon: float = 1e-3


CONFIGS = [Config(lr_kind, lr) for lr_kind in ("none", "momentum", "adam") for lr in (1.0, 0.3)]


def everywhere(name: str) -> bool:
    return True


def random_rounds(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return an initial tensor, and per round a pseudo-average (as an offset) and which entries are covered."""
    rng = np.random.default_rng(7)
    start = torch.from_numpy(rng.standard_normal((3, 4))).to(dtype)
    offsets = [torch.from_numpy(rng.standard_normal((3, 4))).to(dtype) for _ in range(count)]
    masks = [torch.from_numpy(rng.random((3, 4)) < 0.6) for _ in range(count)]
    return start, list(zip(offsets, masks, strict=True))


def step_of_one_entry(
    config: Config, old: float, average: float, momentum: float, variance: float
) -> tuple[float, float, float]:
    delta, lr = average - old, config.server_lr
    if config.server_optimizer == "none":
        return old + lr * delta, momentum, variance
    if config.server_optimizer == "momentum":
        momentum = config.server_momentum * momentum + delta
        return old + lr * momentum, momentum, variance
    momentum = config.server_momentum * momentum + (1 - config.server_momentum) * delta
    variance = config.server_beta2 * variance + (1 - config.server_beta2) * delta**2
    return old + lr * momentum / (variance**0.5 + config.server_epsilon), momentum, variance


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_entry_follows_the_formula_over_rounds(config: Config) -> None:
    start, rounds = random_rounds(5)
    params, state = {"w": start}, dict[str, Tensor]()
    values = start.double().numpy().copy()
    momentum, variance = np.zeros_like(values), np.full_like(values, config.server_epsilon**2)
    for offset, mask in rounds:
        average = torch.where(mask, params["w"] + offset, params["w"])
        for at in zip(*np.nonzero(mask.numpy()), strict=True):
            values[at], momentum[at], variance[at] = step_of_one_entry(
                config, values[at], values[at] + float(offset[at]), momentum[at], variance[at]
            )
        params, state = apply_server_optimizer(config, params, {"w": average}, state, {"w": mask}.__getitem__, {"w"})
        np.testing.assert_allclose(params["w"].numpy(), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_nobody_returned_keeps_its_bits_and_its_state(config: Config) -> None:
    start, rounds = random_rounds(2)
    params, state = {"w": start}, dict[str, Tensor]()
    for offset, mask in rounds:
        average = torch.where(mask, params["w"] + offset, params["w"])
        before, slots = params["w"], state
        params, state = apply_server_optimizer(config, params, {"w": average}, state, {"w": mask}.__getitem__, {"w"})
        assert torch.equal(params["w"][~mask].view(torch.int32), before[~mask].view(torch.int32))
        for key, slot in slots.items():
            assert torch.equal(state[key][~mask], slot[~mask])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_tensor_that_nobody_returned_has_no_part(config: Config) -> None:
    old = {"w": torch.tensor([-0.0, 2.0])}
    params, state = apply_server_optimizer(config, old, {"w": old["w"].clone()}, {}, lambda _: False, {"w"})
    assert torch.equal(params["w"].view(torch.int32), old["w"].view(torch.int32))
    assert not state


def test_plain_averaging_is_the_average_itself() -> None:
    average = {"w": torch.tensor([0.1, -0.0]), "n": torch.tensor(4)}
    old = {"w": torch.tensor([1e8, 1.0]), "n": torch.tensor(1)}
    params, state = apply_server_optimizer(Config(), old, average, {"stale": torch.ones(1)}, everywhere, {"w"})
    assert params == average
    assert state == {}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_buffers_and_integers_take_the_average(config: Config) -> None:
    old = {"w": torch.zeros(2), "running_mean": torch.zeros(2), "n": torch.tensor(1)}
    average = {"w": torch.ones(2), "running_mean": torch.ones(2), "n": torch.tensor(4)}
    params, state = apply_server_optimizer(config, old, average, {}, everywhere, {"w", "n"})
    assert list(params) == list(average)
    assert torch.equal(params["running_mean"], average["running_mean"])
    assert torch.equal(params["n"], average["n"])
    assert {key.partition(".")[2] for key in state} <= {"w"}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nothing_is_modified_and_low_precision_is_computed_in_float32(config: Config) -> None:
    start, rounds = random_rounds(2, torch.bfloat16)
    params, state = {"w": start}, dict[str, Tensor]()
    for offset, _ in rounds:
        average = {"w": params["w"] + offset}
        inputs = [params["w"], average["w"], *state.values()]
        copies = [tensor.clone() for tensor in inputs]
        params, state = apply_server_optimizer(config, params, average, state, everywhere, {"w"})
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    assert params["w"].dtype == torch.bfloat16
    assert all(slot.dtype == torch.float32 for slot in state.values())


def test_momentum_without_memory_is_plain_averaging() -> None:
    old, average = {"w": torch.tensor([1.0, -3.0])}, {"w": torch.tensor([2.0, 5.0])}
    config = Config("momentum", server_momentum=0.0)
    params, _ = apply_server_optimizer(config, old, average, {}, everywhere, {"w"})
    assert torch.equal(params["w"], average["w"])


def test_it_takes_coverage_from_the_average() -> None:
    average = CoverageAverage({"w": torch.zeros(4)})
    average.add({"w": torch.ones(2)}, {"w": (Keep.first(2, 4),)}, 1.0)
    values, _ = average.result()
    params, state = apply_server_optimizer(
        Config("momentum", server_lr=0.5), {"w": torch.zeros(4)}, values, {}, average.covered, {"w"}
    )
    assert params["w"].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert state["momentum.w"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_an_unknown_optimiser_is_refused() -> None:
    old = {"w": torch.zeros(1)}
    with pytest.raises(ConfigError, match="server_optimizer=adamw"):
        apply_server_optimizer(replace(Config(), server_optimizer="adamw"), old, old, {}, everywhere, {"w"})
