"""Fitness of candidates that clients judge: relative to uniform on the same clients, and never asked for twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedlp.apps.client_fitness import ClientFitness
from fedlp.errors import CalibrationError
from fedlp.federation.oneshot.plans import Plan
from fedlp.federation.oneshot.settings import Share
from fedlp.types import PrunableLayer

LAYERS = [PrunableLayer(name, 8, 1, 8, (), (), 0.0) for name in "ab"]
UNIFORM = [{"a": 6, "b": 6}, {"a": 4, "b": 4}]
CANDIDATES = [[{"a": 7, "b": 5}, {"a": 5, "b": 3}], [{"a": 5, "b": 7}, {"a": 4, "b": 4}]]


class Judge:
    """A judge whose clients drop out: those of each question diverge by another factor."""

    def __init__(self, *factors: float) -> None:
        self.factors, self.asked = list(factors), list[tuple[int, Share]]()

    def divergences(self, plans: Sequence[Plan], share: Share) -> list[float]:
        self.asked.append((len(plans), share))
        factor = self.factors.pop(0)
        return [factor * sum((8 - kept) ** 2 for kept in plan.values()) for plan in plans]


def make(judge: Judge, file: Path, told: list[float]) -> ClientFitness:
    return ClientFitness(judge, LAYERS, UNIFORM, file, told.append)  # type: ignore[arg-type]


def test_a_client_that_drops_out_leaves_candidates_comparable(tmp_path: Path) -> None:
    told: list[float] = []
    judge = Judge(1.0, 0.3)
    fitness = make(judge, tmp_path / "search.jsonl", told)
    first, second = fitness(CANDIDATES[:1], True), fitness(CANDIDATES[1:], True)
    assert first + second == pytest.approx([((1 + 9) / 8 + (9 + 25) / 32) / 2, ((9 + 1) / 8 + 1) / 2])
    assert judge.asked == [(4, Share.FITNESS), (4, Share.FITNESS)]
    assert told == pytest.approx([first[0], min(first + second)])


def test_what_is_on_record_is_not_asked_for_again(tmp_path: Path) -> None:
    file, told = tmp_path / "search.jsonl", list[float]()
    found = make(Judge(1.0), file, told)(CANDIDATES, True)
    judge = Judge(5.0)
    again = make(judge, file, told)
    assert again(CANDIDATES, True) == found
    assert judge.asked == []
    again(CANDIDATES, False)  # of other examples
    assert judge.asked == [(6, Share.PART)]
    assert len(told) == 2


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_uniform_sparsity_without_an_effect_is_one_line(factor: float, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="uniform sparsity changes nothing"):
        make(Judge(factor), tmp_path / "search.jsonl", [])(CANDIDATES, True)
