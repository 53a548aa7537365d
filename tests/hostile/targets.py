"""Every kind of reply, and the server's instruction: an honest one, its decoder, the promise of what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, RecordDict
from torch import Tensor

from fedlp.config import compose
from fedlp.errors import ProtocolError
from fedlp.federation.oneshot import messages as pooling
from fedlp.federation.oneshot.messages import Part
from fedlp.federation.oneshot.plans import judgement_parts
from fedlp.federation.secagg import messages as phases
from fedlp.federation.secagg.group_sum import GroupSum
from fedlp.federation.secagg.keys import DIGEST_BYTES, SEALED_BYTES, public_key
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.secagg.shamir import SHARE_BYTES
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.client_evaluation import read_metrics
from fedlp.federation.server.frozen_tensors import EncodedDownlink
from fedlp.federation.server.stacked_exchange import are_sound
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import evaluation_messages, messages, stacks
from fedlp.federation.wire.digests import digest_tensors
from fedlp.federation.wire.downloads import Download
from fedlp.federation.wire.encoded_tensors import EncodedTensors
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.blockwise import NormalFloat4
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.federation.wire.encodings.quantised import Int4, Int8
from fedlp.federation.wire.encodings.topk import TopK
from fedlp.federation.wire.index_sets import encode_names
from fedlp.federation.wire.ranges import LARGEST_METRIC, LARGEST_MOMENT, LARGEST_VALUE, MOST_EXAMPLES
from fedlp.models import describe_model, state_tensors
from fedlp.pruning.refitted_model import MOST_DIVERGENCE
from fedlp.tasks import make_task
from fedlp.types import Assignment, Budget, ClientProfile, ClientUpdate, InputNorms, Keep, SubModel

WHO = "client 4"
PROFILE = ClientProfile(4, 50)
STACKED = (4, 7, 2)  # clients of a stack
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

    def stack(self) -> Target:
        """Return the target of stacked updates: each is taken where it would be alone, else its sender is named."""
        submodels, layout = self.submodels, self.submodels.layout(SubModel())
        assigned = [Assignment(3, client_id, SubModel(), layout.name_set) for client_id in STACKED]
        uploads = encode_names(layout.name_set, submodels.names)
        params = {name: torch.stack([tensor] * len(STACKED)) for name, tensor in self.params.items()}
        losses = [0.5, float("nan"), 0.25]
        update = stacks.StackedUpdate(3, STACKED, [17, 50, 1], losses, params)

        def decode(content: RecordDict) -> None:
            found = stacks.decode_updates(content, assigned, layout.signature())
            guards = [RoundGuard(ServerState(2, self.params), self.trainable, True) for _ in range(2)]
            sound = are_sound(found, [PROFILE.num_examples] * len(STACKED), guards[0]).tolist()
            errors = [self.verdict(stacks.client_message(found, k, uploads), assigned[k], guards[1]) for k in range(3)]
            assert sound == [error is None for error in errors], errors
            for k, (client_id, error) in enumerate(zip(STACKED, errors, strict=True)):
                assert str(error or f"client {client_id}, round 3").startswith(f"client {client_id}, round 3")
                if error is None:
                    in_range({name: rows[k] for name, rows in found.params.items()}, LARGEST_VALUE)
            for error in filter(None, errors):
                raise error

        honest = stacks.encode_updates(update, submodels)
        arrays = honest.array_records[messages.PARAMS]
        for dtype, array in list(arrays.items()):  # as they arrive
            arrays[dtype] = Array(array.dtype, array.shape, array.stype, bytes(array.data))
        return Target("stacked updates", honest, decode, named="client")

    def verdict(self, content: RecordDict, assigned: Assignment, guard: RoundGuard) -> ProtocolError | None:
        """Return why an update that comes alone is refused; None if it is taken."""
        try:
            profile = ClientProfile(assigned.client_id, PROFILE.num_examples)
            guard.admit(messages.decode_update(content, assigned, profile, self.submodels), {})
        except ProtocolError as error:
            return error
        return None

    def statistics(self) -> Target:
        names = [name for name in self.submodels.statistics if self.params[name].is_floating_point()]
        names.sort(key=list(self.params).index)
        honest = evaluation_messages.encode_statistics({name: self.params[name] for name in names}, 20)

        def decode(content: RecordDict) -> None:
            found, count = evaluation_messages.decode_statistics(content, PROFILE, SubModel(), self.submodels)
            in_range(found, LARGEST_MOMENT)
            assert 1 <= count <= 50

        return Target("statistics", honest, decode)


def instruction(covers_trained: bool = False, stays_encoded: bool = False) -> Target:
    """Return the server's instruction with encoded tensors, as a client reads it that decodes frozen ones, or not."""
    config = compose(("model=fedlp_cnn", "model.frozen=[fc*]")).model
    submodels = SubModels(describe_model(config, (1, 8, 8), 10, "classification"))
    params = {name: tensor.detach() for name, tensor in state_tensors(submodels.spec.build(0)).items()}
    download, still = Download(NormalFloat4(), covers_trained), submodels.spec.frozen
    downlink = EncodedDownlink(submodels, download, 0)
    held = {axis: Keep.first(size // 2, size) for axis, size in submodels.widths.axes.items()}
    layout = submodels.layout(SubModel(widths=held))
    assigned = Assignment(3, 4, SubModel(widths=held), layout.name_set - still)

    def decode(content: RecordDict) -> None:
        found = messages.decode_instruction(content, submodels, None, download, stays_encoded)
        layout = submodels.layout(found.submodel)
        frozen = {name: x for name, x in found.params.items() if name in still}
        if found.frozen and stays_encoded:
            assert not frozen
            frozen = dict(EncodedTensors(download.encoding, found.frozen, messages.frozen_signature(layout)).decode())
        in_range({**found.params, **frozen} if covers_trained else frozen, LARGEST_VALUE)
        assert bool(found.held) or found.params.keys() | frozen.keys() == layout.name_set
        if found.frozen:
            assert digest_tensors(frozen) == content[messages.INSTRUCTION]["digest"]

    honest = messages.encode_instruction(assigned, downlink.encode(layout, layout.slice(params)), submodels)
    name = "instruction, all encoded" if covers_trained else "instruction with frozen tensors"
    name += ", which stay encoded" * stays_encoded
    return Target(name, honest, decode, named="the server's ")


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


def judgement(dtype: torch.dtype) -> Target:
    parts = judgement_parts(3, 7)

    def decode(content: RecordDict) -> None:
        found, count = pooling.decode_sums(content, parts, 0, 9, dtype, WHO)
        values = found["divergence"]
        assert values.shape == (3,)
        assert bool(((values >= 0) & (values <= MOST_DIVERGENCE * 7 * count)).all())
        assert 1 <= count <= 9

    sums = {"divergence": torch.tensor([0.5, 3.0, 0.0], dtype=torch.float64)}
    return Target(f"judgement, {dtype}", pooling.encode_sums(sums, parts, 0, 5, dtype), decode)


def profile() -> Target:
    def decode(content: RecordDict) -> None:
        found = messages.decode_profile(content)
        assert found.client_id >= 0
        assert 0 <= found.num_examples <= MOST_EXAMPLES  # without examples it is not sampled
        assert found.num_test is None or 0 <= found.num_test <= MOST_EXAMPLES

    honest = messages.encode_profile(ClientProfile(4, 20, Budget(params=1e5, latency_s=0.5), num_test=5))
    return Target("profile", honest, decode, named="")


def evaluation() -> Target:
    def decode(content: RecordDict) -> None:
        found = evaluation_messages.decode_sums(content)
        assert all(isinstance(found[key], float) for key in ("loss", "count"))

    honest = evaluation_messages.encode_sums({"loss": 3.5, "correct": 4.0, "count": 9.0, "positives": [1.0, 2.0]})
    return Target("evaluation sums", honest, decode, named="evaluation sums")


def own_evaluation() -> Target:
    """Return the target of evaluation sums of a client's own examples: what is accepted gives metrics in bounds."""
    task = make_task("classification", metrics=("accuracy", "macro_f1"))
    right, positive = {"macro_f1.right": [2.0, 1.0]}, {"macro_f1.predicted": [2.0, 2.0], "macro_f1.true": [3.0, 1.0]}
    sums = {"loss": 3.5, "count": 4.0, "accuracy.correct": 3.0, "accuracy.count": 4.0, **right, **positive}
    lengths = {name: len(value) if isinstance(value, list) else 0 for name, value in sums.items()}

    def decode(content: RecordDict) -> None:
        found, count = evaluation_messages.decode_client_sums(content, lengths, WHO, 4, 1.0)
        metrics = read_metrics(task, found, WHO)
        assert 1 <= found["count"] <= count <= 4
        assert all(-1e-6 <= metrics[name] <= 1 + 1e-6 for name in ("accuracy", "macro_f1"))
        assert 0 <= metrics["loss"] <= LARGEST_METRIC

    return Target("evaluation sums of a client", evaluation_messages.encode_client_sums(sums, 4), decode)


def secure_aggregation() -> Iterator[Target]:
    """Yield the messages of secure aggregation; what is accepted may be any bytes, but of the right number."""
    keys = phases.PublicKeys(public_key(bytes(range(32))), public_key(bytes(range(1, 33))))

    def decode_keys(content: RecordDict) -> None:
        GroupSum(SecAggSettings(), 3).add_keys(4, phases.decode_keys(content, 3, 4))

    yield Target("keys", phases.encode_keys(3, 4, keys), decode_keys)
    digests = (bytes(DIGEST_BYTES),) * 5
    dealing = phases.Dealing((bytes(SEALED_BYTES),) * 4, digests, digests, digests[0])

    def decode_dealing(content: RecordDict) -> None:
        found = phases.decode_dealing(content, 3, 4, 5)
        assert [len(x) for x in found.sealed] == [SEALED_BYTES] * 4
        assert [len(x) for x in (*found.seed_digests, *found.key_digests)] == [DIGEST_BYTES] * 10

    yield Target("shares", phases.encode_dealing(3, 4, dealing), decode_dealing)
    for bits, kind in ((32, np.uint32), (64, np.uint64)):

        def decode_masked(content: RecordDict, bits: int = bits, kind: type[np.generic] = kind) -> None:
            values, sums = phases.decode_masked(content, 3, 4, bits, 300, 6)
            assert (values.dtype, values.shape, sums.dtype, sums.shape) == (kind, (300,), np.uint64, (6,))

        vectors = np.arange(300, dtype=kind), np.arange(6, dtype=np.uint64)
        yield Target(f"masked update of {bits} bits", phases.encode_masked(3, 4, *vectors), decode_masked)
    shares = bytes(SHARE_BYTES)

    def decode_opening(content: RecordDict) -> None:
        seeds, others = phases.decode_opening(content, 3, 4, 4, 1)
        assert [len(share) for share in (*seeds, *others)] == [SHARE_BYTES] * 5

    yield Target("shares that open a sum", phases.encode_opening(3, 4, [shares] * 4, [shares]), decode_opening)


def all_targets() -> Iterator[Target]:
    """Yield every kind of message."""
    yield from secure_aggregation()
    updates = Updates()
    yield updates.target("update", widths=False)
    yield updates.target("update of chosen units, 8 bits, coded", widths=True, encoding=Int8(), coded=True)
    yield updates.target("update of chosen units, 4 bits, input norms", widths=True, encoding=Int4(), normed=True)
    yield updates.target("update of the largest entries", widths=False, encoding=TopK(), coded=True)
    yield updates.stack()
    yield updates.statistics()
    yield instruction()
    yield instruction(covers_trained=True)
    yield instruction(stays_encoded=True)
    gram = Part("r.gram", (6, 6), True, False, "r.total", 8)
    diagonal = Part("r.diagonal", (6,), False, True, "r.total", 8)
    cross = [Part("r.target_total", (3,)), Part("r.cross", (3, 6))]
    yield moments("moments", [Part("r.total", (6,)), gram, *cross], torch.float32)
    yield moments("moments, float64, the diagonal", [Part("r.total", (6,)), diagonal], torch.float64)
    yield vote()
    yield judgement(torch.float32)
    yield judgement(torch.float64)
    yield profile()
    yield evaluation()
    yield own_evaluation()
