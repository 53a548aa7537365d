"""Areas of shared memory: what is packed in its place is not copied, and comes out the same in any order."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedlp.errors import FedLPError
from fedlp.federation.flower_compat import make_array, make_record
from fedlp.federation.wire.messages import encode_params
from fedlp.federation.wire.packing import pack_stacks, placed_in
from fedlp.simulation.transport import Area, decode_frame, encode_frame

SIZE = 1 << 15  # numbers of a tensor that is worth a place
PARAMS = [{"w": torch.arange(SIZE) + 0.5 * i, "n": torch.tensor(i)} for i in range(3)]


def area(num_bytes: int = 1 << 20) -> Area:
    return Area(memoryview(mmap.mmap(-1, num_bytes)))


def frame_of(where: Area, packed: Sequence[int], sent: Sequence[int]) -> list[RecordDict | None]:
    """Pack some models in their order, send some in theirs, and return what arrives."""
    with placed_in(where.begin()):
        contents = {i: make_record(RecordDict, {"params": encode_params(PARAMS[i])}) for i in packed}
    frame = encode_frame([({}, contents[i]) for i in sent], where)
    return [content for _, content in decode_frame(frame, where, make_array)]


@pytest.mark.parametrize("sent", [(0, 1, 2), (0, 2), (2, 1, 0), (1,), (1, 1, 0)])
def test_what_is_packed_in_place_arrives(sent: tuple[int, ...]) -> None:
    where = area()
    for _ in range(2):  # a second frame overwrites the first
        for content, i in zip(frame_of(where, (0, 1, 2), sent), sent, strict=True):
            assert content is not None
            found = content["params"]
            wanted = encode_params(PARAMS[i])
            assert isinstance(found, ArrayRecord)
            assert {name: bytes(array.data) for name, array in found.items()} == {
                name: bytes(array.data) for name, array in wanted.items()
            }


def test_an_image_in_its_place_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    where = area()
    with placed_in(where.begin()):
        content = make_record(RecordDict, {"params": encode_params({"w": PARAMS[0]["w"]})})
    where.write([array.data for array in content["params"].values()])
    assert where._holds == (None,)


def test_an_area_that_is_too_small_gives_no_place() -> None:
    where = area(SIZE)
    with placed_in(where.begin()):
        content = make_record(RecordDict, {"params": encode_params(PARAMS[0])})
    with pytest.raises(FedLPError, match="larger than the engine's slots"):
        encode_frame([({}, content)], where)


def test_stacks_are_packed_in_place() -> None:
    stack: dict[str, Tensor] = {"w": torch.arange(3.0 * SIZE).reshape(3, SIZE)}
    where = area()
    with placed_in(where.begin()):
        placed = pack_stacks(stack)["float32"]
    assert np.array_equal(placed, pack_stacks(stack)["float32"])
    where.write([placed.reshape(-1).data])
    assert where._holds == (None,)
