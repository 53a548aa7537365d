"""Plans that clients judge: a byte per layer, against the refits that they hold of the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedlp.federation.oneshot.messages import Part
from fedlp.federation.oneshot.model import digest_state
from fedlp.pruning.precomputed_models import width_level, width_of_level
from fedlp.pruning.refitted_model import MOST_DIVERGENCE
from fedlp.types import PrunableLayer

Plan = Mapping[str, int]
"""Units kept of each layer."""


def encode_plans(plans: Sequence[Plan], layers: Sequence[PrunableLayer]) -> bytes:
    """Return the level of each layer's width, a byte each, plan by plan."""
    return bytes(width_level(layer, plan[layer.name]) for plan in plans for layer in layers)


def decode_plans(data: bytes, layers: Sequence[PrunableLayer]) -> list[dict[str, int]]:
    """Return the plans of levels, with rounded widths; ValueError unless each has a level of every layer."""
    if not data or len(data) % len(layers):
        raise ValueError(f"{len(data)} bytes are no plans of {len(layers)} layers")
    rows = [data[start : start + len(layers)] for start in range(0, len(data), len(layers))]
    return [{x.name: width_of_level(x, level) for x, level in zip(layers, row, strict=True)} for row in rows]


def judgement_parts(num_plans: int, labels: int) -> list[Part]:
    """Return the parts of a judgement: of each plan the divergence, summed over ``labels`` of every example."""
    return [Part("divergence", (num_plans,), nonnegative=True, most=MOST_DIVERGENCE * labels)]


class RefitStates:
    """Two states of what a client holds, both based on the dense model: without its refits, and with them.

    Parameters
    ----------
    dense : bytes
        Digest of the dense model.
    refits : mapping
        Tensors of :func:`~fedlp.pruning.refitted_model.refit_signature`.
    """

    def __init__(self, dense: bytes, layers: Sequence[PrunableLayer], refits: Mapping[str, Tensor]) -> None:
        self.layers, self._refits = layers, refits
        self.changed = [0]
        self.names = [dense, dense]
        self._name = digest_state(dense, refits)

    @property
    def name(self) -> bytes:
        """Digest of the dense model with its refits."""
        return self._name

    def tensors(self, layers: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the refits, or nothing where a client holds them."""
        return self._refits if layers else {}
