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

    @property
    def is_plain(self) -> bool:
        """Whether a step subtracts the gradient and does nothing else."""
        return not (self._momentum or self._weight_decay)

    @torch.no_grad()
    def descend(self, parameter: Tensor) -> None:
        """Move one parameter as a plain step does, and drop its gradient."""
        assert parameter.grad is not None
        parameter.add_(parameter.grad, alpha=-self.lr)
        parameter.grad = None

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
        if moved:
            torch._foreach_add_(moved, steps, alpha=-self.lr)


class Adam:
    """Adam, or AdamW where weight decay is decoupled.

    torch's on a CPU, bit for bit, without the import of torch's compiler and the work around a step.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        decoupled: bool = False,
    ) -> None:
        self.lr = lr
        self._parameters, self._betas, self._epsilon = params, betas, epsilon
        self._weight_decay, self._decoupled = weight_decay, decoupled
        self._moments: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._steps: dict[Tensor, int] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._move(parameter, parameter.grad)

    def _move(self, parameter: Tensor, gradient: Tensor) -> None:
        beta1, beta2 = self._betas
        self._steps[parameter] = step = self._steps.get(parameter, 0) + 1
        if parameter not in self._moments:
            self._moments[parameter] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = self._moments[parameter]
        if self._weight_decay and self._decoupled:
            parameter.mul_(1 - self.lr * self._weight_decay)
        elif self._weight_decay:
            gradient = gradient.add(parameter, alpha=self._weight_decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(self._epsilon)
        parameter.addcdiv_(first, scale, value=-self.lr / (1 - beta1**step))


@register("optimizer", "adam")
def adam(
    params: Sequence[nn.Parameter],
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Adam | torch.optim.Optimizer:
    """Adam; ``weight_decay`` is added to the gradient."""
    _check_adam(beta1, beta2, epsilon)
    if _is_on_cpu(params):
        return Adam(params, lr, (beta1, beta2), epsilon, weight_decay)
    return torch.optim.Adam(params, lr=lr, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


@register("optimizer", "adamw")
def adamw(
    params: Sequence[nn.Parameter],
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Adam | torch.optim.Optimizer:
    """AdamW: Adam with decoupled ``weight_decay``."""
    _check_adam(beta1, beta2, epsilon)
    if not _is_on_cpu(params):
        return torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)
    return Adam(params, lr, (beta1, beta2), epsilon, weight_decay, decoupled=True)


def _check_adam(beta1: float, beta2: float, epsilon: float) -> None:
    """Raise ValueError for an option out of range."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}={beta} is not in [0, 1)")
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon} is below 0")


def _is_on_cpu(params: Sequence[nn.Parameter]) -> bool:
    return all(parameter.device.type == "cpu" for parameter in params)


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
