"""Durations on a virtual clock, and clients in flight in a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedlp.allocation.budget.costs import LatencyTable
from fedlp.errors import CheckpointError
from fedlp.federation.server.availability import make_availability
from fedlp.federation.server.checkpoint import ServerState, read_checkpoint, save_checkpoint
from fedlp.federation.server.flights import pack_flights, unpack_flights
from fedlp.federation.server.virtual_clock import Device, Part, Phases, VirtualClock

FAST = Device("fast", flops=2e6, downlink_bytes_s=100, uplink_bytes_s=50, watts=3)
SLOW = Device("slow", flops=1e6, downlink_bytes_s=10, uplink_bytes_s=5, measured=LatencyTable((1e3,), (4.0,)))


def test_phases_are_bytes_over_bandwidth_and_operations_over_speed() -> None:
    clock = VirtualClock([FAST, SLOW], batch_size=8, local_epochs=2)
    assert clock.phases(0, 200, 20, 1e3, 6e4, 100) == Phases(2.0, 2 * (2 * 20 * 1e3 + 6e4) / 2e6, 2.0)
    assert clock.phases(1, 200, 20, 1e3, 0.0, 100).download_s == 20
    assert clock.phases(1, 200, 8, 125.0, 0.0, 0).training_s == 2 * 4.0  # two steps of 1,000 MACs
    assert clock.phases(1, 0, 0, 0.0, 1e6, 0).training_s == 2.0  # no step: by flops


@pytest.mark.parametrize(
    ("seconds", "spent"),
    [(9, (1, 2, 3)), (6, (1, 2, 3)), (5, (1, 2, 2)), (2, (1, 1, 0)), (0.5, (0.5, 0, 0)), (0, (0, 0, 0))],
)
def test_a_part_that_is_cut_short_spends_the_earlier_phases_first(
    seconds: float, spent: tuple[float, float, float]
) -> None:
    assert Phases(1, 2, 3).until(seconds) == Phases(*map(float, spent))


def test_use_of_a_class_counts_what_lies_within_the_round() -> None:
    clock = VirtualClock([FAST, FAST, SLOW], batch_size=8, local_epochs=1)
    ended = [Part(0, 8.0, Phases(1, 2, 3), True, staleness=2)]  # from 8 to 14, of which 4 s here
    found = clock.round_time(
        10.0, 20.0, [1, 2], ended, [Part(1, 18.0, Phases(9), False), Part(2, 12.0, Phases(8), False)]
    )
    assert (found.seconds, found.since_start_s) == (10, 20)
    fast, slow = found.devices["fast"], found.devices["slow"]
    assert (fast.clients, fast.asked, fast.finished, fast.busy_s, fast.utilisation) == (2, 1, 1, 6, 0.3)
    assert (fast.energy_j, slow.energy_j) == (18, None)
    assert (slow.asked, slow.finished, slow.utilisation) == (1, 0, 0.8)
    assert (found.clients[0].device, found.clients[0].staleness) == ("fast", 2)
    assert clock.round_time(5.0, 5.0, [], []).devices["fast"].utilisation == 0


def test_stretches_in_seconds_meet_and_end(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client,from,to\n0,1.5,3\n0,3,4\n1,2,\n")
    there = make_availability(str(trace), 0, is_virtual=True)
    assert [there.present_at(now, 1, [0, 1, 2]) for now in (0, 1.5, 2, 3.5, 4)] == [[], [0], [0, 1], [0, 1], [1]]
    assert (there.leaves_at(0, 1.5), there.leaves_at(1, 2), there.leaves_at(2, 1)) == (4, math.inf, 1)
    assert [there.next_arrival(now) for now in (0, 1.5, 2, 3)] == [1.5, 2, 3, math.inf]
    always = make_availability(None, 0, is_virtual=True)
    assert (always.leaves_at(0, 5), always.next_arrival(5)) == (math.inf, math.inf)


def test_flights_survive_a_checkpoint(tmp_path: Path) -> None:
    frozen = torch.arange(3.0)
    old = ServerState(0, {"a": torch.zeros(2), "b": frozen}, memory={"m.1": torch.ones(1)})
    new = ServerState(4, {"a": torch.ones(2), "b": frozen})
    clock = pack_flights(7.25, {3: (1, 0.5), 1: (1, 6.0)}, {1: old}, new)
    assert "1.params.b" not in clock  # equal to the current one
    save_checkpoint(tmp_path, ServerState(4, new.params, clock=clock))
    state = read_checkpoint(tmp_path, 4)
    started, versions = unpack_flights(state)
    assert (started, float(state.clock["now"])) == ({1: (1, 6.0), 3: (1, 0.5)}, 7.25)
    assert list(versions) == [1]
    assert versions[1].server_round == 0
    for kept, found in ((old.params, versions[1].params), (old.memory, versions[1].memory)):
        assert list(kept) == list(found)
        assert all(torch.equal(kept[name], found[name]) for name in kept)
    damaged = {name: tensor for name, tensor in state.clock.items() if name != "1.params.a"}
    with pytest.raises(CheckpointError, match="clients in flight"):
        unpack_flights(ServerState(4, {"b": frozen}, clock=damaged))
