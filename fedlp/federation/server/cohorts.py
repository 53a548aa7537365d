"""Instructions to several clients at once, on an engine whose workers train them together.

Clients that get the same sub-model and return the same tensors share one message; see ``federation.wire.stacks``. If it
fails, each of its clients is asked by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from flwr.app import ArrayRecord, Message, RecordDict

from fedlp.federation.flower_compat import make_request
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.stacks import TRAIN_COHORT, stack_instructions
from fedlp.types import Assignment


@runtime_checkable
class StackingGrid(Protocol):
    """Grid whose workers train several clients together.

    Attributes
    ----------
    cohort : int
        Clients of one message, >= 1.
    stacks : bool
        Whether one message may be for several clients.
    """

    cohort: int
    stacks: bool

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        """Yield one reply per message, in order."""


class Instructed(NamedTuple):
    """Instruction of one client before it is a message.

    Attributes
    ----------
    params : ArrayRecord or Sent
        Encoded tensors, which several clients may share.
    held : bytes
        Digest of the frozen tensors, if ``params`` leaves them out.
    has_frozen : bool
        Whether the client keeps frozen tensors.
    """

    instruction: Assignment
    params: ArrayRecord | messages.Sent
    held: bytes
    has_frozen: bool


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message, and the clients that it is for.

    Attributes
    ----------
    bytes_down : int
        Of each client's download.
    """

    clients: Sequence[Instructed]
    message: Message
    bytes_down: int

    @property
    def is_stack(self) -> bool:
        """Whether it is for several clients."""
        return self.message.metadata.message_type == TRAIN_COHORT


class Packer:
    """Maker of a round's messages.

    Parameters
    ----------
    node : callable
        Returns the node of a client.
    size : int
        Clients of one message at most.
    """

    def __init__(self, submodels: SubModels, node: Callable[[int], int], size: int, ttl: float) -> None:
        self._submodels, self._node, self._size, self._ttl = submodels, node, size, ttl

    def single(self, one: Instructed) -> Parcel:
        """Return the message for one client."""
        content = messages.encode_instruction(one.instruction, one.params, self._submodels, one.held)
        return self._parcel([one], content, messages.TRAIN, messages.count_bytes(content))

    def parcels(self, instructed: Iterable[Instructed]) -> Iterator[Parcel]:
        """Yield messages for all clients as soon as they are full; who shares one depends on the cohort alone."""
        open_: dict[tuple[SubModelLayout, frozenset[str], int], list[Instructed]] = {}
        for one in instructed:
            if not is_plain(one):
                yield self.single(one)
                continue
            key = self._submodels.layout(one.instruction.submodel), one.instruction.uploads, id(one.params)
            members = open_.setdefault(key, [])
            members.append(one)
            if len(members) == self._size:
                yield self._stack(open_.pop(key))
        for members in open_.values():
            yield self.single(members[0]) if len(members) == 1 else self._stack(members)

    def _stack(self, members: Sequence[Instructed]) -> Parcel:
        first = members[0]
        content = messages.encode_instruction(first.instruction, first.params, self._submodels)
        ids = [one.instruction.client_id for one in members]
        bytes_down = messages.count_bytes(content)  # all are of one length: their ids are numbers
        return self._parcel(members, stack_instructions(content, ids), TRAIN_COHORT, bytes_down)

    def _parcel(self, clients: Sequence[Instructed], content: RecordDict, kind: str, bytes_down: int) -> Parcel:
        first = clients[0].instruction
        node, group = self._node(first.client_id), str(first.server_round)
        return Parcel(clients, make_request(content, node, kind, group, self._ttl), bytes_down)


def is_plain(one: Instructed) -> bool:
    """Return whether a client trains its tensors and returns some of them, and nothing else."""
    asked = one.instruction
    asks = asked.kept or asked.returned or asked.evidence or asked.submodel.nested_levels
    return not asks and not one.has_frozen
