"""Clients that come and go between real SuperNodes: over-selection, and drop-outs in mid-round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlp.apps.deployment.certificates import make_certificates
from fedlp.apps.deployment.loopback import LoopbackFederation
from fedlp.errors import FedLPError
from tests.deploy.bench import Bench

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]


def test_the_first_answers_count_and_drop_outs_are_named(folder: Path, tmp_path: Path) -> None:
    certificates = make_certificates(folder / "certificates", ("127.0.0.1",), 3)
    with LoopbackFederation(folder / "flower", certificates, folder) as federation:
        made = Bench(folder, certificates, federation, None)
        for i, key in enumerate(certificates.node_keys):
            federation.register(key.with_suffix(".pub"))
            federation.start_node(f"supernode-{i}", {"partition-id": i, "num-partitions": 3}, key)
        three = ("num_clients=3", "strategy=fedavg", "num_rounds=3")
        more = made.run(tmp_path / "more", *three, "clients_per_round=2", "fleet.extra_clients=1")
        lost = made.run(tmp_path / "lost", *three, "clients_per_round=3", "fleet.dropout=0.5")
    for line in more.rounds:
        assert line["cohort"] == [0, 1, 2]
        assert [one["reason"] for one in line["failures"]] == ["surplus"]
        assert sum(cost["num_examples"] > 0 for cost in line["clients"]) == 2
    reasons = {one["reason"] for line in lost.rounds for one in line["failures"]}
    assert reasons == {"dropped_out"}
    for line in lost.rounds:
        assert len(line["failures"]) + sum(cost["num_examples"] > 0 for cost in line["clients"]) == 3


def test_devices_with_arrays_of_their_own_beside_one_whose_data_no_run_reads(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    places = []
    for i in range(2):
        targets = rng.integers(0, 2, 40)
        inputs = rng.standard_normal((40, 5)) + 3 * targets[:, None]
        places.append(tmp_path / f"own-{i}.npz")
        np.savez(places[-1], x=inputs.astype(np.float32), y=targets)
    certificates = make_certificates(folder / "certificates", ("127.0.0.1",), 2)
    with LoopbackFederation(folder / "flower", certificates, folder) as federation:
        made = Bench(folder, certificates, federation, None)
        nodes = []
        for i, (place, key) in enumerate(zip(places, certificates.node_keys, strict=True)):
            federation.register(key.with_suffix(".pub"))
            seat: dict[str, int | str] = {"partition-id": i, "num-partitions": 2}
            seat |= {"data": str(place)}
            nodes.append(federation.start_node(f"supernode-{i}", seat, key))
        facts = ("dataset=arrays", "dataset.task=classification", "dataset.shape=[5]", "dataset.num_outputs=2")
        reads = (*facts, "dataset.on_devices=true", "dataset.client_test_fraction=0.25", "evaluation=clients")
        trains = ("model=fedlp_mlp", "strategy=fedavg", "local.lr=0.1", "local.epochs=10", "num_rounds=3")
        done = made.run(tmp_path / "run", *reads, *trains)
        with pytest.raises(FedLPError):
            made.run(tmp_path / "public", "strategy=fedavg", "num_rounds=1")
        logs, server = [node.log.read_text() for node in nodes], made.server_log()
    assert done.failures == []
    assert [one["num_examples"] for one in done.rounds[-1]["evaluations"]] == [10, 10]
    assert done.rounds[-1]["metrics"]["client_accuracy_worst"] > 0.8
    for client_id, log in enumerate(logs):
        (line,) = (line for line in log.splitlines() if "cannot take part" in line)
        assert f"the node brings data={places[client_id]}, but this run trains on dataset=digits" in line
        assert f"cannot take part: client {client_id}: the node brings data=" in server
