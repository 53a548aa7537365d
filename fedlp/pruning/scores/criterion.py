"""Protocol of pruning scores, and their checked evaluation.

A score maps a view of one layer to the saliency of each unit; units of the least saliency are removed first. Its class
is registered by name, ``@register("score", NAME)``, and its fields are its options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from fedlp.errors import CalibrationError, ConfigError
from fedlp.pruning.kernels.obs import Elimination
from fedlp.pruning.scores.view import NEEDS, LayerView


class UnitScore(Protocol):
    """A pruning score.

    Beside the two members below it may have the methods of :class:`RanksJointly`, where the saliency of a unit depends
    on the units removed before it, and of :class:`HasPrice`, where computing it takes long.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Evidence that it reads: names in :data:`~fedlp.pruning.scores.view.NEEDS`."""

    def __call__(self, view: LayerView) -> Tensor:
        """Return the saliency of each unit, (units,), finite, >= 0."""


@runtime_checkable
class RanksJointly(Protocol):
    """Score in which removals interact, such as optimal brain surgeon."""

    def eliminate(self, view: LayerView, count: int) -> Elimination:
        """Return the order in which ``count`` units are removed, and the losses along it."""


@runtime_checkable
class HasPrice(Protocol):
    """Score with a compute cost beyond the passes over the examples."""

    def macs(self, view: LayerView) -> float:
        """Return the multiply-accumulates of scoring all units of a layer."""


@dataclass(frozen=True)
class FunctionScore:
    """Score by a function of the view, with ``needs`` as an attribute of the function.

    Attributes
    ----------
    function : callable
        Returns the saliency of each unit.
    needs : frozenset of str
    name : str
        Its name in messages.
    """

    function: Callable[[LayerView], Tensor]
    needs: frozenset[str]
    name: str

    def __call__(self, view: LayerView) -> Tensor:
        """Return the saliency of each unit, (units,)."""
        return self.function(view)


def as_score(part: object) -> UnitScore:
    """Return a part of kind ``score`` as a score: an instance of a class unchanged, a function with its needs.

    Raises
    ------
    ConfigError
        If it does not follow the protocol; names the missing member.
    """
    inner = getattr(part, "func", part)
    if isinstance(inner, FunctionType) and isinstance(needs := getattr(inner, "needs", None), frozenset | set):
        part = FunctionScore(cast(Callable[[LayerView], Tensor], part), frozenset(needs), inner.__name__)
    check_score(part)
    return cast(UnitScore, part)


def check_score(score: object) -> None:
    """Raise ConfigError unless an object follows the protocol of scores; names the missing member."""
    name, needs = score_name(score), getattr(score, "needs", None)
    if not callable(score) or not isinstance(needs, frozenset | set):
        raise ConfigError(f"{name} is no score: it must have __call__(view) and needs, a set of {_list(NEEDS)}")
    if not needs <= NEEDS:
        unknown = _list(needs - NEEDS)
        raise ConfigError(f"score {name} needs {unknown}, which does not exist; choose from {_list(NEEDS)}")


def score_name(score: object) -> str:
    """Return the name of a score in messages: that of its class or function."""
    if isinstance(score, FunctionScore):
        return score.name
    return str(getattr(getattr(score, "func", score), "__name__", type(score).__name__))


def saliencies(score: UnitScore, view: LayerView) -> Tensor:
    """Return the saliency of each unit, (units,), finite, >= 0, on the CPU.

    Raises
    ------
    CalibrationError
        If the score returns an invalid value; names score and layer.
    """
    found = score(view)
    where = f"score {score_name(score)}, layer {view.layer.name}"
    if not isinstance(found, Tensor) or found.shape != (view.num_units,):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise CalibrationError(f"{where}: it must return one number for each of {view.num_units} units, not {got}")
    if not bool((found >= 0).all() & torch.isfinite(found).all()):
        raise CalibrationError(f"{where}: saliencies must be finite and at least 0; check the model and the data")
    return found.cpu()


def removal_order(score: UnitScore, view: LayerView, count: int) -> Elimination:
    """Return the order in which ``count`` units are removed; of equal saliencies the first unit goes first.

    Losses are NaN for a score that does not rank jointly.
    """
    if isinstance(score, RanksJointly):
        found = score.eliminate(view, count)
        if len(set(found.order)) != count or not set(found.order) <= set(range(view.num_units)):
            raise CalibrationError(
                f"score {score_name(score)}, layer {view.layer.name}: it must name {count} of {view.num_units} "
                "different units to remove"
            )
        return found
    order = torch.sort(saliencies(score, view), stable=True).indices[:count]
    return Elimination(tuple(order.tolist()), (count,), (float("nan"),))


def scoring_macs(score: UnitScore, view: LayerView) -> float:
    """Return the multiply-accumulates of scoring a layer, without the passes over the examples."""
    return score.macs(view) if isinstance(score, HasPrice) else 0.0


def _list(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(map(str, names)))
