"""SuperNodes that must not get in, and one that dies: the run completes with the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedlp.config import compose, to_yaml
from fedlp.deployment.certificates import Certificates, make_certificates
from fedlp.deployment.loopback import LoopbackFederation
from fedlp.simulation.flower_process import write_app
from tests.integration.running import TINY, Finished, read

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300
SMALL = (*TINY, "num_clients=2", "clients_per_round=2")
BELONGS_TO_A_RUN = ("Receiving:", "[RUN ", "flwr-clientapp")
REFUSALS = {
    "no-key": "SuperNode authentication is enabled",
    "wrong-key": "Failed to activate SuperNode",
    "other-ca": "CERTIFICATE_VERIFY_FAILED",
}


@contextmanager
def federation(folder: Path) -> Iterator[tuple[LoopbackFederation, Certificates]]:
    """A SuperLink that knows the keys of two SuperNodes; none is started."""
    certificates = make_certificates(folder / "certificates", (), num_supernodes=2)
    with LoopbackFederation(folder / "flower", certificates, folder) as running:
        for key in certificates.node_keys:
            running.register(key.with_suffix(".pub"))
        yield running, certificates


def start_both(running: LoopbackFederation, certificates: Certificates) -> None:
    for i, key in enumerate(certificates.node_keys):
        running.start_node(key.name, {"partition-id": i, "num-partitions": 2}, key)


def ignore(_: dict[str, Any]) -> None: ...


def run(
    running: LoopbackFederation, app: Path, out: Path, on_line: Callable[[dict[str, Any]], None], **settings: str
) -> Finished:
    running.run(app, {"out": str(out), **settings}, on_line)
    return read(out)


def test_who_has_no_key_or_a_wrong_one_or_another_ca_gets_nothing(folder: Path, tmp_path: Path) -> None:
    wrong = folder / "wrong"
    key = ec.generate_private_key(ec.SECP384R1())
    wrong.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    other = make_certificates(folder / "other", (), num_supernodes=1)
    seat: dict[str, int | str] = {"partition-id": 0, "num-partitions": 2}
    with federation(folder) as (running, certificates):
        outsiders = {
            "no-key": running.start_node("no-key", seat, None),
            "wrong-key": running.start_node("wrong-key", seat, wrong),
            "other-ca": running.start_node("other-ca", seat, certificates.node_keys[0], ca=other.ca),
        }
        start_both(running, certificates)
        overrides = " ".join((*SMALL, "num_rounds=2"))
        done = run(running, CHECKOUT, tmp_path / "run", ignore, overrides=overrides)  # as `flwr run .` does
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 2
    assert done.failures == []
    model = done.rounds[0]["bytes_down"] // 2
    for name, node in outsiders.items():
        log = node.log.read_text()
        assert not any(words in log for words in BELONGS_TO_A_RUN), f"{name}: {log}"
        assert node.wire.up > 0, f"{name} never tried"
        assert node.wire.down < min(model, 20_000), f"{name} got {node.wire.down} bytes"
        assert node.process.returncode == 1, f"{name} was not turned away"
        assert REFUSALS[name] in log, f"{name}: {log}"
    members = [running.nodes[key.name] for key in certificates.node_keys]
    assert all(node.log.read_text().count("Receiving: train message") == 2 for node in members)
    assert all(node.wire.down > 2 * model for node in members)


def test_a_supernode_killed_in_mid_training_is_named_and_the_round_completes(folder: Path, tmp_path: Path) -> None:
    config = to_yaml(compose((*SMALL, "num_rounds=2")))
    with federation(folder) as (running, certificates):
        start_both(running, certificates)

        def kill(line: dict[str, Any]) -> None:
            if line["server_round"] == 1:
                node = running.nodes["supernode-1"]
                deadline = time.monotonic() + PATIENCE_S
                while node.log.read_text().count("Receiving: train message") < 2:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                node.process.kill()

        done = run(running, write_app(folder), tmp_path / "run", kill, cfg=config)
    assert done.failures == [(2, 1, "gone")]
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 2
    assert {cost["client_id"]: cost["num_examples"] > 0 for cost in done.rounds[1]["clients"]} == {0: True, 1: False}
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())
