"""Named random streams: equal names give equal numbers, independent of earlier draws.

Every random number of a run comes from ``generator(seed, stream, *key)``. A stream is keyed by values that have a
meaning (round, client), never by how many numbers were drawn earlier, so a run can resume anywhere and clients can
train in any order and process.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


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
