r"""Server optimizers: the clients' average as a pseudo-gradient (FedOpt; Reddi et al., ICLR 2021, Algorithm 2).

With the pseudo-gradient :math:`\Delta = \text{average} - x`:

* ``none``: :math:`x \leftarrow x + \eta \Delta`, which for a rate of 1 is the average itself;
* ``momentum``: :math:`v \leftarrow \beta v + \Delta,\; x \leftarrow x + \eta v` (FedAvgM; Hsu et al., 2019);
* ``adam``: :math:`m \leftarrow \beta_1 m + (1 - \beta_1) \Delta,\; v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2,\;
  x \leftarrow x + \eta m / (\sqrt v + \epsilon)`, from :math:`m = 0, v = \epsilon^2` and without bias correction, as in
  the paper;
* ``yogi``: as ``adam`` with :math:`v \leftarrow v - (1 - \beta_2) \Delta^2 \operatorname{sign}(v - \Delta^2)`;
* ``adagrad``: as ``adam`` with :math:`v \leftarrow v + \Delta^2`.

Deviations
----------
An entry without an update this round neither moves nor changes its state: it has no pseudo-gradient, and
one of zero would let momentum move it. Buffers, such as running statistics, take the plain average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedlp.errors import ConfigError
from fedlp.registry import register

Slots = dict[str, tuple[Tensor, Tensor]]
"""State of one tensor by slot name: before and after the step."""


class ServerOptimizer(Protocol):
    """Protocol of the kind ``server_optimizer``."""

    def step(self, delta: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return the step of one tensor for its pseudo-gradient, and its state before and after by slot.

        Parameters
        ----------
        delta : Tensor
            Pseudo-gradient, float32 or wider. Not modified.
        state : mapping from slot name to Tensor
            State from the last step of this tensor; empty at first.
        """


@register("server_optimizer", "none")
@dataclass(frozen=True)
class PlainAverage:
    """The aggregate, or a step of ``lr`` towards it.

    Attributes
    ----------
    lr : float
        Step size, > 0.
    """

    lr: float = 1.0

    def __post_init__(self) -> None:
        _check_lr(self.lr)

    @property
    def is_identity(self) -> bool:
        """Whether the aggregate itself is the new model."""
        return self.lr == 1.0

    def step(self, delta: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return the step."""
        return self.lr * delta, {}


@register("server_optimizer", "momentum")
@dataclass(frozen=True)
class Momentum:
    r"""FedAvgM (Hsu et al., 2019).

    Attributes
    ----------
    lr : float
        Step size, > 0.
    momentum : float
        :math:`\beta`, in [0, 1).
    """

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        _check_decay("momentum", self.momentum)

    def step(self, delta: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return the step."""
        before = state.get("momentum", torch.zeros_like(delta))
        velocity = self.momentum * before + delta
        return self.lr * velocity, {"momentum": (before, velocity)}


@dataclass(frozen=True)
class Adaptive:
    r"""Adaptive server optimizer (Reddi et al., ICLR 2021).

    Attributes
    ----------
    lr : float
        Step size, > 0. By default no entry moves by more than 0.01 in the first step, whatever the scale of
        :math:`\Delta`: that step has size :math:`\eta (1 - \beta_1) / \sqrt{1 - \beta_2}` with ``adam`` and ``yogi``,
        :math:`\eta (1 - \beta_1)` with ``adagrad``.
    momentum : float
        :math:`\beta_1`, in [0, 1).
    beta2 : float
        :math:`\beta_2`, in [0, 1).
    epsilon : float
        Adaptivity (:math:`\tau` in the paper), > 0.
    """

    lr: float = 0.01
    momentum: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        _check_decay("momentum", self.momentum)
        _check_decay("beta2", self.beta2)
        if not self.epsilon > 0:
            raise ConfigError(f"server_optimizer.epsilon={self.epsilon} is not allowed: it must be above 0")

    def step(self, delta: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return the step."""
        momentum = state.get("momentum", torch.zeros_like(delta))
        variance = state.get("variance", torch.full_like(delta, self.epsilon**2))
        mean = self.momentum * momentum + (1.0 - self.momentum) * delta
        square = self._variance(variance, delta)
        step = self.lr * mean / (square.sqrt() + self.epsilon)
        return step, {"momentum": (momentum, mean), "variance": (variance, square)}

    def _variance(self, variance: Tensor, delta: Tensor) -> Tensor:
        return self.beta2 * variance + (1.0 - self.beta2) * delta**2


@register("server_optimizer", "adam")
@dataclass(frozen=True)
class Adam(Adaptive):
    """FedAdam (Reddi et al., ICLR 2021)."""


@register("server_optimizer", "yogi")
@dataclass(frozen=True)
class Yogi(Adaptive):
    """FedYogi (Reddi et al., ICLR 2021)."""

    def _variance(self, variance: Tensor, delta: Tensor) -> Tensor:
        square = delta**2
        return variance - (1.0 - self.beta2) * square * torch.sign(variance - square)


@register("server_optimizer", "adagrad")
@dataclass(frozen=True)
class Adagrad(Adaptive):
    """FedAdagrad (Reddi et al., ICLR 2021)."""

    lr: float = 0.03

    def _variance(self, variance: Tensor, delta: Tensor) -> Tensor:
        return variance + delta**2


def _check_lr(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise ConfigError(f"server_optimizer.lr={lr} is not allowed: it must be a finite number above 0")


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"server_optimizer.{name}={value} is not allowed: it must be in [0, 1)")


@torch.no_grad()
def apply_server_optimizer(
    optimizer: ServerOptimizer,
    old: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    covered: Callable[[str], bool | Tensor],
    trainable: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the new global values and the new state of the optimizer.

    Parameters
    ----------
    old, average : mapping from tensor name to Tensor
        Global values before the round, and the clients' average, equal to them for entries without an update.
        Computed in float32 or wider. Not modified.
    state : mapping from str to Tensor
        State from the last call; empty at first. Not modified.
    covered : callable
        Returns whether each entry of a tensor has an update: True or False for all, else booleans of its shape.
    trainable : collection of str
        Names that the optimizer moves; others take the average.

    Returns
    -------
    params : dict from tensor name to Tensor
        In the order of ``average``, of the same dtypes.
    state : dict from str to Tensor
        ``SLOT.NAME``, such as ``momentum.NAME``, of every tensor NAME that was ever covered.
    """
    if getattr(optimizer, "is_identity", False):
        return dict(average), {}
    params, new_state = dict(average), dict(state)
    slots_of: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        slot, _, owner = key.partition(".")
        slots_of.setdefault(owner, {})[slot] = value
    for name, target in average.items():
        mask = name in trainable and target.is_floating_point() and covered(name)
        if mask is False:
            continue
        wide = torch.promote_types(target.dtype, torch.float32)
        origin = old[name].to(wide)
        step, slots = optimizer.step(target.to(wide) - origin, slots_of.get(name, {}))
        params[name] = _merge(mask, (origin + step).to(target.dtype), old[name])
        for slot, (before, after) in slots.items():
            new_state[f"{slot}.{name}"] = _merge(mask, after, before)
    return params, new_state


def _merge(mask: bool | Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask, new, old) if isinstance(mask, Tensor) else new
