"""A score of one's own: one class, for one-shot pruning and for a client in a round; its mistakes are told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedlp import registry
from fedlp.errors import CalibrationError, ConfigError
from fedlp.federation.client.unit_choice import best_units, score_units
from fedlp.models.cost import Macs
from fedlp.pruning.kernels.obs import Elimination
from fedlp.pruning.pruner import Calibration, Method, Pruner
from fedlp.pruning.scores.criterion import UnitScore, as_score
from fedlp.pruning.scores.view import LayerView
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import WidthSpec, trace_widths
from fedlp.types import PrunableLayer


@dataclass(frozen=True)
class Activity:
    """Mean square of a unit's activations, to some power."""

    power: float = 1.0
    needs = frozenset({"weights", "input_norms"})

    def __call__(self, view: LayerView) -> Tensor:
        return view.sum_columns(lambda reader: reader.square_mean) ** self.power


class FromTheLast:
    """Units from the last one on, whose losses it makes up."""

    needs = frozenset({"model"})

    def __call__(self, view: LayerView) -> Tensor:
        return self.eliminate(view, view.num_units - 1).saliency(view.num_units)

    def eliminate(self, view: LayerView, count: int) -> Elimination:
        assert isinstance(view.model, nn.Module)
        assert view.data.num_examples == 40
        order = tuple(range(view.num_units - 1, -1, -1))[:count]
        return Elimination(order, (1,) * count, tuple(float(i + 1) ** 2 for i in range(count)))

    def macs(self, view: LayerView) -> float:
        return 1000.0 * view.num_units


def even_units(view: LayerView) -> Tensor:
    """Return a score that is a function."""
    return (torch.arange(view.num_units) % 2 == 0).double()


even_units.needs = frozenset()  # type: ignore[attr-defined]


def view_nothing(view: LayerView) -> Tensor:
    """Return a score without needs."""
    return torch.zeros(view.num_units)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PARTS", dict(registry._PARTS))
    registry.register("score", "activity")(Activity)


@pytest.fixture
def data() -> Calibration:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return Calibration(list(inputs.split(20)), [torch.zeros(20, dtype=torch.int64)] * 2)


def make_model(data: Calibration) -> tuple[nn.Module, WidthSpec, tuple[PrunableLayer, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    spec = trace_widths(model, data.batches[0])
    return model, spec, find_layers(model, spec)


def activities(model: nn.Module, data: Calibration) -> list[Tensor]:
    hidden = torch.cat(list(data.batches))
    found = []
    for layer in model:  # type: ignore[attr-defined]
        hidden = layer(hidden)
        if isinstance(layer, nn.ReLU):
            found.append(hidden.detach().double().square().mean(dim=0))
    return found


@pytest.mark.usefixtures("registered")
def test_it_chooses_in_one_shot_pruning(data: Calibration) -> None:
    model, spec, layers = make_model(data)
    method = Method(as_score(registry.lookup("score", "activity")(power=2.0)), recovery="none")
    pruned = Pruner(model, spec, layers, data, method).prune({layer.name: 3 for layer in layers})
    first = activities(model, data)[0]
    assert pruned.widths["0"].indices().tolist() == sorted(first.argsort(descending=True)[:3].tolist())
    assert all(layer.loss != layer.loss for layer in pruned.layers), "no loss is known"


@pytest.mark.usefixtures("registered")
def test_it_scores_for_a_client_in_a_round(data: Calibration) -> None:
    model, spec, layers = make_model(data)
    method = Method(as_score(registry.lookup("score", "activity")()), recovery="none")
    found, macs = score_units(model, model, spec, layers, data, method, Macs(10.0, 30.0))
    for layer, wanted in zip(layers, activities(model, data), strict=True):
        few = torch.corrcoef(torch.stack([found[layer.name], wanted]))[0, 1]
        assert float(few) > 0.5, "a few rows of each layer resemble all"
    assert macs == 40 * 10.0
    assert best_units(found["0"], 1).indices().tolist() == [int(found["0"].argmax())]


def test_one_that_ranks_jointly_is_asked_for_its_order(data: Calibration) -> None:
    model, spec, layers = make_model(data)
    method = Method(FromTheLast(), recovery="none")
    pruned = Pruner(model, spec, layers, data, method).prune({"0": 5, "2": 4})
    assert pruned.widths["0"].runs == ((0, 5),)
    assert [layer.loss for layer in pruned.layers] == [9.0, 0.0]
    found, macs = score_units(model, model, spec, layers, data, method, Macs(10.0, 30.0))
    assert found["2"].tolist() == [5.0, 5.0, 3.0, 1.0]
    assert macs == 12_000.0


def test_a_function_with_needs_will_do(data: Calibration) -> None:
    model, spec, layers = make_model(data)
    score = as_score(registry.lookup("score", "tests.unit.pruning.test_own_score:even_units"))
    pruned = Pruner(model, spec, layers, data, Method(score, recovery="none")).prune({"0": 4, "2": 2})
    assert pruned.widths["0"].indices().tolist() == [0, 2, 4, 6]


# ---- mistakes
def make_bad(result: object, needs: object = frozenset({"weights"})) -> UnitScore:
    class Bad:
        def __call__(self, view: LayerView) -> object:
            return result(view) if callable(result) else result

    Bad.needs = needs  # type: ignore[attr-defined]
    return Bad()  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("result", "needs", "words"),
    [
        (torch.zeros(3), {"weights"}, r"score Bad, layer 0: .* one number for each of 8 units, not shape \(3,\)"),
        ([0.0] * 8, {"weights"}, "for each of 8 units, not list"),
        (torch.full((8,), -1.0), {"weights"}, "score Bad, layer 0: saliencies must be finite and at least 0"),
        (torch.full((8,), torch.nan), {"weights"}, "saliencies must be finite"),
        (lambda view: view.parameters, set(), "a score reads parameters of the model .* add 'weights' to its needs"),
        (lambda view: view.readers[0].mean, {"weights"}, "reads input statistics of 2 .* add 'input_norms'"),
        (lambda view: view.readers[0].hessian(True), {"weights", "input_norms"}, "add 'moments' to its needs"),
        (lambda view: view.gradients, {"weights"}, "reads gradients of the loss .* add 'gradients'"),
        (lambda view: view.model, {"weights"}, "reads the model .* add 'model'"),
    ],
)
def test_what_a_score_does_wrong_is_one_line(result: object, needs: set[str], words: str, data: Calibration) -> None:
    model, spec, layers = make_model(data)
    method = Method(make_bad(result, frozenset(needs)), recovery="none")
    with pytest.raises((CalibrationError, ConfigError), match=words):
        Pruner(model, spec, layers, data, method).prune({"0": 4, "2": 4})
    with pytest.raises((CalibrationError, ConfigError), match=words):
        score_units(model, model, spec, layers, data, method, Macs(1.0, 1.0))


def test_an_order_of_the_wrong_length_is_refused(data: Calibration) -> None:
    class Short(FromTheLast):
        def eliminate(self, view: LayerView, count: int) -> Elimination:
            return super().eliminate(view, count - 1)

    model, spec, layers = make_model(data)
    with pytest.raises(CalibrationError, match="score Short, layer 0: it must name 4 of 8 different units"):
        Pruner(model, spec, layers, data, Method(Short(), recovery="none")).prune({"0": 4, "2": 4})


def test_what_is_no_score_is_told() -> None:
    with pytest.raises(ConfigError, match=r"score Bad needs moment, which does not exist; choose from gradients, in"):
        Method(make_bad(None, frozenset({"moment"})))
    with pytest.raises(ConfigError, match=r"Calibration is no score: it must have __call__\(view\) and needs"):
        Method(Calibration([], []))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="len is no score: it must have"):
        as_score(partial(len))
    with pytest.raises(ConfigError, match="view_nothing is no score: it must have"):
        as_score(view_nothing)
