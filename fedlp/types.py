"""Shared vocabulary: small frozen values passed between packages.

Nothing here computes; :class:`Keep` knows just enough about itself to be sliced, sent and counted.

Longer than other files: a vocabulary is looked up in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


PRESENCE = "presence of "


def presence(axis: str) -> str:
    """Return the name, among the factors of a cost, of the smaller of an axis's units and 1: 0 without its branch."""
    return f"{PRESENCE}{axis}"


@dataclass(frozen=True, slots=True)
class PrunableLayer:
    """Prunable layer: one width axis, and the layers that read it.

    Attributes
    ----------
    name : str
        The width axis.
    num_units : int
        Units it has now; at least ``least`` must stay.
    unit_size : int
        Columns per unit in the weights of the first reader.
    num_params : int
        Parameters removed with all units of this axis alone.
    coupled : tuple of str
        Tensors that lose entries with a unit.
    readers : tuple of str
        Paths of the layer's *readers*, the linear layers or convolutions whose inputs are the units, in the order of
        the model. They compensate for removed units.
    depth : float
        Relative position in the network, in [0, 1]; layers of one transformer block share a depth.
    least : int
        Fewest units that may stay: 1, or 0 where the residual branch may be removed as a whole.
    """

    name: str
    num_units: int
    unit_size: int
    num_params: int
    coupled: tuple[str, ...]
    readers: tuple[str, ...]
    depth: float
    least: int = 1


@dataclass(frozen=True, slots=True)
class Keep:
    """Kept indices of one axis: sorted, disjoint, non-empty half-open runs within ``[0, size)``; none without runs."""

    size: int
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        end = -1
        for start, stop in self.runs:
            if not end < start < stop <= self.size or start < 0:
                raise ValueError(f"runs {self.runs} are not sorted, disjoint and within [0, {self.size})")
            end = stop

    @classmethod
    def full(cls, size: int) -> Keep:
        """Keep everything."""
        return cls(size, ((0, size),))

    @classmethod
    def first(cls, count: int, size: int) -> Keep:
        """Keep the first ``count`` indices; none for 0."""
        return cls(size, ((0, count),) if count else ())

    @classmethod
    def window(cls, start: int, count: int, size: int) -> Keep:
        """Keep ``count`` indices from ``start`` on, wrapping around."""
        start %= size
        stop = start + count
        if stop <= size:
            return cls(size, ((start, stop),))
        if stop - size >= start:
            return cls.full(size)
        return cls(size, ((0, stop - size), (start, size)))

    @classmethod
    def from_indices(cls, indices: NDArray[np.int64], size: int) -> Keep:
        """Keep sorted, distinct ``indices``."""
        index = np.asarray(indices, dtype=np.int64)
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        parts = np.split(index, breaks) if index.size else []
        return cls(size, tuple((int(part[0]), int(part[-1]) + 1) for part in parts))

    @property
    def count(self) -> int:
        """Number of kept indices."""
        return sum(stop - start for start, stop in self.runs)

    @property
    def is_full(self) -> bool:
        """Whether all indices are kept."""
        return self.runs == ((0, self.size),)

    def indices(self) -> NDArray[np.int64]:
        """Return the kept indices, sorted."""
        parts = [np.arange(start, stop, dtype=np.int64) for start, stop in self.runs]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def within(self, outer: Keep) -> Keep:
        """Return the same indices as positions within ``outer``, a superset."""
        if outer.is_full:
            return self
        if self.is_full or not np.isin(self.indices(), outer.indices()).all():
            raise ValueError(f"{self.count} indices are not all among the {outer.count} of {outer.size}")
        return Keep.from_indices(np.searchsorted(outer.indices(), self.indices()), outer.count)

    def repeat(self, unit: int) -> Keep:
        """Return the kept entries of an axis with ``unit`` consecutive entries per index."""
        return Keep(self.size * unit, tuple((start * unit, stop * unit) for start, stop in self.runs))

    def tile(self, copies: int) -> Keep:
        """Return the same indices on each of ``copies`` concatenated axes."""
        runs: list[tuple[int, int]] = []
        for offset in range(0, copies * self.size, self.size):
            for start, stop in self.runs:
                touches = bool(runs) and runs[-1][1] == offset + start
                first = runs.pop()[0] if touches else offset + start
                runs.append((first, offset + stop))
        return Keep(self.size * copies, tuple(runs))

    def before(self, other: Keep) -> Keep:
        """Return the kept indices of this axis concatenated with another."""
        shifted = [(start + self.size, stop + self.size) for start, stop in other.runs]
        runs = list(self.runs)
        if runs and shifted and runs[-1][1] == shifted[0][0]:
            shifted[0] = runs.pop()[0], shifted[0][1]
        return Keep(self.size + other.size, (*runs, *shifted))


@dataclass(frozen=True, slots=True)
class SubModel:
    """Sub-model: part of the global model that a client receives, trains and returns.

    Attributes
    ----------
    depth : int or None
        FedLP-Hetero: the prefix of this depth with a personal head; None for the whole depth.
    widths : mapping from axis name to Keep
        Width slices: kept indices of each named axis; an absent axis stays whole.
    nested_levels : tuple of float
        FjORD's ordered dropout: widths, relative to the global model, that local steps draw from; empty for none.
    """

    depth: int | None = None
    widths: Mapping[str, Keep] = field(default_factory=dict)
    nested_levels: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """Budget of a client's sub-model; None for no limit.

    Attributes
    ----------
    params : float or None
        Trainable numbers.
    macs : float or None
        Multiply-accumulates of a forward pass on one example.
    memory_bytes : float or None
        Peak of a training step: weights, gradients, optimizer state and a batch of activations.
    upload_bytes : float or None
        Of one round.
    latency_s : float or None
        Seconds of one training step on the client's device.
    """

    params: float | None = None
    macs: float | None = None
    memory_bytes: float | None = None
    upload_bytes: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True)
class ClientProfile:
    """Profile that a client reports once, before the first round.

    Attributes
    ----------
    budget : Budget or None
        Budget from the device's own file; None for that of the config's fleet.
    num_test : int or None
        Number of examples held out for evaluation; None if unknown.
    """

    client_id: int
    num_examples: int
    budget: Budget | None = None
    num_test: int | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """Part of one client in one round, as a policy assigns it.

    Attributes
    ----------
    uploads : frozenset of str
        Names of the tensors that the client sends back.
    kept : mapping from axis name to int
        Number of units of each axis that the client selects and sends; all units of an absent axis.
    returned : mapping from axis name to Keep
        Units of the global axis that the server has selected for the client to send.
    evidence : frozenset of str
        Measurements that the client also sends: "unit_scores" (saliency of the units that it holds), "input_norms"
        (mean squares of the inputs of the modules that read them).
    least : mapping from axis name to int
        Number of first units of an axis of ``kept`` that the client may send instead; empty where it may not.
    """

    server_round: int
    client_id: int
    submodel: SubModel
    uploads: frozenset[str]
    kept: Mapping[str, int] = field(default_factory=dict)
    returned: Mapping[str, Keep] = field(default_factory=dict)
    evidence: frozenset[str] = frozenset()
    least: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainInstruction(Assignment):
    """Assignment of a client, with the tensors of its sub-model.

    Attributes
    ----------
    params : mapping from tensor name to Tensor
        Shared tensors of the client's sub-model, already sliced.
    held : bytes
        Digest of the frozen tensors that the client already holds and that were not sent; empty if all were sent.
    frozen : mapping from name to Tensor
        Frozen tensors as encoded for the message; empty where they came as they are.
    """

    params: Mapping[str, Tensor] = field(default_factory=dict)
    held: bytes = b""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InputNorms:
    """Sums of squares of a module's inputs over a client's examples; they add up over clients.

    Attributes
    ----------
    total : (columns,) Tensor
        Sum of squares of each column, float64, >= 0.
    count : int
        Input vectors, >= 1.
    """

    total: Tensor
    count: int


@dataclass(frozen=True, slots=True)
class ClientReport:
    """Answer of one client, without its tensors.

    Attributes
    ----------
    widths : mapping from axis name to Keep
        Returned units of the global model; its sub-model's unless it selects units.
    scores : mapping from axis name to (units,)
        Saliency of every held unit, >= 0; empty unless requested.
    input_norms : mapping from module path to InputNorms
        Sums of squares of the held columns; empty unless requested.
    """

    server_round: int
    client_id: int
    num_examples: int
    metrics: Mapping[str, float]
    widths: Mapping[str, Keep] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    input_norms: Mapping[str, InputNorms] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientUpdate(ClientReport):
    """Answer of one client: its report and the requested tensors, sliced to the units that it sends."""

    params: Mapping[str, Tensor] = field(default_factory=dict)

    def report(self) -> ClientReport:
        """Return the answer without its tensors."""
        return ClientReport(**{name: getattr(self, name) for name in _REPORTED})


_REPORTED = tuple(item.name for item in fields(ClientReport))


@dataclass(frozen=True, slots=True)
class ClientFailure:
    """Reason that a sampled client's answer was not used."""

    client_id: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ClientCost:
    """Cost of one client in one round; bytes are counted on the encoded records.

    Attributes
    ----------
    train_loss : float or None
        Mean training loss reported by the client; None if not reported.
    """

    client_id: int
    num_examples: int
    bytes_down: int
    bytes_up: int
    params_down: int
    params_up: int
    macs: float
    train_loss: float | None = None


@dataclass(frozen=True, slots=True)
class ClientTime:
    """Simulated seconds of one client's part in a round, by phase, up to its end.

    Attributes
    ----------
    device : str
        Device class.
    started_s : float
        Beginning, in seconds since the start of the run.
    staleness : int
        Steps of the server between download and arrival; 0 in synchronous rounds.
    finished : bool
        Whether its upload was complete in time.
    """

    client_id: int
    device: str
    started_s: float
    download_s: float
    training_s: float
    upload_s: float
    staleness: int = 0
    finished: bool = True


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Use of one device class in a round, on the virtual clock.

    Attributes
    ----------
    clients : int
        Clients of the class in the federation.
    asked, finished : int
        Clients that received a sub-model in the round, and those whose update was complete in it.
    busy_s : float
        Sum over its clients of the seconds in which they took part.
    utilisation : float
        ``busy_s`` over seconds of the round times clients, in [0, 1]; 0 for a round without duration.
    energy_j : float or None
        Energy of ``busy_s``; None for a class without watts.
    """

    clients: int
    asked: int
    finished: int
    busy_s: float
    utilisation: float
    energy_j: float | None = None


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Simulated time of a round.

    Attributes
    ----------
    seconds : float
        Duration, waiting for available clients included; evaluation takes none.
    since_start_s : float
        End of the round, in seconds since the start of the run.
    clients : tuple of ClientTime
        Clients whose part ended in the round, in the order of their ends.
    devices : mapping from device class to DeviceUse
    """

    seconds: float
    since_start_s: float
    clients: tuple[ClientTime, ...]
    devices: Mapping[str, DeviceUse]


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """Request for the metrics of a client's sub-model on its own test examples.

    Attributes
    ----------
    params : mapping from tensor name to Tensor
        Shared tensors of the sub-model, sliced.
    measures_statistics : bool
        Whether batch norm statistics are measured on the client's training examples first.
    frozen : mapping from name to Tensor
        Encoded frozen tensors that ``params`` leaves out.
    """

    server_round: int
    client_id: int
    submodel: SubModel
    params: Mapping[str, Tensor]
    measures_statistics: bool = False
    frozen: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientEvaluation:
    """Metrics of one client's sub-model on its own test examples.

    Attributes
    ----------
    tier : str
        Tier or device class of the fleet; without a fleet, the sub-model's share of the parameters.
    num_examples : int
        Test examples, >= 1.
    metrics : mapping from name to float
        ``loss`` and the task's metrics.
    """

    client_id: int
    tier: str
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of ``rounds.jsonl``.

    Attributes
    ----------
    coverage : mapping from layer name to float
        Fraction of the layer's entries that at least one client returned, in [0, 1].
    metrics : mapping
        Global test metrics: ``accuracy`` and ``loss``, or ``perplexity`` and ``loss``; ``train_loss`` where clients
        report it. Empty test metrics where the round was not evaluated. ``client_accuracy`` and so on where clients
        evaluate; see :mod:`fedlp.federation.server.client_evaluation`.
    evaluations : tuple of ClientEvaluation
        By client; the file leaves it out where empty.
    absent : mapping from reason to client ids
        Clients that could not be sampled: "unavailable" ones, and ones with "no_data"; clients that could not evaluate
        for want of examples held out: "no_test_examples". Left out where empty.
    phases : mapping from name to mapping
        ``bytes_down`` and ``bytes_up`` of each phase of secure aggregation, in all; left out where empty.
    privacy : mapping from str to float
        ``epsilon`` at ``delta`` after the round, and its noise; left out if empty.
    clipped : mapping from client id to float
        Factor of the differences of each client beyond the bound on norms, in (0, 1); left out if empty.
    staleness : mapping from client id to int
        Steps of the server between download and answer, of clients that answered in an asynchronous round on the wall
        clock; left out if empty.
    simulated : RoundTime or None
        Time on the virtual clock; left out without one.
    """

    server_round: int
    cohort: tuple[int, ...]
    bytes_up: int
    bytes_down: int
    params_up: int
    params_down: int
    macs: float
    coverage: Mapping[str, float]
    failures: tuple[ClientFailure, ...]
    clients: tuple[ClientCost, ...]
    metrics: Mapping[str, float]
    wall_time_s: float
    evaluations: tuple[ClientEvaluation, ...] = ()
    absent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    privacy: Mapping[str, float] = field(default_factory=dict)
    clipped: Mapping[int, float] = field(default_factory=dict)
    staleness: Mapping[int, int] = field(default_factory=dict)
    simulated: RoundTime | None = None
