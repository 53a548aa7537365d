"""Checkpoints are whole or not there, and a damaged one says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlp.errors import CheckpointError
from fedlp.federation.client.store import ClientStore
from fedlp.federation.server.checkpoint import ServerState, load_checkpoint, save_checkpoint


def state(server_round: int) -> ServerState:
    return ServerState(server_round, {"w": torch.full((3,), float(server_round))}, {"m.w": torch.ones(3)})


def test_the_newest_is_loaded_and_the_one_before_is_kept(tmp_path: Path) -> None:
    for server_round in (1, 2, 3):
        save_checkpoint(tmp_path, state(server_round))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.server_round == 3
    assert torch.equal(loaded.params["w"], torch.full((3,), 3.0))
    assert torch.equal(loaded.optimizer["m.w"], torch.ones(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-000002.json",
        "round-000002.safetensors",
        "round-000003.json",
        "round-000003.safetensors",
    ]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "garbled json"])
def test_damage_is_found_and_the_way_back_works(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    path = tmp_path / "round-000002.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:40])
    elif damage == "missing":
        path.unlink()
    else:
        (tmp_path / "round-000002.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"delete round-000002.json to go on") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "round-000002.json").unlink()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.server_round == 1


def test_a_write_that_was_cut_off_leaves_nothing_that_counts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    (tmp_path / "round-000002.safetensors").write_bytes(b"half")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.server_round == 1


def test_a_client_finds_the_head_it_had_before_a_round(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, horizon=3)
    for server_round in (1, 4, 5, 9):
        store.save(7, server_round, {"head": torch.tensor([float(server_round)])})
    assert store.load(7, before_round=10)["head"].item() == 9
    assert store.load(7, before_round=9)["head"].item() == 5
    assert store.load(8, before_round=9) == {}
    assert sorted(path.name for path in (tmp_path / "7").iterdir()) == [
        "round-000005.safetensors",
        "round-000009.safetensors",
    ]
