"""SuperNodes that must not get in, and one that dies, also where there is no network to shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedlp.apps.deployment.certificates import make_certificates
from tests.deploy.bench import TRAINS, await_words, bench_or_loopback
from tests.deploy.network import why_no_network

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
BELONGS_TO_A_RUN = ("Receiving:", "[RUN ", "flwr-clientapp")
REFUSALS = {
    "no-key": "SuperNode authentication is enabled",
    "wrong-key": "Failed to activate SuperNode",
    "other-ca": "CERTIFICATE_VERIFY_FAILED",
}


def test_who_has_no_key_or_a_wrong_one_or_another_ca_gets_nothing(folder: Path, tmp_path: Path) -> None:
    wrong = folder / "wrong"
    key = ec.generate_private_key(ec.SECP384R1())
    wrong.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    other = make_certificates(folder / "other", (), num_supernodes=1)
    with bench_or_loopback(folder, strangers=tuple(REFUSALS)) as made:
        strangers = {
            "no-key": made.start(0, "no-key", host="no-key", key=None),
            "wrong-key": made.start(0, "wrong-key", host="wrong-key", key=wrong),
            "other-ca": made.start(0, "other-ca", host="other-ca", ca=other.ca),
        }
        members = [made.start(i) for i in range(2)]
        done = made.run(tmp_path / "run")
        model = done.rounds[0]["bytes_down"] // 2
        for name, node in strangers.items():
            log = node.log.read_text()
            assert not any(words in log for words in BELONGS_TO_A_RUN), f"{name}: {log}"
            assert node.wire.up > 0, f"{name} never tried"
            assert node.wire.down < min(model, 20_000), f"{name} got {node.wire.down} bytes"
            assert node.process.poll() == 1, f"{name} was not turned away"
            assert REFUSALS[name] in log, f"{name}: {log}"
        assert all(node.log.read_text().count(TRAINS) == 2 for node in members)
        assert all(node.wire.down > 2 * model for node in members)
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 2
    assert done.failures == []


@pytest.mark.skipif(not why_no_network(), reason="on hosts of their own in test_network_faults.py")
def test_a_supernode_killed_in_mid_training_is_named_and_the_round_completes(folder: Path, tmp_path: Path) -> None:
    with bench_or_loopback(folder) as made:
        nodes = [made.start(i) for i in range(2)]

        def kill(line: dict[str, Any]) -> None:
            if line["server_round"] == 1:
                await_words(nodes[1].log, TRAINS, times=2)
                nodes[1].process.kill()

        done = made.run(tmp_path / "run", on_line=kill)
    assert done.failures == [(2, 1, "gone")]
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 2
    assert {cost["client_id"]: cost["num_examples"] > 0 for cost in done.rounds[1]["clients"]} == {0: True, 1: False}
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())
