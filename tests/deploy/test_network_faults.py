"""What clients and the network do wrong, on hosts of their own: the others' round completes, the model is theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedlp.apps.deployment.demo import Traffic, traffic_table
from fedlp.apps.deployment.loopback import SuperNode
from tests.deploy.bench import TRAINS, WHOLE, assert_is_the_others_model, await_true, await_words, bench
from tests.deploy.network import Link, why_no_network

REASON = why_no_network()
pytestmark = [pytest.mark.deploy, pytest.mark.skipif(bool(REASON), reason=REASON)]
SLOW = Link(rate_kbit=128)
CRAWL = Link(rate_kbit=32)
WAYS = ("up", "down")
SENT = 100_000  # bytes: a part of an upload, and more than all else that a SuperNode says meanwhile


def identity(node: SuperNode) -> str:
    """Return the id that the SuperLink gave a SuperNode."""
    (found,) = re.findall(r"SuperNode ID: (\d+)", node.log.read_text())
    return str(found)


def await_training(node: SuperNode, times: int) -> None:
    """Wait until a SuperNode has received so many instructions, the last of them whole."""

    def trains() -> bool:
        parts = node.log.read_text().split(TRAINS)
        return len(parts) > times and "Start `flwr-clientapp` process" in parts[times]

    await_true(trains, f"it did not get {times} instructions")


def test_a_supernode_killed_in_mid_training_rejoins_and_is_killed_in_mid_upload(folder: Path, tmp_path: Path) -> None:
    config = (WHOLE, "num_rounds=4", "simulation.round_timeout_s=120")
    with bench(folder) as made:
        network, nodes = made.network, made.federation.nodes
        assert network is not None
        for i in range(2):
            made.start(i)

        def after(line: dict[str, Any]) -> None:
            match line["server_round"]:
                case 1:
                    await_training(nodes["supernode-1"], times=2)
                    nodes["supernode-1"].process.kill()
                case 2:
                    network.shape("node-0", SLOW)  # so that round 3 lasts until the other is back
                    await_words(made.start(1, "again").log, "SuperNode ID")
                    network.shape("node-0", Link())
                case 3:
                    again = nodes["again"]
                    await_training(again, times=1)
                    network.shape("node-1", SLOW)
                    before = again.wire.up
                    await_true(lambda: again.wire.up > before + SENT, "it uploads nothing")
                    again.process.kill()

        done = made.run(tmp_path / "run", *config, on_line=after)
        assert identity(nodes["again"]) == identity(nodes["supernode-1"])
    assert done.failures == [(2, 1, "gone"), (3, 1, "gone"), (4, 1, "no_reply")]
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 4
    assert_is_the_others_model(done, tmp_path / "here", *config)


def test_a_straggler_past_the_deadline_is_named_and_its_late_answer_is_not_read(folder: Path, tmp_path: Path) -> None:
    config = (WHOLE, "num_rounds=3", "simulation.round_timeout_s=90")
    with bench(folder) as made:
        network = made.network
        assert network is not None
        nodes = [made.start(i) for i in range(2)]

        def after(line: dict[str, Any]) -> None:
            match line["server_round"]:
                case 1:
                    await_training(nodes[1], times=2)
                    network.shape("node-1", CRAWL)
                case 2:
                    network.shape("node-1", Link())

        done = made.run(tmp_path / "run", *config, on_line=after)
        assert nodes[1].log.read_text().count("Sending: train message") == 3
    assert done.failures == [(2, 1, "no_reply")]
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 3
    assert_is_the_others_model(done, tmp_path / "here", *config)


def test_a_network_cut_in_mid_round_and_healed_costs_the_rounds_between(folder: Path, tmp_path: Path) -> None:
    config = (WHOLE, "num_rounds=4", "simulation.round_timeout_s=120")
    with bench(folder) as made:
        network = made.network
        assert network is not None
        nodes = [made.start(i) for i in range(2)]

        def after(line: dict[str, Any]) -> None:
            match line["server_round"]:
                case 1:
                    await_training(nodes[1], times=2)
                    network.cut("node-1")
                case 2:
                    network.shape("node-0", SLOW)  # so that round 3 lasts until the other is back
                    network.heal("node-1")
                    await_true(lambda: made.is_online(nodes[1]), "the network is healed, the SuperNode is not back")
                    network.shape("node-0", Link())

        done = made.run(tmp_path / "run", *config, on_line=after)
        assert [node.process.poll() for node in nodes] == [None, None]
    assert done.failures == [(2, 1, "gone"), (3, 1, "gone")]
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 4
    assert_is_the_others_model(done, tmp_path / "here", *config)


def test_the_interfaces_counters_agree_with_the_records_over_a_lossy_network(folder: Path, tmp_path: Path) -> None:
    config = (WHOLE, "model=fedlp_cnn", "~model.variant", "num_rounds=2")
    lossy = Link(rate_kbit=20_000, delay_ms=20, loss=0.01)
    with bench(folder, links=(lossy, lossy)) as made:
        nodes = [made.start(i) for i in range(2)]
        done = made.run(tmp_path / "run", *config)
        counted = [(node.wire.up, node.wire.down) for node in nodes]
    recorded = [[sum(line["clients"][i][f"bytes_{way}"] for line in done.rounds) for way in WAYS] for i in range(2)]
    traffic = [Traffic(f"client {i}", *recorded[i], *counted[i]) for i in range(2)]
    print(f"\n{traffic_table(traffic)}")
    for part in traffic:
        for way in WAYS:
            framing = part.overhead(way)
            assert framing is not None
            assert 0 < framing < 20, f"{part.part}, {way}: {framing:.1f} %, of which polling is more on a slow machine"
    assert done.failures == []
    assert_is_the_others_model(done, tmp_path / "here", *config)
