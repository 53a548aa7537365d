"""The counting proxy passes every byte on and counts each way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from fedlp.apps.deployment.wire import CountingProxy


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that answers every connection, at its end, with twice what it read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(3):
                connection, _address = listener.accept()
                with connection:
                    connection.sendall(read_all(connection) * 2)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def ask(address: str, content: bytes) -> bytes:
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_bytes_pass_unchanged_and_are_counted(echo: int) -> None:
    with CountingProxy(echo) as proxy:
        for size in (0, 10, 300_000):
            content = bytes(i % 251 for i in range(size))
            assert ask(proxy.address, content) == content * 2
        assert (proxy.up, proxy.down) == (300_010, 600_020)


def test_where_nobody_listens_the_connection_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with CountingProxy(port) as proxy:
        try:
            answer = ask(proxy.address, b"x")
        except OSError:  # reset, or found no longer connected: which of them is the kernel's timing
            answer = b""
        assert answer == b""
        assert (proxy.up, proxy.down) == (0, 0)
