"""Adapters of several ranks on a whole base: sub-models, server steps in a run, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedlp.apps.federate import Federation
from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.budgets import submodel_costs
from fedlp.models import forward_logits, state_tensors
from fedlp.pruning.tracing.widths import cut_model
from fedlp.types import Keep, SubModel
from tests.integration.running import Finished
from tests.integration.test_adapters import LORA, trained

Once = Callable[..., Finished]
RANKED = (*LORA, "adapter.cut=ranks", "strategy=heterofl", "strategy.widths=[1.0,0.5,0.25]", "simulation.workers=1")
TIERS = ("fleet=tiers", "fleet.fractions=[1.0,0.5,0.25]", "fleet.limited=[upload_bytes]")
DEVICES = "+fleet.devices={pi: {memory_bytes: 4e9, flops: 1e10, uplink_bytes_s: 5e6}}"
RULES = ("flexlora", "flora", "hetlora")


def test_a_slice_has_the_first_ranks_of_all_adapters_and_the_whole_base() -> None:
    plan = Federation(compose(RANKED))
    assert dict(plan.submodels.widths.axes) == {"ranks": 4}
    half = SubModel(widths={"ranks": Keep.first(2, 4)})
    layout = plan.submodels.layout(half)
    assert {name.rpartition(".")[2] for name in layout.keeps} == {"lora_a", "lora_b"}
    model = trained(plan)
    cut = cut_model(model, plan.submodels.widths, half.widths)
    for name, tensor in state_tensors(model).items():
        if name.endswith("lora_b"):
            tensor[:, 2:] = 0.0
    tokens = plan.submodels.spec.example_inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(forward_logits(cut, tokens), forward_logits(model, tokens))
    costs = [submodel_costs(x, plan.submodels, plan.costs, plan.config.local) for x in (half, SubModel())]
    assert costs[0]["upload_bytes"] == costs[1]["upload_bytes"] / 2


@pytest.mark.parametrize("rule", [RULES[0], *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES[1:])])
def test_clients_of_several_ranks_learn(rule: str, once: Once) -> None:
    done = once(*RANKED, *TIERS, f"aggregator={rule}", "download=nf4")
    assert done.failures == []
    losses = [line["metrics"]["loss"] for line in done.rounds]
    assert losses[-1] < losses[0]
    spec, initial = Federation(done.config).submodels.spec, Federation(done.config).initial_params()
    changed = {name for name in spec.tensors if not torch.equal(done.tensors[name], initial[name])}
    bases = {f"{name.rpartition('.')[0]}.weight" for name in spec.tensors if name.endswith("lora_a")}
    assert changed & spec.frozen == (bases if rule == "flora" else set())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("adapter=none",), "of which there are none: set adapter=lora"),
        (("adapter.freeze_a=true",), "sends B alone"),
        (("upload.values=deltas",), "set upload.values=weights"),
        (("server_optimizer=momentum",), "drop server_optimizer=momentum"),
        (("privacy=central_dp", "strategy=fedavg", "privacy.noise_multiplier=1"), "needs aggregator=coverage_average"),
        (("strategy=fedavg", "rounds=asynchronous", DEVICES, "fleet.clock=virtual"), "drop rounds=asynchronous"),
        (("strategy=fedrolex", "strategy.widths=[1.0,0.5]"), "strategy=fedrolex gives others"),
        (("strategy=fedlp_homo",), "strategy=fedlp_homo sends parts"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_contradicts_is_refused(overrides: tuple[str, ...], says: str) -> None:
    base = [option for option in RANKED if not option.startswith(("strategy", "adapter=none"))]
    if overrides[0] == "adapter=none":
        base = [option for option in base if not option.startswith("adapter")]
    with pytest.raises(ConfigError, match=says):
        Federation(compose((*base, "aggregator=flexlora", *overrides)))


def test_what_is_cut_is_widths_or_ranks() -> None:
    with pytest.raises(ConfigError, match=r"adapter.cut=heads is not allowed: it must be widths or ranks"):
        Federation(compose((*LORA, "adapter.cut=heads")))
