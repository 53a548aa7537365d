"""A disk that is full: the server's run ends with one line and goes on later; a client loses its rounds by name."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import FedLPError
from fedlp.federation.server.checkpoint import ServerState, load_checkpoint, write_atomically
from fedlp.types import RoundRecord
from tests.integration.running import TINY, Finished, run
from tests.integration.test_resume import assert_same, go_on

Once = Callable[..., Finished]
CASE = (*TINY, "strategy=fedlp_homo", "num_rounds=4")
PAGE = 4096


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of some bytes."""
    folder.mkdir()
    if subprocess.run(mount(folder, size), capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def mount(folder: Path, size: int, options: str = "") -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", str(folder)]


def grow(folder: Path) -> None:
    subprocess.run(mount(folder, 1 << 24, "remount,"), check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def fill(folder: Path) -> None:
    """Leave not one page."""
    with suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(PAGE)):
            pass


def test_no_room_for_a_checkpoint(once: Once, tmp_path: Path) -> None:
    whole = once(*CASE)
    with small_disk(tmp_path / "disk", int(2.5 * len(whole.model))) as disk:
        with pytest.raises(FedLPError) as error:
            run(disk / "run", *CASE)
        lost = disk / "run" / "checkpoint" / "round-000003.safetensors"
        remedy = f"make room there, then go on with resume={disk / 'run'}"
        assert str(error.value) == f"{lost} cannot be written (No space left on device); {remedy}"
        assert not [name for name in names(disk) if "partial" in name or "000003" in name]
        last = load_checkpoint(disk / "run" / "checkpoint")
        assert last is not None
        assert last.server_round == 2
        grow(disk)
        assert_same(go_on(disk / "run", 4), whole)


def test_no_room_for_a_rounds_line(once: Once, tmp_path: Path) -> None:
    longer = (*CASE, "num_rounds=8")

    def after(_: RoundRecord, __: ServerState) -> None:
        lines = rounds.read_bytes().splitlines(keepends=True)
        if PAGE - sum(map(len, lines)) % PAGE < 0.9 * len(lines[-1]):  # the next line needs a page more
            fill(disk)

    with small_disk(tmp_path / "disk", 1 << 23) as disk:
        rounds = disk / "run" / "rounds.jsonl"
        with pytest.raises(FedLPError, match=r"rounds.jsonl cannot be written \(No space left on device\); make room"):
            assembly.run_locally(to_yaml(compose(longer)), disk / "run", [after])
        assert rounds.stat().st_size % PAGE == 0, "a torn line"
        (disk / "ballast").unlink()
        assert_same(go_on(disk / "run", 8), once(*longer))


def test_no_room_at_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 16) as disk:
        fill(disk)
        with pytest.raises(
            FedLPError, match=r"config.yaml cannot be written .* make room there, then start the run again"
        ):
            run(disk / "run", *CASE)
        assert names(disk) == ["ballast", "run"]


def test_a_folder_that_cannot_be_written_is_not_said_to_be_full(once: Once, tmp_path: Path) -> None:
    def after(record: RoundRecord, _: ServerState) -> None:
        if record.server_round == 2:
            subprocess.run(mount(disk, 1 << 23, "remount,ro,"), check=True)

    with small_disk(tmp_path / "disk", 1 << 23) as disk:
        with pytest.raises(FedLPError, match=r"\(Read-only file system\); make it writable, then go on with resume="):
            assembly.run_locally(to_yaml(compose(CASE)), disk / "run", [after])
        subprocess.run(mount(disk, 1 << 23, "remount,rw,"), check=True)
        assert_same(go_on(disk / "run", 4), once(*CASE))


def test_a_client_without_room_loses_its_rounds_by_name_and_no_others(tmp_path: Path) -> None:
    hetero = (*TINY, "strategy=fedlp_hetero", "clients_per_round=6", "num_rounds=3")
    poor = 3

    def is_in_want(message: Message, context: Context) -> bool:
        is_poor = message.metadata.message_type == "train" and context.node_config["partition-id"] == poor
        return is_poor and message.content.config_records["instruction"]["server-round"] != 3

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == poor and message.metadata.message_type == "train":
            context.node_config["state-dir"] = str(disk)
            if not is_in_want(message, context):
                grow(disk)
        return assembly.client_app(message, context)

    def absent(message: Message, context: Context) -> Message:
        if is_in_want(message, context):
            raise RuntimeError("as if its disk were full")
        return assembly.client_app(message, context)

    with small_disk(tmp_path / "disk", PAGE) as disk:
        done = run(tmp_path / "run", *hetero, app=app)
        assert names(disk) == ["3", "round-000003.safetensors"]
    assert done.failures == [(1, poor, "raised"), (2, poor, "raised")]
    said = done.rounds[0]["failures"][0]["message"]
    assert "client 3 cannot save what it needs in later rounds (No space left on device: " in said
    assert said.startswith("DataError: make room: ")
    assert done.model == run(tmp_path / "same", *hetero, app=absent).model


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 14) as disk:
        write_atomically(disk / "file", b"before")
        with pytest.raises(OSError, match="No space left") as error:
            write_atomically(disk / "file", bytes(1 << 15))
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(disk / "file"))
        assert names(disk) == ["file"]
        assert (disk / "file").read_bytes() == b"before"
