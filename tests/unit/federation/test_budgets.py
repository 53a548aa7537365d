"""Clients get the largest sub-model that their budgets hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlp.allocation.budget.costs import COSTS
from fedlp.apps import runs as assembly
from fedlp.config import LocalConfig, compose, to_yaml
from fedlp.errors import ConfigError
from fedlp.federation.budgets import layer_costs
from fedlp.registry import lookup
from fedlp.types import Keep, SubModel

CNN = ("model=fedlp_cnn", "dataset=cifar10", "num_clients=8", "clients_per_round=4")
TIERS = ("fleet=tiers", "fleet.limited=[params]")


def plan_of(*overrides: str) -> assembly.Federation:
    return assembly.make_plan(to_yaml(compose([*CNN, *overrides])))


def params_of(plan: assembly.Federation) -> list[int]:
    return sorted(plan.submodels.layout(plan.policy.submodel(1, client_id)).num_params() for client_id in range(8))


def test_widths_are_the_widest_that_fit() -> None:
    plan = plan_of("strategy=heterofl", "strategy.widths=[1.0,0.7,0.5,0.3,0.1]", *TIERS)
    found, whole = params_of(plan), plan.submodels.spec.num_params
    for tier, fraction in enumerate((0.1, 0.25, 0.5, 1.0)):
        for params in found[2 * tier : 2 * tier + 2]:
            assert params <= fraction * whole
    assert len(set(found)) == 3  # 0.3 is the widest for both of the smaller tiers


def test_depths_are_the_deepest_that_fit() -> None:
    plan = plan_of("strategy=fedlp_hetero", *TIERS)
    found, whole = params_of(plan), plan.submodels.spec.num_params
    assert len(set(found)) > 2
    assert found[-1] == whole
    assert found[0] <= 0.1 * whole


def test_expected_costs_are_those_of_the_clients(tmp_path: Path) -> None:
    overrides = (*CNN, "strategy=heterofl", "strategy.widths=[1.0,0.5,0.3,0.1]", *TIERS)
    assembly.dry_run(to_yaml(compose(list(overrides))), tmp_path)
    expected = json.loads((tmp_path / "manifest.json").read_text())["expected"]
    assert expected["params_down_per_client"] == pytest.approx(sum(params_of(plan_of(*overrides[4:]))) / 8)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8", "int4", "int2"])
@pytest.mark.parametrize("model", ["fedlp_cnn", "resnet18"])
def test_bytes_of_an_upload_are_those_of_what_is_encoded(model: str, encoding: str) -> None:
    submodels = plan_of("strategy=fedlp_plan", f"model={model}", f"upload={encoding}").submodels
    layers, units = submodels.layers, [max(1, layer.num_units // 3) for layer in submodels.layers]
    widths = {layer.name: Keep.first(n, layer.num_units) for layer, n in zip(layers, units, strict=True)}
    layout = submodels.layout(SubModel(None, widths))
    trainable = [name for name in layout.names if submodels.spec.tensors[name].trainable]
    signature = layout.signature(frozenset(trainable))
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape, dtype in signature}
    written = lookup("encoding", encoding)()
    sent = written.encode(tensors, torch.Generator())
    costs = layer_costs(submodels, LocalConfig(), written)
    expected = costs.evaluate(np.array(units, dtype=np.float64))[COSTS.index("upload_bytes")]
    assert 0 <= sum(tensor.nbytes for tensor in sent.values()) - expected < len(sent)  # whole bytes of each tensor


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("strategy=fedavg", *TIERS), r"client \d has a budget of [\d,]+ params, but the smallest .* fedavg offers"),
        (("strategy=heterofl", "strategy.widths=[1.0,0.9]", "fleet=tiers"), "offer smaller ones"),
        (
            ("strategy=heterofl", "strategy.widths=[1.0,0.1]", "fleet=mixed"),
            r"client \d has a budget of [\d,]+ (macs|memory_bytes), but",
        ),
    ],
)
def test_what_does_not_fit_names_client_and_limit(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_of(*overrides)
