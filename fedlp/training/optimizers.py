"""Optimizers of local training.

An optimizer is registered as ``@register("optimizer", NAME)``: a class or function whose first parameter, ``params``,
is the list of trained parameters, and whose other parameters are its options. It gives a ``torch.optim.Optimizer``, or
an object with ``step()`` and an attribute ``lr``. ``torch.optim:RMSprop`` is a name as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedlp.config import LocalConfig
from fedlp.errors import ConfigError, one_line
from fedlp.registry import lookup, register


class Stepper(Protocol):
    """Protocol of optimizers in the local loop."""

    lr: float

    def step(self) -> None:
        """Move every parameter that has a gradient."""


@register("optimizer", "sgd")
class SGD:
    """Stochastic gradient descent with momentum.

    torch's SGD, bit for bit, without its work around a step, which costs more than the step of a small model.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float = 0.05, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self.lr = lr
        self._parameters, self._momentum, self._weight_decay = params, momentum, weight_decay
        self._velocities: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        moved: list[Tensor] = [parameter for parameter in self._parameters if parameter.grad is not None]
        steps = [parameter.grad for parameter in moved if parameter.grad is not None]
        if self._weight_decay:
            steps = list(torch._foreach_add(steps, moved, alpha=self._weight_decay))
        if self._momentum:
            for i, parameter in enumerate(moved):
                old = self._velocities.get(parameter)
                new = steps[i].clone() if old is None else old.mul_(self._momentum).add_(steps[i])
                self._velocities[parameter] = steps[i] = new
        torch._foreach_add_(moved, steps, alpha=-self.lr)


@register("optimizer", "adam")
def adam(
    params: Sequence[nn.Parameter],
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """Adam; ``weight_decay`` is added to the gradient."""
    return torch.optim.Adam(params, lr=lr, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


@register("optimizer", "adamw")
def adamw(
    params: Sequence[nn.Parameter],
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW: Adam with decoupled ``weight_decay``."""
    return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


def make_optimizer(parameters: Sequence[nn.Parameter], config: LocalConfig) -> Stepper:
    """Return a fresh optimizer; a client starts every round without momentum from the last one.

    Raises
    ------
    ConfigError
        If the config's optimizer is invalid.
    """
    target = lookup("optimizer", config.optimizer)
    known = inspect.signature(target).parameters
    shared = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay")}
    for name, value in (shared | config.optimizer_options).items():
        if value and name not in known:
            raise ConfigError(
                f"local.optimizer={config.optimizer} has no option {name}; it has {', '.join(list(known)[1:])}"
            )
    chosen = {name: value for name, value in (shared | config.optimizer_options).items() if name in known}
    try:
        made: Any = target(parameters, **chosen)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"local.optimizer={config.optimizer}: {one_line(error)}") from error
    if isinstance(made, torch.optim.Optimizer):
        return _TorchStepper(made)
    if not (callable(getattr(made, "step", None)) and isinstance(getattr(made, "lr", None), int | float)):
        raise ConfigError(f"local.optimizer={config.optimizer} must give an object with step() and a number lr")
    return made  # type: ignore[no-any-return]


class _TorchStepper:
    """An optimizer of torch.optim, whose learning rate can be set."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        self._optimizer.step()
