"""Checkpoints are whole or not there, and a damaged one says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
def test_the_checkpoint_before_a_damaged_one_serves(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
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
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.server_round == 1
    (message,) = caplog.messages
    assert "round-000002" in message
    assert "the checkpoint of round 1 is used" in message
    assert "\n" not in message


def test_no_checkpoint_is_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    (tmp_path / "round-000001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"round-000001.safetensors is damaged .* none before it is whole"):
        load_checkpoint(tmp_path)


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


# ---- what clients keep
def one_version(folder: Path) -> bytes:
    ClientStore(folder, horizon=3).save(7, 1, HEAD)
    return (folder / "7" / "round-000001.safetensors").read_bytes()


HEAD = {"head.weight": torch.arange(12.0).view(3, 4), "head.bias": torch.tensor([1.5]), "steps": torch.tensor(9)}


def test_any_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = one_version(tmp_path)
    path = tmp_path / "7" / "round-000001.safetensors"
    store = ClientStore(tmp_path, horizon=3)
    assert all(torch.equal(tensor, HEAD[name]) for name, tensor in store.load(7, before_round=2).items())
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        caplog.clear()
        found = store.load(7, before_round=2)
        assert found == {}, f"byte {at} of {data!r}"
        assert str(path) in caplog.text


@pytest.mark.parametrize("length", [0, 5, 8, 40, -1])
def test_instead_of_a_torn_version_the_one_before_serves(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = ClientStore(tmp_path, horizon=3)
    for server_round in (1, 2):
        store.save(7, server_round, {"head": torch.tensor([float(server_round)])})
    path = tmp_path / "7" / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert store.load(7, before_round=3)["head"].item() == 1
    assert f"client 7: {path} is damaged" in caplog.text
    assert "the version before it is used instead" in caplog.text


def test_a_version_of_an_earlier_fedlp_still_loads(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    save_file(HEAD, tmp_path / "7" / "round-000001.safetensors")
    assert ClientStore(tmp_path, horizon=3).load(7, before_round=2).keys() == HEAD.keys()
