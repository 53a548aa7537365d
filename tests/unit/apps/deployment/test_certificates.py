"""What ``make_certificates`` leaves: a chain TLS accepts, keys only their owner reads, nothing overwritten."""

from __future__ import annotations

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509 import load_pem_x509_certificate

from fedlp.apps.deployment.certificates import Certificates, make_certificates
from fedlp.errors import ConfigError


def shake_hands(made: Certificates, ca: Path, host: str) -> None:
    """Connect to a TLS server with the made certificate; raises what the client's side raises."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.server, made.server_key)
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(far, server_side=True).close()
        except OSError:  # refused by the client
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(near, server_hostname=host).close()
    finally:
        near.close()
        thread.join()


@pytest.mark.parametrize("host", ["superlink.example", "10.1.2.3", "localhost", "127.0.0.1"])
def test_tls_accepts_the_hosts_it_was_made_for(tmp_path: Path, host: str) -> None:
    made = make_certificates(tmp_path, ("superlink.example", "10.1.2.3"), 1)
    shake_hands(made, made.ca, host)


def test_tls_refuses_other_hosts_and_other_cas(tmp_path: Path) -> None:
    made, other = make_certificates(tmp_path / "a", (), 1), make_certificates(tmp_path / "b", (), 1)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(made, made.ca, "superlink.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(made, other.ca, "localhost")


def test_keys_are_pairs_of_a_nist_curve_that_differ(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, (), 3)
    numbers = set()
    for path in made.node_keys:
        private = load_ssh_private_key(path.read_bytes(), None)
        public = load_ssh_public_key(path.with_suffix(".pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert isinstance(public.curve, ec.SECP384R1)
        assert private.public_key() == public
        numbers.add(public.public_numbers())
    assert len(numbers) == 3


def test_only_public_files_can_be_read_by_others(tmp_path: Path) -> None:
    make_certificates(tmp_path, (), 2)
    readable = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mode & 0o077}
    assert readable == {"ca.crt", "server.crt", "supernode-0.pub", "supernode-1.pub"}


def test_they_hold_as_long_as_asked_and_from_yesterday(tmp_path: Path) -> None:
    made, now = make_certificates(tmp_path, (), 1, days=10), datetime.now(UTC)
    for path in (made.ca, made.server):
        certificate = load_pem_x509_certificate(path.read_bytes())
        assert abs(certificate.not_valid_after_utc - now - timedelta(days=10)) < timedelta(minutes=5)
        assert abs(now - timedelta(days=1) - certificate.not_valid_before_utc) < timedelta(minutes=5)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_certificates(tmp_path, (), 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"ca\.key is there already"):
        make_certificates(tmp_path, (), 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("hosts", "supernodes", "days", "words"),
    [
        (("two words",), 1, 1, "neither a host name nor an IP address"),
        (("",), 1, 1, "neither"),
        ((), 0, 1, "supernodes=0"),
        ((), 1, 0, "days=0"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, hosts: tuple[str, ...], supernodes: int, days: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_certificates(tmp_path / "none", hosts, supernodes, days)
    assert not (tmp_path / "none").exists()
