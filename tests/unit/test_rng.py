"""Streams of several clients at once are those of each by itself."""

from __future__ import annotations

import pytest

from fedlp.rng import Stream, generator, generators


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**70 + 1])
@pytest.mark.parametrize("key", [(), (3,), (3, 2**33), (1, 2, 3, 4)], ids=str)
def test_streams_of_many_keys_are_those_of_each(seed: int, key: tuple[int, ...]) -> None:
    last = [0, 1, 5, 999, 2**32 - 1]
    for i, rng in zip(last, generators(seed, Stream.LOCAL_TRAINING, *key, last=last), strict=True):
        alone = generator(seed, Stream.LOCAL_TRAINING, *key, i)
        assert rng.bit_generator.state == alone.bit_generator.state
        assert rng.integers(2**63 - 1) == alone.integers(2**63 - 1)
        assert (rng.permutation(14) == alone.permutation(14)).all()


def test_a_key_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        next(generators(0, Stream.DATA, last=[2**32]))
