"""Pruned sub-models: what a client receives is the centrally pruned model, what it returns lands where it belongs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlp.apps.export import export_run
from fedlp.apps.federate import Federation
from fedlp.apps.submodel_pruning import first_examples
from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.models import state_tensors
from fedlp.pruning.pruner import Pruned, Pruner
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import trace_widths
from fedlp.rng import Stream, generator
from fedlp.training.calibration_data import make_method
from fedlp.training.loop import train_locally
from fedlp.types import SubModel
from tests.integration.running import TINY, Finished, run
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
TIERS = ("fleet=tiers", "fleet.fractions=[1.0,0.6,0.3]", "fleet.limited=[params]")
MLP = ("model=fedlp_mlp", "model.variant=deep")
METHOD = (
    *(
        *TINY[len(MLP) :],
        "strategy=fedlp_plan",
        "strategy.submodels=pruned",
        "pruner=slimgpt",
        "calibration.examples=64",
    ),
    *("strategy.sparsity=0", "upload=float32", "upload.entropy_coding=false", *TIERS),
)
PRUNED = (*METHOD, *MLP)
CNN = (*METHOD, "model=fedlp_cnn", "pruner=obs", "pruner.damping=0.01")


def prepared(*overrides: str) -> tuple[Federation, PlanPolicy, dict[str, Tensor], Mapping[str, Tensor]]:
    """Return a federation, its policy, the initial values and the memory that the first round begins with."""
    plan = Federation(compose(overrides))
    assert isinstance(plan.policy, PlanPolicy)
    params = plan.initial_params()
    return plan, plan.policy, params, plan.policy.prepare({}, 1, params)


def central(plan: Federation, params: Mapping[str, Tensor], kept: Mapping[str, int], centred: bool) -> Pruned:
    """Return the model pruned as ``fedlp-prune`` does it, in one place."""
    model, spec, config = plan.submodels.spec.build(0).eval(), plan.submodels.spec, plan.config
    for name, tensor in state_tensors(model).items():
        tensor.copy_(params[name])
    widths = trace_widths(model, spec.example_inputs(1))
    layers = find_layers(model, widths, not spec.reads_tokens)
    data = first_examples(plan.data.train, plan.info, config.calibration.examples, 32, config.seed, "cpu")
    method = replace(make_method(config.pruner), keeps_batch_norm=True, centred=centred)
    return Pruner(model, widths, layers, data, method).prune(kept)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [PRUNED, CNN], ids=["mlp", "cnn, obs"])
def test_a_client_receives_the_centrally_pruned_model(overrides: tuple[str, ...]) -> None:
    plan, policy, params, memory = prepared(*overrides)
    limits = {budget.params for budget in policy.context.budgets if budget is not None}
    assert len(limits) == 3
    for client_id in range(6):
        submodel = policy.assign(1, client_id, memory, params).submodel
        offset, layout = policy.offset(client_id, memory).values, plan.submodels.layout(submodel)
        budget = policy.context.budgets[client_id]
        assert budget is not None
        assert budget.params is not None
        assert 0.9 * budget.params < layout.num_params() <= budget.params
        if not submodel.widths:
            assert not offset
            continue
        kept = {layer.name: layer.num_units for layer in plan.submodels.layers}
        kept |= {axis: keep.count for axis, keep in submodel.widths.items()}
        pruned = central(plan, params, kept, centred=make_method(plan.config.pruner).centred)
        assert {axis: keep for axis, keep in pruned.widths.items() if not keep.is_full} == submodel.widths
        wanted, values = state_tensors(pruned.model), layout.slice(params)
        for name in layout.names:
            if name not in plan.submodels.statistics:
                torch.testing.assert_close(values[name] + offset.get(name, 0), wanted[name], rtol=1e-5, atol=1e-6)
        assert offset, "what stays is refitted"


def test_without_training_the_global_model_stays(once: Once) -> None:
    done = once(*PRUNED, "local.lr=1e-30", "clients_per_round=6")
    before = Federation(done.config).initial_params()
    assert done.failures == []
    for name, value in done.tensors.items():
        assert torch.equal(value, before[name])


def test_differences_land_at_global_coordinates(once: Once) -> None:
    overrides = (*PRUNED, "clients_per_round=6", "num_rounds=1", "fleet.fractions=[0.6,0.3]")
    done = once(*overrides)
    plan, policy, params, memory = prepared(*overrides)
    sums = {name: np.zeros(tensor.shape) for name, tensor in params.items()}
    counts = {name: np.zeros(tensor.shape) for name, tensor in params.items()}
    for client_id in range(6):
        submodel = policy.assign(1, client_id, memory, params).submodel
        kept = {axis: keep.count for axis, keep in submodel.widths.items()}
        kept = {layer.name: kept.get(layer.name, layer.num_units) for layer in plan.submodels.layers}
        model = central(plan, params, kept, centred=False).model
        before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
        examples = plan.data.train.select(plan.parts[client_id])
        rng = generator(plan.config.seed, Stream.LOCAL_TRAINING, 1, client_id)
        train_locally(model, examples, plan.info, plan.config.local, rng)
        layout = plan.submodels.layout(submodel)
        for name, after in state_tensors(model).items():
            indices = [keep.indices() for keep in layout.keeps[name]] if name in layout.keeps else []
            where = np.ix_(*indices) if indices else ...
            sums[name][where] += len(examples) * (after - before[name]).double().numpy()
            counts[name][where] += len(examples)
    for name, value in done.tensors.items():
        expected = params[name].double().numpy() + sums[name] / np.maximum(counts[name], 1)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-3, atol=1e-5)
        assert np.array_equal(value.numpy()[counts[name] == 0], params[name].numpy()[counts[name] == 0])


@pytest.mark.slow
def test_workers_and_a_stop_change_no_byte(once: Once, tmp_path: Path) -> None:
    overrides = (*PRUNED, "strategy.sparsity=0.3", "upload=int4", "strategy.refit_every=2")
    whole = once(*overrides, "num_rounds=3")
    assert run(tmp_path / "one", *overrides, "num_rounds=3", "simulation.workers=1").model == whole.model
    shutil.copytree(once(*overrides, "num_rounds=2").path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 3), whole)


@pytest.mark.slow
def test_a_refit_prunes_the_model_of_its_round() -> None:
    plan, policy, params, memory = prepared(*PRUNED)
    moved = {name: value + 0.01 * value.abs().mean() for name, value in params.items()}
    assert policy.prepare(memory, 2, moved) is memory
    again = policy.prepare(memory, 3, moved)
    assert policy.prepare(again, 3, params) is again, "once in a round"
    narrow = next(client for client in range(6) if policy.assign(1, client, memory, params).submodel.widths)
    fresh = policy.prepare({}, 1, moved)
    for name, values in policy.offset(narrow, fresh).values.items():
        torch.testing.assert_close(policy.offset(narrow, again).values[name], values)
    assert not torch.equal(fresh[offset_name(fresh)], memory[offset_name(fresh)])
    assert plan.policy.assign(4, narrow, again, moved).submodel == policy.assign(1, narrow, fresh, moved).submodel
    _, once, _, memory = prepared(*PRUNED, "strategy.refit_every=0")
    assert once.prepare(memory, 3, moved) is memory


def offset_name(memory: Mapping[str, Tensor]) -> str:
    return next(name for name in memory if name.startswith("offset."))


def test_what_is_sent_lies_within_what_is_held() -> None:
    plan, policy, params, memory = prepared(*PRUNED, "strategy.sparsity=0.5")
    for client_id in range(6):
        assigned = policy.assign(3, client_id, memory, params)
        for axis, keep in assigned.returned.items():
            if axis in assigned.submodel.widths:
                keep.within(assigned.submodel.widths[axis])  # or it raises
        assert assigned.returned
        assert not assigned.evidence, "the server measured all there is to measure"
    assert isinstance(plan.policy, PlanPolicy)


@pytest.mark.slow
def test_exported_tiers_are_the_pruned_models(once: Once, tmp_path: Path) -> None:
    done = once(*PRUNED, "local.lr=1e-30", "clients_per_round=6")
    index = export_run(done.path, tmp_path / "out", onnx=False)
    plan, policy, params, memory = prepared(*PRUNED, "local.lr=1e-30", "clients_per_round=6")
    assert len(index["artefacts"]) == 3
    for client, folder in index["clients"].items():
        submodel: SubModel = policy.assign(1, int(client), memory, params).submodel
        kept = {axis: keep.count for axis, keep in submodel.widths.items()}
        if not kept:
            continue
        kept = {layer.name: kept.get(layer.name, layer.num_units) for layer in plan.submodels.layers}
        wanted = state_tensors(central(plan, params, kept, centred=False).model)
        stored = load_file(tmp_path / "out" / folder / "model.safetensors")
        for name, value in wanted.items():
            torch.testing.assert_close(stored[name], value, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "out/artefacts.json").read_text())["strategy"] == "fedlp_plan"


def test_weights_cannot_travel_whole() -> None:
    with pytest.raises(ConfigError, match=r"upload\.values=deltas"):
        Federation(compose((*PRUNED, "upload.values=weights")))
