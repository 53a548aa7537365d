"""Records go there and back bit by bit; whatever does not fit is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlp.config import ModelConfig
from fedlp.errors import ProtocolError
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.index_sets import decode_widths, encode_widths
from fedlp.federation.wire.packing import pack_tensors, unpack_tensors
from fedlp.models import describe_model, state_tensors
from fedlp.types import Budget, ClientProfile, ClientUpdate, Keep, SubModel, TrainInstruction

PROFILE = ClientProfile(client_id=4, num_examples=50)


@pytest.fixture(scope="module")
def submodels() -> SubModels:
    config = ModelConfig(name="fedlp_cnn", source="fedlp_cnn")
    return SubModels(describe_model(config, (1, 8, 8), 10, "classification"))


@pytest.fixture(scope="module")
def params(submodels: SubModels) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in state_tensors(submodels.spec.build(0)).items()}


def assign(submodels: SubModels, submodel: SubModel, names: frozenset[str] | None = None) -> TrainInstruction:
    layout = submodels.layout(submodel)
    return TrainInstruction(3, 4, submodel, frozenset(layout.names) if names is None else names)


def slices(submodels: SubModels) -> list[SubModel]:
    axes = submodels.widths.axes
    return [
        SubModel(),
        SubModel(depth=2),
        SubModel(widths={axis: Keep.first(max(1, size // 2), size) for axis, size in axes.items()}),
        SubModel(widths={axis: Keep.window(size - 3, max(1, size // 3), size) for axis, size in axes.items()}),
        SubModel(widths={axis: Keep.from_indices(np.arange(0, size, 2), size) for axis, size in axes.items()}),
    ]


@pytest.mark.parametrize("case", range(5))
def test_an_instruction_goes_there_and_back(submodels: SubModels, params: dict[str, torch.Tensor], case: int) -> None:
    assigned = assign(submodels, slices(submodels)[case])
    sent = submodels.layout(assigned.submodel).slice(params)
    content = messages.encode_instruction(assigned, messages.encode_params(sent), submodels)
    got = messages.decode_instruction(content, submodels)
    assert (got.server_round, got.client_id, got.uploads) == (3, 4, assigned.uploads)
    assert got.submodel.depth == assigned.submodel.depth
    assert dict(got.submodel.widths) == dict(assigned.submodel.widths)
    assert got.params.keys() == sent.keys()
    assert all(torch.equal(got.params[name], sent[name]) for name in sent)


@pytest.mark.parametrize("case", range(5))
def test_an_update_goes_there_and_back_and_costs_what_its_numbers_cost(
    submodels: SubModels, params: dict[str, torch.Tensor], case: int
) -> None:
    submodel = slices(submodels)[case]
    layout = submodels.layout(submodel)
    names = frozenset(layout.names[::3])
    assigned = assign(submodels, submodel, names)
    sent = {name: tensor for name, tensor in layout.slice(params).items() if name in names}
    update = ClientUpdate(3, 4, 17, {"train-loss": 0.25}, params=sent)
    content = messages.encode_update(update, submodels)
    got = messages.decode_update(content, assigned, PROFILE, submodels)
    assert (got.num_examples, got.metrics) == (17, {"train-loss": 0.25})
    assert all(torch.equal(got.params[name], sent[name]) for name in names)
    payload = sum(tensor.numel() * tensor.element_size() for tensor in sent.values())
    assert payload <= messages.count_bytes(content) <= payload + 600


def good_update(submodels: SubModels, params: dict[str, torch.Tensor]) -> RecordDict:
    return messages.encode_update(ClientUpdate(3, 4, 17, {"train-loss": 0.25}, params=dict(params)), submodels)


def change(record: str, key: str, value: object) -> Callable[[RecordDict], None]:
    def apply(content: RecordDict) -> None:
        content[record][key] = value  # type: ignore[index, assignment]

    return apply


def drop(record: str, key: str | None = None) -> Callable[[RecordDict], None]:
    def apply(content: RecordDict) -> None:
        if key is None:
            del content[record]
        else:
            del content[record][key]  # type: ignore[arg-type]

    return apply


def poison(value: float, at: int) -> Callable[[RecordDict], None]:
    def apply(content: RecordDict) -> None:
        array = content.array_records["params"]["float32"].numpy().copy()
        array[at] = value
        content.array_records["params"]["float32"] = Array(array)

    return apply


def fill(record: str) -> Callable[[RecordDict], None]:
    def apply(content: RecordDict) -> None:
        for number in range(1000):
            content[record][str(number)] = 1.0  # type: ignore[index, assignment]

    return apply


def count_batches(value: int) -> Callable[[RecordDict], None]:
    def apply(content: RecordDict) -> None:
        counts = content.array_records["params"]["int64"].numpy().copy()
        counts[-1] = value
        content.array_records["params"]["int64"] = Array(counts)

    return apply


BAD = {
    "another round": (change("update", "server-round", 2), "the update is of round 2"),
    "another client": (change("update", "client-id", 5), "says it is of client 5"),
    "a text for a number": (change("update", "server-round", "3"), "not an integer"),
    "other tensors": (change("update", "uploads", b"\x01" + bytes(5)), "other tensors than were asked for"),
    "a short bitmap": (change("update", "uploads", b"\x01"), "the bitmap of uploads has 1 bytes"),
    "no record": (drop("update"), "'update' is missing"),
    "no metrics": (drop("metrics"), "'metrics' is missing"),
    "no tensors": (drop("params"), "'params' is missing"),
    "a missing array": (drop("params", "int64"), "were expected"),
    "no examples": (change("metrics", "num-examples", 0), "num-examples is 0"),
    "more examples than it has": (change("metrics", "num-examples", 51), "not a count in [1, 50]"),
    "a fraction of an example": (change("metrics", "num-examples", 1.5), "num-examples is 1.5"),
    "a loss that is not a number": (change("metrics", "train-loss", float("nan")), "not a finite number"),
    "a short array": (
        change("params", "float32", Array(np.zeros(7, dtype=np.float32))),
        "array float32 holds",
    ),
    "another type": (
        change("params", "float32", Array(np.zeros(7, dtype=np.float64))),
        "array float32 holds",
    ),
    "NaN": (poison(float("nan"), 0), "tensor conv1.weight holds NaN or infinite values"),
    "infinity": (poison(float("inf"), -1), "holds NaN or infinite values"),
    "values that overflow an average": (poison(3e38, 0), "tensor conv1.weight holds values beyond ±1e+15"),
    "MACs whose sum overflows": (change("metrics", "pruning-macs", 1.7e308), "metric pruning-macs is 1.7e+308"),
    "MACs beyond any machine": (change("metrics", "pruning-macs", 1e30), "choosing units took 1e+30 MACs"),
    "fewer than no MACs": (change("metrics", "pruning-macs", -1.0), "choosing units took -1.0 MACs"),
    "many metrics": (fill("metrics"), "metrics came, more than 64"),
    "a metric of a long name": (change("metrics", "\x1b[2J" * 10**6, float("nan")), "metric ?[2J?[2J"),
    "a count that overflows": (count_batches(-(2**63)), "num_batches_tracked holds a count outside [0, "),
    "a count that will overflow": (count_batches(2**63 - 1), "num_batches_tracked holds a count outside [0, "),
    "a width plan of 10 MB": (change("update", "widths", bytes(10**7)), "the width plan has 10000000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_update_is_refused_by_name(submodels: SubModels, params: dict[str, torch.Tensor], name: str) -> None:
    spoil, reason = BAD[name]
    content = good_update(submodels, params)
    spoil(content)
    with pytest.raises(ProtocolError) as error:
        messages.decode_update(content, assign(submodels, SubModel()), PROFILE, submodels)
    assert reason in str(error.value)
    assert str(error.value).startswith("client 4, round 3: ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_the_largest_values_are_accepted(submodels: SubModels, params: dict[str, torch.Tensor]) -> None:
    huge = {name: torch.full_like(t, 1e15) if t.is_floating_point() else t for name, t in params.items()}
    messages.decode_update(good_update(submodels, huge), assign(submodels, SubModel()), PROFILE, submodels)


@given(st.binary(max_size=60))
def test_random_width_plans_are_decoded_or_refused(data: bytes) -> None:
    axes = {"a": 5, "b": 16}
    try:
        widths = decode_widths(data, axes)
    except ValueError:
        return
    assert all(0 < keep.count <= axes[name] or keep.count == 0 for name, keep in widths.items())


def test_an_axis_comes_once() -> None:
    data = encode_widths({"a": Keep.first(2, 5)}, ("a",))
    with pytest.raises(ValueError, match="axis 0 of the width plan is malformed"):
        decode_widths(2 * data, {"a": 5, "b": 500})


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(100, 140))
def test_kept_indices_survive_and_take_the_shorter_form(chosen: set[int], size: int) -> None:
    keep = Keep.from_indices(np.array(sorted(chosen)), size)
    data = encode_widths({"x": keep}, ("w", "x"))
    assert decode_widths(data, {"w": 3, "x": size}) == {"x": keep}
    assert len(data) - 7 == min(8 * len(keep.runs), (size + 7) // 8)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
)
def test_every_dtype_is_packed_bit_by_bit(dtype: str, coded: bool) -> None:
    kind = getattr(torch, dtype)
    tensors = {
        "a": torch.arange(6).view(2, 3).to(kind),
        "b": torch.ones((), dtype=kind),
        "c": torch.zeros(0, dtype=kind),
    }
    packed = {name: image for name, (_, image) in pack_tensors(tensors, coded).items()}
    signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    got = unpack_tensors(packed, signature, coded)
    assert all(torch.equal(got[name], tensors[name]) and got[name].dtype == kind for name in tensors)


def test_codes_are_as_long_as_what_they_say() -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (100_000,), generator=rng).to(torch.uint8)
    (_, noise), (_, seldom) = (
        pack_tensors({"x": x}, coded=True)["uint8"] for x in (values, torch.where(values < 8, values, 0))
    )
    assert len(noise) < 100_100
    assert len(seldom) == pytest.approx(100_000 * (1 / 32 * (3 + 4.5) + 31 / 32 * 1) / 8, rel=0.1), "a bit for zero"


BOMB = pack_tensors({"x": torch.zeros(1_000_000, dtype=torch.uint8)}, coded=True)["uint8"][1]


@given(st.binary(max_size=200))
def test_bytes_that_are_no_code_of_the_right_length_are_refused(data: bytes) -> None:
    good = pack_tensors({"x": torch.arange(40, dtype=torch.uint8)}, coded=True)["uint8"][1]
    for bad in (data, good[:-1], good + b"x", good + data + b"x", BOMB, b""):
        with pytest.raises(ValueError, match="array uint8 is "):
            unpack_tensors({"uint8": bad}, [("x", (40,), torch.uint8)], coded=True)


def test_flower_reads_what_is_packed(params: dict[str, torch.Tensor]) -> None:
    record = messages.encode_params(params)
    flat = torch.cat([t.reshape(-1) for t in params.values() if t.is_floating_point()])
    np.testing.assert_array_equal(record["float32"].numpy(), flat.numpy())


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"profile": ConfigRecord({"client-id": 1})}),
        RecordDict({"profile": ConfigRecord({"client-id": -1, "num-examples": 3})}),
        RecordDict({"profile": ConfigRecord({"client-id": 1, "num-examples": -1})}),
        RecordDict({"profile": ConfigRecord({"client-id": 1, "num-examples": 2, "budget-macs": 0.0})}),
        RecordDict({"profile": ConfigRecord({"client-id": 1, "num-examples": 2, "budget-macs": float("inf")})}),
        RecordDict({"profile": ConfigRecord({"client-id": 1, "num-examples": 2, "budget-macs": 1e300})}),
        RecordDict({"profile": ConfigRecord({"client-id": 1, "num-examples": 2**63 - 1})}),
        RecordDict({"profile": ConfigRecord({"client-id": 1, "num-examples": 2, "budget-upload-bytes": "1"})}),
        RecordDict({"profile": MetricRecord({"client-id": 1, "num-examples": 2})}),
    ],
)
def test_a_bad_profile_is_refused(content: RecordDict) -> None:
    with pytest.raises(ProtocolError, match="profile"):
        messages.decode_profile(content)


@pytest.mark.parametrize("budget", [None, Budget(upload_bytes=4e5), Budget(params=10, macs=2e6, memory_bytes=1.5)])
def test_a_profile_goes_there_and_back(budget: Budget | None) -> None:
    profile = replace(PROFILE, budget=budget)
    assert messages.decode_profile(messages.encode_profile(profile)) == profile
