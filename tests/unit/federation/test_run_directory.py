"""Records of long runs are read one at a time: what goes on, or ends, does not hold all of them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch

from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.types import ClientCost, RoundRecord

ROUNDS, CLIENTS = 60, 300


def record(server_round: int, clients: int = CLIENTS) -> RoundRecord:
    costs = tuple(ClientCost(i, 5, 100, 100, 10, 10, 1.0, 0.5) for i in range(clients))
    totals = dict.fromkeys(("bytes_up", "bytes_down", "params_up", "params_down"), clients)
    about = {"macs": 0.1, "coverage": {"w": 1.0}, "failures": (), "clients": costs, "metrics": {"loss": 1.0}}
    return RoundRecord(server_round, tuple(range(clients)), **totals, **about, wall_time_s=0.1)  # type: ignore[arg-type]


def state(server_round: int) -> ServerState:
    return ServerState(server_round, {"w": torch.zeros(2)})


def test_neither_going_on_nor_the_end_holds_all_records(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for server_round in range(1, ROUNDS + 1):
        directory.append_round(record(server_round))
    directory.save_state(state(ROUNDS))
    size = (tmp_path / "rounds.jsonl").stat().st_size
    assert size > 2e6
    tracemalloc.start()
    try:
        found = directory.resume()
        manifest = directory.finish(state(ROUNDS), {"seed": 0}, {})
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()
    assert found is not None
    assert found.server_round == ROUNDS
    assert manifest["totals"]["macs"] == sum([0.1] * ROUNDS)
    assert manifest["totals"]["good_rounds"] == manifest["totals"]["rounds"] == ROUNDS
    assert manifest["final_metrics"] == {"loss": 1.0}


@pytest.mark.parametrize("more", [b"", b"\n", b'{"server_round": 3, "fail', b"\n\n"])
def test_rounds_behind_the_checkpoint_are_cut_off_whatever_ends_the_file(more: bytes, tmp_path: Path) -> None:
    directory, rounds = RunDirectory(tmp_path), tmp_path / "rounds.jsonl"
    for server_round in (1, 2, 3):
        directory.append_round(record(server_round, 1))
    lines = rounds.read_bytes().splitlines(keepends=True)
    directory.save_state(state(2))
    for kept in (lines[:3], [lines[0], lines[1][:-1]]):  # the last line of the checkpoint may lack its end
        rounds.write_bytes(b"".join(kept) + (more if kept[-1].endswith(b"\n") else b""))
        assert directory.resume() is not None
        assert rounds.read_bytes() == b"".join(lines[:2])
