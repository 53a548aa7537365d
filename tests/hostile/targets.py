"""Every kind of message that a client sends: an honest one, its decoder, and the promise of what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from fedlp.config import compose
from fedlp.federation.oneshot import messages as pooling
from fedlp.federation.oneshot.messages import Part
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.federation.wire.encodings.quantised import Int4, Int8
from fedlp.federation.wire.encodings.topk import TopK
from fedlp.federation.wire.ranges import LARGEST_METRIC, LARGEST_MOMENT, LARGEST_VALUE, MOST_EXAMPLES
from fedlp.models import describe_model, state_tensors
from fedlp.types import Assignment, Budget, ClientProfile, ClientUpdate, InputNorms, Keep, SubModel

WHO = "client 4"
PROFILE = ClientProfile(4, 50)
FLOAT32 = Float32()


@dataclass(frozen=True)
class Target:
    """A kind of message.

    Attributes
    ----------
    honest : RecordDict
    decode : callable
        Decodes a reply, and checks what was accepted: any error but a ProtocolError is a fault of ours.
    named : str
        What each error must start with.
    """

    name: str
    honest: RecordDict
    decode: Callable[[RecordDict], None]
    named: str = WHO


def in_range(tensors: dict[str, Tensor], largest: float) -> None:
    for tensor in tensors.values():
        if tensor.is_floating_point():
            assert bool((tensor.abs() <= largest).all())


class Updates:
    """Targets that are updates of one small classifier with batch norms."""

    def __init__(self) -> None:
        config = compose(("model=fedlp_cnn",)).model
        self.submodels = SubModels(describe_model(config, (1, 8, 8), 10, "classification"))
        self.params = {name: tensor.detach() for name, tensor in state_tensors(self.submodels.spec.build(0)).items()}
        trainable = (name for name, info in self.submodels.spec.tensors.items() if info.trainable)
        self.trainable = frozenset(trainable)

    def target(
        self, name: str, widths: bool, encoding: Encoding = FLOAT32, coded: bool = False, normed: bool = False
    ) -> Target:
        submodels, layers = self.submodels, self.submodels.layers
        held = {axis: Keep.first(size // 2, size) for axis, size in submodels.widths.axes.items()} if widths else {}
        chosen = {x.name: held[x.name].count // 2 for x in layers} if widths else {}
        layout = submodels.layout(SubModel(widths=held))
        evidence = frozenset({"unit_scores"} if widths else ()) | ({"input_norms"} if normed else set())
        assigned = Assignment(3, 4, SubModel(widths=held), layout.name_set, chosen, evidence=evidence)
        sent = {x.name: Keep.window(1, chosen[x.name], held[x.name].size) for x in layers} if widths else {}
        values = submodels.layout(SubModel(widths={**held, **sent})).slice(self.params)
        update = ClientUpdate(
            server_round=3,
            client_id=4,
            num_examples=17,
            params=encoding.encode(values, torch.Generator().manual_seed(0)),
            metrics={"train-loss": 0.5, "pruning-macs": 1e6},
            widths=sent,
            scores={x.name: torch.rand(held[x.name].count) for x in layers} if widths else {},
            input_norms=self.norms(held) if normed else {},
        )

        def decode(content: RecordDict) -> None:
            found = messages.decode_update(content, assigned, PROFILE, submodels, encoding, coded)
            guard = RoundGuard(ServerState(2, self.params), self.trainable, isinstance(encoding, Float32))
            keeps = submodels.layout(SubModel(widths=found.widths)).keeps
            guard.admit(found, keeps)
            in_range(dict(found.params), LARGEST_VALUE)
            in_range(dict(found.scores), LARGEST_METRIC)
            assert 1 <= found.num_examples <= PROFILE.num_examples
            assert all(abs(value) <= LARGEST_METRIC for value in found.metrics.values())
            assert all(bool(torch.isfinite(norms.total).all()) for norms in found.input_norms.values())
            shapes = {name: tuple(tensor.shape) for name, tensor in found.params.items()}
            assert shapes == {n: s for n, s, _ in submodels.layout(SubModel(widths=found.widths)).signature()}

        return Target(name, messages.encode_update(update, submodels, coded), decode)

    def norms(self, held: dict[str, Keep]) -> dict[str, InputNorms]:
        found = {}
        for layer in self.submodels.layers:
            count = held[layer.name].count if layer.name in held else layer.num_units
            for path in layer.readers:
                columns = self.submodels.reader_columns[path] // layer.num_units * count
                found[path] = InputNorms(torch.rand(columns, dtype=torch.float64), 40)
        return found

    def statistics(self) -> Target:
        names = [name for name in self.submodels.statistics if self.params[name].is_floating_point()]
        names.sort(key=list(self.params).index)
        honest = messages.encode_statistics({name: self.params[name] for name in names}, 20)

        def decode(content: RecordDict) -> None:
            found, count = messages.decode_statistics(content, PROFILE, SubModel(), self.submodels)
            in_range(found, LARGEST_MOMENT)
            assert 1 <= count <= 50

        return Target("statistics", honest, decode)


def moments(name: str, parts: list[Part], dtype: torch.dtype) -> Target:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64, generator=rng)
    sums = {"r.total": x.sum(0), "r.gram": x.T @ x, "r.diagonal": x.square().sum(0)}
    sums |= {"r.cross": torch.randn(3, 6, generator=rng), "r.target_total": torch.randn(3, generator=rng)}

    def decode(content: RecordDict) -> None:
        found, count = pooling.decode_sums(content, parts, 2, 9, dtype, WHO)
        in_range(found, LARGEST_MOMENT)
        assert 1 <= count <= 9
        for part in parts:
            if part.symmetric:
                matrix = pooling.unpack_symmetric(found[part.name], 6)
                matrix = matrix + matrix.tril(-1).T
                assert float(torch.linalg.eigvalsh(matrix)[0]) >= -2e-6 * float(matrix.trace())

    return Target(name, pooling.encode_sums(sums, parts, 2, 5, dtype), decode)


def vote() -> Target:
    axes, kept = {"a": 6, "b": 300, "c": 9}, {"a": 2, "b": 100}
    sent = {"a": Keep.first(2, 6), "b": Keep.from_indices(np.arange(0, 200, 2), 300)}

    def decode(content: RecordDict) -> None:
        found, count = pooling.decode_vote(content, kept, axes, 9, WHO)
        assert {axis: keep.count for axis, keep in found.items()} == kept
        assert 1 <= count <= 9

    return Target("vote", pooling.encode_vote(sent, tuple(axes), 5), decode)


def profile() -> Target:
    def decode(content: RecordDict) -> None:
        found = messages.decode_profile(content)
        assert found.client_id >= 0
        assert 0 <= found.num_examples <= MOST_EXAMPLES  # without examples it is not sampled

    honest = messages.encode_profile(ClientProfile(4, 20, Budget(params=1e5, latency_s=0.5)))
    return Target("profile", honest, decode, named="")


def evaluation() -> Target:
    def decode(content: RecordDict) -> None:
        found = messages.decode_sums(content)
        assert all(isinstance(found[key], float) for key in ("loss", "count"))

    honest = messages.encode_sums({"loss": 3.5, "correct": 4.0, "count": 9.0, "positives": [1.0, 2.0]})
    return Target("evaluation sums", honest, decode, named="evaluation sums")


def all_targets() -> Iterator[Target]:
    """Yield every kind of message that a client sends."""
    updates = Updates()
    yield updates.target("update", widths=False)
    yield updates.target("update of chosen units, 8 bits, coded", widths=True, encoding=Int8(), coded=True)
    yield updates.target("update of chosen units, 4 bits, input norms", widths=True, encoding=Int4(), normed=True)
    yield updates.target("update of the largest entries", widths=False, encoding=TopK(), coded=True)
    yield updates.statistics()
    gram = Part("r.gram", (6, 6), True, False, "r.total", 8)
    diagonal = Part("r.diagonal", (6,), False, True, "r.total", 8)
    cross = [Part("r.target_total", (3,)), Part("r.cross", (3, 6))]
    yield moments("moments", [Part("r.total", (6,)), gram, *cross], torch.float32)
    yield moments("moments, float64, the diagonal", [Part("r.total", (6,)), diagonal], torch.float64)
    yield vote()
    yield profile()
    yield evaluation()
