"""Server steps for adapters: products are averaged as the dense twin averages them, ranks are cut and padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.federation.aggregation.adapter_updates import AdapterUpdates
from fedlp.federation.aggregation.coverage import Keeps
from fedlp.registry import lookup
from fedlp.types import Keep
from tests.reference.adapters import Client, best_of_rank, dense_average, hetlora

RULES = pytest.mark.parametrize("rule", ["flexlora", "flora", "hetlora"])
RANK, OUT, IN = 4, 7, 9
RANKS, WEIGHTS = (4, 2, 1), (10.0, 30.0, 5.0)


def made(rule: str, params: dict[str, Tensor], **given: float | None) -> AdapterUpdates:
    found = lookup("aggregator", rule)(**given).begin(params)
    assert isinstance(found, AdapterUpdates)
    return found


def model() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x.weight": torch.randn(OUT, IN),
        "x.lora_a": torch.randn(RANK, IN),
        "x.lora_b": torch.randn(OUT, RANK),
        "head.weight": torch.randn(3, 2),
    }


def clients() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x.lora_a": torch.randn(rank, IN, generator=generator),
            "x.lora_b": torch.randn(OUT, rank, generator=generator),
            "head.weight": torch.randn(3, 2, generator=generator),
        }
        for rank in RANKS
    ]


def first_ranks(rank: int) -> dict[str, Keeps]:
    keep = Keep.first(rank, RANK)
    return {"x.lora_a": (keep, Keep.full(IN)), "x.lora_b": (Keep.full(OUT), keep)}


def combined(rule: str, **given: float) -> dict[str, Tensor]:
    average = made(rule, model(), **given)
    for rank, weight, update in zip(RANKS, WEIGHTS, clients(), strict=True):
        average.add(update, first_ranks(rank), weight)
    params, coverage = average.result()
    assert coverage["x.lora_a"] == coverage["x.lora_b"] == coverage["head.weight"] == 1.0
    assert average.covered("x.lora_a") is average.covered("head.weight") is True
    assert all(params[name].dtype == tensor.dtype for name, tensor in model().items())
    return params


def plain() -> list[Client]:
    return [
        (update["x.lora_a"].double().numpy(), update["x.lora_b"].double().numpy(), weight)
        for update, weight in zip(clients(), WEIGHTS, strict=True)
    ]


def test_flexlora_is_the_best_approximation_of_the_dense_average_at_every_rank() -> None:
    params, dense = combined("flexlora"), dense_average(plain())
    for rank in range(1, RANK + 1):
        product = (params["x.lora_b"][:, :rank] @ params["x.lora_a"][:rank]).numpy()
        np.testing.assert_allclose(product, best_of_rank(dense, rank), atol=1e-5)
    assert torch.equal(params["x.weight"], model()["x.weight"])


def test_flexlora_leaves_ranks_of_no_weight_trainable() -> None:
    average = made("flexlora", model())
    average.add({"x.lora_a": torch.randn(1, IN), "x.lora_b": torch.randn(OUT, 1)}, first_ranks(1), 1.0)
    params, _ = average.result()
    torch.testing.assert_close(params["x.lora_b"][:, 1:], torch.zeros(OUT, RANK - 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(params["x.lora_a"].norm(dim=1), torch.ones(RANK))


def test_flora_adds_the_dense_average_to_the_base_and_starts_anew() -> None:
    params, before = combined("flora", adapter_scale=2.0), model()
    expected = before["x.weight"].double().numpy() + 2.0 * dense_average(plain())
    np.testing.assert_allclose(params["x.weight"].numpy(), expected, atol=1e-5)
    assert not params["x.lora_b"].any()
    assert torch.equal(params["x.lora_a"], before["x.lora_a"])


def test_flora_is_the_product_of_the_stacks() -> None:
    total = sum(WEIGHTS)
    a = np.concatenate([a for a, _, _ in plain()])
    b = np.concatenate([weight / total * b for _, b, weight in plain()], axis=1)
    np.testing.assert_allclose(b @ a, dense_average(plain()), atol=1e-12)
    params = combined("flora")
    np.testing.assert_allclose((params["x.weight"] - model()["x.weight"]).numpy(), b @ a, atol=1e-5)


def test_hetlora_is_the_padded_average_by_norms() -> None:
    params, (a, b) = combined("hetlora"), hetlora(plain(), RANK)
    np.testing.assert_allclose(params["x.lora_a"].numpy(), a, atol=1e-6)
    np.testing.assert_allclose(params["x.lora_b"].numpy(), b, atol=1e-6)


def test_hetlora_keeps_ranks_that_no_client_of_the_round_holds() -> None:
    before, update = model(), clients()[1]
    average = made("hetlora", before)
    average.add(update, first_ranks(2), 3.0)
    params, _ = average.result()
    torch.testing.assert_close(params["x.lora_a"], torch.cat([update["x.lora_a"], before["x.lora_a"][2:]]))
    torch.testing.assert_close(params["x.lora_b"], torch.cat([update["x.lora_b"], before["x.lora_b"][:, 2:]], dim=1))


def test_hetlora_of_products_that_are_zero_takes_the_examples_weights() -> None:
    average, updates = made("hetlora", model()), clients()
    for rank, weight, update in zip(RANKS, WEIGHTS, updates, strict=True):
        average.add({**update, "x.lora_b": torch.zeros(OUT, rank)}, first_ranks(rank), weight)
    params, _ = average.result()
    first = sum(w * update["x.lora_a"][0] for w, update in zip(WEIGHTS, updates, strict=True)) / sum(WEIGHTS)
    torch.testing.assert_close(params["x.lora_a"][0], first)
    assert not params["x.lora_b"].any()


@RULES
def test_other_tensors_are_averaged_by_weight(rule: str) -> None:
    found = sum(w * update["head.weight"].double() for w, update in zip(WEIGHTS, clients(), strict=True)) / sum(WEIGHTS)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(combined(rule)["head.weight"].double(), found)


@RULES
def test_slices_are_averaged_over_the_holders_of_an_entry(rule: str) -> None:
    """A client of half the columns; entries that it does not hold are those of the whole client alone."""
    before, generator = model(), torch.Generator().manual_seed(2)
    whole = {
        "x.lora_a": torch.randn(RANK, IN, generator=generator),
        "x.lora_b": torch.randn(OUT, RANK, generator=generator),
    }
    keeps = {"x.lora_a": (Keep.full(RANK), Keep.first(5, IN)), "x.lora_b": (Keep.first(3, OUT), Keep.full(RANK))}
    half = {"x.lora_a": whole["x.lora_a"][:, :5], "x.lora_b": whole["x.lora_b"][:3]}
    average, alone = made(rule, before), made(rule, before)
    average.add(whole, {}, 1.0)
    average.add(half, keeps, 3.0)
    alone.add(whole, {}, 1.0)
    found, expected = average.result()[0], alone.result()[0]
    for name in ("x.weight", "x.lora_a", "x.lora_b"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@RULES
def test_layers_without_updates_keep_their_bits_and_half_an_adapter_is_refused(rule: str) -> None:
    average = made(rule, model())
    with pytest.raises(ValueError, match="one half of the adapter of x"):
        average.add({"x.lora_b": torch.zeros(OUT, RANK)}, {}, 1.0)
    params, coverage = average.result()
    assert all(torch.equal(params[name], tensor) for name, tensor in model().items())
    assert not any(coverage.values())
    assert average.covered("x.lora_a") is False


# ---- bounds
def near(before: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Return honest updates: the values before with small changes."""
    generator = torch.Generator().manual_seed(3)
    names = [name for name in before if name != "x.weight"]
    return [
        {name: before[name] + 0.1 * torch.randn(before[name].shape, generator=generator) for name in names}
        for _ in range(count)
    ]


def moved(rule: str, updates: list[dict[str, Tensor]], **given: float | None) -> tuple[dict[str, Tensor], list[float]]:
    average = made(rule, model(), **given)
    for update in updates:
        average.add(update, {}, 1.0)
    return average.result()[0], average.scales


def product(params: dict[str, Tensor]) -> Tensor:
    return params["x.weight"] + params["x.lora_b"] @ params["x.lora_a"]


@RULES
@pytest.mark.parametrize("factor", [-10.0, 1e6])
def test_one_client_of_huge_factors_takes_no_round(rule: str, factor: float) -> None:
    honest = near(model(), 9)
    hostile = {name: model()[name] + factor * (values - model()[name]) for name, values in near(model(), 1)[0].items()}
    expected, _ = moved(rule, honest)
    found, scales = moved(rule, [*honest, hostile])
    assert scales[:-1] == [1.0] * 9
    assert 0 < scales[-1] < 1
    loose, none = moved(rule, [*honest, hostile], max_norm=None)
    assert none == [1.0] * 10
    distances = [float((product(params) - product(expected)).norm()) for params in (found, loose)]
    assert distances[0] < 2.0
    assert distances[1] > 2 * distances[0]


@RULES
def test_within_the_bounds_the_bytes_are_those_without(rule: str) -> None:
    found, plain = moved(rule, near(model(), 6))[0], moved(rule, near(model(), 6), max_norm=None)[0]
    assert all(torch.equal(found[name], values) for name, values in plain.items())


@RULES
@pytest.mark.parametrize("option", ["max_norm", "max_examples"])
def test_bounds_below_one_are_refused(rule: str, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"aggregator\.{option}=0\.5 is not allowed"):
        made(rule, model(), **{option: 0.5})
