"""Sub-models without some attentions, MLPs or residual blocks, in rounds: what they lack is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlp.apps.export import export_run
from fedlp.apps.federate import Federation
from fedlp.config import compose
from fedlp.errors import AllocationError, ConfigError
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.models import state_tensors
from fedlp.models.language import import_transformers
from tests.integration.running import Finished

Once = Callable[..., Finished]
LOWEST = 0.1
DEPTH = (
    *("model=llama_tiny", "dataset=topics", "dataset.max_train_examples=60", "dataset.max_test_examples=20"),
    *("dataset.sequence_length=32", "num_clients=6", "clients_per_round=6", "num_rounds=2", "local.batch_size=4"),
    *("strategy=fedlp_plan", "strategy.submodels=pruned", "strategy.sparsity=0", "pruner=slimgpt", "pruner.depth=true"),
    *("calibration.examples=16", "calibration.batch_size=8", "upload=int8", "upload.entropy_coding=false"),
    *("fleet=tiers", f"fleet.fractions=[0.5,{LOWEST}]", "fleet.limited=[memory_bytes]", "simulation.workers=1"),
)


def prepared(*overrides: str) -> tuple[Federation, PlanPolicy, dict[str, Tensor], Mapping[str, Tensor]]:
    plan = Federation(compose(overrides))
    assert isinstance(plan.policy, PlanPolicy)
    params = plan.initial_params()
    return plan, plan.policy, params, plan.policy.prepare({}, 1, params)


def absent(
    plan: Federation, policy: PlanPolicy, params: Mapping[str, Tensor], memory: Mapping[str, Tensor]
) -> list[set[str]]:
    """Return the tensors that each client's sub-model lacks."""
    names = set(plan.submodels.names)
    submodels = [policy.assign(1, client, memory, params).submodel for client in range(6)]
    return [names - plan.submodels.layout(submodel).name_set for submodel in submodels]


def test_a_tenth_of_the_memory_is_within_reach() -> None:
    plan, policy, params, memory = prepared(*DEPTH)
    for client in range(6):
        submodel, budget = policy.assign(1, client, memory, params).submodel, policy.context.budgets[client]
        assert budget is not None
        cost = plan.costs.model(submodel)
        layout = plan.submodels.layout(submodel)
        assert set(layout.names) == set(state_tensors(cost))
    lacking = absent(plan, policy, params, memory)
    assert any(lacking)
    off = Federation(compose([*(x for x in DEPTH if x != "pruner.depth=true")]))
    smallest = min(range(6), key=lambda client: policy.context.budgets[client].memory_bytes)  # type: ignore[union-attr]
    with pytest.raises(AllocationError, match="out of reach"):
        off.policy.assign(1, smallest, {}, params)


@pytest.mark.slow
def test_what_nobody_holds_stays_and_what_some_hold_is_theirs(once: Once) -> None:
    overrides = (*DEPTH, f"fleet.fractions=[{LOWEST}]")
    done = once(*overrides)
    assert done.failures == []
    plan, policy, params, memory = prepared(*overrides)
    lacking = set.intersection(*absent(plan, policy, params, memory))
    assert lacking
    for name in lacking:
        assert torch.equal(done.tensors[name], params[name]), name
    assert any(not torch.equal(done.tensors[name], params[name]) for name in params.keys() - lacking)


def test_depth_needs_calibration_on_the_server() -> None:
    with pytest.raises(ConfigError, match=r"calibrate_on=clients does not go with pruner\.depth=true"):
        Federation(compose([*DEPTH, "strategy.calibrate_on=clients"]))


@pytest.mark.slow
def test_exported_tiers_load_without_fedlp(once: Once, tmp_path: Path) -> None:
    done = once(*DEPTH)
    assert done.failures == []
    index = export_run(done.path, tmp_path / "out", onnx=False)
    auto = import_transformers().AutoModelForCausalLM
    for folder in set(index["clients"].values()):
        model = auto.from_pretrained(tmp_path / "out" / folder, trust_remote_code=True)
        assert sum(p.numel() for p in model.parameters()) == index["artefacts"][folder]["params"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [("adapter=lora",), ("strategy.sparsity=0.3", "upload=int4", "allocator=owl")])
def test_adapters_and_partial_uploads_of_what_is_held(more: tuple[str, ...], once: Once) -> None:
    done = once(*DEPTH, *more)
    assert done.failures == []
    assert len(done.rounds) == 2
