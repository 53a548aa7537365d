"""Phases of a secure sum over a grid: keys, shares, the masked answers, unmasking; drop-outs are counted and named."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedlp.errors import FedLPError, ProtocolError
from fedlp.federation.secagg import messages as wire
from fedlp.federation.secagg.group_sum import BadDealer, GroupSum, Opening
from fedlp.federation.secagg.keys import Words
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.server.exchange import exchange, kind_of, reason_of
from fedlp.federation.server.round_record import RoundUnderWay
from fedlp.federation.wire import messages

Fail = Callable[[int, str, FedLPError], None]
"""Counts and names a client that failed: its id, the kind of failure, the error."""

Read = Callable[["Group", int, RecordDict], None]
Asked = Sequence[tuple["Group", int, RecordDict]]


@dataclass
class Member:
    """A client of a group.

    Attributes
    ----------
    request : RecordDict
        Request that is answered with a masked vector.
    bytes_down, bytes_up : int
        Bytes of all phases.
    """

    request: RecordDict
    bytes_down: int = 0
    bytes_up: int = 0
    is_lost: bool = False


@dataclass
class Group:
    """Clients whose vectors are added up.

    Attributes
    ----------
    num_values, num_sums : int
        Lengths of the vectors of each client.
    most_examples : int
        Most examples of a client.
    """

    members: dict[int, Member]
    sum: GroupSum
    num_values: int
    num_sums: int
    most_examples: int
    openings: dict[int, Opening] = field(default_factory=dict)


class SecureExchange:
    """Exchange of one round.

    Parameters
    ----------
    node : callable
        Returns the node of a client.
    round_ : RoundUnderWay
        Counts the bytes of each phase.
    fail : callable
        Counts and names a client that failed.
    """

    def __init__(
        self, settings: SecAggSettings, grid: Grid, node: Callable[[int], int], round_: RoundUnderWay, fail: Fail
    ) -> None:
        self._settings, self._grid, self._node, self._round, self._fail = settings, grid, node, round_, fail

    def is_large_enough(self, client_ids: Collection[int]) -> bool:
        """Return whether clients may be a group; clients of a group that is too small are counted as failures."""
        if len(client_ids) >= self._settings.least(len(client_ids)):
            return True
        least = self._settings.min_group
        for client_id in client_ids:
            text = f"its group has {len(client_ids)} clients in this round; privacy.min_group={least}"
            self._fail(client_id, "small_group", FedLPError(text))
        return False

    def run(
        self, groups: Sequence[Group], name: str, kind: str, timeout: float, dropped: Collection[int] = frozenset()
    ) -> None:
        """Run the phases up to the openings.

        Parameters
        ----------
        name, kind : str
            Name of the phase whose answers are masked, and the type of its messages.
        timeout : float
            Seconds that this phase waits; the others wait ``phase_timeout_s`` at most.
        dropped : collection of int
            Clients that get their request in this phase, and answer no more.
        """
        patience = min(timeout, self._settings.phase_timeout_s)
        self._exchange_keys(groups, patience)
        self._exchange_shares(groups, patience)
        self._collect_masked(groups, name, kind, timeout, dropped)
        self._collect_openings(groups, name, patience)

    def open(self, group: Group, convict: Callable[[int], None]) -> tuple[Words, NDArray[np.uint64]] | None:
        """Return a group's sum; None where it is lost, whose clients are counted.

        Parameters
        ----------
        convict : callable
            Told of a client that is proven to have dealt false shares.
        """
        if not group.openings:
            return None
        try:
            return group.sum.open(group.openings)
        except BadDealer as error:
            self.lose(group, error.client_id, "rejected", error)
            if error.is_proven:
                convict(error.client_id)
            self.give_up(group, error)
        except ProtocolError as error:
            self.give_up(group, error)
        return None

    def lose(self, group: Group, client_id: int, reason: str, error: FedLPError) -> None:
        """Count and name a client that failed, once."""
        if not group.members[client_id].is_lost:
            group.members[client_id].is_lost = True
            self._fail(client_id, reason, error)

    def give_up(self, group: Group, error: FedLPError) -> None:
        """Count the clients of a group that have not failed themselves as lost with it."""
        for client_id in group.members:
            self.lose(group, client_id, "group_lost", error)

    # ---- phases
    def _exchange_keys(self, groups: Iterable[Group], timeout: float) -> None:
        """Ask all clients for their public keys."""
        number = self._round.server_round

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            group.sum.add_keys(client_id, wire.decode_keys(content, number, client_id))

        asked = [(group, x, wire.encode_keys_request(number, x)) for group in groups for x in group.members]
        self._ask("keys", wire.KEYS, asked, read, timeout)

    def _exchange_shares(self, groups: Iterable[Group], timeout: float) -> None:
        """Ask the clients of each group that is large enough for shares of their secrets."""
        number = self._round.server_round

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            dealing = wire.decode_dealing(content, number, client_id, len(group.sum.group))
            group.sum.add_dealing(client_id, dealing)

        asked = [
            (group, x, wire.encode_shares_request(number, x, group.sum.group, group.sum.keys))
            for group in groups
            if self._is_enough(group, group.sum.group, "keys")
            for x in group.sum.group
        ]
        self._ask("shares", wire.SHARES, asked, read, timeout)

    def _collect_masked(
        self, groups: Iterable[Group], name: str, kind: str, timeout: float, dropped: Collection[int]
    ) -> None:
        """Send the requests with the shares that each client receives; add up the masked answers."""
        number, bits = self._round.server_round, self._settings.bits

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            sizes = group.num_values, group.num_sums
            group.sum.add_masked(client_id, *wire.decode_masked(content, number, client_id, bits, *sizes))

        asked = []
        for group in groups:
            if not self._is_enough(group, group.sum.dealers, "shares"):
                continue
            for x in group.sum.dealers:
                content = group.members[x].request
                content[wire.SECAGG] = wire.encode_received(number, x, group.sum.received(x, group.most_examples))
                if x in dropped:
                    self._note_bytes(group.members[x], name, messages.count_bytes(content), 0)
                    self.lose(group, x, "dropped_out", FedLPError("it dropped out, as fleet.dropout has it"))
                else:
                    asked.append((group, x, content))
        self._ask(name, kind, asked, read, timeout)

    def _collect_openings(self, groups: Iterable[Group], before: str, timeout: float) -> None:
        """Ask the clients whose answers came for the shares that open their sum."""
        number = self._round.server_round

        def read(group: Group, client_id: int, content: RecordDict) -> None:
            counts = len(group.sum.survivors), len(group.sum.dropped)
            opening = wire.decode_opening(content, number, client_id, *counts)
            group.sum.check_opening(client_id, opening)
            group.openings[client_id] = opening

        asked = [
            (group, x, wire.encode_unmask_request(number, x, group.sum.survivors, group.sum.dropped))
            for group in groups
            if self._is_enough(group, group.sum.survivors, before)
            for x in group.sum.survivors
        ]
        self._ask("unmask", wire.UNMASK, asked, read, timeout)

    def _ask(self, name: str, kind: str, asked: Asked, read: Read, timeout: float) -> None:
        """Send the messages of a phase and read the replies; a client without a good one is counted and named."""
        group_id = str(self._round.server_round)
        requests = (Message(content, self._node(x), kind, group_id=group_id, ttl=timeout) for _, x, content in asked)
        for (group, client_id, content), reply in zip(asked, exchange(self._grid, requests, timeout), strict=True):
            up = messages.count_bytes(reply.content) if reply.has_content() else 0
            self._note_bytes(group.members[client_id], name, messages.count_bytes(content), up)
            try:
                if reply.has_error():
                    raise FedLPError(reason_of(reply))
                read(group, client_id, reply.content)
            except FedLPError as error:
                reason = "rejected" if isinstance(error, ProtocolError) else kind_of(reply.error)
                self.lose(group, client_id, reason, type(error)(f"phase {name}: {error}"))

    def _note_bytes(self, member: Member, phase: str, down: int, up: int) -> None:
        """Count the bytes of one exchange for its client and its phase."""
        member.bytes_down += down
        member.bytes_up += up
        total = self._round.phases.setdefault(phase, {"bytes_down": 0, "bytes_up": 0})
        total["bytes_down"] += down
        total["bytes_up"] += up

    def _is_enough(self, group: Group, client_ids: Collection[int], phase: str) -> bool:
        """Return whether a group goes on with some clients; else its clients are counted as lost."""
        least = group.sum.least
        if client_ids and len(client_ids) >= least:
            return True
        text = f"after phase {phase} {len(client_ids)} clients of its group are left, and {least} are needed"
        self.give_up(group, FedLPError(text))
        return False
