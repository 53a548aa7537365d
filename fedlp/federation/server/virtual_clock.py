"""Virtual clock of a fleet: seconds and energy that a client's part in a round takes on its device class.

Download and upload take encoded bytes over the bandwidth of the link; training takes two operations per
multiply-accumulate over the sustained operations per second, or the measured seconds of ``fedlp-profile``. Memory takes
no time: it limits the sub-model, as budgets do without a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedlp.allocation.budget.costs import LatencyTable
from fedlp.types import ClientTime, DeviceUse, RoundTime

_FLOPS_PER_MAC = 2


@dataclass(frozen=True, slots=True)
class Device:
    """Device class of a client.

    Attributes
    ----------
    flops : float
        Sustained operations per second in training, > 0.
    downlink_bytes_s, uplink_bytes_s : float
        Bandwidths in bytes per second, > 0.
    watts : float or None
        Power while it takes part in a round.
    measured : LatencyTable or None
        Seconds of a training step by its multiply-accumulates, in place of ``flops``.
    """

    name: str
    flops: float
    downlink_bytes_s: float
    uplink_bytes_s: float
    watts: float | None = None
    measured: LatencyTable | None = None

    def training_s(self, macs: float, num_steps: int) -> float:
        """Return the seconds of ``num_steps`` training steps of ``macs`` multiply-accumulates in all."""
        if self.measured is None or not num_steps:
            return _FLOPS_PER_MAC * macs / self.flops
        return num_steps * self.measured.time(macs / num_steps)


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of the phases of a client's part."""

    download_s: float
    training_s: float = 0.0
    upload_s: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the phases."""
        return self.download_s + self.training_s + self.upload_s

    def until(self, seconds: float) -> Phases:
        """Return the phases up to so many seconds after the beginning."""
        if self.total <= seconds:
            return self
        spent = [min(self.download_s, seconds)]
        spent.append(min(self.training_s, seconds - spent[0]))
        return Phases(spent[0], spent[1], min(self.upload_s, max(0.0, seconds - sum(spent))))


@dataclass(frozen=True, slots=True)
class Part:
    """A client's part in a round, on the virtual clock.

    Attributes
    ----------
    started_s : float
        Beginning, in seconds since the start of the run.
    finished : bool
        Whether the upload was complete in time.
    staleness : int
        Steps of the server between download and end.
    """

    client_id: int
    started_s: float
    phases: Phases
    finished: bool
    staleness: int = 0

    @property
    def ends_s(self) -> float:
        """End, in seconds since the start of the run."""
        return self.started_s + self.phases.total


@dataclass(frozen=True)
class VirtualClock:
    """Durations of clients' parts.

    Attributes
    ----------
    devices : sequence of Device
        Device class of each client.
    batch_size, local_epochs : int
        Examples per training step, and passes over a client's examples, >= 1.
    deadline_s : float, optional
        Seconds after which an answer is late.
    """

    devices: Sequence[Device]
    batch_size: int
    local_epochs: int
    deadline_s: float | None = None

    def phases(
        self, client_id: int, bytes_down: int, num_examples: int, training_macs: float, more_macs: float, bytes_up: int
    ) -> Phases:
        """Return the seconds of a client's part.

        Parameters
        ----------
        training_macs : float
            Multiply-accumulates of one example, forward and backward.
        more_macs : float
            Further ones of the round, such as for scores.
        """
        device = self.devices[client_id]
        steps = self.local_epochs * math.ceil(num_examples / self.batch_size)
        macs = self.local_epochs * num_examples * training_macs + more_macs
        return Phases(
            bytes_down / device.downlink_bytes_s, device.training_s(macs, steps), bytes_up / device.uplink_bytes_s
        )

    def round_time(
        self, begun: float, ends: float, asked: Iterable[int], ended: Sequence[Part], in_flight: Iterable[Part] = ()
    ) -> RoundTime:
        """Return the record of a round from ``begun`` to ``ends``, in seconds since the start of the run.

        Parameters
        ----------
        asked : iterable of int
            Clients that received a sub-model in the round.
        ended, in_flight : sequences of Part
            Parts that ended in the round, in order, and parts that did not.
        """
        busy, clients, began, finished = ({device.name: 0.0 for device in self.devices} for _ in range(4))
        for device in self.devices:
            clients[device.name] += 1
        for client_id in asked:
            began[self.devices[client_id].name] += 1
        for part in [*ended, *in_flight]:
            busy[self.devices[part.client_id].name] += max(0.0, min(part.ends_s, ends) - max(part.started_s, begun))
        for part in ended:
            finished[self.devices[part.client_id].name] += part.finished
        watts: Mapping[str, float | None] = {device.name: device.watts for device in self.devices}
        uses = {}
        for name, seconds in busy.items():
            available, power = (ends - begun) * clients[name], watts[name]
            uses[name] = DeviceUse(
                clients=int(clients[name]),
                asked=int(began[name]),
                finished=int(finished[name]),
                busy_s=seconds,
                utilisation=min(1.0, seconds / available) if available else 0.0,
                energy_j=None if power is None else power * seconds,
            )
        return RoundTime(ends - begun, ends, tuple(map(self._client_time, ended)), uses)

    def _client_time(self, part: Part) -> ClientTime:
        phases, name = part.phases, self.devices[part.client_id].name
        spent = phases.download_s, phases.training_s, phases.upload_s
        return ClientTime(part.client_id, name, part.started_s, *spent, part.staleness, part.finished)
