"""Secure aggregation over a SuperLink: every message comes to a new process, and a SuperNode dies in mid-round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlp.apps.deployment.certificates import make_certificates
from fedlp.apps.deployment.loopback import LoopbackFederation
from tests.deploy.bench import TRAINS, WHOLE, Bench, assert_is_the_others_model, await_words

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
CASE = (WHOLE, "num_clients=3", "clients_per_round=3", "privacy=secagg", "privacy.min_group=2")


def test_a_sum_opens_without_the_supernode_that_died_and_the_model_is_the_local_engines(
    folder: Path, tmp_path: Path
) -> None:
    certificates = make_certificates(folder / "certificates", ("127.0.0.1",), 3)
    with LoopbackFederation(folder / "flower", certificates, folder) as federation:
        for key in certificates.node_keys:
            federation.register(key.with_suffix(".pub"))
        made = Bench(folder, certificates, federation, None)
        nodes = [made.start(i) for i in range(3)]

        def kill(line: dict[str, Any]) -> None:
            if line["server_round"] == 1:
                await_words(nodes[1].log, TRAINS, times=2)  # it has dealt shares
                nodes[1].process.kill()

        done = made.run(tmp_path / "run", *CASE, on_line=kill)
    assert done.failures == [(2, 1, "gone")]
    assert done.rounds[0]["failures"] == []
    assert all(line["phases"]["unmask"]["bytes_up"] > 0 for line in done.rounds)
    assert_is_the_others_model(done, tmp_path / "here", *CASE)
    left = sorted(path.parent.name for path in (folder / "clients").rglob("secagg.json"))
    assert left in ([], ["1"]), "only the client that died has keys of a round"
