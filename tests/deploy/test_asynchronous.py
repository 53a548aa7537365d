"""Asynchronous rounds over a SuperLink: a slow SuperNode of three holds up nobody, and its late update counts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedlp.apps.deployment.certificates import make_certificates
from fedlp.apps.deployment.loopback import Host, LoopbackFederation
from tests.deploy.bench import SMALL, WHOLE, Bench
from tests.integration.running import run as run_here

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
THREE = (WHOLE, "num_clients=3", "clients_per_round=3", "rounds=asynchronous")
DELAY_S = 25


@dataclass(frozen=True)
class Uncounted:
    """A connection whose bytes nobody counts."""

    up: int = 0
    down: int = 0


def slow_host(folder: Path) -> Host:
    """Return a host whose every ClientApp takes long to start."""
    (folder / "slow").mkdir()
    (folder / "slow" / "sitecustomize.py").write_text(
        f"import sys, time\nif 'flwr-clientapp' in ' '.join(sys.orig_argv):\n    time.sleep({DELAY_S})\n"
    )
    path = os.pathsep.join([str(folder / "slow"), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())])
    return Host(("env", f"PYTHONPATH={path}"), "127.0.0.1", Uncounted())


def test_a_slow_supernode_holds_up_nobody_and_its_update_counts(folder: Path, tmp_path: Path) -> None:
    certificates = make_certificates(folder / "certificates", ("127.0.0.1",), 3)
    with LoopbackFederation(folder / "flower", certificates, folder) as federation:
        for key in certificates.node_keys:
            federation.register(key.with_suffix(".pub"))
        made = Bench(folder, certificates, federation, None)
        for i in range(2):
            made.start(i)
        federation.start_node(
            "supernode-2",
            {"partition-id": 2, "num-partitions": 3, "state-dir": str(folder / "clients")},
            certificates.node_keys[2],
            host=slow_host(folder),
        )
        done = made.run(tmp_path / "run", *THREE, "rounds.buffer_size=2", "num_rounds=6")
        every = made.run(tmp_path / "every", *THREE, "num_rounds=1")
    assert done.failures == []
    assert all(sum(cost["num_examples"] > 0 for cost in line["clients"]) == 2 for line in done.rounds)
    parts = [[line["staleness"][str(i)] for line in done.rounds if i in line["cohort"]] for i in range(3)]
    assert sum(map(len, parts)) == 12
    assert 1 <= len(parts[2]) <= min(len(parts[0]), len(parts[1]))
    assert max(parts[2]) >= 1
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())
    assert every.failures == []
    assert every.model == run_here(tmp_path / "here", *SMALL, *THREE[:-1], "num_rounds=1").model
