"""Stacks of updates: each client's part is the message that it would send alone, and is checked as such."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor

from fedlp.config import compose
from fedlp.errors import ProtocolError
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import messages, stacks
from fedlp.federation.wire.index_sets import encode_names
from fedlp.federation.wire.packing import pack_stacks, pack_tensors, unpack_stacks
from fedlp.federation.wire.ranges import LARGEST_VALUE, are_in_range, check_values, find_bounds
from fedlp.models import describe_model
from fedlp.types import Assignment, ClientProfile, ClientUpdate, SubModel

CLIENTS = 5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return (10 * torch.randn((CLIENTS, *shape), generator=torch.Generator().manual_seed(seed))).to(dtype)


def test_every_row_is_the_image_of_one_client() -> None:
    shapes = [(3, 2), (), (4,), (0, 2), (2, 1, 3)]
    found = {f"{d}{i}": draw(s, d, i) for d in DTYPES for i, s in enumerate(shapes)}
    images = pack_stacks(found)
    for k in range(CLIENTS):
        alone = pack_tensors({name: stack[k] for name, stack in found.items()})
        assert {name: rows[k].tobytes() for name, rows in images.items()} == {n: x for n, (_, x) in alone.items()}
    signature = [(name, tuple(stack.shape[1:]), stack.dtype) for name, stack in found.items()]
    for name, stack in unpack_stacks(images, signature).items():
        assert stack.dtype == found[name].dtype
        assert torch.equal(stack, found[name])
    images["float32"][2, 3] ^= 1  # in the header
    with pytest.raises(ValueError, match="array float32"):
        unpack_stacks(images, signature)


class Case:
    """A stack of updates of one small network, with the checks of the server."""

    def __init__(self) -> None:
        self.submodels = SubModels(describe_model(compose(("model=linear",)).model, (1, 2, 2), 3, "classification"))
        layout = self.submodels.layout(SubModel())
        self.signature, self.names = layout.signature(), layout.name_set
        self.assigned = [Assignment(3, 10 + k, SubModel(), self.names) for k in range(CLIENTS)]
        params = {name: draw(shape, dtype, len(shape)) for name, shape, dtype in self.signature}
        losses = [0.5, math.nan, 0.25, math.inf, 1.0]
        self.update = stacks.StackedUpdate(3, [10 + k for k in range(CLIENTS)], [4, 5, 6, 7, 8], losses, params)
        self.state = ServerState(2, {name: stack[0].clone() for name, stack in params.items()})

    def guard(self) -> RoundGuard:
        return RoundGuard(self.state, self.names, holds_weights=True)


def test_a_stack_is_what_its_clients_would_send() -> None:
    case = Case()
    content = stacks.encode_updates(case.update, case.submodels)
    found = stacks.decode_updates(content, case.assigned, case.signature)
    assert [list(found.client_ids), list(found.num_examples)] == [[10, 11, 12, 13, 14], [4, 5, 6, 7, 8]]
    for k, assigned in enumerate(case.assigned):
        params = {name: stack[k] for name, stack in case.update.params.items()}
        metrics = {"train-loss": case.update.losses[k]} if math.isfinite(case.update.losses[k]) else {}
        alone = messages.encode_update(ClientUpdate(3, 10 + k, 4 + k, metrics, params=params), case.submodels)
        part = stacks.client_message(found, k, encode_names(assigned.uploads, case.submodels.names))
        assert messages.count_bytes(part) == messages.count_bytes(alone)
        decoded = messages.decode_update(part, assigned, ClientProfile(10 + k, 8), case.submodels)
        assert decoded.metrics == metrics
        assert all(torch.equal(decoded.params[name], tensor) for name, tensor in params.items())


def test_an_instruction_names_its_clients() -> None:
    case = Case()
    params = messages.encode_params(case.state.params)
    content = stacks.stack_instructions(
        messages.encode_instruction(case.assigned[0], params, case.submodels), [10, 11, 12]
    )
    instruction, client_ids = stacks.decode_instructions(content, case.submodels)
    assert (instruction.client_id, client_ids, stacks.count_clients(content)) == (10, [10, 11, 12], 3)
    for wrong in ([], [11, 10], [10, 10], ["10"], [1.5]):
        content[messages.INSTRUCTION]["client-ids"] = wrong  # type: ignore[assignment]
        with pytest.raises(ProtocolError, match="several clients"):
            stacks.decode_instructions(content, case.submodels)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop(messages.PARAMS),
        lambda content: content[messages.UPDATE].update({"client-ids": [10, 11, 12, 13, 15]}),
        lambda content: content[messages.UPDATE].update({"server-round": 4}),
        lambda content: content[messages.METRICS].update({"num-examples": [1, 2, 3, 4]}),
        lambda content: content[messages.METRICS].update({"train-losses": [1, 2, 3, 4, 5]}),
        lambda content: content[messages.PARAMS].clear(),
        lambda content: setattr(content[messages.PARAMS]["float32"], "data", b"12345"),
        lambda content: setattr(content[messages.PARAMS]["float32"], "data", b"123"),
    ],
    ids=["no arrays", "other clients", "round", "short list", "types", "empty", "short rows", "broken rows"],
)
def test_a_malformed_stack_is_refused(spoil: Callable[[RecordDict], object]) -> None:
    case = Case()
    content = stacks.encode_updates(case.update, case.submodels)
    spoil(content)
    with pytest.raises(ProtocolError, match="clients 10 to 14, round 3"):
        stacks.decode_updates(content, case.assigned, case.signature)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * LARGEST_VALUE, -1e6, 9e4, 0.0])
def test_checks_of_a_stack_are_those_of_each_client(value: float) -> None:
    case = Case()
    params = {name: stack.clone() for name, stack in case.update.params.items()}
    next(iter(params.values()))[3].view(-1)[1] = value
    bounds, floats = find_bounds(params), case.names
    stacked, alone = case.guard(), case.guard()
    sound = are_in_range(bounds, floats) & np.ones(CLIENTS, dtype=bool)
    sound = stacked.admit_stack(case.update.client_ids, bounds, floats, sound)
    for k in range(CLIENTS):
        one = ClientUpdate(3, 10 + k, 4, {}, params={name: stack[k] for name, stack in params.items()})
        try:
            check_values(one.params, "client")
            alone.admit(one, {})
        except ProtocolError:
            assert not sound[k]
        else:
            assert sound[k]
    assert stacked._extents.keys() == alone._extents.keys()
    for client_id, extents in alone._extents.items():
        np.testing.assert_array_equal(stacked._extents[client_id], extents)


@pytest.mark.parametrize("weights", [[3.0, 1.0, 7.0, 2.0, 5.0], [0.5, 1.5, 2.0, 3.0, 0.25]], ids=["whole", "fractions"])
def test_a_stack_is_averaged_as_its_clients_bit_for_bit(weights: list[float]) -> None:
    params = {"a": torch.zeros(7, 3), "b": torch.zeros(()), "n": torch.zeros((), dtype=torch.int64), "c": torch.ones(2)}
    batches = [
        {name: draw(tuple(x.shape), x.dtype, seed) for name, x in params.items() if name != "c"} for seed in (1, 2)
    ]
    stacked, alone = CoverageAverage(params), CoverageAverage(params)
    for batch in batches:
        stacked.add_stack(batch, {}, weights)
        for k, weight in enumerate(weights):
            alone.add({name: stack[k] for name, stack in batch.items()}, {}, weight)
    (found, coverage), (wanted, same) = stacked.result(), alone.result()
    assert coverage == same
    assert all(torch.equal(found[name], wanted[name]) for name in params)
    with pytest.raises(ValueError, match="weight"):
        stacked.add_stack(batches[0], {}, [0.0] * CLIENTS)


def test_a_count_that_float64_would_round_into_range_is_out_of_it() -> None:
    params = {"bn.num_batches_tracked": torch.tensor([[2**53 + 1], [2**53]])}
    assert are_in_range(find_bounds(params), frozenset()).tolist() == [False, True]
