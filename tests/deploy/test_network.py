"""The bench's network by itself: what it carries, counts, loses and cuts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.deploy.network import Link, Network, why_no_network

REASON = why_no_network()
pytestmark = [pytest.mark.deploy, pytest.mark.skipif(bool(REASON), reason=REASON)]
MANY, SIZE, HEADERS = 50, 1000, 42  # datagrams, bytes of each, and of its UDP, IP and Ethernet headers
STRAY = 500  # bytes of ARP, at most


class Line:
    """Datagrams from host ``far`` to host ``near``."""

    def __init__(self, link: Link, stack: ExitStack) -> None:
        self.network = stack.enter_context(Network({"near": Link(), "far": link}))
        with self.network.inside("near"):
            self._receiver = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            self._receiver.bind(("0.0.0.0", 0))
            self._receiver.settimeout(1)
        with self.network.inside("far"):
            self._sender = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            self._sender.connect((self.network.address("near"), self._receiver.getsockname()[1]))

    def carry(self, number: int) -> int:
        """Send datagrams, and return how many arrive."""
        for _ in range(number):
            self._sender.send(bytes(SIZE))
        return sum(1 for _ in self._arriving(number))

    def _arriving(self, number: int) -> Iterator[bytes]:
        try:
            for _ in range(number):
                yield self._receiver.recv(SIZE)
        except TimeoutError:
            return


def test_every_byte_is_counted_and_nothing_of_it_is_seen_outside() -> None:
    outside = Path("/proc/net/dev").read_text().count("\n")
    with ExitStack() as stack:
        line = Line(Link(), stack)
        assert line.carry(MANY) == MANY
        near, far = (line.network.host(name).wire for name in ("near", "far"))
        for count in (near.down, far.up):
            assert 0 <= count - MANY * (SIZE + HEADERS) < STRAY
        assert max(near.up, far.down) < STRAY
        assert Path("/proc/net/dev").read_text().count("\n") == outside


def test_some_frames_are_lost_and_a_cut_cable_carries_nothing() -> None:
    with ExitStack() as stack:
        line = Line(Link(loss=0.3), stack)
        while not line.carry(1):  # until both know each other's hardware address
            continue
        assert MANY * 0.4 < line.carry(MANY) < MANY
        line.network.shape("far", Link())
        assert line.carry(MANY) == MANY
        line.network.cut("far")
        assert line.carry(MANY) == 0
        line.network.heal("far")
        assert line.carry(MANY) == MANY


def test_a_slow_link_drops_what_it_has_no_room_for() -> None:
    with ExitStack() as stack:
        line = Line(Link(rate_kbit=64), stack)
        assert 0 < line.carry(MANY) < MANY / 3
