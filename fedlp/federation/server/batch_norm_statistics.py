"""Static batch norms: running statistics of the global model, measured on a few clients' examples.

Activations of narrow sub-models differ from those of the global model: an average of their statistics fits
neither. Here none are sent; before the global model is evaluated, some clients that can hold all of it run it over
their examples (Diao et al., ICLR 2021, ask all clients).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlp.federation.submodels import SubModelLayout

_MEAN, _VAR = ".running_mean", ".running_var"

Statistics = tuple[Mapping[str, Tensor], int]
"""Running means and variances by tensor name, and their number of examples."""


def pool_statistics(parts: Sequence[Statistics]) -> dict[str, Tensor]:
    """Return the statistics of all examples together: means, and variances around the common mean.

    Parameters
    ----------
    parts : sequence of Statistics
        At least one.
    """
    total = sum(count for _, count in parts)
    found: dict[str, Tensor] = {}
    for name in (name for name in parts[0][0] if name.endswith(_MEAN)):
        var_name = name.removesuffix(_MEAN) + _VAR
        mean = sum(count * part[name].double() for part, count in parts) / total
        square = sum(count * (part[var_name].double() + part[name].double().square()) for part, count in parts) / total
        assert isinstance(mean, Tensor)
        found[name] = mean.to(parts[0][0][name])
        found[var_name] = torch.as_tensor(square - mean.square()).clamp(min=0.0).to(parts[0][0][var_name])
    return found


def merge_statistics(
    params: Mapping[str, Tensor], measured: Mapping[str, Tensor], layout: SubModelLayout
) -> dict[str, Tensor]:
    """Return the global values with measured statistics at the units of a sub-model."""
    found = dict(params)
    for name, values in measured.items():
        keeps = layout.keeps.get(name)
        if keeps is None:
            found[name] = values
        else:
            index = torch.from_numpy(keeps[0].indices())
            found[name] = params[name].clone().index_copy_(0, index, values.to(params[name]))
    return found
