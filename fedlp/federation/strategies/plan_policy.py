"""Policy of FedLP-Plan: units of each layer that a client receives and sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlp.allocation.budget.costs import CostModel
from fedlp.allocation.evidence import needs_of
from fedlp.errors import AllocationError
from fedlp.federation.sampling import sample_uploads
from fedlp.federation.strategies.plan_evidence import pool_input_norms
from fedlp.federation.strategies.plan_memory import own_units, rank_units, remember_units
from fedlp.federation.strategies.plan_options import PlanOptions
from fedlp.federation.strategies.plan_solver import Counts, PlanSolver
from fedlp.federation.strategies.policy import Answer, Case, Memory, Offset, PolicyContext
from fedlp.federation.strategies.pruned_submodels import PrunedSubModels
from fedlp.rng import Stream, generator
from fedlp.types import Assignment, Keep, PrunableLayer, SubModel


@dataclass(frozen=True, eq=False)
class PlanPolicy:
    """Policy of FedLP-Plan.

    Parameters
    ----------
    costs : CostModel
        Costs of the model's prunable layers.
    rates : float or tuple of float
        Layer-preserving rate, or one per client.
    asked : str or None
        The option ``submodels`` as it was given.
    """

    context: PolicyContext
    options: PlanOptions
    costs: CostModel
    rates: float | tuple[float, ...] = 1.0
    asked: str | None = "slices"

    @cached_property
    def solver(self) -> PlanSolver:
        """Units of each layer by budget."""
        return PlanSolver(self.context, self.options.spread, self.options.width_multiple, self.costs)

    @cached_property
    def pruned(self) -> PrunedSubModels | None:
        """Sub-models pruned by the server; None if sub-models are slices."""
        if self.options.submodels != "pruned":
            return None
        every, pruner = self.options.refit_every, self.context.pruner
        if every is None:
            is_costly = pruner is None or pruner.asks_clients or self.context.submodels.spec.frozen
            every = 0 if is_costly else 2
        return PrunedSubModels(self.context, self.solver, every)

    def prepare(self, memory: Memory, server_round: int, params: Mapping[str, Tensor]) -> Memory:
        """Return the memory with the pruned sub-models of every kind of client."""
        return memory if self.pruned is None else self.pruned.prepare(memory, server_round, params)

    def offset(self, client_id: int, memory: Memory) -> Offset:
        """Return the difference of a client's received values from the slice of the global model."""
        return Offset() if self.pruned is None else self.pruned.offset(client_id, memory)

    @property
    def note(self) -> str:
        """One line for the start of a run; empty where there is nothing to say."""
        if self.pruned is None or self.asked is not None:
            return ""
        return (
            "training starts from pretrained weights that some budgets do not hold: sub-models are pruned and refitted "
            "(strategy.submodels=slices: slices instead)"
        )

    @property
    def measures_statistics(self) -> bool:
        """Whether batch norm statistics are measured before an evaluation, and never sent."""
        return self.context.batch_norm == "static"

    @property
    def _layers(self) -> tuple[PrunableLayer, ...]:
        return self.context.submodels.layers

    def sparsity(self, server_round: int) -> float:
        """Return the sparsity of uploads in a round: 0 at first, then from ``ramp_from`` to the last value."""
        options = self.options
        done = server_round - options.warmup_rounds
        if done <= 0:
            return 0.0
        progress = min(done / (options.ramp_rounds + 1), 1.0)
        return options.ramp_from + progress * (options.sparsity - options.ramp_from)

    def counts(
        self, server_round: int, client_id: int, memory: Memory, params: Mapping[str, Tensor] | None = None
    ) -> tuple[Counts, Counts]:
        """Return the number of units of each axis that a client receives, and that it sends.

        Raises
        ------
        AllocationError
            If the client's budget is out of reach; names the client and the limit.
        """
        units = self._units(client_id, memory)
        given = {axis: len(index) for axis, index in units.items()} if units else None
        return self.solver.counts(self.sparsity(server_round), client_id, memory, params, given)

    def _units(self, client_id: int, memory: Memory) -> Mapping[str, NDArray[np.int64]]:
        """Return the units of a client's pruned sub-model; empty if it has none."""
        return {} if self.pruned is None else self.pruned.units(client_id, memory)

    # ---- the units
    def assign(
        self, server_round: int, client_id: int, memory: Memory, params: Mapping[str, Tensor] | None = None
    ) -> Assignment:
        """Return the client's assignment; AllocationError if its budget is out of reach."""
        options, layers = self.options, self._layers
        held, sent = self.counts(server_round, client_id, memory, params)
        fresh = (server_round - 1) % options.refresh_every == 0
        own = own_units(memory, client_id, self._layers) if options.unit_selection == "client" else {}
        ranked = self._ranked(server_round, client_id, sent, own, memory)
        widths = {
            x.name: Keep.from_indices(np.sort(ranked[x.name][: held[x.name]]), x.num_units)
            for x in layers
            if held[x.name] < x.num_units
        }
        submodel = SubModel(widths=widths)
        pruned = [x for x in layers if sent[x.name] < held[x.name]]
        chooses = options.unit_selection == "client" and (fresh or not own)
        kept = {x.name: sent[x.name] for x in pruned} if chooses else {}
        returned = (
            {}
            if chooses
            else {x.name: Keep.from_indices(np.sort(ranked[x.name][: sent[x.name]]), x.num_units) for x in pruned}
        )
        measures = fresh and not (widths and options.measured_by == "whole")
        evidence = self._evidence if measures else frozenset[str]()
        uploads = self._uploads(server_round, client_id, submodel)
        return Assignment(server_round, client_id, submodel, uploads, kept, returned, evidence)

    def _ranked(
        self, server_round: int, client_id: int, sent: Counts, own: Mapping[str, Tensor], memory: Memory
    ) -> dict[str, NDArray[np.int64]]:
        """Return the units of each layer in the order of the client's preference."""
        whose = 0 if self.options.unit_selection == "server" else client_id  # the server draws alike for all clients
        by_score = self.options.unit_selection != "random" and self.context.scores_units
        ranked, units = {}, self._units(client_id, memory)
        for number, x in enumerate(self._layers):
            rng = generator(self.context.seed, Stream.UNITS, server_round, whose, number)
            order = rank_units(memory, x, own.get(x.name), by_score, int(self._regrow * sent[x.name]), rng)
            if x.name in units:  # those that it holds come first
                order = order[np.argsort(~np.isin(order, units[x.name]), kind="stable")]
            ranked[x.name] = order
        return ranked

    def _uploads(self, server_round: int, client_id: int, submodel: SubModel) -> frozenset[str]:
        """Return the uploaded tensors: a layer draw, without the statistics of batch norms if these are static."""
        submodels, batch_norm, rate = self.context.submodels, self.context.batch_norm, self._rate(client_id)
        uploads = held = submodels.layout(submodel).name_set
        if rate < 1.0:
            layers, unit = submodels.spec.layers, self.options.upload_unit
            uploads = sample_uploads(self.context.seed, server_round, client_id, layers, rate, unit) & held
        narrow = batch_norm == "whole" and submodel.widths and self.somebody_is_whole
        if narrow or batch_norm == "static":
            uploads -= submodels.statistics  # a narrow model's are not a wide one's
        return uploads

    def _rate(self, client_id: int) -> float:
        return self.rates if isinstance(self.rates, float) else self.rates[client_id]

    @cached_property
    def _evidence(self) -> frozenset[str]:
        """Measurements requested in a round of fresh ones."""
        options = self.options
        limited = self._somebody_is_limited and self.pruned is None  # else the server has measured what limits ask for
        allocates = limited or options.spread == "allocator"
        needs = needs_of(self.context.allocator) if allocates else frozenset[str]()
        ranks = options.unit_selection != "random" and (
            limited or (options.unit_selection == "server" and self._regrow < 1)
        )
        found = set()
        if self.context.scores_units and (ranks or needs & {"unit_scores", "error_curves"}):
            found.add("unit_scores")
        if "input_norms" in needs:
            found.add("input_norms")
        return frozenset(found)

    @property
    def scores_on_clients(self) -> bool:
        """Whether clients measure the saliency of units."""
        return self.options.unit_selection == "client" or "unit_scores" in self._evidence

    def settled(self) -> PlanPolicy:
        """Return the policy without regrowth: the best-scored units are held."""
        return PlanPolicy(self.context, replace(self.options, regrow=0.0), self.costs, self.rates)  # type: ignore[type-var]

    @cached_property
    def somebody_is_whole(self) -> bool:
        """Whether some client holds all units."""
        return any(not held.widths for held, _ in self._kinds)

    @cached_property
    def _somebody_is_limited(self) -> bool:
        return any(held.widths for held, _ in self._kinds)

    @cached_property
    def _regrow(self) -> float:
        """Return the option; if None, 0 if whole clients train the units that slices lack, else 1."""
        given = self.options.regrow
        if given is not None:
            return given
        if self.pruned is not None:
            return 1.0
        return 0.0 if self._somebody_is_limited and self.somebody_is_whole else 1.0

    @cached_property
    def _kinds(self) -> list[tuple[SubModel, SubModel]]:
        """Return the last round's sub-model and upload of every kind of client, without any measurements."""
        found = []
        for client_id in sorted({self._first_like(client_id) for client_id in range(len(self.context.budgets))}):
            with suppress(AllocationError):
                found.append(self._case(self.context.num_rounds, client_id))
        return found

    def remember(self, memory: Memory, server_round: int, answers: Sequence[Answer]) -> Memory:
        """Return pooled scores and input norms, each unit's last round, and each client's last units."""
        found = remember_units(memory, server_round, self._layers, answers, self.options.unit_selection == "client")
        return found | pool_input_norms(self._layers, found, answers)

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return one case per kind of client, with the counts before any measurement of units.

        Clients whose budgets are out of reach are left out.
        """
        kinds = Counter((self._first_like(client_id), self._rate(client_id)) for client_id in client_ids)
        find = lru_cache(self._case)
        found = []
        for (client_id, rate), count in kinds.items():
            with suppress(AllocationError):
                submodel, sent = find(self.context.num_rounds, client_id)
                found.append(Case(submodel, float(count), rate, sent))
        total = sum(case.probability for case in found)
        return [replace(case, probability=case.probability / total) for case in found]

    def _first_like(self, client_id: int) -> int:
        """Return the first client of the same budget."""
        return self.context.budgets.index(self.context.budgets[client_id])

    def _case(self, server_round: int, client_id: int) -> tuple[SubModel, SubModel]:
        sizes = {layer.name: layer.num_units for layer in self._layers}
        held, sent = (
            SubModel(widths={a: Keep.first(counts[a], size) for a, size in sizes.items() if counts[a] < size})
            for counts in self.counts(server_round, client_id, {})
        )
        return held, sent
