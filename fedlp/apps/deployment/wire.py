"""Bytes on the network, counted by a TCP proxy: without root, and without other traffic of the machine.

The count is of TCP payload: TLS records with Flower's framing, without TCP and IP headers.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from contextlib import suppress
from typing import Self

_CHUNK = 1 << 16


class CountingProxy:
    """Proxy from a free port of loopback to a port of this machine; bytes are forwarded unread.

    Attributes
    ----------
    address : str
        ``host:port`` to connect to.
    up, down : int
        Bytes so far from and to the connecting peer.
    """

    def __init__(self, port: int) -> None:
        self.up = 0
        self.down = 0
        self._target = port
        self._lock = threading.Lock()
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                proxy._serve(self.request)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, near: socket.socket) -> None:
        """Pass bytes both ways until both ends have closed."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as far:
            back = threading.Thread(target=self._pump, args=(far, near, "down"), daemon=True)
            back.start()
            self._pump(near, far, "up")
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):  # either end may vanish at any time: that is what a network does
            while data := source.recv(_CHUNK):
                with self._lock:
                    setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64
