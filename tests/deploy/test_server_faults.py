"""What goes wrong at the server: it goes on, or ends with one line and is resumed, and the model is the same."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from fedlp.apps.deployment.loopback import SuperNode
from fedlp.errors import FedLPError
from fedlp.simulation.flower_process import SUPERLINK, call_flwr, find_flwr, flower_env, processes_in
from tests.deploy.bench import SMALL, TRAINS, Bench, absent, await_true, await_words, bench, bench_or_loopback, ignore
from tests.deploy.network import Link, why_no_network
from tests.integration.running import Finished, read
from tests.integration.running import run as run_here
from tests.integration.test_full_disk import PAGE, grow, small_disk

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
CHECKOUT = Path(__file__).resolve().parents[2]
HETERO = ("strategy=fedlp_hetero", "strategy.depths=[2,5]")  # client 0 has a head of its own, larger than a page
ONLINE = "SuperNode ID: "


def start(made: Bench, name: str, i: int, **seat: int | str) -> SuperNode:
    """Start a SuperNode on host ``node-I``, with that host's key, as whoever it says it is."""
    host = made.network and made.network.host(f"node-{i}")
    return made.federation.start_node(name, seat, made.certificates.node_keys[i], host=host)


def resume(made: Bench, out: Path, num_rounds: int) -> Finished:
    """Go on as ``flwr run .`` from a checkout does."""
    overrides = f"resume={out} num_rounds={num_rounds}"
    made.federation.run(CHECKOUT, {"overrides": overrides, "out": str(out)}, ignore)
    return read(out)


def flower(made: Bench, *words: str) -> str:
    program = find_flwr()
    assert program is not None
    return call_flwr([program, *words], flower_env(program, made.folder / "flower" / "cli"))


def last_run(made: Bench) -> dict[str, Any]:
    """Return what Flower knows of the last run."""
    found: dict[str, Any] = json.loads(flower(made, "ls", SUPERLINK, "--format", "json"))["runs"][0]
    return found


def test_a_superlink_that_is_restarted_and_a_serverapp_that_is_killed_and_resumed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with bench_or_loopback(folder) as made:
        nodes = [made.start(i) for i in range(2)]

        def after(line: dict[str, Any]) -> None:
            if line["server_round"] == 1:
                await_words(nodes[0].log, TRAINS, times=2)
                made.federation.superlink.kill()
                made.federation.superlink.wait()
                made.federation.start_superlink()
            elif line["server_round"] == 2:
                apps = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_in(folder)}
                (serverapp,) = (pid for pid, words in apps.items() if b"flwr-serverapp" in words)
                os.kill(serverapp, signal.SIGKILL)

        with pytest.raises(FedLPError, match="Flower could not run the ServerApp"):
            made.run(out, *HETERO, "num_rounds=4", on_line=after)
        assert last_run(made)["status"].startswith("finished")
        assert (out / "rounds.jsonl").read_bytes().count(b"\n") < 4
        done = resume(made, out, 4)
    here = run_here(tmp_path / "here", *SMALL, *HETERO, "num_rounds=4")
    assert done.untimed == here.untimed
    assert done.model == here.model


def test_disks_that_are_full(folder: Path, tmp_path: Path) -> None:
    """A client's is, and it loses the round; then the server's is, and the run ends, and goes on later."""
    here = run_here(tmp_path / "here", *SMALL, *HETERO, "num_rounds=3", app=absent((1, 0)))
    with (
        small_disk(tmp_path / "client", PAGE) as poor,
        small_disk(tmp_path / "server", int(1.5 * len(here.model))) as disk,
        bench_or_loopback(folder) as made,
    ):
        out = disk / "run"
        start(made, "poor", 0, **{"partition-id": 0, "state-dir": str(poor)})
        made.start(1)

        def after(line: dict[str, Any]) -> None:
            if line["server_round"] == 1:
                grow(poor)

        lost = out / "checkpoint" / "round-000002.safetensors"
        words = f"{lost} cannot be written (No space left on device); make room there, then go on with resume={out}"
        with pytest.raises(FedLPError, match=f"^{re.escape(words)}$"):
            made.run(out, *HETERO, "num_rounds=3", on_line=after)
        await_true(lambda: words in str(last_run(made)), "Flower never said why the run ended")
        grow(disk)
        done = resume(made, out, 3)
    assert done.failures == [(1, 0, "raised")]
    assert "client 0 cannot save what it needs in later rounds (No space left" in str(done.rounds[0]["failures"])
    assert done.model == here.model


def test_who_joins_late_or_says_it_is_somebody_else(folder: Path, tmp_path: Path) -> None:
    if reason := why_no_network():
        pytest.skip(reason)
    config = ("strategy=fedavg", "num_clients=3", "clients_per_round=3", "min_clients=2", "num_rounds=8")
    with bench(folder, links=(Link(),) * 6) as made:
        await_words(made.start(0).log, ONLINE)
        start(made, "twin", 3, **{"partition-id": 0})
        made.start(1)

        def after(line: dict[str, Any]) -> None:
            if line["server_round"] == 1:
                made.start(2)
                start(made, "too-far", 4, **{"partition-id": 4})
                start(made, "nobody", 5, colour="red")

        done = made.run(tmp_path / "run", *config, "simulation.round_timeout_s=120", on_line=after)
        said = flower(made, "log", str(last_run(made)["run-id"]), SUPERLINK, "--show")
    cohorts = [line["cohort"] for line in done.rounds]
    assert (cohorts[0], cohorts[-1]) == ([0, 1], [0, 1, 2])
    assert cohorts == sorted(cohorts)
    assert done.failures == []
    for words in (
        "it says it is client 0, which node",
        "the run begins without 1 of 3 clients, which did not join within 120 s: 2",
        "client 2 has joined",
        "there is no client 4: num_clients=3",
        "the node has no partition-id",
    ):
        assert said.count(words) == 1, said
    late = [(line["server_round"], 2) for line in done.rounds if 2 not in line["cohort"]]
    assert done.model == run_here(tmp_path / "here", *SMALL, *config, app=absent(*late)).model
