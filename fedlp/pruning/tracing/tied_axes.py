"""Union of width axes that are tied together."""

from __future__ import annotations

import math

from fedlp.pruning.tracing.slicing import Dim

AxisDim = tuple[int | None, int]  # axis number (None: always whole), entries per unit
WHOLE: AxisDim = (None, 1)


class AxisTable:
    """Union-find over numbered axes, in which a tie may make the unit coarser.

    An axis of n units, tied to one whose unit is k times as long, becomes one of n / k units; dimensions that were
    described by it stand for k times as many entries per unit from then on.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._births: list[int] = []  # number of the oldest axis in it
        self._parents: list[int] = []
        self._factors: list[int] = []  # own units per unit of the parent
        self._whole: set[int] = set()
        self._reasons: dict[int, str] = {}  # why an axis is whole; empty where that is as it must be

    def start(self, name: str, size: int) -> int:
        """Return a new axis of ``size`` units."""
        axis = len(self._names)
        self._names.append(name)
        self._sizes.append(size)
        self._births.append(axis)
        self._parents.append(axis)
        self._factors.append(1)
        return axis

    def root(self, dim: AxisDim) -> AxisDim:
        """Return the same dimension in the units of the axis it has been tied into."""
        axis, entries = dim
        while axis is not None and self._parents[axis] != axis:
            axis, entries = self._parents[axis], entries * self._factors[axis]
        return axis, entries

    def tie(self, first: AxisDim, second: AxisDim, reason: str = "") -> None:
        """Make two dimensions of the same length lose the same units; where one is whole, both are, for a reason."""
        (a, a_entries), (b, b_entries) = self.root(first), self.root(second)
        if a is None or b is None:
            self.keep_whole(first, reason)
            self.keep_whole(second, reason)
        elif a != b or a_entries != b_entries:
            entries, length = math.lcm(a_entries, b_entries), self._sizes[a] * a_entries
            if length % entries or length != self._sizes[b] * b_entries:
                raise ValueError(f"units of {a_entries} and {b_entries} entries do not fit {length} entries")
            oldest = min(a, b, key=lambda axis: self._births[axis])
            joint = self.start(self._names[oldest], length // entries)
            self._births[joint] = self._births[oldest]
            for axis, own in ((a, a_entries), (b, b_entries)):
                self._parents[axis], self._factors[axis] = joint, entries // own
                if axis in self._whole:
                    self._mark(joint, self._reasons[axis])

    def keep_whole(self, dim: AxisDim, reason: str = "") -> None:
        """Mark a dimension as one that never loses units, and note the first reason."""
        axis, _ = self.root(dim)
        if axis is not None:
            self._mark(axis, reason)

    @property
    def num_axes(self) -> int:
        """Number of axes, those included that were tied into others."""
        return len(self._names)

    def keep_whole_from(self, number: int) -> None:
        """Mark all axes from the ``number``-th on as whole, without a reason."""
        for axis in range(number, len(self._names)):
            self.keep_whole((axis, 1))

    def keep_outputs(self, dim: AxisDim) -> None:
        """Mark a dimension of the model's outputs, which is whole without a reason."""
        axis, _ = self.root(dim)
        if axis is not None:
            self._whole.add(axis)
            self._reasons[axis] = ""

    def _mark(self, axis: int, reason: str) -> None:
        self._whole.add(axis)
        self._reasons[axis] = self._reasons.get(axis) or reason

    def is_whole(self, dim: AxisDim) -> bool:
        """Return whether a dimension never loses units."""
        axis, _ = self.root(dim)
        return axis is None or axis in self._whole

    def named(self, dim: AxisDim) -> Dim:
        """Return the dimension under its axis's final name."""
        axis, entries = self.root(dim)
        return Dim(None, 1) if axis is None or self.is_whole(dim) else Dim(self._names[axis], entries)

    def final_sizes(self) -> dict[str, int]:
        """Return the units of every axis that can lose some, in order of creation."""
        roots = [axis for axis, parent in enumerate(self._parents) if axis == parent and axis not in self._whole]
        roots.sort(key=lambda axis: self._births[axis])
        return {self._names[axis]: self._sizes[axis] for axis in roots}

    def reasons(self) -> dict[str, str]:
        """Return why axes of several units stay whole, oldest first; without axes that always do."""
        roots = [axis for axis, parent in enumerate(self._parents) if axis == parent and self._reasons.get(axis)]
        roots.sort(key=lambda axis: self._births[axis])
        return {self._names[axis]: self._reasons[axis] for axis in roots if self._sizes[axis] > 1}
