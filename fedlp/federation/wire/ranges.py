"""Ranges of external numbers, within which sums stay finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import ProtocolError, printable

Flags = NDArray[np.bool_]

MOST_EXAMPLES = 10**9
"""Examples of one client: the weights of a million clients sum to less than 2^53, exactly."""

LARGEST_VALUE = 1e15
"""Absolute value of a weight, its difference or a mean: its square, times 10^8, is finite in float32."""

LARGEST_MOMENT = 1e30
"""Absolute value of a sum of products or of a variance: its square is finite in float64, the value in float32."""

LARGEST_METRIC = 1e39
"""Absolute value of a metric: any finite float32."""

LARGEST_COST = 1e21
"""MACs, or a limit on any cost."""

MOST_STEPS = 2**53
"""Absolute value of an integer of the model, such as batches seen: exact in float64."""

MOST_METRICS = 64
"""Metrics of one update."""


def check_values(tensors: Mapping[str, Tensor], who: str, largest: float = LARGEST_VALUE) -> None:
    """Raise ProtocolError naming ``who`` and the first tensor with an entry that is not finite, or out of range.

    Parameters
    ----------
    largest : float
        Largest absolute value of a floating-point entry. Integers are at most ``MOST_STEPS``, and counts of batches
        not negative.
    """
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool or not tensor.numel():
            continue
        low, high = (bound.item() for bound in torch.aminmax(tensor))  # both NaN where any entry is
        if not tensor.is_floating_point():
            least = 0 if name.endswith("num_batches_tracked") else -MOST_STEPS
            if not least <= low <= high <= MOST_STEPS:
                raise ProtocolError(f"{who}: tensor {name} holds a count outside [{least}, {MOST_STEPS}]")
        elif not -torch.inf < low <= high < torch.inf:
            raise ProtocolError(f"{who}: tensor {name} holds NaN or infinite values")
        elif not -largest <= low <= high <= largest:
            raise ProtocolError(f"{who}: tensor {name} holds values beyond ±{largest:g}")


_CACHED = 1 << 18  # bytes of rows that are read twice

Bounds = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Smallest and largest entry of one tensor of each client, (clients,); NaN where one is."""


def find_bounds(stacks: Mapping[str, Tensor]) -> dict[str, Bounds]:
    """Return the bounds of tensors of several clients, (clients, ...), by name; 0 of empty ones."""
    found = {}
    for name, stack in stacks.items():
        values = (stack.float() if stack.dtype == torch.bfloat16 else stack).reshape(len(stack), -1).numpy()
        if not values.shape[1]:
            values = np.zeros((len(stack), 1))
        blocks = [values[lo : lo + step] for step in [_rows_at_once(values)] for lo in range(0, len(values), step)]
        bounds = [(block.min(axis=1), block.max(axis=1)) for block in blocks]  # the second pass reads from the cache
        low, high = (_as_floats(np.concatenate(part)) for part in zip(*bounds, strict=True))
        found[name] = low, high
    return found


def _as_floats(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return numbers as float64; integers beyond ``MOST_STEPS``, which would be rounded into range, as infinite."""
    floats = values.astype(np.float64)
    if values.dtype.kind == "i":
        floats[values > MOST_STEPS] = np.inf
        floats[values < -MOST_STEPS] = -np.inf
    return floats


def _rows_at_once(values: NDArray[Any]) -> int:
    return max(1, _CACHED // int(values[0].nbytes))


def are_in_range(bounds: Mapping[str, Bounds], floats: frozenset[str], largest: float = LARGEST_VALUE) -> Flags:
    """Return whether :func:`check_values` accepts each client's tensors, (clients,)."""
    sound: Flags = np.array(True)
    for name, (low, high) in bounds.items():
        most = largest if name in floats else float(MOST_STEPS)
        least = 0.0 if name.endswith("num_batches_tracked") and name not in floats else -most
        sound = sound & (low >= least) & (high <= most)  # both False for NaN
    return sound


def check_count(value: object, most: int, who: str) -> int:
    """Return a number of examples in [1, ``most``]; ProtocolError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ProtocolError(f"{who}: num-examples is {show(value)}, not a count in [1, {most}]")
    return value


def read_number(value: object, least: float, most: float) -> float | None:
    """Return a number as a float; None if invalid, or outside [``least``, ``most``]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        return None
    return float(value)


def show(value: object) -> str:
    """Return an external value in a few words."""
    if isinstance(value, str | bytes | list) and len(value) > 20:
        return f"a {type(value).__name__} of length {len(value)}"
    return printable(value if isinstance(value, int | float) and not isinstance(value, bool) else repr(value), 40)
