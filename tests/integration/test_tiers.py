"""The table of tiers at the end of a run, and what devices allocate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedlp.apps.federate import Federation
from fedlp.apps.tier_table import tier_table
from fedlp.config import compose
from fedlp.federation.budgets import submodel_costs
from fedlp.models.forward import shapes_only
from fedlp.types import SubModel
from tests.integration.running import Finished
from tests.integration.test_pooled_submodels import LLAMA

Once = Callable[..., Finished]


def test_the_table_of_tiers(once: Once) -> None:
    done = once(*LLAMA, "evaluation.tiers=true", "local.lr=1e-30", "strategy.calibrate_on=server")
    tiers = done.manifest["tiers"]
    assert list(tiers) == ["1", "0.8", "0.6"], "from the largest to the smallest"
    assert [entry["clients"] for entry in tiers.values()] == [2, 2, 2]
    totals = done.manifest["totals"]
    for key in ("bytes_up", "bytes_down"):
        assert sum(entry[key] for entry in tiers.values()) == totals[key]
    for name, entry in tiers.items():
        assert entry["perplexity"] == done.manifest["final_metrics"][f"tier_{name}_perplexity"]
    budgets = done.manifest["budgets"]
    assert set(budgets) == set(tiers)
    for limits in budgets.values():
        assert limits
        assert all(0 < one["used"] <= one["limit"] * (1 + 1e-9) for one in limits.values())
    text = tier_table(tiers)
    assert text.splitlines()[0].split() == ["tier", "clients", "params", "memory", "up", "down", "perplexity", "loss"]
    assert len(text.splitlines()) == 4


@pytest.mark.slow
def test_memory_is_message_weights_gradients_state_and_activations() -> None:
    needed = []
    for batch_size in (1, 3):
        plan = Federation(compose((*LLAMA, "local=adam", f"local.batch_size={batch_size}")))
        needed.append(submodel_costs(SubModel(), plan.submodels, plan.costs, plan.config.local))
    activations = (needed[1]["memory_bytes"] - needed[0]["memory_bytes"]) / 2
    assert activations > 0
    assert needed[0]["memory_bytes"] - activations == pytest.approx(5 * 4 * needed[0]["params"])


def test_attention_keeps_no_matrix_of_weights() -> None:
    queries = torch.zeros(1, 2, 256, 8, requires_grad=True)

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    kept = {}
    for device in ("meta", "cpu"):
        largest = 0
        with shapes_only(Attention(), queries, device) as (shapes, example):
            example.requires_grad_()

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal largest
                largest = max(largest, tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                shapes(example)
        kept[device] = largest
    assert kept["cpu"] == 2 * 256 * 8
    assert kept["meta"] == 2 * 256 * 256
