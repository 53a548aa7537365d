r"""Server-side optimisers: the average of a round is a pseudo-gradient (Reddi et al., Adaptive Federated Optimization, 2021).

With :math:`\Delta = \bar x - x` on the entries that somebody returned:

.. math::
    \text{momentum:}\quad v \leftarrow \beta_1 v + \Delta, \qquad x \leftarrow x + \eta v \\
    \text{adam:}\quad m \leftarrow \beta_1 m + (1 - \beta_1) \Delta, \quad
    v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2, \quad x \leftarrow x + \eta \frac{m}{\sqrt v + \epsilon}

Adam has no bias correction, as in the paper's Algorithm 2. Entries that nobody returned neither move nor change state.
Buffers take the average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor

from fedlp.config import StrategyConfig

State = dict[str, Tensor]


def apply_server_optimizer(
    config: StrategyConfig,
    old: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    covered: Callable[[str], bool | Tensor],
    trainable: Set[str],
) -> tuple[dict[str, Tensor], State]:
    """Return the next global model and the optimiser's next state; nothing is modified.

    Parameters
    ----------
    old, average : mapping from tensor name to Tensor
        The global model before the round, and the coverage average.
    state : mapping
        What the last call returned; empty in the first round.
    covered : callable
        Which entries of a tensor somebody returned: True or False for all, or booleans of its shape.
    trainable : set of str
        Names that are optimised; the others take the average.
    """
    if config.server_optimizer == "none" and config.server_lr == 1.0:
        return dict(average), {}
    params, new_state = dict(average), dict(state)
    for name in sorted(trainable):
        mask = covered(name)
        if mask is False:
            continue
        delta = average[name].double() - old[name].double()
        step, moments = _step(config, name, delta, state)
        moved = old[name].double().add_(step, alpha=config.server_lr).to(old[name].dtype)
        if isinstance(mask, Tensor):
            moved = torch.where(mask, moved, old[name])
            moments = {
                key: torch.where(mask, moment, state.get(key, torch.zeros_like(moment)))
                for key, moment in moments.items()
            }
        params[name] = moved
        new_state |= moments
    return params, new_state


def _step(
    config: StrategyConfig, name: str, delta: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the step and the moments of one tensor, in float64."""
    zero = torch.zeros_like(delta)
    first = state.get(f"first.{name}", zero)
    if config.server_optimizer == "none":
        return delta, {}
    if config.server_optimizer == "momentum":
        velocity = config.server_momentum * first + delta
        return velocity, {f"first.{name}": velocity}
    second = state.get(f"second.{name}", zero)
    mean = config.server_momentum * first + (1 - config.server_momentum) * delta
    square = config.server_beta2 * second + (1 - config.server_beta2) * delta.square()
    return mean / (square.sqrt() + config.server_epsilon), {f"first.{name}": mean, f"second.{name}": square}
