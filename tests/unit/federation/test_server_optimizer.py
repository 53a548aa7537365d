"""Server optimisers against their formulas, entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.aggregation.server_optimizer import (
    Adagrad,
    Adam,
    Adaptive,
    Momentum,
    PlainAverage,
    ServerOptimizer,
    Yogi,
    apply_server_optimizer,
)
from fedlp.types import Keep

OPTIMIZERS: list[ServerOptimizer] = [
    kind(lr=lr) for kind in (PlainAverage, Momentum, Adam, Yogi, Adagrad) for lr in (1.0, 0.3)
]
EVERY = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)


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
    optimizer: Any, old: float, average: float, momentum: float, variance: float
) -> tuple[float, float, float]:
    """Return value, momentum and variance of one entry after a step, by the formulas of Reddi et al., Algorithm 2."""
    delta, lr = average - old, optimizer.lr
    if isinstance(optimizer, PlainAverage):
        return old + lr * delta, momentum, variance
    if isinstance(optimizer, Momentum):
        momentum = optimizer.momentum * momentum + delta
        return old + lr * momentum, momentum, variance
    momentum = optimizer.momentum * momentum + (1 - optimizer.momentum) * delta
    square = delta**2
    if isinstance(optimizer, Yogi):
        variance -= (1 - optimizer.beta2) * square * float(np.sign(variance - square))
    elif isinstance(optimizer, Adagrad):
        variance += square
    else:
        variance = optimizer.beta2 * variance + (1 - optimizer.beta2) * square
    return old + lr * momentum / (variance**0.5 + optimizer.epsilon), momentum, variance


@EVERY
def test_every_entry_follows_the_formula_over_rounds(optimizer: ServerOptimizer) -> None:
    start, rounds = random_rounds(5)
    params, state = {"w": start}, dict[str, Tensor]()
    values = start.double().numpy().copy()
    momentum, variance = np.zeros_like(values), np.full_like(values, 1e-3**2)
    for offset, mask in rounds:
        average = torch.where(mask, params["w"] + offset, params["w"])
        for at in zip(*np.nonzero(mask.numpy()), strict=True):
            values[at], momentum[at], variance[at] = step_of_one_entry(
                optimizer, values[at], values[at] + float(offset[at]), momentum[at], variance[at]
            )
        params, state = apply_server_optimizer(optimizer, params, {"w": average}, state, {"w": mask}.__getitem__, {"w"})
        np.testing.assert_allclose(params["w"].numpy(), values, rtol=1e-4, atol=1e-5)


@EVERY
def test_what_nobody_returned_keeps_its_bits_and_its_state(optimizer: ServerOptimizer) -> None:
    start, rounds = random_rounds(2)
    params, state = {"w": start}, dict[str, Tensor]()
    for offset, mask in rounds:
        average = torch.where(mask, params["w"] + offset, params["w"])
        before, slots = params["w"], state
        params, state = apply_server_optimizer(optimizer, params, {"w": average}, state, {"w": mask}.__getitem__, {"w"})
        assert torch.equal(params["w"][~mask].view(torch.int32), before[~mask].view(torch.int32))
        for key, slot in slots.items():
            assert torch.equal(state[key][~mask], slot[~mask])


@EVERY
def test_a_tensor_that_nobody_returned_has_no_part(optimizer: ServerOptimizer) -> None:
    old = {"w": torch.tensor([-0.0, 2.0])}
    params, state = apply_server_optimizer(optimizer, old, {"w": old["w"].clone()}, {}, lambda _: False, {"w"})
    assert torch.equal(params["w"].view(torch.int32), old["w"].view(torch.int32))
    assert not state


def test_plain_averaging_is_the_average_itself() -> None:
    average = {"w": torch.tensor([0.1, -0.0]), "n": torch.tensor(4)}
    old = {"w": torch.tensor([1e8, 1.0]), "n": torch.tensor(1)}
    params, state = apply_server_optimizer(PlainAverage(), old, average, {"stale": torch.ones(1)}, everywhere, {"w"})
    assert params == average
    assert state == {}


@EVERY
def test_buffers_and_integers_take_the_average(optimizer: ServerOptimizer) -> None:
    old = {"w": torch.zeros(2), "running_mean": torch.zeros(2), "n": torch.tensor(1)}
    average = {"w": torch.ones(2), "running_mean": torch.ones(2), "n": torch.tensor(4)}
    params, state = apply_server_optimizer(optimizer, old, average, {}, everywhere, {"w", "n"})
    assert list(params) == list(average)
    assert torch.equal(params["running_mean"], average["running_mean"])
    assert torch.equal(params["n"], average["n"])
    assert {key.partition(".")[2] for key in state} <= {"w"}


@EVERY
def test_nothing_is_modified_and_low_precision_is_computed_in_float32(optimizer: ServerOptimizer) -> None:
    start, rounds = random_rounds(2, torch.bfloat16)
    params, state = {"w": start}, dict[str, Tensor]()
    for offset, _ in rounds:
        average = {"w": params["w"] + offset}
        inputs = [params["w"], average["w"], *state.values()]
        copies = [tensor.clone() for tensor in inputs]
        params, state = apply_server_optimizer(optimizer, params, average, state, everywhere, {"w"})
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    assert params["w"].dtype == torch.bfloat16
    assert all(slot.dtype == torch.float32 for slot in state.values())


def test_momentum_without_memory_is_plain_averaging() -> None:
    old, average = {"w": torch.tensor([1.0, -3.0])}, {"w": torch.tensor([2.0, 5.0])}
    params, _ = apply_server_optimizer(Momentum(momentum=0.0), old, average, {}, everywhere, {"w"})
    assert torch.equal(params["w"], average["w"])


def test_it_takes_coverage_from_the_average() -> None:
    average = CoverageAverage({"w": torch.zeros(4)})
    average.add({"w": torch.ones(2)}, {"w": (Keep.first(2, 4),)}, 1.0)
    values, _ = average.result()
    params, state = apply_server_optimizer(Momentum(lr=0.5), {"w": torch.zeros(4)}, values, {}, average.covered, {"w"})
    assert params["w"].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert state["momentum.w"].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", [Adam, Yogi, Adagrad])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_by_default_no_entry_moves_far_in_the_first_step(kind: type[Adaptive], scale: float) -> None:
    params, _ = apply_server_optimizer(
        kind(), {"w": torch.zeros(2)}, {"w": torch.tensor([scale, -scale])}, {}, everywhere, {"w"}
    )
    assert params["w"][0] == -params["w"][1]
    assert 0.002 < params["w"][0] <= 0.0101


@pytest.mark.parametrize("kind", [Adam, Yogi, Adagrad])
def test_the_first_step_has_the_size_that_the_formula_gives(kind: type[Adaptive]) -> None:
    """From a variance of 1e-6 and a pseudo-gradient of 1; worked out by hand."""
    optimizer = kind(lr=1.0)
    variance = {Adam: 0.99e-6 + 0.01, Yogi: 1e-6 + 0.01, Adagrad: 1e-6 + 1.0}[kind]
    params, state = apply_server_optimizer(
        optimizer, {"w": torch.zeros(1)}, {"w": torch.ones(1)}, {}, everywhere, {"w"}
    )
    assert params["w"].item() == pytest.approx(0.1 / (variance**0.5 + 1e-3), rel=1e-6)
    assert state["variance.w"].item() == pytest.approx(variance, rel=1e-6)


def test_the_variance_of_yogi_falls_by_the_square_and_that_of_adagrad_never() -> None:
    delta, state = torch.tensor([0.1]), {"momentum": torch.zeros(1), "variance": torch.ones(1)}
    after = {kind: kind().step(delta, state)[1]["variance"][1].item() for kind in (Adam, Yogi, Adagrad)}
    assert after[Adam] == pytest.approx(0.99 + 0.01 * 0.01)
    assert after[Yogi] == pytest.approx(1.0 - 0.01 * 0.01)
    assert after[Adagrad] == pytest.approx(1.01)


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"server_optimizer.*adamw"):
        compose(["server_optimizer=adamw"])


@pytest.mark.parametrize("kind", [PlainAverage, Momentum, Adam, Yogi, Adagrad])
@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_is_refused(kind: Any, lr: float) -> None:
    with pytest.raises(ConfigError, match=r"server_optimizer\.lr=.* above 0"):
        kind(lr=lr)


@pytest.mark.parametrize("option", ["momentum", "beta2", "epsilon"])
def test_options_of_adaptive_optimisers_have_ranges(option: str) -> None:
    for value in {"epsilon": (0.0, -1.0)}.get(option, (1.0, -0.1)):
        with pytest.raises(ConfigError, match=rf"server_optimizer\.{option}={value} is not allowed"):
            Adam(**{option: value})
