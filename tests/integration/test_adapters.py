"""Adapters: only they are trained and sent; slices, merged copies, exports and peft's own layers agree with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from fedlp.apps.export import export_run
from fedlp.apps.federate import Federation
from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation import costs
from fedlp.federation.budgets import layer_costs, submodel_costs
from fedlp.federation.client import uploads
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.models import forward_logits, state_tensors
from fedlp.models.adapters import LoraLinear, LoraOptions, merge_adapters, without_adapters
from fedlp.models.unallocated import allocate
from fedlp.pruning.tracing.widths import cut_model
from fedlp.types import Keep, SubModel
from tests.integration.running import Finished, run

Once = Callable[..., Finished]
LM = (
    *("model=llama_tiny", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=48"),
    *("dataset=topics", "dataset.sequence_length=32", "dataset.max_train_examples=120", "local=adam", "local.lr=0.01"),
    *("dataset.max_test_examples=20", "num_clients=6", "clients_per_round=4", "num_rounds=2", "simulation.workers=2"),
    *("eval_batch_size=10", "local.batch_size=8"),
)
LORA = (*LM, "adapter=lora", "adapter.rank=4")
TIERS = ("fleet=tiers", "fleet.fractions=[1.0,0.8,0.65]", "fleet.limited=[params]")
PRUNED = (
    *("strategy=fedlp_plan", "strategy.submodels=pruned", "pruner=slimgpt", "calibration.examples=32"),
    *("strategy.sparsity=0", "upload=float32", "upload.entropy_coding=false", *TIERS),
)


def trained(plan: Federation) -> nn.Module:
    """Return a federation's model with adapters that do something."""
    model = plan.submodels.spec.build(0).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state_tensors(model).items():
        if "lora_b" in name:
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model


def test_an_adapter_adds_the_scaled_product() -> None:
    linear = nn.Linear(6, 5)
    layer = LoraLinear(linear, LoraOptions(rank=2, alpha=3.0))
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), linear(x), msg="B is zero at first")
    with torch.no_grad():
        layer.lora_b.normal_()
    wanted = x @ (linear.weight + 1.5 * layer.lora_b @ layer.lora_a).T + linear.bias
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [("strategy=fedavg",), (*PRUNED,)], ids=["fedavg", "pruned"])
def test_only_adapters_move_and_travel_up(strategy: tuple[str, ...], once: Once) -> None:
    done = once(*LORA, *strategy)
    plan = Federation(done.config)
    assert done.failures == []
    moved = {name for name, value in done.tensors.items() if not torch.equal(value, plan.initial_params()[name])}
    assert moved == {name for name in done.tensors if "lora_" in name}
    count = sum(value.numel() for name, value in done.tensors.items() if "lora_" in name)
    for client in (client for line in done.rounds for client in line["clients"]):
        assert client["params_up"] <= count
        assert client["bytes_up"] < 4 * count + 3000


def test_a_frozen_a_stays(once: Once) -> None:
    done = once(*LORA, "strategy=fedavg", "adapter.freeze_a=true")
    before = Federation(done.config).initial_params()
    moved = {name for name, value in done.tensors.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in done.tensors if "lora_b" in name}


def test_a_slice_of_the_adapters_is_the_slice_of_the_product() -> None:
    plan = Federation(compose((*LORA, "strategy=fedavg")))
    model, spec = trained(plan), plan.submodels.widths
    widths = {
        axis: Keep.from_indices(torch.arange(size)[1::2].numpy(), size)
        for axis, size in spec.axes.items()
        if size > 1 and axis != "hidden"
    }
    plain = cut_model(without_adapters(model), spec, widths)
    tokens = plan.submodels.spec.example_inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(
            forward_logits(cut_model(model, spec, widths), tokens), forward_logits(plain, tokens)
        )
        merged = merge_adapters(cut_model(model, spec, widths))
        torch.testing.assert_close(forward_logits(merged, tokens), forward_logits(plain, tokens))


def test_a_client_makes_no_copy_of_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: set[str] = set()
    differences = uploads._differences

    def spy(trained: Mapping[str, torch.Tensor], received: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.update(trained)
        return differences(trained, received)

    monkeypatch.setattr(uploads, "_differences", spy)
    run(tmp_path, *LORA, "upload=int8", "upload.values=deltas", "num_rounds=1", "simulation.workers=0")
    assert seen
    assert all("lora_" in name for name in seen)
    monkeypatch.setattr(costs, "is_small", lambda num_params, inputs: False)
    plan = Federation(compose(LORA))
    assert all(x.is_meta for x in plan.costs.model(SubModel()).parameters()), "nor for its costs"


def test_a_refit_prunes_base_and_adapters_together() -> None:
    plan = Federation(compose((*LORA, *PRUNED)))
    params = state_tensors(trained(plan))
    memory = plan.policy.prepare({}, 1, params)
    narrow = min(range(6), key=lambda client: plan.policy.context.budgets[client].params)
    submodel = plan.policy.assign(1, narrow, memory, params).submodel
    layout = plan.submodels.layout(submodel)
    offset = plan.policy.offset(narrow, memory).values
    assert offset
    assert not any("lora_" in name for name in offset)
    model = allocate(plan.costs.model(submodel))
    for name, tensor in state_tensors(model).items():
        tensor.copy_(layout.slice(params)[name] + offset.get(name, 0))
    kept = {axis: keep.count for axis, keep in submodel.widths.items()}
    kept = {layer.name: kept.get(layer.name, layer.num_units) for layer in plan.submodels.layers}
    base = Federation(compose((*LM, *PRUNED)))  # the same model, adapters merged into it beforehand
    merged = state_tensors(without_adapters(trained(plan)))
    widths, difference = base.pruner.prune(merged, kept)
    assert {axis: keep for axis, keep in widths.items() if not keep.is_full} == submodel.widths
    wanted = base.submodels.layout(submodel).slice(merged)
    for name, tensor in state_tensors(without_adapters(model)).items():
        torch.testing.assert_close(tensor, wanted[name] + difference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_exports_load_in_transformers_and_peft(once: Once, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    done = once(*LORA, *PRUNED)
    index = export_run(done.path, tmp_path / "out", onnx=False)
    plan = Federation(done.config)
    whole = next(name for name, entry in index["artefacts"].items() if (tmp_path / "out" / f"{name}-adapter").is_dir())
    model = plan.submodels.spec.build(0).eval()
    for name, tensor in state_tensors(model).items():
        tensor.copy_(done.tensors[name])
    tokens = plan.submodels.spec.example_inputs(2)
    with torch.no_grad():
        wanted = forward_logits(model, tokens)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / whole)
        torch.testing.assert_close(plain(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
        base = without_adapters(plan.submodels.spec.build(0)).eval()
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / f"{whole}-adapter").eval()
        torch.testing.assert_close(adapted(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    assert len(index["artefacts"]) == 3


def test_memory_counts_gradients_of_adapters_alone() -> None:
    found = {}
    for adapter, overrides in (("lora", LORA), ("none", LM)):
        plan = Federation(compose((*overrides, "strategy=fedavg")))
        whole = submodel_costs(SubModel(), plan.submodels, plan.costs, plan.config.local)
        model = layer_costs(plan.submodels, plan.config.local, Float32())
        row = torch.tensor([[layer.num_units for layer in plan.submodels.layers]], dtype=torch.float64).numpy()
        for name, value in zip(("params", "macs", "memory_bytes"), model.evaluate(row)[0], strict=False):
            assert value == pytest.approx(whole[name]), name
        found[adapter] = whole
        info = plan.submodels.spec.tensors.values()
        numbers = sum(math.prod(item.shape) for item in info), plan.submodels.spec.num_params
        whole["weights"] = 4 * numbers[0] + 12 * numbers[1]
    activations = {name: cost["memory_bytes"] - cost["weights"] for name, cost in found.items()}
    assert activations["lora"] > 0
    assert found["lora"]["weights"] < found["none"]["weights"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model=fedlp_mlp", "adapter=lora"), "causal language models"),
        ((*LORA, "adapter.targets=[qproj]"), "no linear layer has such a name"),
        ((*LORA, "adapter.rank=0"), "adapter.rank=0"),
        ((*LM, "adapter.name=dora"), "one of none, lora"),
        ((*LORA, "strategy=fedlp_plan", "strategy.criterion=update"), "does not go with"),
    ],
)
def test_what_cannot_be_adapted_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Federation(compose(overrides))
