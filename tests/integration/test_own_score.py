"""A score of one's own by ``module:object``: in the rounds of a federation and in one-shot pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fedlp
from fedlp.pruning.scores.view import LayerView
from tests.integration.running import Finished

Once = Callable[..., Finished]
IN_ROUNDS = (
    *("model=fedlp_cnn", "dataset.max_train_examples=120", "dataset.max_test_examples=40", "simulation.workers=2"),
    *("num_clients=6", "clients_per_round=4", "local.batch_size=8"),
    *("strategy=fedlp_plan", "strategy.unit_selection=client", "strategy.train_sent=false"),
    *("strategy.regrow=0", "upload=float32", "num_rounds=1", "calibration.examples=8"),
)
HERE = "tests.integration.test_own_score"


@dataclass(frozen=True)
class SquaredNorm:
    """The score "magnitude", by other means.

    Attributes
    ----------
    sign : float
        1 to remove small weights first, -1 large ones.
    """

    sign: float = 1.0
    needs = frozenset({"weights"})

    def __call__(self, view: LayerView) -> Tensor:
        return view.sum_coupled({name: weight * weight for name, weight in view.parameters.items()}) ** self.sign


@pytest.mark.slow
def test_it_chooses_units_in_a_round(once: Once) -> None:
    own = once(*IN_ROUNDS, f"pruner={HERE}:SquaredNorm")
    assert own.model == once(*IN_ROUNDS, "pruner=magnitude").model
    assert own.model != once(*IN_ROUNDS, f"pruner={HERE}:SquaredNorm", "pruner.sign=-1").model


def test_it_chooses_units_in_one_shot_pruning() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    data = (torch.randn(40, 6), torch.randint(0, 3, (40,)))

    def widths(score: str, **pruner: float) -> dict[str, object]:
        return dict(fedlp.prune(net, data, sparsity=0.5, score=score, allocator="uniform", pruner=pruner).widths)

    assert widths(f"{HERE}:SquaredNorm") == widths("magnitude")
    assert widths(f"{HERE}:SquaredNorm", sign=-1.0) != widths("magnitude")
