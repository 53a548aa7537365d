"""A run that was stopped, however rudely, goes on and ends as if it never had been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlp.apps import runs as assembly
from fedlp.config import from_yaml, to_yaml
from fedlp.errors import CheckpointError, ConfigError
from tests.integration.running import TINY, TINY_CNN, Finished, command, interruptible, read, run

Once = Callable[..., Finished]
ADAM = ("server_optimizer=adam", "server_optimizer.lr=0.03")
CASES = {
    "homo": (*TINY_CNN, "strategy=fedlp_homo"),
    "homo, momentum on clients' average": (*TINY, "strategy=fedlp_homo", "server_optimizer=momentum"),
    "hetero": (*TINY, "strategy=fedlp_hetero"),
    "hetero, adam, seldom checkpoints": (*TINY, "strategy=fedlp_hetero", *ADAM, "checkpoint_every=3"),
}


def go_on(folder: Path, num_rounds: int) -> Finished:
    """Resume in this process, as the command line does."""
    config = from_yaml((folder / "config.yaml").read_text())
    config.resume, config.num_rounds = str(folder), num_rounds
    assembly.run(to_yaml(config), folder, lambda _: "test")
    return read(folder)


def assert_same(one: Finished, other: Finished) -> None:
    assert one.untimed == other.untimed
    assert one.model == other.model
    assert one.config == other.config
    for manifest in (one.manifest, other.manifest):
        manifest["totals"].pop("wall_time_s", None)
        manifest.pop("made", None)  # its date
    assert one.manifest == other.manifest


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_in_pieces_ends_like_one_in_one_piece(case: str, once: Once, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(once(*CASES[case], "num_rounds=2").path, folder)
    go_on(folder, 5)
    assert_same(go_on(folder, 7), once(*CASES[case], "num_rounds=7"))


def test_a_finished_run_stays_as_it_is(once: Once, tmp_path: Path) -> None:
    before = once(*CASES["hetero"], "num_rounds=2")
    shutil.copytree(before.path, tmp_path / "run")
    assert_same(go_on(tmp_path / "run", 2), before)


# ---- what a kill leaves
@pytest.mark.slow
def test_rounds_behind_the_last_checkpoint_are_done_again(once: Once, tmp_path: Path) -> None:
    """A kill between a round and its checkpoint leaves lines, heads and a torn line that must not count."""
    case = CASES["hetero, adam, seldom checkpoints"]
    folder = tmp_path / "run"
    whole = once(*case, "num_rounds=7")  # checkpoints of rounds 6 and 7, heads up to round 7
    shutil.copytree(whole.path, folder)
    for name in ("checkpoint/round-000007.json", "model.safetensors", "manifest.json"):
        (folder / name).unlink()
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write(b'{"server_round": 8, "coh')
    assert_same(go_on(folder, 7), whole)


@pytest.mark.slow
def test_a_run_without_any_checkpoint_starts_anew(once: Once, tmp_path: Path) -> None:
    case = CASES["hetero"]
    folder = tmp_path / "run"
    shutil.copytree(once(*case, "num_rounds=2").path, folder)
    shutil.rmtree(folder / "checkpoint")
    assert_same(go_on(folder, 7), once(*case, "num_rounds=7"))


def test_the_checkpoint_before_a_damaged_one_serves(
    once: Once, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES["hetero, adam, seldom checkpoints"]
    folder = tmp_path / "run"
    whole = once(*case, "num_rounds=7")
    shutil.copytree(whole.path, folder)
    (folder / "checkpoint" / "round-000007.safetensors").write_bytes(b"damaged")
    assert_same(go_on(folder, 7), whole)
    assert "round-000007.safetensors is damaged (SHA-256 differs); the run goes on from round 6" in caplog.text


def test_a_run_goes_on_from_the_newest_checkpoint_whose_rounds_are_on_record(
    once: Once, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = once(*CASES["hetero, adam, seldom checkpoints"], "num_rounds=7")
    folder = tmp_path / "run"
    shutil.copytree(whole.path, folder)
    lines = (folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_bytes(b"".join(lines[:6]) + bytes(40) + b"\n" + lines[6])
    assert_same(go_on(folder, 7), whole)
    assert "does not hold rounds 1 to 7 of the checkpoint; the run goes on from round 6" in caplog.text


def test_a_run_goes_on_without_its_records_in_memory(
    once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = (*TINY, "strategy=fedavg")
    shutil.copytree(once(*case, "num_rounds=1").path, tmp_path / "run")
    monkeypatch.delattr("fedlp.apps.round_keeping.load_run")
    assert_same(go_on(tmp_path / "run", 2), once(*case, "num_rounds=2"))


def test_a_checkpoint_never_outlives_what_is_on_record_of_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, of every file only that is sure to be there which was written before its last fsync."""
    durable: dict[str, bytes] = {}
    seen = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file():
            durable[path.name] = path.read_bytes()
            seen.append((path.name, durable.get("rounds.jsonl", b"").count(b"\n")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    run(tmp_path, *TINY, "strategy=fedlp_homo", "num_rounds=5", "checkpoint_every=2")
    written = {name[1:13]: count for name, count in seen if name.startswith(".round-")}
    assert written == {"round-000002": 2, "round-000004": 4, "round-000005": 5}


def test_a_checkpoint_of_another_model_is_refused(once: Once, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(once(*TINY, "strategy=fedlp_homo", "num_rounds=2").path, folder)
    config = (folder / "config.yaml").read_text()
    assert "variant: deep" in config
    (folder / "config.yaml").write_text(config.replace("variant: deep", "variant: plain"))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        go_on(folder, 7)


def test_rounds_that_are_lost_are_missed(once: Once, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(once(*CASES["hetero"], "num_rounds=2").path, folder)
    (folder / "rounds.jsonl").write_bytes((folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(CheckpointError, match="does not hold rounds 1 to 2"):
        go_on(folder, 7)


def test_fewer_rounds_than_were_done_are_refused(once: Once, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(once(*CASES["hetero"], "num_rounds=2").path, folder)
    with pytest.raises(ConfigError, match="has done 2"):
        go_on(folder, 1)


def test_a_new_run_does_not_inherit_the_heads_of_one_that_was_given_up(once: Once, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = once(*CASES["hetero"], "num_rounds=2")
    shutil.copytree(once(*CASES["hetero"], "num_rounds=7").path / "clients", folder / "clients")
    shutil.copytree(
        once(*CASES["hetero"], "num_rounds=1", "seed=3").path / "clients", folder / "clients", dirs_exist_ok=True
    )
    assembly.run_locally(to_yaml(whole.config), folder)
    assert_same(read(folder), whole)


# ---- real signals to a real process
def members(group: int) -> list[int]:
    """Return the living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_a_run_survives_a_signal(number: signal.Signals, once: Once, tmp_path: Path) -> None:
    case = (*CASES["hetero, adam, seldom checkpoints"], "num_rounds=30")
    folder = tmp_path / "run"
    process = subprocess.Popen(
        interruptible(command("fedlp", *case, f"hydra.run.dir={folder}")),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rounds = folder / "rounds.jsonl"
    deadline = time.monotonic() + 300
    while not rounds.is_file() or rounds.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=f"another process is running {folder} now"):
        go_on(folder, 30)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the workers too
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert rounds.read_bytes().count(b"\n") < 30, "the run was over before the signal came"
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert errors.splitlines()[-1] == f"fedlp: stopped; go on with: fedlp resume={folder}"
    while members(process.pid):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.05)
    assert_same(go_on(folder, 30), once(*case))
