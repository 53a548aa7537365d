"""A grid whose clients answer at once, without training: for many rounds, and for any answer to any message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedlp.apps import runs as assembly
from fedlp.federation.flower_compat import become_server
from fedlp.federation.wire import evaluation_messages, messages
from fedlp.types import ClientProfile, ClientUpdate, Keep, SubModel, TrainInstruction

Answer = Callable[[Message, int], Message]
"""The reply of a client to a message."""


class InstantGrid(Grid):
    """Calls a function in this process for every message; node ``i + 1`` is the client of partition ``i``."""

    def __init__(self, num_clients: int, answer: Answer) -> None:
        become_server()
        self._num_clients, self._answer = num_clients, answer

    def stream(self, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
        for message in messages:
            yield self._answer(message, message.metadata.dst_node_id - 1)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._num_clients + 1)

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:
        return None

    create_message = push_messages = pull_messages = send_and_receive = None  # type: ignore[assignment]


class InstantClient:
    """Answers as an honest client whose training changes every weight a little, and which chooses units at random."""

    def __init__(self, cfg: str) -> None:
        self.plan = assembly.make_plan(cfg)
        self._rng = np.random.default_rng(0)

    def __call__(self, message: Message, client_id: int) -> Message:
        submodels = self.plan.submodels
        if message.metadata.message_type == messages.CAPABILITIES:
            return Message(messages.encode_profile(ClientProfile(client_id, 20)), reply_to=message)
        if message.metadata.message_type == messages.STATISTICS:
            submodel, _ = evaluation_messages.decode_submodel(message.content, submodels)
            names = frozenset(name for name in submodels.statistics if not name.endswith("num_batches_tracked"))
            measured = {name: torch.full(shape, 0.01) for name, shape, _ in submodels.layout(submodel).signature(names)}
            return Message(evaluation_messages.encode_statistics(measured, 20), reply_to=message)
        instruction = messages.decode_instruction(message.content, submodels)
        return Message(messages.encode_update(self.train(instruction), submodels), reply_to=message)

    def train(self, instruction: TrainInstruction) -> ClientUpdate:
        submodels, held = self.plan.submodels, instruction.submodel.widths
        widths = {}
        for axis, count in instruction.kept.items():
            outer = held.get(axis, Keep.full(submodels.widths.axes[axis]))
            chosen = np.sort(self._rng.choice(outer.count, count, replace=False))
            widths[axis] = Keep.from_indices(outer.indices()[chosen], outer.size)
        layout = submodels.layout(SubModel(instruction.submodel.depth, {**held, **instruction.returned, **widths}))
        sent = {
            name: torch.zeros(shape, dtype=dtype) + (0.01 if dtype.is_floating_point else 1)
            for name, shape, dtype in layout.signature(instruction.uploads)
        }
        scores = {x.name: torch.rand(held[x.name].count if x.name in held else x.num_units) for x in submodels.layers}
        return ClientUpdate(
            server_round=instruction.server_round,
            client_id=instruction.client_id,
            num_examples=20,
            params=sent,
            metrics={"train-loss": 1.0},
            widths=widths,
            scores=scores if "unit_scores" in instruction.evidence else {},
        )
