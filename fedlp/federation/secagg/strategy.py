"""A round by secure aggregation (Bonawitz et al., CCS 2017): keys, shares, training with masks, unmasking.

Each group of clients that return one index set of one sub-model has a secure sum of its own. A client that fails in any
phase is counted and named; a group of which too few are left costs its clients their round, and no run. The weighted
mean of a group enters the coverage average as one update that has the weight of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedlp.errors import FedLPError, ProtocolError
from fedlp.federation.secagg import messages as phases
from fedlp.federation.secagg.fixed_point import FixedPoint, unflatten
from fedlp.federation.secagg.group_sum import BadDealer, GroupSum, Opening
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.secagg.sums import DataSums, SumLayout
from fedlp.federation.server.availability import draw_dropouts
from fedlp.federation.server.exchange import ERROR_KINDS, exchange, reason_of
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.server.strategy import FedLPStrategy
from fedlp.federation.strategies.policy import Answer, offset_of
from fedlp.federation.submodels import SubModelLayout
from fedlp.federation.wire import messages
from fedlp.types import Assignment, ClientCost, SubModel

log = logging.getLogger("fedlp")

_ROUNDING = 1 + 1e-6


@dataclass
class Member:
    """A client of a group: its assignment, the instruction on its way, and the bytes of all phases."""

    assigned: Assignment
    message: Message
    bytes_down: int = 0
    bytes_up: int = 0
    is_lost: bool = False


@dataclass
class Group:
    """Clients that return one index set, and their secure sum."""

    members: dict[int, Member]
    sum: GroupSum
    layout: SubModelLayout
    most_examples: int
    openings: dict[int, Opening] = field(default_factory=dict)

    def left(self, client_ids: Iterable[int]) -> list[int]:
        """Return the clients, of some, that have not failed."""
        return [client_id for client_id in client_ids if not self.members[client_id].is_lost]


class SecureStrategy(FedLPStrategy):
    """Flower strategy of all methods whose clients return one index set per group.

    Parameters
    ----------
    secagg : SecAggSettings
        Settings of secure aggregation.
    *args, **kwargs
        Those of ``FedLPStrategy``.
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
        groups = self._form_groups(server_round, requests)
        patience = min(timeout, self._secagg.phase_timeout_s)
        self._exchange_keys(server_round, groups, grid, patience)
        self._exchange_shares(server_round, groups, grid, patience)
        self._train(server_round, groups, grid, timeout)
        self._ask_to_unmask(server_round, groups, grid, patience)
        return self._average(server_round, groups)

    def _form_groups(self, server_round: int, requests: Sequence[Message]) -> list[Group]:
        """Return the groups of a cohort that are large enough; clients of others are counted as failures."""
        assert self.state is not None
        found: dict[object, dict[int, Member]] = {}
        for message in requests:
            assigned, _ = self._round.assigned.popleft()
            client_id = assigned.client_id
            if client_id in self.state.suspects:
                self._fail(client_id, "rejected", ProtocolError(f"client {client_id} broke a round before"))
                continue
            kind = offset_of(self.policy, client_id, self.state.memory).kind
            found.setdefault((index_set(assigned), kind), {})[client_id] = Member(assigned, message)
        groups = []
        for members in found.values():
            if len(members) < self._secagg.least(len(members)):
                text = f"its group has {len(members)} clients in this round; privacy.min_group={self._secagg.min_group}"
                for client_id in members:
                    self._fail(client_id, "small_group", FedLPError(text))
                continue
            assigned = next(iter(members.values())).assigned
            returned = SubModel(assigned.submodel.depth, {**assigned.submodel.widths, **assigned.returned})
            most = max(self._roster.profile(client_id).num_examples for client_id in members)
            groups.append(Group(members, GroupSum(self._secagg, server_round), self.submodels.layout(returned), most))
        return groups

    # ---- phases
    def _exchange_keys(self, server_round: int, groups: Sequence[Group], grid: Grid, timeout: float) -> None:
        """Ask all clients for their public keys."""

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            group.sum.add_keys(client_id, phases.decode_keys(content, server_round, client_id))

        asked = [
            (group, client_id, phases.encode_keys_request(server_round, client_id))
            for group in groups
            for client_id in group.members
        ]
        self._phase("keys", phases.KEYS, asked, read, grid, timeout)

    def _exchange_shares(self, server_round: int, groups: Sequence[Group], grid: Grid, timeout: float) -> None:
        """Ask the clients of each group that is large enough for shares of their secrets."""

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            size = len(group.sum.group)
            group.sum.add_dealing(client_id, phases.decode_dealing(content, server_round, client_id, size))

        asked = [
            (group, client_id, phases.encode_shares_request(server_round, client_id, group.sum.group, group.sum.keys))
            for group in groups
            if self._is_enough(group, group.sum.group, "keys")
            for client_id in group.sum.group
        ]
        self._phase("shares", phases.SHARES, asked, read, grid, timeout)

    def _train(self, server_round: int, groups: Sequence[Group], grid: Grid, timeout: float) -> None:
        """Send the instructions with the shares that each client receives; add up the masked updates."""
        dropped = draw_dropouts(self.settings.seed, server_round, self._round.cohort, self.settings.dropout)

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            signature = group.layout.signature(group.members[client_id].assigned.uploads)
            size = sum(int(np.prod(shape)) for _, shape, _ in signature)
            num_sums = self._sums_of(group).size
            values = phases.decode_masked(content, server_round, client_id, self._secagg.bits, size, num_sums)
            group.sum.add_masked(client_id, *values)

        asked = []
        for group in groups:
            if not self._is_enough(group, group.sum.dealers, "shares"):
                continue
            for client_id in group.sum.dealers:
                content = group.members[client_id].message.content
                received = group.sum.received(client_id, group.most_examples)
                content[phases.SECAGG] = phases.encode_received(server_round, client_id, received)
                if client_id in dropped:
                    self._note_bytes(group.members[client_id], "train", messages.count_bytes(content), 0)
                    self._lose(group, client_id, "dropped_out", FedLPError("it dropped out, as fleet.dropout has it"))
                else:
                    asked.append((group, client_id, content))
        self._phase("train", messages.TRAIN, asked, read, grid, timeout)

    def _ask_to_unmask(self, server_round: int, groups: Sequence[Group], grid: Grid, timeout: float) -> None:
        """Ask the clients whose updates came for the shares that open their sum."""

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            counts = len(group.sum.survivors), len(group.sum.dropped)
            opening = phases.decode_opening(content, server_round, client_id, *counts)
            group.sum.check_opening(client_id, opening)
            group.openings[client_id] = opening

        asked = []
        for group in groups:
            if self._is_enough(group, group.sum.survivors, "train"):
                lists = group.sum.survivors, group.sum.dropped
                asked += [
                    (group, client_id, phases.encode_unmask_request(server_round, client_id, *lists))
                    for client_id in group.sum.survivors
                ]
        self._phase("unmask", phases.UNMASK, asked, read, grid, timeout)

    def _phase(
        self,
        name: str,
        kind: str,
        asked: Sequence[tuple[Group, int, RecordDict]],
        read: Callable[[Group, int, RecordDict], None],
        grid: Grid,
        timeout: float,
    ) -> None:
        """Send the messages of a phase and read the replies; a client whose reply is no good is counted and named."""
        group_id = str(self._round.server_round)
        requests = (
            Message(content, self._roster.node(client_id), kind, group_id=group_id, ttl=timeout)
            for _, client_id, content in asked
        )
        for (group, client_id, content), reply in zip(asked, exchange(grid, requests, timeout), strict=True):
            up = messages.count_bytes(reply.content) if reply.has_content() else 0
            self._note_bytes(group.members[client_id], name, messages.count_bytes(content), up)
            try:
                if reply.has_error():
                    raise FedLPError(reason_of(reply))
                read(group, client_id, reply.content)
            except FedLPError as error:
                reason = "rejected" if isinstance(error, ProtocolError) else ERROR_KINDS.get(reply.error.code, "error")
                self._lose(group, client_id, reason, type(error)(f"phase {name}: {error}"))

    def _note_bytes(self, member: Member, phase: str, down: int, up: int) -> None:
        """Count the bytes of one exchange for its client and its phase."""
        member.bytes_down += down
        member.bytes_up += up
        total = self._round.phases.setdefault(phase, {"bytes_down": 0, "bytes_up": 0})
        total["bytes_down"] += down
        total["bytes_up"] += up

    def _lose(self, group: Group, client_id: int, reason: str, error: FedLPError) -> None:
        """Count and name a client that failed, once."""
        if not group.members[client_id].is_lost:
            group.members[client_id].is_lost = True
            self._fail(client_id, reason, error)

    def _is_enough(self, group: Group, client_ids: Sequence[int], phase: str) -> bool:
        """Return whether a group goes on with some clients; else its clients are counted as lost."""
        least = group.sum.least
        if client_ids and len(client_ids) >= least:
            return True
        text = f"after phase {phase} {len(client_ids)} clients of its group are left, and {least} are needed"
        self._give_up(group, FedLPError(text))
        return False

    def _give_up(self, group: Group, error: FedLPError) -> None:
        """Count the clients of a group, that have not failed themselves, as lost with it."""
        for client_id in group.left(group.members):
            self._lose(group, client_id, "group_lost", error)

    # ---- sums
    def _sums_of(self, group: Group) -> SumLayout:
        """Return the layout of the 64-bit sums of a group."""
        assigned = next(iter(group.members.values())).assigned
        return SumLayout.of(assigned, self.submodels, len(group.sum.dealers), group.most_examples)

    def _average(self, server_round: int, groups: Sequence[Group]) -> tuple[ArrayRecord, MetricRecord]:
        """Open the sums, and conclude the round with their means."""
        assert self.state is not None
        average = self._aggregator.begin(self._before_round())
        answers: list[Answer] = []
        losses: list[tuple[float, int]] = []
        good = 0
        for group in groups:
            opened = self._open(server_round, group) if group.openings else None
            for client_id, member in group.members.items():
                self._add_cost(client_id, member, group, opened[1] if opened else None)
            if opened is None:
                continue
            params, sums, weight = opened
            average.add(params, group.layout.keeps, weight)
            assigned = group.members[group.sum.survivors[0]].assigned
            answers.append((assigned, sums.report))
            good += len(group.sum.survivors)
            if sums.train_loss is not None:
                losses.append((sums.train_loss, sums.examples))
        order = {client_id: number for number, client_id in enumerate(self._round.cohort)}
        self._round.costs.sort(key=lambda cost: order[cost.client_id])
        guard = RoundGuard(self.state, self._trainable, self._sends_weights)
        return self._conclude(server_round, average, guard, answers, losses, good)

    def _open(self, server_round: int, group: Group) -> tuple[dict[str, Tensor], DataSums, float] | None:
        """Return the mean of a group's updates, the sums over its data, and its weight; None where it is lost."""
        try:
            values, sums = group.sum.open(group.openings)
            return self._read_sums(server_round, group, values, sums)
        except BadDealer as error:
            self._lose(group, error.client_id, "rejected", error)
            if error.is_proven:
                assert self.state is not None
                self._suspect(error.client_id)
            self._give_up(group, error)
        except ProtocolError as error:
            self._give_up(group, error)
        return None

    def _read_sums(
        self, server_round: int, group: Group, values: Any, sums: Any
    ) -> tuple[dict[str, Tensor], DataSums, float]:
        """Return the mean, the sums over data and the weight that an opened sum stands for.

        Raises
        ------
        ProtocolError
            If they cannot be those of the group's clients.
        """
        survivors, dealers = group.sum.survivors, group.sum.dealers
        data = self._sums_of(group).decode(sums, server_round, survivors[0])
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
        signature = group.layout.signature(group.members[survivors[0]].assigned.uploads)
        params = self._add_up(group.layout, unflatten(flat, signature, self._trainable))
        share = 1.0
        if self.settings.weighting == "held":
            share = group.layout.num_params() / self.submodels.spec.num_params
        return params, data, weight * share

    def _suspect(self, client_id: int) -> None:
        """Take no more updates of a client that is proven to have dealt false shares."""
        assert self.state is not None
        self.state = replace(self.state, suspects=tuple(sorted({*self.state.suspects, client_id})))

    def _add_up(self, layout: SubModelLayout, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a client of the mean update would have sent, in the model's dtypes."""
        assert self.state is not None
        before = layout.slice(self.state.params)
        found = {}
        for name, mean in means.items():
            old = before[name]
            if not old.is_floating_point():
                found[name] = (old.to(torch.float64) + mean).round().to(old.dtype)
            elif self._sends_weights:
                found[name] = (old.to(torch.float64) + mean).to(old.dtype)
            else:
                found[name] = mean.to(old.dtype)
        return found

    def _add_cost(self, client_id: int, member: Member, group: Group, sums: DataSums | None) -> None:
        """Record the cost of a client: bytes of all phases; its examples are those of its profile."""
        counts = sums is not None and client_id in group.sum.survivors
        examples = self._roster.profile(client_id).num_examples if counts else 0
        macs = self._costs.macs(member.assigned.submodel).training * examples * self.settings.local_epochs
        self._round.costs.append(
            ClientCost(
                client_id=client_id,
                num_examples=examples,
                bytes_down=member.bytes_down,
                bytes_up=member.bytes_up,
                params_down=self.submodels.layout(member.assigned.submodel).num_params(),
                params_up=group.layout.num_params(member.assigned.uploads) if counts else 0,
                macs=macs + (sums.macs / len(group.sum.survivors) if sums and counts else 0.0),
            )
        )


def index_set(assigned: Assignment) -> object:
    """Return what clients have in common whose updates can be added up: sub-model, units returned, tensors."""
    submodel = assigned.submodel
    return (
        submodel.depth,
        tuple(sorted(submodel.widths.items())),
        tuple(sorted(assigned.returned.items())),
        assigned.uploads,
        assigned.evidence,
    )
