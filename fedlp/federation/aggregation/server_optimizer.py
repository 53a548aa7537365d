r"""Server optimisers: the clients' average taken as a gradient (FedOpt; Reddi et al., ICLR 2021, Algorithm 2).

With the pseudo-gradient :math:`\Delta = \text{average} - x`:

* ``none``: :math:`x \leftarrow x + \eta \Delta`, which for a rate of 1 is the average itself;
* ``momentum``: :math:`v \leftarrow \beta v + \Delta,\; x \leftarrow x + \eta v` (FedAvgM; Hsu et al., 2019);
* ``adam``: :math:`m \leftarrow \beta_1 m + (1 - \beta_1) \Delta,\; v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2,\;
  x \leftarrow x + \eta m / (\sqrt v + \epsilon)`, from :math:`m = 0, v = \epsilon^2` and without bias correction, as in
  the paper.

Deviations
----------
An entry that nobody returned this round neither moves nor changes its state: there is no pseudo-gradient for it, and
one of zero would make it coast. Buffers, such as running statistics, take the average as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedlp.errors import ConfigError


class ServerOptimizerConfig(Protocol):
    """What the optimiser reads of a config."""

    @property
    def server_optimizer(self) -> str:
        """``none``, ``momentum`` or ``adam``."""

    @property
    def server_lr(self) -> float:
        r"""Learning rate :math:`\eta`, > 0."""

    @property
    def server_momentum(self) -> float:
        r""":math:`\beta` or :math:`\beta_1`, in [0, 1)."""

    @property
    def server_beta2(self) -> float:
        r""":math:`\beta_2`, in [0, 1)."""

    @property
    def server_epsilon(self) -> float:
        r"""Adaptivity :math:`\epsilon` (:math:`\tau` in the paper), > 0."""


@torch.no_grad()
def apply_server_optimizer(
    config: ServerOptimizerConfig,
    old: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    covered: Callable[[str], bool | Tensor],
    trainable: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the new global values and the new state of the optimiser.

    Parameters
    ----------
    old, average : mapping from tensor name to Tensor
        The global values before the round, and the clients' average, equal to them where nobody returned an entry.
        Computed in float32 or wider. Not modified.
    state : mapping from str to Tensor
        What the last call returned; empty at first. Not modified.
    covered : callable
        Which entries of a tensor somebody returned: True or False for all, else booleans of its shape.
    trainable : collection of str
        Names that the optimiser moves; the others take the average.

    Returns
    -------
    params : dict from tensor name to Tensor
        In the order of ``average``, of the same dtypes.
    state : dict from str to Tensor
        ``momentum.NAME`` and ``variance.NAME``, as far as the optimiser has them and NAME was ever covered.

    Raises
    ------
    ConfigError
        For an optimiser that does not exist.
    """
    if config.server_optimizer == "none" and config.server_lr == 1.0:
        return dict(average), {}
    params, new_state = dict(average), dict(state)
    for name, target in average.items():
        mask = name in trainable and target.is_floating_point() and covered(name)
        if mask is False:
            continue
        wide = torch.promote_types(target.dtype, torch.float32)
        origin = old[name].to(wide)
        step, slots = _step(config, name, target.to(wide) - origin, state)
        params[name] = _merge(mask, (origin + step).to(target.dtype), old[name])
        for key, (before, after) in slots.items():
            new_state[key] = _merge(mask, after, before)
    return params, new_state


def _step(
    config: ServerOptimizerConfig, name: str, delta: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the step of one tensor, and each piece of its state before and after."""
    first, second = f"momentum.{name}", f"variance.{name}"
    beta, beta2 = config.server_momentum, config.server_beta2
    momentum = state[first] if first in state else torch.zeros_like(delta)
    match config.server_optimizer:
        case "none":
            return config.server_lr * delta, {}
        case "momentum":
            velocity = beta * momentum + delta
            return config.server_lr * velocity, {first: (momentum, velocity)}
        case "adam":
            start = torch.full_like(delta, config.server_epsilon**2)
            variance = state.get(second, start)
            mean = beta * momentum + (1.0 - beta) * delta
            square = beta2 * variance + (1.0 - beta2) * delta**2
            step = config.server_lr * mean / (square.sqrt() + config.server_epsilon)
            return step, {first: (momentum, mean), second: (variance, square)}
    raise ConfigError(f"strategy.server_optimizer={config.server_optimizer} does not exist; use none, momentum or adam")


def _merge(mask: bool | Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask, new, old) if isinstance(mask, Tensor) else new
