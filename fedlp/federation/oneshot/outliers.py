"""Rejection of sums far larger than those of other clients.

An honest client's second moments differ from another's by a small factor: measured on digits, per example, by at most 2
between clients of one or two classes each and the median. Sums of 100 times the median would make the average of the
others vanish. So each part of an answer has a size (the trace of second moments, the sum of what is not negative, else
the Euclidean norm), divided by the number of examples; an answer is left out if that of any part is too large for the
lower median over the clients. With fewer than three answers there is no such median, and nothing is left out.

Answers are held back until the median of all is known, as far as memory goes; beyond that, the median is that of the
answers so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.oneshot.messages import FISHER, JUDGE, Part

HELD_BYTES = 1 << 28  # of answers held back, but for the last three
_LEAST = 3
_FACTOR = 100.0
_SIGNED_FACTOR = 1000.0  # of sums that may cancel out, and nearly do with some clients
_FISHER_FACTOR = 1e6  # of gradients, which vanish where a model is right
_DIVERGENCE_FACTOR = 1e3  # of plans' divergences, which are small where a model is sure

Answer = tuple[int, Mapping[str, Tensor], int]
"""Client id, sums by part, and number of examples."""


def drop_outliers(
    answers: Iterable[Answer], kind: str, parts: Sequence[Part], reject: Callable[[int, ProtocolError], None]
) -> Iterator[tuple[Mapping[str, Tensor], int]]:
    """Yield sums and number of examples of each answer that is in proportion, in their order.

    Parameters
    ----------
    kind : str
        The question's.
    reject : callable
        Called with each client that is left out.
    """
    largest = np.array([_factor(kind, part) for part in parts])
    held: deque[Answer] = deque()
    sizes: dict[int, NDArray[np.float64]] = {}
    num_bytes = 0

    def release() -> Iterator[tuple[Mapping[str, Tensor], int]]:
        client_id, sums, count = held.popleft()
        median = np.sort(np.array(list(sizes.values())), axis=0)[(len(sizes) - 1) // 2]
        too_large = (sizes[client_id] > largest * median) & (median > 0)
        if len(sizes) < _LEAST or not too_large.any():
            yield sums, count
            return
        worst = int(np.flatnonzero(too_large)[0])
        times = sizes[client_id][worst] / median[worst]
        name = parts[worst].name
        reject(client_id, ProtocolError(f"{name} is {times:.3g} times that of the median client, per example"))

    for answer in answers:
        client_id, sums, count = answer
        sizes[client_id] = np.array([_size(sums[part.name], part) for part in parts]) / count
        held.append(answer)
        num_bytes += _num_bytes(answer)
        while num_bytes > HELD_BYTES and len(held) > _LEAST:
            num_bytes -= _num_bytes(held[0])
            yield from release()
    while held:
        yield from release()


def _factor(kind: str, part: Part) -> float:
    if kind == FISHER:
        return _FISHER_FACTOR
    if kind == JUDGE:
        return _DIVERGENCE_FACTOR
    return _FACTOR if part.symmetric or part.nonnegative else _SIGNED_FACTOR


def _size(values: Tensor, part: Part) -> float:
    if part.symmetric:
        rows = torch.arange(part.shape[0])
        return float(values[rows * (rows + 3) // 2].sum())
    return float(values.sum() if part.nonnegative else values.norm())


def _num_bytes(answer: Answer) -> int:
    return sum(tensor.nbytes for tensor in answer[1].values())
