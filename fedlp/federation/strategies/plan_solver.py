"""Units of each layer by budget: the allocation rule within every limit of a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor

from fedlp.allocation.budget.constraints import round_client
from fedlp.allocation.budget.costs import COSTS, CostModel
from fedlp.allocation.budget.solve import Cost
from fedlp.allocation.evidence import Evidence, needs_of
from fedlp.allocation.rules.dp import allocate_by_curves
from fedlp.allocation.rules.uniform import Uniform
from fedlp.federation.strategies.plan_evidence import round_evidence
from fedlp.federation.strategies.policy import Memory, PolicyContext
from fedlp.types import Budget, PrunableLayer

Counts = Mapping[str, int]


class PlanSolver:
    """Solver of budgets for units per layer; clients of one budget share the solution.

    Parameters
    ----------
    spread : "macs" or "allocator"
        Division of the upload budget among layers.
    width_multiple : int
        Multiple that widths are rounded to where budgets allow.
    """

    def __init__(self, context: PolicyContext, spread: str, width_multiple: int, costs: CostModel) -> None:
        self._context, self._layers, self._costs = context, context.submodels.layers, costs
        self._spread, self._multiple = spread, width_multiple
        self._solved: dict[Any, Counts] = {}
        self._seen: tuple[Any, Any] = (None, None)  # memory and model that the solutions are of

    def held(self, client_id: int, evidence: Evidence) -> Counts:
        """Return the units of each axis within a client's budget, by the rule on evidence of the whole model."""
        budget = self._context.budgets[client_id]
        whole = {layer.name: layer.num_units for layer in self._layers}
        if not limits_what_is_held(budget):
            return whole
        return self._fit(replace(budget, upload_bytes=None), whole, client_id, "allocator", evidence, True)

    def counts(
        self,
        sparsity: float,
        client_id: int,
        memory: Memory,
        params: Mapping[str, Tensor] | None,
        given: Counts | None = None,
    ) -> tuple[Counts, Counts]:
        """Return the units of each axis that a client receives, and that it sends at an upload sparsity.

        Parameters
        ----------
        given : mapping from axis name to int, optional
            Units that the client receives; solved for if absent.
        """
        if self._seen[0] is not memory or self._seen[1] is not params:
            self._solved.clear()
            self._seen = (memory, params)
        budget = self._context.budgets[client_id]
        whole = {layer.name: layer.num_units for layer in self._layers}
        held: Counts = whole if given is None else given
        if given is None and limits_what_is_held(budget):
            held = self._solve(replace(budget, upload_bytes=None), whole, client_id, drops=True)
        upload_bytes = None if budget is None else budget.upload_bytes
        if not sparsity and upload_bytes is None:
            return held, held
        most = None
        if sparsity:
            full, least = self._params(whole), self._params(dict.fromkeys(whole, 0))
            most = full - sparsity * (full - least)
        if self._spread == "macs":  # the same for all, as far as a client holds it
            moves = self._solve(Budget(params=most), whole, client_id, "macs")
            sent = {name: min(moves[name], held[name]) for name in held}
            return held, self._solve(Budget(upload_bytes=upload_bytes), sent, client_id, "macs")
        return held, self._solve(Budget(params=most, upload_bytes=upload_bytes), held, client_id)

    def _params(self, kept: Counts) -> float:
        row = np.array([[kept[name] for name in self._costs.layers]], dtype=np.float64)
        return float(self._costs.evaluate(row)[0, COSTS.index("params")])

    def _solve(
        self, budget: Budget, most: Counts, client_id: int, spread: str = "allocator", drops: bool = False
    ) -> Counts:
        """Return the units within a budget, at most ``most``."""
        key = budget, tuple(most.values()), spread, drops
        if key not in self._solved:
            self._solved[key] = self._fit(budget, most, client_id, spread, drops=drops)
        return self._solved[key]

    def _fit(
        self,
        budget: Budget,
        most: Counts,
        client_id: int,
        spread: str,
        evidence: Evidence | None = None,
        drops: bool = False,
    ) -> Counts:
        """Return the units within a budget, at most ``most``; none of a branch only if it ``drops`` branches."""
        costs = self._costs
        layers = [x if drops else replace(x, least=min(1, most[x.name])) for x in self._layers]
        limits = costs.limits(budget, None)
        bounds = {x.name: (1.0 - most[x.name] / x.num_units, 1.0) for x in layers}
        sparsity = {x.name: 1.0 - most[x.name] / x.num_units for x in layers}

        def load(kept: Mapping[str, float]) -> float:
            row = np.array([[min(kept.get(name, 0), most[name]) for name in costs.layers]], dtype=np.float64)
            return float((costs.evaluate(row)[0] / limits).max())

        if load(most) <= 1.0:
            return most
        least = {x.name: x.least for x in layers}
        if load(least) <= 1.0:  # else the rounding says what is out of reach
            held = [x for x in layers if most[x.name]]
            by_rule = spread != "macs"
            found = self._by_rule(held, load, most, evidence) if by_rule else self._by_work(held, load, most)
            sparsity |= {x.name: 1.0 - min(found[x.name], most[x.name]) / x.num_units for x in held}
        return round_client(
            layers, sparsity, costs, budget, client_id=client_id, bounds=bounds, multiple=self._multiple
        )

    def _by_rule(
        self, held: Sequence[PrunableLayer], load: Cost, most: Counts, given: Evidence | None
    ) -> Mapping[str, int]:
        """Return the units kept of the held layers by the allocation rule; uniform until its evidence has arrived."""
        rule, (memory, params) = self._context.allocator, self._seen
        whole, none = load(most), load(dict.fromkeys(most, 0))
        sparsity = min(max((whole - 1.0) / (whole - none), 0.0), 1.0)
        if given is None:
            evidence = round_evidence(self._context.submodels, most, sparsity, memory, params)
        else:
            evidence = given.at(sparsity)
        needs = needs_of(rule)
        if not all(evidence.has(need) for need in needs):
            return Uniform()(held, evidence, load, 1.0)
        if needs & {"unit_scores", "error_curves"}:
            scored = {x.name: x.num_units for x in evidence.layers}
            held = [replace(x, num_units=scored[x.name]) for x in held]
        return rule(held, evidence, load, 1.0)

    def _by_work(self, layers: Sequence[PrunableLayer], load: Cost, most: Counts) -> Counts:
        r"""Return the units that maximise :math:`\sum_l m_l \log f_l` within the budget, to about a per cent.

        :math:`m_l` are the MACs of a layer, :math:`f_l` the fraction of its weights that is sent. Where weights are
        counted, that fraction is in proportion to the MACs per weight, as far as there are weights.
        """
        macs = COSTS.index("macs")
        row = np.array([[most[name] for name in self._costs.layers]], dtype=np.float64)
        without = row * (1.0 - np.eye(row.size))  # the layers that one axis takes part in, all units of it gone
        work = self._costs.evaluate(row)[:, macs] - self._costs.evaluate(without)[:, macs]
        by_name = dict(zip(self._costs.layers, work.tolist(), strict=True))
        held = [replace(x, num_units=most[x.name]) for x in layers]
        left = {x.name: np.arange(x.num_units - 1, 0, -1) / x.num_units for x in held}
        curves = {x.name: (-by_name[x.name] * np.log(left[x.name])).tolist() for x in held}
        return allocate_by_curves(held, curves, load, 1.0)


def limits_what_is_held(budget: Budget | None) -> TypeGuard[Budget]:
    """Return whether a budget limits more than uploads."""
    return budget is not None and replace(budget, upload_bytes=None) != Budget()
