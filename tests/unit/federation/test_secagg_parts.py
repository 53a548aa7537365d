"""Parts of secure aggregation: shares, keys, masks, fixed-point values, sums over data, secrets on disk."""

from __future__ import annotations

import math
import stat
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlp.errors import DataError
from fedlp.federation.secagg.fixed_point import BUFFER_RANGE, FixedPoint, flatten, unflatten
from fedlp.federation.secagg.keys import (
    add_mask,
    agree,
    commit,
    open_sealed,
    public_key,
    seal,
)
from fedlp.federation.secagg.secret_store import Secrets, SecretStore
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.secagg.shamir import PRIME, combine_shares, split_secret
from fedlp.federation.secagg.sums import SumLayout
from fedlp.types import ClientReport, InputNorms

SECRET = bytes(range(200, 232))


# ---- shares
def test_the_field_is_one() -> None:
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not() -> None:
    shares = dict(enumerate(split_secret(SECRET, 3, 5), start=1))
    for points in combinations(shares, 3):
        assert combine_shares({point: shares[point] for point in points}) == SECRET
    assert combine_shares(shares) == SECRET
    for points in combinations(shares, 2):
        try:
            assert combine_shares({point: shares[point] for point in points}) != SECRET
        except ValueError:
            continue


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_extreme_secrets_come_back(secret: bytes) -> None:
    assert combine_shares(dict(enumerate(split_secret(secret, 2, 2), start=1))) == secret


@pytest.mark.parametrize(("secret", "threshold", "count"), [(b"short", 2, 3), (SECRET, 4, 3), (SECRET, 0, 3)])
def test_shares_that_cannot_be_are_refused(secret: bytes, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        split_secret(secret, threshold, count)


# ---- keys
def test_two_clients_agree_and_a_third_does_not() -> None:
    one, other, third = (bytes([number]) * 32 for number in (1, 2, 3))
    key = agree(one, public_key(other), "mask", 7, 4, 9)
    assert key == agree(other, public_key(one), "mask", 7, 9, 4)
    assert key != agree(third, public_key(one), "mask", 7, 9, 4)
    assert key != agree(one, public_key(other), "shares", 7, 4, 9)
    assert key != agree(one, public_key(other), "mask", 8, 4, 9)


def test_only_the_receiver_opens_what_was_sealed_for_it() -> None:
    sealed = seal(SECRET, b"share", 3, sender=1, receiver=2)
    assert open_sealed(SECRET, sealed, 3, 1, 2) == b"share"
    assert open_sealed(SECRET, sealed, 4, 1, 2) is None
    assert open_sealed(SECRET, sealed, 3, 2, 1) is None
    assert open_sealed(SECRET, sealed[:-1] + b"x", 3, 1, 2) is None


def test_digests_bind_kind_round_owner_and_holder() -> None:
    digests = {commit(b"x", kind, *key) for kind in ("seed", "key") for key in ((1, 2, 3), (1, 3, 2), (2, 2, 3))}
    assert len(digests) == 6


@pytest.mark.parametrize("size", [1, 3, (1 << 18) // 4, (1 << 18) // 4 + 1, 200_001])
def test_masks_cancel_exactly(size: int) -> None:
    values = np.arange(size, dtype=np.uint32), np.arange(5, dtype=np.uint64)
    parts = values[0].copy(), values[1].copy()
    add_mask(parts, SECRET, 1)
    assert (parts[0] != values[0]).mean() > 0.99 or size < 4
    assert (parts[1] != values[1]).all()
    add_mask(parts, SECRET, -1)
    assert all((one == other).all() for one, other in zip(parts, values, strict=True))


def test_a_mask_is_uniform_and_no_key_gives_anothers() -> None:
    one, other = np.zeros(1 << 16, np.uint32), np.zeros(1 << 16, np.uint32)
    add_mask([one], SECRET, 1)
    add_mask([other], SECRET[::-1], 1)
    counts = np.bincount(one >> 24, minlength=256)
    assert abs(((counts - 256) ** 2 / 256).sum() - 255) < 5 * math.sqrt(2 * 255)
    assert (one == other).mean() < 0.001


# ---- fixed-point values
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("count", [2, 10, 1000])
def test_sums_never_wrap_and_the_error_is_within_its_bound(bits: int, count: int) -> None:
    rng = np.random.default_rng(0)
    fixed = FixedPoint(bits, 4.0, count)
    weights = rng.integers(1, 100, count)
    values = rng.uniform(-4, 4, (count, 50))
    values[:, 0], values[:, 1] = 4.0, -4.0
    weights[0] = largest = weights.max()
    encoded = [fixed.encode(row, weight / largest) for row, weight in zip(values, weights, strict=True)]
    total = np.add.reduce(encoded, dtype=encoded[0].dtype)
    mean = fixed.decode(total) * largest / weights.sum()
    expected = np.average(values, axis=0, weights=weights)
    assert np.abs(mean - expected).max() <= fixed.error(largest, weights.sum()) + 1e-12
    assert fixed.error(largest, weights.sum()) < 1e-5


def test_values_beyond_the_range_are_clipped_and_counted() -> None:
    fixed = FixedPoint(32, 1.0, 4)
    values = np.array([0.5, 1.5, -9.0])
    assert fixed.clips(values) == 2
    assert fixed.decode(fixed.encode(values, 1.0)) == pytest.approx([0.5, 1.0, -1.0], abs=1e-8)


def test_tensors_come_back_and_buffers_have_a_wider_range() -> None:
    params = {"w": torch.randn(2, 3), "running_var": torch.rand(3) * 1000, "steps": torch.tensor(77)}
    signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in params.items()]
    flat = flatten(params, signature, frozenset({"w"}))
    assert flat[-1] == 77 / BUFFER_RANGE
    found = unflatten(flat, signature, frozenset({"w"}))
    for name, tensor in params.items():
        torch.testing.assert_close(found[name], tensor.to(torch.float64))


def test_more_than_half_of_a_group_opens_its_sum() -> None:
    settings = SecAggSettings(threshold=0.6, min_group=3)
    assert [settings.shares(count) for count in (2, 3, 4, 5, 10, 50)] == [2, 2, 3, 3, 6, 30]
    assert [settings.least(count) for count in (2, 3, 4, 10)] == [3, 3, 3, 6]
    assert SecAggSettings(threshold=0.501).shares(10) == 6


# ---- sums over data
def test_sums_over_data_are_those_of_all_clients() -> None:
    layout = SumLayout(3, 50, units={"a": 2, "b": 1}, columns={"m": 2})
    first = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0])}
    second = {"a": torch.tensor([7.0, 9.0]), "b": torch.tensor([1e-6])}
    norms = [InputNorms(torch.tensor(total), count) for total, count in (([2.0, 4.0], 8), ([1.0, 0.5], 2))]
    reports = [
        ClientReport(1, 0, 50, {"train-loss": 1.0}, scores=first, input_norms={"m": norms[0]}),
        ClientReport(1, 1, 10, {"train-loss": 3.0}, scores=second, input_norms={"m": norms[1]}),
        ClientReport(1, 2, 40, {}),
    ]
    total = np.add.reduce([layout.encode(report, clipped) for report, clipped in zip(reports, (0, 2, 3), strict=True)])
    found = layout.decode(total, 1, 0)
    assert (found.examples, found.clipped, found.macs) == (100, 5, 0.0)
    assert found.train_loss == pytest.approx(80 / 60, abs=1e-9)
    assert found.report.num_examples == 60
    torch.testing.assert_close(
        found.report.scores["a"], torch.tensor([2.0, 4.0], dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert float(found.report.scores["b"][0]) == pytest.approx(250.00001 / 60, abs=1e-9)
    assert found.report.input_norms["m"].count == 10
    assert found.report.input_norms["m"].total.tolist() == pytest.approx([3.0, 4.5], abs=1e-6)


# ---- secrets on disk
def test_secrets_last_for_their_phase_and_are_their_owners_alone(tmp_path: Path) -> None:
    store = SecretStore(tmp_path / "4")
    made = Secrets(3, "shares", SECRET, SECRET, SECRET, (1, 4), {1: (SECRET, SECRET)}, (1,), {1: (b"a", b"b")})
    store.save(made)
    assert SecretStore(tmp_path / "4").load(3, "shares") == made
    (file,) = (tmp_path / "4").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(DataError, match="has keys of round 3 after its phase shares, not of round 3 after train"):
        store.load(3, "train")
    with pytest.raises(DataError, match="not of round 4"):
        store.load(4, "shares")
    file.write_bytes(b"{}")
    with pytest.raises(DataError, match="no keys of this round"):
        store.load(3, "shares")
    store.delete()
    store.delete()
    with pytest.raises(DataError, match="no keys of this round"):
        store.load(3, "shares")
