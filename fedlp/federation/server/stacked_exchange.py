"""Exchange with clients of equal assignments in stacks: one message and one reply for several clients.

A stack that fails is asked again, client by client. Updates of a stack whose values are out of range are received one
by one, so that the record names each client's fault.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from flwr.app import Message

from fedlp.errors import ProtocolError
from fedlp.federation.aggregation.aggregator import add_stack
from fedlp.federation.flower_compat import make_reply
from fedlp.federation.server.cohorts import Instructed, Packer, Parcel, StackingGrid
from fedlp.federation.server.exchange import reason_of
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.server.update_collector import UpdateCollector
from fedlp.federation.submodels import SubModelLayout
from fedlp.federation.wire import messages
from fedlp.federation.wire.index_sets import encode_names
from fedlp.federation.wire.ranges import LARGEST_METRIC, Flags, are_in_range, find_bounds
from fedlp.federation.wire.stacks import StackedUpdate, client_message, decode_updates
from fedlp.types import ClientCost, ClientReport

log = logging.getLogger("fedlp")


def exchange_stacks(
    grid: StackingGrid, packer: Packer, instructed: Iterable[Instructed], collector: UpdateCollector, timeout: float
) -> None:
    """Send instructions in stacks and collect the updates; the round's costs and answers are in order of the cohort."""
    sent, again = deque[Parcel](), list[Parcel]()

    def note(parcels: Iterable[Parcel]) -> Iterator[Message]:
        for parcel in parcels:
            sent.append(parcel)
            yield parcel.message

    for reply in grid.stream(note(packer.parcels(instructed)), timeout):
        parcel = sent.popleft()
        if not parcel.is_stack:
            collector.collect(parcel.clients[0].instruction, parcel.bytes_down, reply)
        elif reply.has_error():
            number = collector.record.server_round
            log.debug("round %d: %s; clients of this stack are asked alone", number, reason_of(reply))
            again.extend(packer.single(one) for one in parcel.clients)
        else:
            collect_stack(collector, parcel, reply)
    for reply in grid.stream(note(again), timeout):
        parcel = sent.popleft()
        collector.collect(parcel.clients[0].instruction, parcel.bytes_down, reply)
    order = {client_id: number for number, client_id in enumerate(collector.record.cohort)}
    collector.record.costs.sort(key=lambda cost: order.get(cost.client_id, -1))
    collector.tally.answers.sort(key=lambda answer: order[answer[0].client_id])


def collect_stack(collector: UpdateCollector, parcel: Parcel, reply: Message) -> None:
    """Count in the reply of several clients."""
    assigned, submodels = [one.instruction for one in parcel.clients], collector.submodels
    layout, uploads = submodels.layout(assigned[0].submodel), assigned[0].uploads
    try:
        stack = decode_updates(reply.content, assigned, layout.signature(uploads))
    except ProtocolError as error:
        for instruction in assigned:
            collector.spend(instruction, parcel.bytes_down, 0, None)
            collector.fail(instruction.client_id, "rejected", error)
        return
    limits = [collector.roster.profile(client_id).num_examples for client_id in stack.client_ids]
    sound, names = are_sound(stack, limits, collector.tally.guard), encode_names(uploads, submodels.names)
    _add_updates(collector, parcel, stack, layout, np.flatnonzero(sound).tolist(), names)
    for k in np.flatnonzero(~sound).tolist():
        message = make_reply(client_message(stack, k, names), parcel.message)
        collector.collect(assigned[k], parcel.bytes_down, message)


def are_sound(stack: StackedUpdate, limits: Sequence[int], guard: RoundGuard) -> Flags:
    """Return whether each client's values are in range and fit the model, so that they would pass alone, (clients,).

    Parameters
    ----------
    limits : sequence of int
        Most examples of each client.
    guard : RoundGuard
        Records the updates that pass.
    """
    examples, losses = np.array(stack.num_examples, dtype=object), np.array(stack.losses)
    bounds = find_bounds(stack.params)
    floats = frozenset(name for name, x in stack.params.items() if x.is_floating_point())
    known = np.array((examples >= 1) & (examples <= np.array(limits, dtype=object)), dtype=np.bool_)
    known &= ~np.isfinite(losses) | (np.abs(losses) <= LARGEST_METRIC)  # one that is not finite is not on record
    known &= are_in_range(bounds, floats)
    return known & guard.admit_stack(stack.client_ids, bounds, floats, known)


def _add_updates(
    collector: UpdateCollector,
    parcel: Parcel,
    stack: StackedUpdate,
    layout: SubModelLayout,
    positions: Sequence[int],
    names: bytes,
) -> None:
    """Count in the updates at some positions of a stack; ``names`` are the encoded names of the tensors."""
    assigned = [one.instruction for one in parcel.clients]
    counts = {stack.num_examples[k] for k in positions}  # of equal sub-models: they give weight and cost
    weight_of = {count: collector.weight(count, assigned[0]) for count in counts}
    macs_of = {count: collector.training_macs(assigned[0], count) for count in counts}
    weights = {k: weight_of[stack.num_examples[k]] for k in positions}
    add_stack(collector.tally.average, stack.params, layout.keeps, weights)
    parameters = layout.num_params(), layout.num_params(assigned[0].uploads)
    widths = assigned[0].submodel.widths
    sizes: dict[bool, int] = {}  # bytes of a reply with a loss, and of one without
    for k in positions:
        instruction, count = assigned[k], stack.num_examples[k]
        loss = stack.losses[k] if math.isfinite(stack.losses[k]) else None
        if (has_loss := loss is not None) not in sizes:
            sizes[has_loss] = messages.count_bytes(client_message(stack, k, names))
        spent = parcel.bytes_down, sizes[has_loss], *parameters, macs_of[count]
        collector.record.costs.append(ClientCost(instruction.client_id, count, *spent, loss))
        metrics = {} if loss is None else {"train-loss": loss}
        collector.note(instruction, ClientReport(stack.server_round, instruction.client_id, count, metrics, widths))
