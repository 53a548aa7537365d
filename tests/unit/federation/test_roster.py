"""Who joins when: on time, late, twice, under another node's id, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlp.errors import AllocationError, FedLPError
from fedlp.federation import flower_compat
from fedlp.federation.server import reply_polling as pulling
from fedlp.federation.server import roster
from fedlp.federation.server.exchange import exchange
from fedlp.federation.server.roster import Roster
from fedlp.federation.wire import messages
from fedlp.types import Budget, ClientProfile

LONG, SHORT = 60.0, 0.0


class Network(Grid):
    """Nodes that come and go; those of ``silent`` hear what they are asked, and say nothing yet."""

    def __init__(self, **clients: int | str) -> None:
        self.clients = {int(node.removeprefix("n")): client for node, client in clients.items()}
        self.budgets: dict[int, Budget] = {}
        self.empty: set[int] = set()
        self.unregistered: set[int] = set()
        self.silent: set[int] = set()
        self.pushed: list[Message] = []
        self._ids = count(1)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        new = list(messages)
        for message in new:
            flower_compat.set_message_id(message, str(next(self._ids)))
        self.pushed += new
        return ["" if m.metadata.dst_node_id in self.unregistered else m.metadata.message_id for m in new]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        return [
            self._answer(message)
            for message in self.pushed
            if message.metadata.message_id in wanted and message.metadata.dst_node_id not in self.silent
        ]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        client = self.clients.get(node, "Node Unavailable")
        if isinstance(client, str):
            return Message(Error(2, client), reply_to=message)
        profile = ClientProfile(client, 0 if node in self.empty else 10, self.budgets.get(node))
        return Message(messages.encode_profile(profile), reply_to=message)

    @property
    def asked(self) -> list[int]:
        return [message.metadata.dst_node_id for message in self.pushed]

    def set_run(self, run: Any) -> None: ...

    run: Any = None

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise AssertionError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise AssertionError


@pytest.fixture(autouse=True)
def _server(monkeypatch: pytest.MonkeyPatch) -> None:
    flower_compat.become_server()
    monkeypatch.setattr(roster, "_POLL_S", 0.0)
    monkeypatch.setattr(pulling, "_REST_S", 0.0)


def joined(who: Roster) -> dict[int, int]:
    return {client_id: who.node(client_id) for client_id in who.client_ids}


def test_where_all_are_there_each_is_asked_once() -> None:
    grid, who = Network(n7=1, n3=0), Roster(2, 1)
    who.join(grid, LONG)
    assert [list(who.refresh(grid, LONG)) for _ in range(3)] == [[], [], []]
    assert joined(who) == {0: 3, 1: 7}
    assert grid.asked == [7, 3]


def test_the_run_begins_when_the_time_is_up_with_those_who_are_there(caplog: pytest.LogCaptureFixture) -> None:
    who = Roster(4, 2)
    who.join(Network(n1=0, n2=3), SHORT)
    assert joined(who) == {0: 1, 3: 2}
    assert caplog.messages == ["the run begins without 2 of 4 clients, which did not join within 0 s: 1, 2"]


@pytest.mark.parametrize(("min_clients", "takes"), [(3, 3), (None, 4)])
def test_it_does_not_begin_with_fewer_than_asked_for(min_clients: int | None, takes: int) -> None:
    with pytest.raises(
        FedLPError, match=f"2 of num_clients=4 clients joined within 0 s, and it takes {takes} to begin"
    ):
        Roster(4, min_clients).join(Network(n1=0, n2=3), SHORT)


def test_it_begins_with_nobody_on_no_account() -> None:
    with pytest.raises(FedLPError, match=r"0 of num_clients=4 .* takes 1 to begin"):
        Roster(4, 0).join(Network(), SHORT)
    with pytest.raises(FedLPError, match="none of the 2 clients can take part"):
        Roster(2, 0).join(Network(n1="broken", n2="broken"), LONG)


def test_a_latecomer_joins_without_anybody_waiting_for_it() -> None:
    grid, who = Network(n1=0), Roster(3, 1)
    who.join(grid, SHORT)
    grid.clients |= {2: 2, 3: 1}
    grid.silent = {2}
    assert list(who.refresh(grid, LONG)) == [1]
    grid.silent = set()
    assert list(who.refresh(grid, LONG)) == [2]
    assert list(who.refresh(grid, LONG)) == []
    assert joined(who) == {0: 1, 1: 3, 2: 2}
    assert grid.asked == [1, 2, 3]


def test_of_two_nodes_that_say_they_are_one_client_the_first_is_it(caplog: pytest.LogCaptureFixture) -> None:
    grid, who = Network(n1=0, n2=0, n3=1), Roster(2, 1)
    who.join(grid, LONG)
    assert list(who.refresh(grid, LONG)) == []
    assert joined(who) == {0: 1, 1: 3}
    assert caplog.messages == ["node 2 cannot take part: it says it is client 0, which node 1 is"]


def test_two_that_are_one_do_not_end_the_wait_for_the_others() -> None:
    with pytest.raises(FedLPError, match="1 of num_clients=2"):
        Roster(2).join(Network(n1=0, n2=0), SHORT)


def test_a_client_comes_back_at_another_node() -> None:
    grid, who = Network(n1=0, n2=1), Roster(2, 1)
    who.join(grid, LONG)
    grid.clients[9] = 0
    assert list(who.refresh(grid, LONG)) == []  # the old node counts as there until Flower misses it
    del grid.clients[1]
    assert list(who.refresh(grid, LONG)) == [0]
    assert joined(who) == {0: 9, 1: 2}
    grid.clients[1] = 0
    assert list(who.refresh(grid, LONG)) == []
    assert joined(who) == {0: 9, 1: 2}


def test_a_client_that_is_gone_stays_on_the_roster_and_is_not_asked_again() -> None:
    grid, who = Network(n1=0, n2=1), Roster(2, 1)
    who.join(grid, LONG)
    del grid.clients[1]
    assert list(who.refresh(grid, LONG)) == []
    grid.clients[1] = 0
    assert list(who.refresh(grid, LONG)) == []
    assert joined(who) == {0: 1, 1: 2}
    assert grid.asked == [1, 2]


def test_who_cannot_take_part_is_named_once_and_asked_again_when_it_comes_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid, who = Network(n1=0, n2="no partition-id", n3=7), Roster(2, 1)
    who.join(grid, LONG)
    assert list(who.refresh(grid, LONG)) == []
    assert caplog.messages == [
        "node 2 cannot take part: no partition-id",
        "node 3 cannot take part: it says it is client 7; num_clients=2",
    ]
    del grid.clients[2]
    assert list(who.refresh(grid, LONG)) == []
    grid.clients[2] = 1
    assert list(who.refresh(grid, LONG)) == [1]


def test_one_that_is_dismissed_is_no_client_until_it_comes_back() -> None:
    grid, who = Network(n1=0), Roster(2, 1)
    who.join(grid, SHORT)
    grid.clients[2] = 1
    for client_id in who.refresh(grid, LONG):
        who.dismiss(client_id, AllocationError("its budget is out of reach"))
    assert list(who.refresh(grid, LONG)) == []
    assert joined(who) == {0: 1}


def test_budgets_are_those_of_who_is_there() -> None:
    grid, who = Network(n1=0, n2=1), Roster(3, 1)
    grid.budgets = {2: Budget(params=9.0), 3: Budget(params=5.0)}
    who.join(grid, SHORT)
    assert who.budgets == {1: Budget(params=9.0)}
    grid.clients[3] = 2
    assert list(who.refresh(grid, LONG)) == [2]
    assert who.budgets == {1: Budget(params=9.0), 2: Budget(params=5.0)}


def test_an_exchange_names_a_node_that_is_not_registered_any_more_and_goes_on() -> None:
    grid = Network(n1=0, n2=1, n3=2)
    grid.unregistered, grid.silent = {2}, {3}
    sent = [Message(RecordDict(), node, messages.CAPABILITIES) for node in (1, 2, 3)]
    replies = list(exchange(grid, sent, 0.2))
    assert [reply.has_error() and reply.error.code for reply in replies] == [False, 5, 3]


def test_clients_without_examples_are_named_once_and_not_sampled(caplog: pytest.LogCaptureFixture) -> None:
    grid, who = Network(n7=1, n3=0, n4=2), Roster(3)
    grid.empty = {7}
    who.join(grid, LONG)
    assert (who.client_ids, who.idle_ids) == ([0, 2], [1])
    assert "1 of 3 clients have no examples and are not sampled: 1" in caplog.text
    grid, who = Network(n7=0), Roster(1)
    grid.empty = {7}
    with pytest.raises(FedLPError, match="none of the 1 clients has examples; give them data"):
        who.join(grid, LONG)


class Knowing(Network):
    """Nodes of which the grid knows some without asking."""

    def get_node_ids(self) -> Iterable[int]:
        return range(1, 1 + len(self.clients))

    def profiles(self) -> dict[int, ClientProfile]:
        return {1: ClientProfile(0, 4), 3: ClientProfile(2, 0)}


def test_nodes_whose_profiles_the_grid_knows_are_not_asked() -> None:
    grid, who = Knowing(n1=0, n2=1, n3=2), Roster(3)
    who.join(grid, LONG)
    assert grid.asked == [2]
    assert (joined(who), who.idle_ids) == ({0: 1, 1: 2}, [2])
    assert who.profile(0).num_examples == 4
    assert list(who.refresh(grid, LONG)) == []
