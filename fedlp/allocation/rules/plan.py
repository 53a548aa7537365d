"""Plan from a file: the sparsity of each layer, shifted until the budget is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlp.allocation.budget.solve import Cost, allocate_shape
from fedlp.allocation.evidence import Evidence
from fedlp.allocation.files import read_mapping
from fedlp.errors import AllocationError, ConfigError
from fedlp.registry import register
from fedlp.types import PrunableLayer


@register("allocator", "plan")
@dataclass(frozen=True)
class PlanFile:
    """Sparsities of a file, shifted until the budget is met; 0 for layers absent from it.

    Attributes
    ----------
    path : str
        YAML or JSON file, layer name -> sparsity in [0, 1).
    """

    path: str | None = None

    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if self.path is None:
            raise ConfigError("allocator=plan needs allocator.path: a YAML or JSON file, layer name -> sparsity")

    def __call__(self, layers: Sequence[PrunableLayer], evidence: Evidence, cost: Cost, limit: float) -> dict[str, int]:
        """Return the units kept of each layer; AllocationError if the file does not fit the model."""
        stored = read_mapping(str(self.path))
        names = [layer.name for layer in layers]
        for name, value in stored.items():
            if name not in names:
                raise AllocationError(f"allocator.path={self.path}: the model has no prunable layer {name}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise AllocationError(
                    f"allocator.path={self.path}: layer {name} has sparsity {value}; it must be in [0, 1)"
                )
        return allocate_shape(layers, {name: float(stored.get(name, 0.0)) for name in names}, 1.0, cost, limit)
