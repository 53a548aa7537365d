"""SuperNodes with folders of images of their own, and a SuperLink's host without any data."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlp.apps.deployment.certificates import make_certificates
from fedlp.apps.deployment.loopback import LoopbackFederation
from fedlp.report import find_runs, group_runs
from fedlp.report.client_plots import client_plots
from tests.deploy.bench import Bench
from tests.integration.own_images import READS, write_devices

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
PLAN = ("strategy=fedlp_plan", "evaluation=clients", "local.epochs=3", "local.lr=0.1")
BUDGETS = (None, 60_000)  # parameters of 191,427


def test_two_devices_train_and_evaluate_and_two_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    places = write_devices(tmp_path / "devices")
    certificates = make_certificates(folder / "certificates", ("127.0.0.1",), len(places))
    with LoopbackFederation(folder / "flower", certificates, folder) as federation:
        made = Bench(folder, certificates, federation, None)
        nodes = []
        for i, (place, key) in enumerate(zip(places, certificates.node_keys, strict=True)):
            federation.register(key.with_suffix(".pub"))
            seat: dict[str, int | str] = {"partition-id": i, "num-partitions": len(places), "data": str(place)}
            if i < len(BUDGETS) and (limit := BUDGETS[i]):
                budget = tmp_path / f"budget-{i}.yaml"
                budget.write_text(f"params: {limit}\n")
                seat["budget"] = str(budget)
            nodes.append(federation.start_node(f"supernode-{i}", seat, key))
        done = made.run(tmp_path / "run", "num_clients=4", "clients_per_round=4", *PLAN, *READS, "num_rounds=3")
        logs = [node.log.read_text() for node in nodes]
        server = made.server_log()
    assert done.failures == []
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 3
    whole, small = (done.rounds[0]["clients"][i]["params_down"] for i in range(2))
    assert small <= 60_000 < whole == 191_427
    last = done.rounds[-1]
    assert {one["client_id"]: one["num_examples"] for one in last["evaluations"]} == {0: 10, 1: 4}
    assert last["metrics"]["client_accuracy_worst"] == min(one["metrics"]["accuracy"] for one in last["evaluations"])
    assert "accuracy" not in last["metrics"]
    for client_id, words in ((2, "unknown class violet"), (3, "holds 0 images")):
        (line,) = (line for line in logs[client_id].splitlines() if "cannot take part" in line)
        assert words in line
        assert "Traceback" not in logs[client_id]
        (line,) = (line for line in server.splitlines() if f"cannot take part: client {client_id}:" in line)
        assert words in line
    (plot,) = client_plots(group_runs(find_runs([tmp_path / "run"])))
    assert plot.file == "client_accuracy.png"
