"""Options of FedLP-Plan that its policy reads."""

from __future__ import annotations

from typing import Protocol


class PlanOptions(Protocol):
    """Options of :class:`~fedlp.federation.strategies.fedlp_plan.FedLPPlan` that the policy reads."""

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable parameters that uploads leave out."""

    @property
    def spread(self) -> str:
        """Division of the upload budget among layers."""

    @property
    def unit_selection(self) -> str:
        """Selection of the sent units."""

    @property
    def upload_unit(self) -> str:
        """Unit of the layer draw."""

    @property
    def refresh_every(self) -> int:
        """Rounds between fresh measurements."""

    @property
    def measured_by(self) -> str:
        """Clients that measure units and inputs: all, or those that hold the whole model."""

    @property
    def warmup_rounds(self) -> int:
        """First rounds without sparsity."""

    @property
    def ramp_rounds(self) -> int:
        """Rounds of the ramp."""

    @property
    def ramp_from(self) -> float:
        """Sparsity before the ramp."""

    @property
    def width_multiple(self) -> int:
        """Multiple that widths are rounded to."""

    @property
    def regrow(self) -> float | None:
        """Fraction of the units that goes to the least recently updated ones."""

    @property
    def submodels(self) -> str | None:
        """Sub-models of clients with a budget: slices, or pruned."""

    @property
    def refit_every(self) -> int | None:
        """Rounds between fresh prunings; 0 for one pruning only."""
