"""A round by secure aggregation (Bonawitz et al., CCS 2017): keys, shares, training with masks, unmasking.

Each group of clients that return one index set of one sub-model has a secure sum of its own. A client that fails in any
phase is counted and named; a group of which too few are left costs its clients their round, and no run. The weighted
mean of a group enters the coverage average as one update that has the weight of all of them.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.secagg.evaluation import EvaluationSums
from fedlp.federation.secagg.fixed_point import FixedPoint, unflatten
from fedlp.federation.secagg.group_sum import GroupSum
from fedlp.federation.secagg.keys import Words
from fedlp.federation.secagg.phases import Group, Member, SecureExchange
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.secagg.sums import DataSums, SumLayout
from fedlp.federation.server.availability import draw_dropouts
from fedlp.federation.server.client_evaluation import PREFIX, Asked, read_metrics
from fedlp.federation.server.round_record import Tally
from fedlp.federation.server.strategy import FedLPStrategy
from fedlp.federation.strategies.policy import Answer, offset_of
from fedlp.federation.submodels import SubModelLayout
from fedlp.federation.wire import messages
from fedlp.types import Assignment, ClientCost, SubModel

log = logging.getLogger("fedlp")

_ROUNDING = 1 + 1e-6


@dataclass
class TrainGroup(Group):
    """Group of clients that train.

    Attributes
    ----------
    assigned : Assignment
        Assignment of one of them; the others' differ in the client alone.
    layout : SubModelLayout
        Layout of the part that they return.
    """

    assigned: Assignment = field(kw_only=True)
    layout: SubModelLayout = field(kw_only=True)


class SecureStrategy(FedLPStrategy):
    """Flower strategy of all methods whose clients return one index set per group.

    Parameters
    ----------
    secagg : SecAggSettings
        Settings of secure aggregation.
    *args, **kwargs
        Parameters of ``FedLPStrategy``.
    """

    def __init__(self, *args: Any, secagg: SecAggSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._secagg = secagg

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> NoReturn:
        """Raise: no update of one client is ever opened here."""
        raise AssertionError("secure aggregation opens no update")

    def _draw_dropouts(self, server_round: int, cohort: Sequence[int]) -> frozenset[int]:
        """Return nobody: clients drop out after they dealt shares, in the phase of training."""
        return frozenset()

    def _train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Run the phases of a round; return the new model and the round's metrics."""
        requests = list(self.configure_train(server_round, arrays, ConfigRecord(), grid))
        run = SecureExchange(self._secagg, grid, self._roster.node, self._round, self._fail)
        groups = self._form_groups(server_round, requests, run)
        dropped = draw_dropouts(self.settings.seed, server_round, self._round.cohort, self.settings.dropout)
        run.run(groups, "train", messages.TRAIN, timeout, dropped)
        return self._average(server_round, groups, run)

    def _form_groups(self, server_round: int, requests: Sequence[Message], run: SecureExchange) -> list[TrainGroup]:
        """Return the groups of a cohort that are large enough; clients of others are counted as failures."""
        assert self.state is not None
        found: dict[object, dict[int, tuple[Assignment, Member]]] = {}
        for message in requests:
            assigned, _ = self._round.assigned.popleft()
            client_id = assigned.client_id
            if client_id in self.state.suspects:
                text = f"client {client_id}: its updates are not used any more, since it dealt false shares before"
                self._fail(client_id, "rejected", ProtocolError(text))
                continue
            kind = offset_of(self.policy, client_id, self.state.memory).kind
            member = assigned, Member(message.content)
            found.setdefault((index_set(assigned), kind), {})[client_id] = member
        return [self._form_group(server_round, members) for members in found.values() if run.is_large_enough(members)]

    def _form_group(self, server_round: int, members: Mapping[int, tuple[Assignment, Member]]) -> TrainGroup:
        """Return a group of clients that return one index set."""
        assigned, _ = next(iter(members.values()))
        returned = SubModel(assigned.submodel.depth, {**assigned.submodel.widths, **assigned.returned})
        layout = self.submodels.layout(returned)
        most = max(self._roster.profile(client_id).num_examples for client_id in members)
        return TrainGroup(
            members={client_id: member for client_id, (_, member) in members.items()},
            sum=GroupSum(self._secagg, server_round),
            num_values=sum(math.prod(shape) for _, shape, _ in layout.signature(assigned.uploads)),
            num_sums=SumLayout.of(assigned, self.submodels, len(members), most).size,
            most_examples=most,
            assigned=assigned,
            layout=layout,
        )

    # ---- evaluation on clients
    def _evaluate_on_clients(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> Mapping[str, float]:
        """Return the metrics of the sums of all clients' evaluations, which are a group; empty where it is lost."""
        evaluator = self._clients
        assert evaluator is not None
        waiting: deque[tuple[Asked, SubModelLayout, int]] = deque()
        asked = self._asked_clients(server_round)
        requests = evaluator.requests(server_round, asked, self._encoded_values, arrays, waiting, timeout)
        members = {one.client_id: Member(message.content) for one, message in zip(asked, requests, strict=True)}
        run = SecureExchange(self._secagg, grid, self._roster.node, self._round, self._fail)
        if not run.is_large_enough(members):
            return {}
        lengths = evaluator.settings.lengths
        size = EvaluationSums(lengths, len(members)).size
        group = Group(members, GroupSum(self._secagg, server_round), 0, size, most_examples=1)
        run.run([group], "evaluate", messages.EVALUATE_CLIENT, timeout)
        total, count = run.open(group, self._suspect), 0
        metrics: dict[str, float] = {}
        if total is not None:
            try:
                sums, count = EvaluationSums(lengths, len(group.sum.dealers)).decode(total[1])
                metrics = read_metrics(evaluator.settings.task, sums, "the sum of all clients")
            except ProtocolError as error:
                run.give_up(group, error)
        share = count // max(len(group.sum.survivors), 1)
        for one, layout, _ in waiting:
            member, counts = members[one.client_id], one.client_id in group.sum.survivors
            macs = evaluator.macs(one.submodel, share if counts else 0)
            cost = member.bytes_down, member.bytes_up, layout.num_params(), 0
            self._round.costs.append(ClientCost(one.client_id, 0, *cost, macs))
        return {PREFIX + name: value for name, value in metrics.items()}

    # ---- sums
    def _average(
        self, server_round: int, groups: Sequence[TrainGroup], run: SecureExchange
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Open the sums, and conclude the round with their means."""
        assert self.state is not None
        average = CoverageAverage(self._server.before(self.state))  # of groups, so without bounds on clients
        answers: list[Answer] = []
        losses: list[tuple[float, int]] = []
        good = 0
        for group in groups:
            opened = self._open(server_round, group, run)
            for client_id, member in group.members.items():
                self._add_cost(client_id, member, group, opened[1] if opened else None)
            if opened is None:
                continue
            params, sums, weight = opened
            average.add(params, group.layout.keeps, weight)
            returned = {**group.assigned.submodel.widths, **group.assigned.returned}
            answers.append((group.assigned, replace(sums.report, widths=returned)))
            good += len(group.sum.survivors)
            if sums.train_loss is not None:
                losses.append((sums.train_loss, sums.examples))
        order = {client_id: number for number, client_id in enumerate(self._round.cohort)}
        self._round.costs.sort(key=lambda cost: order.get(cost.client_id, -1))  # those of calibration first
        return self._conclude(server_round, Tally(average, self._guard(), answers, losses), good)

    def _open(
        self, server_round: int, group: TrainGroup, run: SecureExchange
    ) -> tuple[dict[str, Tensor], DataSums, float] | None:
        """Return the mean of a group's updates, the sums over its data, and its weight; None where it is lost."""
        total = run.open(group, self._suspect)
        if total is None:
            return None
        try:
            return self._read_sums(server_round, group, *total)
        except ProtocolError as error:
            run.give_up(group, error)
            return None

    def _read_sums(
        self, server_round: int, group: TrainGroup, values: Words, sums: NDArray[np.uint64]
    ) -> tuple[dict[str, Tensor], DataSums, float]:
        """Return the mean, the sums over data and the weight that an opened sum stands for.

        Raises
        ------
        ProtocolError
            If they cannot be sums over the group's clients.
        """
        survivors, dealers = group.sum.survivors, group.sum.dealers
        layout = SumLayout.of(group.assigned, self.submodels, len(dealers), group.most_examples)
        data = layout.decode(sums, server_round, group.assigned.client_id)
        most = sum(self._roster.profile(client_id).num_examples for client_id in survivors)
        if not len(survivors) <= data.examples <= most:
            raise ProtocolError(f"the sum of {len(survivors)} updates is of {data.examples} examples, not up to {most}")
        by_examples = self._secagg.by_examples
        weight, largest = (data.examples, group.most_examples) if by_examples else (len(survivors), 1)
        fixed = FixedPoint(self._secagg.bits, self._secagg.value_range, len(dealers))
        flat = fixed.decode(values) * (largest / weight)
        if float(np.abs(flat).max(initial=0.0)) > fixed.value_range * _ROUNDING + fixed.error(largest, weight):
            raise ProtocolError(f"the mean of {len(survivors)} updates is out of their range")
        if data.clipped:
            log.warning(
                "round %d: %d values of %d updates were beyond privacy.value_range=%g and clipped; raise it",
                *(server_round, data.clipped, len(survivors), fixed.value_range),
            )
        signature = group.layout.signature(group.assigned.uploads)
        params = self._add_up(group.layout, unflatten(flat, signature, self._server.trainable))
        share = 1.0
        if self.settings.weighting == "held":
            share = group.layout.num_params() / self.submodels.spec.num_params
        return params, data, weight * share

    def _suspect(self, client_id: int) -> None:
        """Take no more updates of a client that is proven to have dealt false shares."""
        assert self.state is not None
        self.state = replace(self.state, suspects=tuple(sorted({*self.state.suspects, client_id})))

    def _add_up(self, layout: SubModelLayout, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that a client of the mean update would have sent, in the model's dtypes."""
        assert self.state is not None
        before = layout.slice(self.state.params)
        found = {}
        for name, mean in means.items():
            old = before[name]
            if not old.is_floating_point():
                found[name] = (old.to(torch.float64) + mean).round().to(old.dtype)
            elif self._server.sends_weights:
                found[name] = (old.to(torch.float64) + mean).to(old.dtype)
            else:
                found[name] = mean.to(old.dtype)
        return found

    def _add_cost(self, client_id: int, member: Member, group: TrainGroup, sums: DataSums | None) -> None:
        """Record the cost of a client: bytes of all phases; its examples are taken from its profile."""
        counts = sums is not None and client_id in group.sum.survivors
        examples = self._roster.profile(client_id).num_examples if counts else 0
        macs = self._costs.macs(group.assigned.submodel).training * examples * self.settings.local_epochs
        self._round.costs.append(
            ClientCost(
                client_id=client_id,
                num_examples=examples,
                bytes_down=member.bytes_down,
                bytes_up=member.bytes_up,
                params_down=self.submodels.layout(group.assigned.submodel).num_params(),
                params_up=group.layout.num_params(group.assigned.uploads) if counts else 0,
                macs=macs + (sums.macs / len(group.sum.survivors) if sums and counts else 0.0),
            )
        )


def index_set(assigned: Assignment) -> object:
    """Return a key that clients share if their updates can be added up: sub-model, units returned, tensors."""
    submodel = assigned.submodel
    return (
        submodel.depth,
        tuple(sorted(submodel.widths.items())),
        tuple(sorted(assigned.returned.items())),
        assigned.uploads,
        assigned.evidence,
    )
