"""Spawned workers, as on Windows and macOS: the bytes of forked ones, one line where a run cannot be handed over."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedlp
from fedlp import registry
from fedlp.errors import ConfigError, FedLPError
from fedlp.simulation import shared_blocks
from fedlp.simulation.local import LocalGrid
from fedlp.simulation.starting import start_method
from tests.integration.running import TINY, Call, Finished, assert_refused, command, execute, read, run
from tests.integration.test_resume import assert_same, go_on, members

Once = Callable[..., Finished]
SPAWN = "simulation.start=spawn"
TIERS = ("strategy=fedlp_plan", "fleet=tiers", "fleet.fractions=[1.0,0.5]")
NETS = Path(__file__).parent / "own" / "nets.py"

SCRIPT = """
import numpy as np, torch, fedlp
from nets_of_mine import net
x, y = torch.randn(60, 8), torch.randint(3, (60,))

@fedlp.register("partition", "halves")  # known where this script was imported
def halves(train, num_clients):
    return np.array_split(np.arange(len(train)), num_clients)

options = {"strategy": "fedavg", "partition": "halves", "simulation": {"workers": 1, "start": "spawn"}}
GUARD
    fedlp.simulate(net, (x, y), clients=4, rounds=1, out="run", callbacks=[lambda record, state: None], **options)
"""


MODULE = """
import torch

def net():
    return torch.nn.Linear(8, 3)
"""


def assert_equal_bytes(one: Finished, other: Finished) -> None:
    assert one.untimed == other.untimed
    assert one.model == other.model


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def examples(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=draws)
    return x, x[:, :3].argmax(1)


# ---- the bytes of forked workers
def test_fedavg(once: Once, tmp_path: Path) -> None:
    case = (*TINY, "strategy=fedavg")
    spawned = run(tmp_path / "run", *case, SPAWN, "simulation.workers=1")
    assert_equal_bytes(spawned, once(*case))
    assert spawned.config.simulation.start == "spawn"


@pytest.mark.slow
def test_a_plan_with_tiers(once: Once, tmp_path: Path) -> None:
    assert_equal_bytes(run(tmp_path / "run", *TINY, *TIERS, SPAWN), once(*TINY, *TIERS))


@pytest.mark.slow
def test_a_resumed_run(once: Once, tmp_path: Path) -> None:
    case = (*TINY, "strategy=fedlp_hetero", "server_optimizer=momentum")
    run(tmp_path / "run", *case, SPAWN)
    resumed, whole = go_on(tmp_path / "run", 5), once(*case, "num_rounds=5")
    resumed.config.simulation.start = resumed.manifest["config"]["simulation"]["start"] = "auto"
    assert_same(resumed, whole)


@pytest.mark.slow
def test_a_model_of_ones_own_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # to read the runs
    shutil.copy(NETS, tmp_path / "nets_of_mine.py")
    case = ("model=nets_of_mine:cosine", *TINY[2:], *TIERS)
    runs = []
    for start in ("fork", "spawn"):
        done = execute("fedlp", *case, f"simulation.start={start}", f"hydra.run.dir={start}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len([line for line in done.stderr.splitlines() if "stay whole" in line]) == 1
        runs.append(read(tmp_path / start))
    assert_equal_bytes(*runs)


def in_memory(out: Path, model: nn.Module | Callable[[], nn.Module], **simulation: object) -> tuple[list[str], bytes]:
    """Return lines, without times, and model of a run on data in memory."""
    clients = [examples(seed, 20 + seed) for seed in range(4)]
    options = {"rounds": 2, "strategy": "fedavg", "local": {"batch_size": 8}, "out": out}
    fedlp.simulate(model, clients, examples(9, 30), simulation=simulation, **options)
    lines = (out / "rounds.jsonl").read_text().splitlines()
    return [line.partition("wall_time_s")[0] for line in lines], (out / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_function_that_makes_the_model_and_data_in_memory(tmp_path: Path) -> None:
    spawned = in_memory(tmp_path / "spawn", two_layers, workers=2, start="spawn")
    assert spawned == in_memory(tmp_path / "fork", two_layers, workers=2, start="fork")


# ---- clients in this process
def test_a_model_that_has_no_name_trains_in_this_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forked = in_memory(tmp_path / "fork", two_layers(), workers=2, start="fork")
    assert not caplog.records
    assert in_memory(tmp_path / "auto", two_layers(), start="spawn") == forked
    assert [record.getMessage() for record in caplog.records] == [
        "clients train one after another in this process (simulation.workers=0): the model is an object (Sequential), "
        'which another process cannot build; give model="module:name", or a function or class of the top level of a '
        "module or script that makes it"
    ]
    with pytest.raises(
        ConfigError, match=r'start=spawn: the model is an object .* model="module:name".*workers=0'
    ) as no:
        in_memory(tmp_path / "run", two_layers(), workers=2, start="spawn")
    assert "\n" not in str(no.value)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_system_that_cannot_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    in_memory(tmp_path / "run", two_layers(), workers=2)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "more",
    [
        ("strategy=fedavg",),
        pytest.param(TIERS, marks=pytest.mark.slow),
        pytest.param(("strategy=fedlp_hetero", "server_optimizer=momentum"), marks=pytest.mark.slow),
        pytest.param(("strategy=fedavg", "privacy=secagg"), marks=pytest.mark.slow),
        pytest.param(("strategy=fedavg", "simulation.batched=true"), marks=pytest.mark.slow),
    ],
    ids=["fedavg", "tiers", "hetero", "secagg", "batched"],
)
def test_no_workers(more: tuple[str, ...], once: Once, tmp_path: Path) -> None:
    case = (*TINY, *more)
    here = run(tmp_path / "run", *case, "simulation.workers=0")
    assert not multiprocessing.active_children()
    assert_equal_bytes(here, once(*case))


MORTAL = """
import multiprocessing, os
from pathlib import Path
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_features, num_classes):
        super().__init__()
        self.first, self.last = nn.Linear(in_features, 16), nn.Linear(16, num_classes)

    def forward(self, x):
        mark = Path(__file__).with_name("died")
        is_step = self.training and torch.is_grad_enabled() and len(x) == 8 and multiprocessing.parent_process()
        if is_step and not mark.is_file():
            mark.touch()
            os.kill(os.getpid(), 9)
        return self.last(torch.relu(self.first(x.flatten(1))))
"""


@pytest.mark.slow
def test_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    case = ("model=mortal:Net", *TINY[2:], "strategy=fedavg", "simulation.workers=1")
    forked = run(tmp_path / "fork", *case)
    (tmp_path / "died").unlink()
    spawned = run(tmp_path / "spawn", *case, SPAWN)
    assert_equal_bytes(spawned, forked)
    assert [(server_round, reason) for server_round, _, reason in spawned.failures] == [(1, "crashed")]


# ---- ends
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_a_run_survives_signals(once: Once, tmp_path: Path) -> None:
    case = (*TINY, "strategy=fedavg", "num_rounds=40")
    process = subprocess.Popen(
        command("fedlp", *case, SPAWN, "hydra.run.dir=run"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rounds = tmp_path / "run" / "rounds.jsonl"

    def await_rounds(count: int) -> None:
        deadline = time.monotonic() + 300
        while not rounds.is_file() or rounds.read_bytes().count(b"\n") < count:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    await_rounds(2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == f"fedlp: stopped; go on with: fedlp resume={tmp_path / 'run'}"
    assert "Traceback" not in errors
    assert "leaked" not in errors
    deadline = time.monotonic() + 10
    while members(process.pid):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.05)
    assert read_after(tmp_path / "run").model == once(*case).model


def read_after(folder: Path) -> Finished:
    """Return a stopped run after it has gone on, spawned again."""
    done = execute("fedlp", f"resume={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return read(folder)


@pytest.mark.slow
def test_a_script_without_a_guard_gets_one_line(tmp_path: Path) -> None:
    for guard, is_fine in (("if True:", False), ('if __name__ == "__main__":', True)):
        (tmp_path / "nets_of_mine.py").write_text(MODULE)
        (tmp_path / "script.py").write_text(SCRIPT.replace("GUARD", guard))
        line = [sys.executable, "script.py"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode == 0) == is_fine, done.stderr
        assert (tmp_path / "run" / "manifest.json").is_file() == is_fine
        if not is_fine:
            assert done.stderr.count("Traceback") == 1
            assert done.stderr.splitlines()[-1].endswith('put the call of fedlp under: if __name__ == "__main__":')


@pytest.mark.slow
def test_a_session_that_workers_cannot_import(tmp_path: Path) -> None:
    (tmp_path / "nets_of_mine.py").write_text(MODULE)
    asked = SCRIPT.replace("GUARD", "if True:")
    for word, said in (("-c", "partition halves cannot be"), ("-", "script <stdin> is no")):
        for text, is_fine in ((asked, False), (asked.replace('"workers": 1, ', ""), True)):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            words, given = ([word, text], None) if word == "-c" else ([word], text)
            line = [sys.executable, *words]
            done = subprocess.run(
                line, input=given, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
            )
            assert (done.returncode == 0) == is_fine, done.stderr
            assert said in done.stderr.splitlines()[-1]
            assert done.stderr.count("Traceback") == 1 - is_fine
            assert (tmp_path / "run" / "manifest.json").is_file() == is_fine


# ---- what is refused, in one line
def test_parts_that_have_no_name(tmp_path: Path) -> None:
    registry.name_of("callback", lambda record, state: False)  # of an earlier run, and of the same name
    options = {"rounds": 1, "strategy": "fedavg", "simulation": {"start": "spawn", "workers": 2}, "out": tmp_path}
    with pytest.raises(ConfigError, match=r"partition _lambda_.* cannot be imported by another process") as found:
        fedlp.simulate(two_layers, examples(0, 40), clients=4, partition=lambda train: np.arange(36) % 4, **options)
    assert "\n" not in str(found.value)
    assert not multiprocessing.active_children()


def test_options_that_do_not_fit(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(call("simulation=ray", SPAWN), "simulation.start=spawn is not allowed: it must be auto with .*ray")
    assert_refused(call("simulation.start=thread"), "must be one of auto, fork, spawn")
    assert_refused(call("simulation.workers=0", SPAWN), "start=spawn is not allowed: it must be auto with .*workers=0")
    assert_refused(call("simulation.workers=0", "simulation=ray"), "workers=0 is not allowed: it must be at least 1")
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ConfigError, match=r"cannot fork processes; set simulation\.start=spawn"):
        start_method("fork")


@pytest.mark.parametrize(
    ("platform", "methods", "chosen"),
    [("linux", ["fork", "spawn"], "fork"), ("darwin", ["spawn", "fork"], "spawn"), ("win32", ["spawn"], "spawn")],
)
def test_the_start_that_fits_the_system(
    platform: str, methods: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(sys, "platform", platform)
    assert start_method("auto") == chosen


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends processes that write into full shared memory")
def test_shared_memory_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shared_blocks.shutil, "disk_usage", lambda _: free)  # type: ignore[attr-defined]
    with pytest.raises(FedLPError, match="need up to 19 MB of shared memory, and /dev/shm has 1 MB; enlarge"):
        LocalGrid(os.getpid, 2, 2, 2_300_000, start="spawn")  # type: ignore[arg-type]
