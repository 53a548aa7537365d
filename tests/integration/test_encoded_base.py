"""A base that stays encoded on clients: the model of a float32 client, less memory, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedlp.apps.federate import Federation
from fedlp.config import compose
from fedlp.errors import ConfigError
from fedlp.federation.budgets import layer_costs, submodel_costs
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.models.encoded_base import EncodedEmbedding, EncodedLinear, EncodedLoraLinear
from fedlp.types import Keep, SubModel
from tests.integration.running import Finished
from tests.integration.test_adapters import LORA, PRUNED
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
ENCODED = (*LORA, "adapter.base=encoded", "simulation.workers=1")
NF4 = ("download=nf4", "download.block_size=16")
SLICES = ("strategy=heterofl", "strategy.widths=[1.0,0.5]")
RANKS = ("adapter.cut=ranks", "strategy=heterofl", "strategy.widths=[1.0,0.5]", "aggregator=flora")
SETTINGS = {
    "nf4": ("strategy=fedavg", "evaluation=both", "dataset.client_test_fraction=0.2", *NF4),
    "int8": ("strategy=fedavg", "download=int8"),
    "bfloat16": ("strategy=fedavg", "download=bfloat16", "local.precision=bfloat16"),
    "slices": (*SLICES, *NF4),
    "pruned": (*PRUNED, "download=block8"),
    "depth": ("strategy=fedlp_hetero", *NF4),
    "flora": (*RANKS, *NF4),
}


@pytest.mark.parametrize(
    "setting", ["nf4", *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name != "nf4")]
)
def test_it_trains_the_model_of_a_client_that_widened_it_once(setting: str, once: Once) -> None:
    encoded = once(*ENCODED, *SETTINGS[setting])
    wide = once(*ENCODED, *SETTINGS[setting], "adapter.base=float32")
    assert encoded.failures == wide.failures == []
    assert encoded.model == wide.model, "bit for bit"
    assert [line["bytes_down"] for line in encoded.rounds] == [line["bytes_down"] for line in wide.rounds]
    assert encoded.rounds[-1]["metrics"] == wide.rounds[-1]["metrics"]


def test_a_stop_changes_nothing_and_a_lost_base_comes_again(once: Once, tmp_path: Path) -> None:
    options = (*ENCODED, *SETTINGS["nf4"], "num_rounds=3", "clients_per_round=6")
    shutil.copytree(once(*options, "num_rounds=1").path, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "lost")
    assert_same(go_on(tmp_path / "run", 3), once(*options))
    shutil.rmtree(tmp_path / "lost/clients/frozen/2")
    done = go_on(tmp_path / "lost", 3)
    assert done.failures == [(2, 2, "raised")]
    assert "lost the frozen tensors" in done.rounds[1]["failures"][0]["message"]


def test_a_client_holds_no_wide_weight() -> None:
    plan = Federation(compose((*ENCODED, *SLICES, *NF4)))
    runtime = plan.runtime("")
    half = SubModel(widths={axis: Keep.first(size // 2, size) for axis, size in plan.submodels.widths.axes.items()})
    for submodel in (SubModel(), half):
        model, state = runtime._shaped(submodel, encoded=True)
        assert all("lora_" in name or tensor.ndim == 1 for name, tensor in state.items())
        kinds = {type(module) for module in model.modules()}
        assert kinds >= {EncodedLoraLinear, EncodedEmbedding, EncodedLinear}, "the output is tied to the embedding"


@pytest.mark.parametrize("download", [NF4, ("download=int8",), ("download=block4",), ("download=bfloat16",)])
def test_budgets_count_the_base_as_it_is_held(download: tuple[str, ...]) -> None:
    found: dict[str, list[tuple[float, float]]] = {"float32": [], "encoded": []}
    for base, costs in found.items():
        plan = Federation(compose((*ENCODED, "strategy=fedavg", *download, f"adapter.base={base}")))
        given = plan.submodels, plan.costs, plan.config.local, plan.base_encoding
        model = layer_costs(plan.submodels, plan.config.local, Float32(), plan.base_encoding)
        for part in (1.0, 0.5):
            counts = {x.name: max(1, int(part * x.num_units)) for x in plan.submodels.layers}
            widths = {x.name: Keep.first(counts[x.name], x.num_units) for x in plan.submodels.layers}
            exact = submodel_costs(SubModel(widths=widths if part < 1 else {}), *given)["memory_bytes"]
            row = torch.tensor([list(counts.values())], dtype=torch.float64).numpy()
            costs.append((exact, model.evaluate(row)[0][2]))
    tensors = plan.submodels.spec.tensors
    for (wide, wide_bound), (narrow, narrow_bound) in zip(*found.values(), strict=True):
        rounded_up = (wide - narrow) - (wide_bound - narrow_bound)
        assert -4 * len(plan.submodels.spec.frozen) <= rounded_up <= 1e-6, "a part of a block at the end of a weight"
    assert found["encoded"][0][1] <= found["encoded"][0][0] + 1e-6, "a budget of the whole model holds it"
    base = sum(info.shape[0] * info.shape[1] for info in tensors.values() if len(info.shape) > 1 and not info.trainable)
    assert 3 * base < found["float32"][0][0] - found["encoded"][0][0] < 8 * base


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("strategy=fedavg",), "keeps the base as it was sent, in float32; choose download=nf4"),
        (("strategy=fjord", "strategy.widths=[1.0,0.5]", *NF4), "slices the base at every step"),
        (("strategy=fedlp_plan", "strategy.unit_selection=client", *NF4), "set strategy.submodels=pruned"),
        (("strategy=fedavg", "adapter.base=nf4", *NF4), "adapter.base=nf4 is not allowed: it must be float32 or enc"),
    ],
)
def test_what_needs_its_values_is_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Federation(compose((*ENCODED, *overrides)))
