"""FedLP with pruning: a plan per client from its budget, units chosen on its shard, only what is kept travels.

What a client gets is the largest sub-model that its budget holds (parameters, MACs, memory, seconds); what it sends is
what ``strategy.sparsity`` and its limit on uploads leave of that. The server pools the scores of units that clients
send: they say how sparsity is spread over layers, and which units come first where the server chooses.

Longer than other files: plan, units and memory of one policy, each of which reads the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.allocation.budget.constraints import round_client
from fedlp.allocation.budget.costs import COSTS, CostModel, LatencyTable
from fedlp.allocation.budget.solve import Cost
from fedlp.allocation.rules import allocate
from fedlp.config import RunConfig
from fedlp.errors import AllocationError
from fedlp.federation.server.sampling import sample_uploads
from fedlp.federation.strategies.policies import Assignment, Case, Memory, Returned
from fedlp.federation.submodels import SubModels
from fedlp.rng import Stream, generator
from fedlp.types import Budget, Keep, PrunableLayer, SubModel

Counts = Mapping[str, int]

_SCORE, _SEEN, _HELD = "score", "seen", "held"  # what the names of remembered tensors begin with


def _limits_what_is_held(budget: Budget | None) -> TypeGuard[Budget]:
    return budget is not None and replace(budget, upload_bytes=None) != Budget()


@dataclass(frozen=True, eq=False)
class PrunedSlices:
    """The policy of ``strategy=fedlp``.

    Parameters
    ----------
    costs : CostModel
        Of the model's prunable layers.
    budgets : tuple of Budget or None
        One per client.
    tables : mapping from client id to LatencyTable
        What was measured on a client's device, where something was.
    """

    config: RunConfig
    submodels: SubModels
    costs: CostModel
    budgets: tuple[Budget | None, ...]
    tables: Mapping[int, LatencyTable] = field(default_factory=dict)
    _solved: dict[Any, Any] = field(default_factory=dict, repr=False)  # of the memory that was seen last

    # ---- the plan
    def counts(self, server_round: int, client_id: int, memory: Memory) -> tuple[Counts, Counts]:
        """Return how many units of each axis a client gets, and how many it sends.

        Raises
        ------
        AllocationError
            If the client's budget is out of reach; names the client and the limit.
        """
        budget, table = self.budgets[client_id], self.tables.get(client_id)
        whole = {layer.name: layer.num_units for layer in self.submodels.layers}
        held: Counts = whole
        if _limits_what_is_held(budget):
            held = self._solve(replace(budget, upload_bytes=None), whole, memory, client_id, table)
        sparsity = self.sparsity(server_round)
        upload_bytes = None if budget is None else budget.upload_bytes
        if not sparsity and upload_bytes is None:
            return held, held
        most = None
        if sparsity:
            full, least = self._params(whole), self._params(dict.fromkeys(whole, 0))
            most = full - sparsity * (full - least)
        if self.config.strategy.spread == "macs":  # the same for all, as far as a client holds it
            moves = self._solve(Budget(params=most), whole, memory, client_id, None, "macs")
            sent = {name: min(moves[name], held[name]) for name in held}
            return held, self._solve(Budget(upload_bytes=upload_bytes), sent, memory, client_id, None, "macs")
        return held, self._solve(Budget(params=most, upload_bytes=upload_bytes), held, memory, client_id, None)

    def sparsity(self, server_round: int) -> float:
        """Return what uploads leave out in a round: nothing at first, then from ``ramp_from`` to the last value."""
        strategy = self.config.strategy
        done = server_round - strategy.warmup_rounds
        if done <= 0:
            return 0.0
        progress = min(done / (strategy.ramp_rounds + 1), 1.0)
        return strategy.ramp_from + progress * (strategy.sparsity - strategy.ramp_from)

    def _params(self, kept: Counts) -> float:
        row = np.array([[kept[name] for name in self.costs.layers]], dtype=np.float64)
        return float(self.costs.evaluate(row)[0, COSTS.index("params")])

    def _solve(
        self,
        budget: Budget,
        most: Counts,
        memory: Memory,
        client_id: int,
        table: LatencyTable | None,
        spread: str = "allocator",
    ) -> Counts:
        """Return the units that a budget leaves of ``most``, by the config's rule; clients of one kind share it."""
        if self._solved.get("memory") is not memory:
            self._solved.clear()
            self._solved["memory"] = memory
        key = budget, tuple(most.values()), table, spread
        if key not in self._solved:
            self._solved[key] = self._fit(budget, most, memory, client_id, table, spread)
        found: Counts = self._solved[key]
        return found

    def _fit(
        self, budget: Budget, most: Counts, memory: Memory, client_id: int, table: LatencyTable | None, spread: str
    ) -> Counts:
        layers, costs = self.submodels.layers, self.costs
        limits = costs.limits(budget, table)
        bounds = {x.name: (1.0 - most[x.name] / x.num_units, 1.0) for x in layers}
        even = {x.name: 1.0 - most[x.name] / x.num_units for x in layers}

        def load(kept: Mapping[str, float]) -> float:
            row = np.array([[min(kept[name], most[name]) for name in costs.layers]], dtype=np.float64)
            return float((costs.evaluate(row)[0] / limits).max())

        if load(most) <= 1.0:
            return most
        least = dict.fromkeys(costs.layers, 1)
        if load(least) <= 1.0:  # else let the rounding say what is out of reach
            found = self._by_work(load, most) if spread == "macs" else self._by_rule(load, most, memory)
            even = {x.name: 1.0 - min(found[x.name], most[x.name]) / x.num_units for x in layers}
        multiple = self.config.strategy.width_multiple
        return round_client(
            layers, even, costs, budget, client_id=client_id, table=table, bounds=bounds, multiple=multiple
        )

    def _by_rule(self, load: Cost, most: Counts, memory: Memory) -> Counts:
        layers, settings = self.submodels.layers, self.config.allocator
        if memory and settings.name in ("dp", "flap"):  # of each layer, the units that score best are held
            held = [replace(x, num_units=most[x.name]) for x in layers]
            scores = {x.name: np.sort(memory[f"{_SCORE}.{x.name}"].numpy())[-x.num_units :] for x in held}
            if settings.name == "flap":
                return allocate.allocate_pooled(held, scores, load, 1.0)
            curves = {name: np.cumsum(values)[:-1].tolist() for name, values in scores.items()}
            return allocate.allocate_by_curves(held, curves, load, 1.0)
        rule = settings.name if settings.name in ("depth_line", "log_depth") else "uniform"
        amplitude = None if rule == "uniform" else settings.amplitude
        return allocate.allocate_by_depth(layers, rule, 0.5, load, 1.0, amplitude)

    def _by_work(self, load: Cost, most: Counts) -> Counts:
        r"""Return the units that maximise :math:`\sum_l m_l \log f_l` within the budget, to about a per cent.

        :math:`m_l` are the MACs of a layer, :math:`f_l` the share of its weights that is sent. Where weights are
        counted, that share is in proportion to the multiply-adds per weight, as far as there are weights.
        """
        macs = COSTS.index("macs")
        row = np.array([[most[name] for name in self.costs.layers]], dtype=np.float64)
        without = row * (1.0 - np.eye(row.size))  # the layers that one axis takes part in, all units of it gone
        work = self.costs.evaluate(row)[:, macs] - self.costs.evaluate(without)[:, macs]
        by_name = dict(zip(self.costs.layers, work.tolist(), strict=True))
        held = [replace(x, num_units=most[x.name]) for x in self.submodels.layers]
        left = {x.name: np.arange(x.num_units - 1, 0, -1) / x.num_units for x in held}
        curves = {x.name: (-by_name[x.name] * np.log(left[x.name])).tolist() for x in held}
        return allocate.allocate_by_curves(held, curves, load, 1.0)

    # ---- the units
    def assign(self, server_round: int, client_id: int, memory: Memory) -> Assignment:
        """Return what the client gets and sends; AllocationError where its budget is out of reach."""
        strategy, layers = self.config.strategy, self.submodels.layers
        held, sent = self.counts(server_round, client_id, memory)
        fresh = (server_round - 1) % strategy.refresh_every == 0
        own = self._own(client_id, memory)
        ranked = {}
        whose = 0 if strategy.masks == "server" else client_id  # the server's draws are the same for all clients
        for number, x in enumerate(layers):
            rng = generator(self.config.seed, Stream.UNITS, server_round, whose, number)
            ranked[x.name] = self._rank(x, own.get(x.name), sent[x.name], memory, rng)
        widths = {
            x.name: Keep.from_indices(np.sort(ranked[x.name][: held[x.name]]), x.num_units)
            for x in layers
            if held[x.name] < x.num_units
        }
        submodel = SubModel(widths=widths)
        rates = strategy.layer_preserving_rate
        rate = float(rates[client_id] if isinstance(rates, list) else rates)
        uploads = self.submodels.layout(submodel).name_set
        if rate < 1.0:
            uploads = sample_uploads(
                self.config.seed, server_round, client_id, self.submodels.spec.layers, rate, strategy.mask_unit
            )
        narrow = strategy.batch_norm == "whole" and widths and self._somebody_is_whole
        if narrow or strategy.batch_norm == "static":
            uploads -= self.submodels.statistics  # those of a narrow model are not those of a wide one
        pruned = [x for x in layers if sent[x.name] < held[x.name]]
        chooses = strategy.masks == "client" and (fresh or not own)
        kept = {x.name: sent[x.name] for x in pruned} if chooses else {}
        returned = (
            {}
            if chooses
            else {x.name: Keep.from_indices(np.sort(ranked[x.name][: sent[x.name]]), x.num_units) for x in pruned}
        )
        return Assignment(submodel, uploads, kept, returned, scored=fresh and self._uses_scores)

    @property
    def _uses_scores(self) -> bool:
        strategy, limited = self.config.strategy, self._somebody_is_limited
        ranks = strategy.masks != "random" and (limited or (strategy.masks == "server" and self._regrow < 1))
        spreads = self.config.allocator.name in ("dp", "flap") and (limited or strategy.spread == "allocator")
        return self.config.pruner.name != "random" and (ranks or spreads)

    @cached_property
    def _somebody_is_whole(self) -> bool:
        return any(not held.widths for held, _ in self._kinds)

    @cached_property
    def _somebody_is_limited(self) -> bool:
        return any(held.widths for held, _ in self._kinds)

    @cached_property
    def _regrow(self) -> float:
        """Return the config's share, or where it has none 0, if clients that hold all move what others lack; else 1."""
        given = self.config.strategy.regrow
        if given is not None:
            return given
        return 0.0 if self._somebody_is_limited and self._somebody_is_whole else 1.0

    @cached_property
    def _kinds(self) -> list[tuple[SubModel, SubModel]]:
        """Return what every kind of client gets and sends in the end, before anything is known of the units."""
        found = []
        for client_id in sorted({self._first_like(client_id) for client_id in range(len(self.budgets))}):
            with suppress(AllocationError):
                found.append(self._case(self.config.num_rounds, client_id))
        return found

    def _own(self, client_id: int, memory: Memory) -> dict[str, Tensor]:
        """Return the units that a client returned last, as booleans; empty where the server chooses."""
        prefix = f"{_HELD}.{client_id}."
        if self.config.strategy.masks != "client":
            return {}
        return {x.name: memory[prefix + x.name] for x in self.submodels.layers if prefix + x.name in memory}

    def _rank(
        self, layer: PrunableLayer, own: Tensor | None, sent: int, memory: Memory, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return the units of a layer, those that a client is to have first.

        A share of them are those that nobody has returned for longest; then come the client's own, then all others, by
        their scores. Units without scores come in their order, or at random.
        """
        axis, size = layer.name, layer.num_units
        if "random" in (self.config.strategy.masks, self.config.pruner.name):
            ranked = rng.permutation(size)
        else:
            scores = memory.get(f"{_SCORE}.{axis}")
            keys = np.zeros(size) if scores is None else -scores.numpy()
            mine = np.zeros(size, dtype=bool) if own is None else own.numpy()
            ranked = np.lexsort((np.arange(size), keys, ~mine))
        count = int(self._regrow * sent)
        seen = memory.get(f"{_SEEN}.{axis}")
        if not count or seen is None:
            return ranked
        stale = np.lexsort((rng.permutation(size), seen.numpy()))[:count]
        return np.concatenate([stale, ranked[~np.isin(ranked, stale)]])

    # ---- the memory
    def remember(self, memory: Memory, server_round: int, answers: Sequence[Returned]) -> Memory:
        """Return the pooled scores, when each unit was last returned, and which units each client returned last.

        A unit's score is the mean over the clients that scored it, weighted by their examples; one that nobody has
        scored in this round keeps its score.
        """
        found = dict(memory)
        for layer in self.submodels.layers:
            axis, size = layer.name, layer.num_units
            total, weight = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
            seen = found.get(f"{_SEEN}.{axis}", torch.zeros(size, dtype=torch.int64)).clone()
            for answer in answers:
                sent = torch.from_numpy(answer.widths.get(axis, Keep.full(size)).indices())
                seen[sent] = server_round
                if axis in answer.scores:
                    held = torch.from_numpy(answer.held.get(axis, Keep.full(size)).indices())
                    total[held] += answer.num_examples * answer.scores[axis]
                    weight[held] += answer.num_examples
                if self.config.strategy.masks == "client":
                    mine = torch.zeros(size, dtype=torch.bool)
                    mine[sent] = True
                    found[f"{_HELD}.{answer.client_id}.{axis}"] = mine
            old = found.get(f"{_SCORE}.{axis}", torch.zeros(size, dtype=torch.float64))
            found[f"{_SCORE}.{axis}"] = torch.where(weight > 0, total / weight.clamp(min=1.0), old)
            found[f"{_SEEN}.{axis}"] = seen
        return found

    def cases(self, client_ids: Sequence[int]) -> list[Case]:
        """Return one case per kind of client, with the counts that hold before anything is known of the units.

        Clients whose budgets are out of reach are left out.
        """
        rates = self.config.strategy.layer_preserving_rate
        kinds = Counter(
            (self._first_like(client_id), float(rates[client_id] if isinstance(rates, list) else rates))
            for client_id in client_ids
        )
        find = lru_cache(self._case)
        found = []
        for (client_id, rate), count in kinds.items():
            with suppress(AllocationError):
                submodel, sent = find(self.config.num_rounds, client_id)
                found.append(Case(submodel, float(count), rate, sent))
        total = sum(case.probability for case in found)
        return [replace(case, probability=case.probability / total) for case in found]

    def _first_like(self, client_id: int) -> int:
        """Return the first client of the same budget and device."""
        if client_id in self.tables:
            return client_id
        return self.budgets.index(self.budgets[client_id])

    def _case(self, server_round: int, client_id: int) -> tuple[SubModel, SubModel]:
        sizes = {layer.name: layer.num_units for layer in self.submodels.layers}
        held, sent = (
            SubModel(widths={a: Keep.first(counts[a], size) for a, size in sizes.items() if counts[a] < size})
            for counts in self.counts(server_round, client_id, {})
        )
        return held, sent
