"""Named random streams: equal names give equal numbers, independent of earlier draws.

Every random number of a run comes from ``generator(seed, stream, *key)``. A stream is keyed by values that have a
meaning (round, client), never by how many numbers were drawn earlier, so a run can resume anywhere and clients can
train in any order and process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """Purpose of a random stream. Values are part of the reproducibility contract: never renumber."""

    MODEL = 1
    PARTITION = 2
    COHORT = 3
    UPLOADS = 4
    DEPTHS = 5
    WIDTHS = 6
    LOCAL_TRAINING = 7
    PERSONAL_HEAD = 8
    AUGMENTATION = 9
    DATA = 10
    CALIBRATION = 11
    FINETUNE = 12
    FLEET = 13
    SEARCH = 14
    UNITS = 15
    ENCODING = 16
    PRIVACY = 17
    STATISTICS = 18
    CLIENT_TEST = 20
    EVALUATION = 21
    PERSONAL_STEPS = 22
    AVAILABILITY = 23
    DROPOUT = 24
    ARRIVAL = 25
    DOWNLOAD = 26
    CENTRAL_NOISE = 30


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Return the generator of one named stream.

    Parameters
    ----------
    seed : int
        The run's seed, >= 0.
    stream : Stream
        Purpose of the numbers.
    *key : int
        Further non-negative coordinates, such as the round and the client id.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(stream), *key))))


def torch_seed(seed: int, stream: Stream, *key: int) -> int:
    """Return a 63-bit seed for ``torch.manual_seed`` from the named stream."""
    return int(generator(seed, stream, *key).integers(0, 2**63 - 1))


def generators(seed: int, stream: Stream, *key: int, last: Sequence[int]) -> Iterator[np.random.Generator]:
    """Yield ``generator(seed, stream, *key, i)`` for each ``i`` of ``last``, several times as fast.

    All are one object, set to each stream's start in turn: finish drawing from one before the next. The hash of
    ``numpy.random.SeedSequence`` is computed for all keys at once; numpy promises not to change it.
    """
    words = [word for value in (seed, int(stream), *key) for word in _words(value)]
    keys = np.asarray(last, dtype=np.uint64)
    if len(keys) and keys.max() > _MASK32:
        raise ValueError(f"the last part of a key is {keys.max()}, beyond {_MASK32}")
    common = [np.full(len(keys), word, dtype=np.uint32) for word in words]
    pool = _mix_entropy([*common, keys.astype(np.uint32)])
    found = np.random.Generator(np.random.PCG64(0))
    for high, low, more, least in _state_words(pool).tolist():
        step = ((more << 64 | least) << 1 | 1) & _MASK128
        state = ((step + (high << 64 | low)) * _PCG_FACTOR + step) & _MASK128
        found.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": state, "inc": step},
            "has_uint32": 0,
            "uinteger": 0,
        }
        yield found


_MASK32, _MASK128 = 2**32 - 1, 2**128 - 1
_PCG_FACTOR = 0x2360ED051FC65DA44385DF649FCCF645  # of PCG64, O'Neill, 2014
_POOL = 4  # words of SeedSequence's pool
Words = NDArray[np.uint32]


def _words(value: int) -> list[int]:
    """Return a non-negative integer in words of 32 bits, the lowest first; at least one."""
    found = [value & _MASK32]
    while value := value >> 32:
        found.append(value & _MASK32)
    return found


class _Hash:
    """SeedSequence's hash of words, whose constants change with every call."""

    def __init__(self, start: int, factor: int) -> None:
        self._constant, self._factor = start, factor

    def __call__(self, words: Words) -> Words:
        """Return hashed words, (n,)."""
        hashed = words ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & _MASK32
        hashed = hashed * np.uint32(self._constant)
        return hashed ^ (hashed >> np.uint32(16))


def _mix(one: Words, other: Words) -> Words:
    mixed: Words = one * np.uint32(0xCA01F9DD) - other * np.uint32(0x4973F715)
    return mixed ^ (mixed >> np.uint32(16))


def _mix_entropy(entropy: Sequence[Words]) -> list[Words]:
    """Return SeedSequence's pool of each key, as words of (n,)."""
    hashed, zero = _Hash(0x43B0D7E5, 0x931E8875), np.zeros_like(entropy[0])
    pool = [hashed(entropy[i] if i < len(entropy) else zero) for i in range(_POOL)]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], hashed(pool[source]))
    for words in entropy[_POOL:]:
        for target in range(_POOL):
            pool[target] = _mix(pool[target], hashed(words))
    return pool


def _state_words(pool: Sequence[Words]) -> NDArray[np.uint64]:
    """Return ``generate_state(4, uint64)`` of each key, (n, 4)."""
    hashed = _Hash(0x8B51F9DD, 0x58F38DED)
    halves = np.stack([hashed(pool[i % _POOL]) for i in range(2 * _POOL)], axis=1).astype(np.uint64)
    return halves[:, 0::2] | halves[:, 1::2] << np.uint64(32)
