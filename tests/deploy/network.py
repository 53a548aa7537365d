"""Several hosts on one machine: network namespaces, joined by links with a rate, a delay and loss.

A star. Every host has one interface, ``eth0``, a TAP device; the link's other end is a TAP device too, a port of a
bridge in a namespace of its own. ``tc`` shapes the rate at both ends. A thread carries frames between the ends, holds
them for the delay and loses some: not every kernel has netem.

The namespaces have no names: they last as long as this process or one started in them, so that nothing can be left
behind, and the machine's own network is not touched.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Self

from fedlp.apps.deployment.loopback import Host

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_FRAME = 2048  # bytes; an MTU of 1500 and its header
_MTU_BURST = 3200


@dataclass(frozen=True)
class Link:
    """A host's link, the same both ways.

    Attributes
    ----------
    rate_kbit : int
        Thousand bits a second, with all headers.
    delay_ms : float
        One way.
    loss : float
        Probability that a frame is lost, in [0, 1).
    """

    rate_kbit: int = 100_000
    delay_ms: float = 1.0
    loss: float = 0.0


class Interface:
    """The counters of a host's interface: bytes of whole Ethernet frames, ``up`` from the host, ``down`` to it."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace

    @property
    def up(self) -> int:
        return self._counters()[8]

    @property
    def down(self) -> int:
        return self._counters()[0]

    def _counters(self) -> list[int]:
        with _entered(self._namespace):
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        (found,) = (line.partition(":")[2] for line in lines if line.strip().startswith("eth0:"))
        return [int(word) for word in found.split()]


class Network:
    """Hosts and their links; a context manager, which all else needs.

    Parameters
    ----------
    links : mapping of str to Link
        Of every host; the first is the SuperLink's.
    seed : int
        Of the losses.
    """

    def __init__(self, links: Mapping[str, Link], seed: int = 0) -> None:
        self._links = dict(links)
        self._addresses = {name: f"10.0.0.{i}" for i, name in enumerate(links, start=1)}
        self._spaces: dict[str, int] = {}
        self._relay = _Relay(seed)
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._switch = _new_namespace(stack)
            _call(self._switch, "ip", "link add bridge type bridge", "link set bridge up")
            for name, link in self._links.items():
                self._spaces[name] = space = _new_namespace(stack)
                ends = _tap(space, "eth0", stack), _tap(self._switch, name, stack)
                address = self._addresses[name]
                _call(space, "ip", "link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up")
                _call(self._switch, "ip", f"link set dev {name} master bridge", f"link set dev {name} up")
                self._relay.join_ends(name, *ends)
                self.shape(name, link)
            stack.callback(self._relay.stop)
            self._relay.start()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return self._addresses[name]

    def host(self, name: str) -> Host:
        """Return a host as a place for SuperNodes; their connections are counted by its interface."""
        enter = ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self._spaces[name]}")
        return Host(enter, next(iter(self._addresses.values())), Interface(self._spaces[name]))

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Put this thread, and what it starts, on a host."""
        with _entered(self._spaces[name]):
            yield

    def shape(self, name: str, link: Link) -> None:
        """Give a link other properties from now on."""
        self._relay.links[name] = link
        burst = max(_MTU_BURST, link.rate_kbit * 1000 // 8 // 100)  # what passes between two ticks of a slow clock
        shaper = f"root tbf rate {link.rate_kbit}kbit burst {burst} latency 300ms"
        for space, device in ((self._spaces[name], "eth0"), (self._switch, name)):
            _call(space, "tc", f"qdisc replace dev {device} {shaper}")

    def cut(self, name: str) -> None:
        """Pull a host's cable out of the switch: both ends see silence."""
        _call(self._switch, "ip", f"link set dev {name} nomaster")

    def heal(self, name: str) -> None:
        """Put the cable back."""
        _call(self._switch, "ip", f"link set dev {name} master bridge")


class _Relay(threading.Thread):
    """Carries frames between the two ends of every link."""

    def __init__(self, seed: int) -> None:
        super().__init__(daemon=True)
        self.links: dict[str, Link] = {}
        self._other: dict[int, tuple[int, str]] = {}
        self._random = random.Random(seed)
        self._stopped = False

    def join_ends(self, name: str, one: int, other: int) -> None:
        """Make a link of two TAP devices."""
        self._other |= {one: (other, name), other: (one, name)}

    def stop(self) -> None:
        self._stopped = True
        if self.is_alive():
            self.join()

    def run(self) -> None:
        held: list[tuple[float, int, int, bytes]] = []  # when it is due, order of arrival, where it goes, frame
        order = count()
        while not self._stopped:
            patience = min(0.1, held[0][0] - time.monotonic()) if held else 0.1
            ready, _, _ = select.select(list(self._other), [], [], max(0.0, patience))
            now = time.monotonic()
            for end in ready:
                other, name = self._other[end]
                link = self.links[name]
                frame = os.read(end, _FRAME)
                if self._random.random() >= link.loss:
                    heapq.heappush(held, (now + link.delay_ms / 1000, next(order), other, frame))
            while held and held[0][0] <= now:
                _, _, end, frame = heapq.heappop(held)
                with suppress(OSError):  # no room there: one more frame is lost
                    os.write(end, frame)


@cache
def why_no_network() -> str:
    """Return why a network cannot be made here; empty where it can."""
    try:
        with Network({"a": Link(), "b": Link()}):
            return ""
    except OSError as error:
        return f"hosts as network namespaces need root, ip, tc and /dev/net/tun: {error}"


def _new_namespace(stack: ExitStack) -> int:
    """Return a descriptor of a new network namespace without IPv6, whose chatter would be counted."""
    home = _open_namespace()
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")
    try:
        space = _open_namespace()
        stack.callback(os.close, space)
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    finally:
        _check(_libc.setns(home, _CLONE_NEWNET), "setns")
        os.close(home)
    return space


@contextmanager
def _entered(space: int) -> Iterator[None]:
    """Put this thread into a namespace."""
    home = _open_namespace()
    try:
        _check(_libc.setns(space, _CLONE_NEWNET), "setns")
        yield
    finally:
        _check(_libc.setns(home, _CLONE_NEWNET), "setns")
        os.close(home)


def _open_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _tap(space: int, name: str, stack: ExitStack) -> int:
    """Make a TAP device in a namespace and return its descriptor, with which it goes."""
    with _entered(space):
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, end)
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return end


def _call(space: int, program: str, *lines: str) -> None:
    """Run lines of ``ip`` or ``tc`` in a namespace."""
    with _entered(space):
        done = subprocess.run(
            [program, "-batch", "-"], input="\n".join(lines), text=True, check=False, capture_output=True
        )
    if done.returncode != 0:
        raise OSError(f"{program}: {done.stderr.strip()}")


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
