"""Blockwise encodings: the nearest level of every entry, so many bits, refused where they cannot be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlp.errors import ConfigError, ProtocolError
from fedlp.federation.wire.encodings.base import encoded_bytes
from fedlp.federation.wire.encodings.blockwise import NORMAL_LEVELS, Block4, Block8, Blockwise, NormalFloat4
from fedlp.federation.wire.packing import pack_tensors, unpack_tensors
from fedlp.federation.wire.ranges import LARGEST_VALUE
from tests.reference.blockwise import block_scales, blockwise

LEVELS = {
    Block8: [k / 127 for k in range(-127, 128)],
    Block4: [k / 7 for k in range(-7, 8)],
    NormalFloat4: list(NORMAL_LEVELS),
}
KINDS = pytest.mark.parametrize("kind", LEVELS)
RNG = torch.Generator()


@KINDS
@pytest.mark.parametrize(("shape", "block"), [((8, 30), 64), ((5, 3, 2, 2), 16), ((1, 1), 64), ((4, 32), 1)])
def test_every_entry_is_the_nearest_level_of_its_block(
    kind: type[Blockwise], shape: tuple[int, ...], block: int
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    part, signature = kind(block), [("w", shape, torch.float32)]
    encoded = part.encode({"w": values}, RNG)
    images = {name: image for name, (_, image) in pack_tensors(encoded).items()}
    found = part.decode(unpack_tensors(images, part.signature(signature)), signature, "client 1")["w"]
    scales = encoded["scale of w"].double().tolist()
    np.testing.assert_allclose(scales, block_scales(values.double().numpy(), block), rtol=2**-8)
    expected = blockwise(values.double().numpy(), scales, block, LEVELS[kind])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)


@KINDS
def test_so_many_bytes_travel_as_are_counted(kind: type[Blockwise]) -> None:
    encoded = kind().encode({"w": torch.randn(64, 128)}, RNG)
    travels = sum(tensor.nbytes for tensor in encoded.values())
    assert travels == 64 * 128 * kind.width // 8 + 64 * 128 // 64 * 2
    per_entry, per_row = encoded_bytes((64, 128), torch.float32, kind())
    assert (per_entry * 64 * 128, per_row) == (travels, 0.0)


@KINDS
def test_vectors_zeros_and_empty_matrices_stay_as_they_are(kind: type[Blockwise]) -> None:
    values = {
        "b": torch.tensor([0.1, -1e-8]),
        "n": torch.tensor(7),
        "zero": torch.zeros(2, 3),
        "none": torch.zeros(0, 3),
    }
    signature = [(name, tuple(x.shape), x.dtype) for name, x in values.items()]
    found = kind().decode(kind().encode(values, RNG), signature, "client 1")
    assert all(torch.equal(found[name], x) for name, x in values.items())


@KINDS
def test_what_was_decoded_is_encoded_to_the_same_values(kind: type[Blockwise]) -> None:
    signature = [("w", (8, 32), torch.float32)]
    once = kind().decode(kind().encode({"w": torch.randn(8, 32)}, RNG), signature, "client 1")
    again = kind().decode(kind().encode(once, RNG), signature, "client 1")
    assert torch.equal(once["w"], again["w"])


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e37])
def test_a_scale_that_cannot_be_is_refused_by_name(kind: type[Blockwise], bad: float) -> None:
    encoded = kind().encode({"w": torch.randn(4, 32)}, RNG)
    encoded["scale of w"][1] = bad
    with pytest.raises(ProtocolError, match="client 1: tensor w has a scale outside"):
        kind().decode(encoded, [("w", (4, 32), torch.float32)], "client 1")


@KINDS
def test_the_largest_scale_gives_values_in_range_whatever_the_codes(kind: type[Blockwise]) -> None:
    encoded = kind().encode({"w": torch.randn(4, 32)}, RNG)
    encoded["scale of w"].fill_(LARGEST_VALUE / 150)
    encoded["w"].fill_(0x88 if encoded["w"].dtype == torch.uint8 else -128)
    found = kind().decode(encoded, [("w", (4, 32), torch.float32)], "client 1")["w"]
    assert math.isfinite(float(found.abs().max()))
    assert found.abs().max() <= LARGEST_VALUE


def test_a_block_holds_an_entry() -> None:
    with pytest.raises(ConfigError, match="block_size=0 is not allowed"):
        Block4(0)


def test_normal_levels_leave_less_error_of_normal_values_than_equidistant_ones() -> None:
    values = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    signature = [("w", (256, 64), torch.float32)]
    errors = [
        float((part.decode(part.encode({"w": values}, RNG), signature, "x")["w"] - values).square().mean())
        for part in (NormalFloat4(), Block4())
    ]
    assert errors[0] < 0.95 * errors[1]
