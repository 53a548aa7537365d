"""Uploads in fewer bits: right on average, small in error, refused where they cannot be."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlp.errors import ConfigError, ProtocolError
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.packing import Signature, pack_tensors, unpack_tensors
from fedlp.federation.wire.ranges import LARGEST_VALUE
from fedlp.registry import lookup
from tests.reference.topk import top_k

VALUES = {
    "weight": torch.linspace(-3.0, 2.0, 60).view(4, 3, 5) ** 3,
    "zero": torch.zeros(2, 3),
    "bias": torch.tensor([0.1, -1e-8]),
    "count": torch.tensor(7),
}
SIGNATURE = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in VALUES.items()]
QUANTISED = pytest.mark.parametrize(("encoding", "bits"), [("int8", 8), ("int4", 4), ("int2", 2)])


def made(encoding: str, **options: float) -> Encoding:
    found = lookup("encoding", encoding)(**options)
    assert isinstance(found, Encoding)
    return found


def encode_values(
    values: dict[str, Tensor], encoding: str, generator: torch.Generator, **options: float
) -> dict[str, Tensor]:
    return made(encoding, **options).encode(values, generator)


def decode_values(encoded: dict[str, Tensor], signature: Signature, encoding: str, who: str) -> dict[str, Tensor]:
    return made(encoding).decode(encoded, signature, who)


def there_and_back(encoding: str, seed: int = 0) -> dict[str, torch.Tensor]:
    encoded = encode_values(VALUES, encoding, torch.Generator().manual_seed(seed))
    images = {name: image for name, (_, image) in pack_tensors(encoded).items()}
    return decode_values(unpack_tensors(images, made(encoding).signature(SIGNATURE)), SIGNATURE, encoding, "client 1")


def test_float32_is_exact() -> None:
    assert all(torch.equal(value, VALUES[name]) for name, value in there_and_back("float32").items())


@pytest.mark.parametrize(("encoding", "error"), [("bfloat16", 2**-8), ("int8", 1 / 127), ("int4", 1 / 7), ("int2", 1)])
def test_errors_are_within_a_step(encoding: str, error: float) -> None:
    found = there_and_back(encoding)
    for name, value in found.items():
        assert value.dtype == VALUES[name].dtype
        assert value.shape == VALUES[name].shape
    rows = VALUES["weight"].flatten(1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    assert ((found["weight"].flatten(1) - rows).abs() <= error * largest * (1 + 1e-6)).all()
    for exact in ("zero", "bias", "count"):
        assert torch.equal(found[exact], VALUES[exact])


@QUANTISED
def test_rounding_is_right_on_average_and_repeatable(encoding: str, bits: int) -> None:
    drawn = torch.stack([there_and_back(encoding, seed)["weight"] for seed in range(2000)])
    step = VALUES["weight"].flatten(1).abs().amax(dim=1) / (2 ** (bits - 1) - 1)
    error = (drawn.mean(dim=0) - VALUES["weight"]).flatten(1) / step[:, None]
    assert float(error.abs().max()) < 4 * 0.5 / 2000**0.5
    assert torch.equal(there_and_back(encoding, 3)["weight"], drawn[3])
    assert not torch.equal(drawn[3], drawn[4])


@QUANTISED
def test_coarse_steps_are_right_on_average_and_mostly_zero(encoding: str, bits: int) -> None:
    values = torch.randn(50, 400, generator=torch.Generator().manual_seed(1))
    signature = [("w", (50, 400), torch.float32)]
    shares = []
    for coarseness in (1.0, 8.0):
        drawn = []
        for seed in range(100):
            rng = torch.Generator().manual_seed(seed)
            encoded = encode_values({"w": values}, encoding, rng, coarseness=coarseness)
            drawn.append(decode_values(encoded, signature, encoding, "client 1")["w"])
        step = coarseness * values.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert float(((torch.stack(drawn).mean(dim=0) - values) / step).abs().max()) < 5 * 0.5 / 100**0.5
        shares.append(float((drawn[0] != 0).float().mean()))
    assert shares[1] < shares[0]
    assert bits > 2 or shares[1] == pytest.approx(shares[0] / 8, rel=0.1)


@QUANTISED
@pytest.mark.parametrize("shape", [(64, 256), (3, 5, 1, 1), (1, 1)])
def test_so_many_bits_per_weight_travel(encoding: str, bits: int, shape: tuple[int, ...]) -> None:
    encoded = encode_values({"weight": torch.randn(shape)}, encoding, torch.Generator())
    assert sum(tensor.nbytes for tensor in encoded.values()) == math.ceil(math.prod(shape) * bits / 8) + shape[0] * 4


@QUANTISED
def test_every_step_arrives_as_it_was(encoding: str, bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    steps = torch.arange(-largest, largest + 1, dtype=torch.float32)[None]  # of scale 1: nothing is left to chance
    signature = [("w", tuple(steps.shape), torch.float32)]
    encoded = encode_values({"w": steps}, encoding, torch.Generator())
    assert torch.equal(decode_values(encoded, signature, encoding, "client 1")["w"], steps)


@QUANTISED
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_do_not_become_finite(encoding: str, bits: int, bad: float) -> None:
    encoded = encode_values({"w": torch.tensor([[1.0, bad], [1.0, 2.0]])}, encoding, torch.Generator())
    with pytest.raises(ProtocolError, match="client 1: tensor w has a scale outside"):
        decode_values(encoded, [("w", (2, 2), torch.float32)], encoding, "client 1")


@QUANTISED
@pytest.mark.parametrize("bad", [-1.0, 1e37])
def test_a_scale_that_cannot_be_is_refused_by_name(encoding: str, bits: int, bad: float) -> None:
    encoded = encode_values(VALUES, encoding, torch.Generator())
    encoded["scale of weight"][0] = bad
    with pytest.raises(ProtocolError, match="client 1: tensor weight has a scale outside"):
        decode_values(encoded, SIGNATURE, encoding, "client 1")


@QUANTISED
def test_the_largest_scale_gives_values_in_range_whatever_the_steps(encoding: str, bits: int) -> None:
    encoded = encode_values(VALUES, encoding, torch.Generator())
    encoded["scale of weight"].fill_(LARGEST_VALUE / 128)
    encoded["weight"].fill_(128 if encoded["weight"].dtype == torch.uint8 else -128)
    assert decode_values(encoded, SIGNATURE, encoding, "client 1")["weight"].abs().max() <= LARGEST_VALUE


# ---- top-k
@pytest.mark.parametrize("fraction", ["0.02", "0.1", "0.25", "1"])
@pytest.mark.parametrize("shape", [(8, 30), (5, 3, 2, 2), (1, 1)])
def test_top_k_is_the_plain_loop(fraction: str, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    part, signature = made("topk", fraction=float(fraction)), [("w", shape, torch.float32)]
    encoded = part.encode({"w": values}, torch.Generator())
    images = {name: image for name, (_, image) in pack_tensors(encoded).items()}
    found = part.decode(unpack_tensors(images, part.signature(signature)), signature, "client 1")["w"]
    np.testing.assert_allclose(found.numpy(), top_k(values.double().numpy(), Fraction(fraction)), rtol=1e-6)


def test_top_k_leaves_vectors_and_integers_and_matrices_of_nothing_as_they_are() -> None:
    params = {**VALUES, "none": torch.zeros(0, 3)}
    signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in params.items()]
    part = made("topk", fraction=0.1)
    found = part.decode(part.encode(params, torch.Generator()), signature, "client 1")
    for name in ("bias", "count", "none", "zero"):
        assert torch.equal(found[name], params[name])


def test_top_k_takes_a_tenth_of_thirty_entries_and_not_four() -> None:
    sent = made("topk", fraction=0.1).encode({"w": torch.randn(5, 6)}, torch.Generator())
    assert sent["indices of w"].tolist() == sorted(set(sent["indices of w"].tolist()))
    assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == {
        "w": (1,),
        "indices of w": (3,),
        "scale of w": (2,),
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("indices of w", [3, 2, 9], "indices of w are not sorted"),
        ("indices of w", [2, 2, 9], "indices of w are not sorted"),
        ("indices of w", [-1, 2, 9], "indices of w are not sorted"),
        ("indices of w", [0, 2, 30], r"not sorted, distinct and in \[0, 30\)"),
        ("scale of w", [1.0, float("nan")], "tensor w has a scale outside"),
        ("scale of w", [-1.0, 1.0], "tensor w has a scale outside"),
        ("scale of w", [1.0, float("inf")], "tensor w has a scale outside"),
    ],
)
def test_what_top_k_cannot_have_written_is_refused(name: str, value: list[float], words: str) -> None:
    part = made("topk", fraction=0.1)
    encoded = part.encode({"w": torch.randn(5, 6)}, torch.Generator())
    encoded[name] = torch.tensor(value).to(encoded[name].dtype)
    with pytest.raises(ProtocolError, match=f"client 1: .*{words}"):
        part.decode(encoded, [("w", (5, 6), torch.float32)], "client 1")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_top_k_of_values_that_are_not_finite_is_refused(bad: float) -> None:
    part = made("topk", fraction=0.5)
    encoded = part.encode({"w": torch.tensor([[1.0, bad], [1.0, 2.0]])}, torch.Generator())
    with pytest.raises(ProtocolError, match="client 1: tensor w has a scale outside"):
        part.decode(encoded, [("w", (2, 2), torch.float32)], "client 1")


@pytest.mark.parametrize(
    ("encoding", "options", "words"),
    [
        ("topk", {"fraction": 0.0}, r"upload\.fraction=0\.0 is not allowed: it must be in \(0, 1\]"),
        ("topk", {"fraction": 1.5}, r"upload\.fraction=1\.5 is not allowed"),
        ("int4", {"coarseness": 0.5}, r"upload\.coarseness=0\.5 is not allowed: .* at least 1"),
        ("int8", {"coarseness": float("inf")}, r"upload\.coarseness=inf is not allowed"),
    ],
)
def test_options_of_encodings_have_ranges(encoding: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(encoding, **options)
