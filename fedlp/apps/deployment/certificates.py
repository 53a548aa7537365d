"""A development CA, the SuperLink's certificate, and one key pair per SuperNode.

Flower 1.41 takes TLS material as PEM, and SuperNode keys as OpenSSH files of NIST curves. Keys lie in files that only
their owner may read, and nothing is ever overwritten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlp.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1")  # the SuperLink's own ServerApp reaches it by these
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_CLOCK_SKEW = timedelta(days=1)  # devices without a clock of their own wake up in the past


@dataclass(frozen=True)
class Certificates:
    """Paths of certificates and keys.

    Attributes
    ----------
    ca : Path
        Certificate of the CA that signs the SuperLink's; its key, ``ca.key``, lies beside it.
    node_keys : tuple of Path
        The SuperNodes' private keys; the public key of each, to be registered, is the same name with ``.pub``.
    """

    ca: Path
    server: Path
    server_key: Path
    node_keys: tuple[Path, ...]


def make_certificates(folder: Path, hosts: Sequence[str], num_supernodes: int, days: int = 365) -> Certificates:
    """Make a CA, a server certificate and SuperNode keys.

    Parameters
    ----------
    hosts : sequence of str
        Names and addresses of the SuperLink for SuperNodes and ``flwr``; loopback is always added.
    num_supernodes : int
        Key pairs to make, >= 1.
    days : int
        Validity of the certificates, >= 1.

    Raises
    ------
    ConfigError
        If a value is out of range, a host is neither a name nor an address, or a file exists.
    """
    names = [_name(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    if num_supernodes < 1:
        raise ConfigError(f"supernodes={num_supernodes}: must be at least 1")
    if days < 1:
        raise ConfigError(f"days={days}: must be at least 1")
    keys = folder / "supernodes"
    made = Certificates(
        folder / "ca.crt",
        folder / "server.crt",
        folder / "server.key",
        tuple(keys / f"supernode-{i}" for i in range(num_supernodes)),
    )
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = _ca_certificate(ca_key, days)
    files = {
        folder / "ca.key": _pem(ca_key),
        made.ca: ca.public_bytes(Encoding.PEM),
        made.server_key: _pem(server_key),
        made.server: _server_certificate(server_key, names, ca, ca_key, days).public_bytes(Encoding.PEM),
    }
    for path in made.node_keys:
        key = ec.generate_private_key(ec.SECP384R1())
        files[path] = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        files[path.with_suffix(".pub")] = public + f" {path.name}\n".encode()
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another folder, or remove it first")
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path, content in files.items():
        _write(path, content, mode=0o644 if path.suffix in (".crt", ".pub") else 0o600)
    return made


def _name(host: str) -> x509.GeneralName:
    """Return a host in the form of a certificate."""
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        labels = host.removeprefix("*.").split(".")
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
            raise ConfigError(f"host {host!r} is neither a host name nor an IP address") from None
        return x509.DNSName(host)


def _ca_certificate(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlp development CA")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    return (
        _builder(key.public_key(), subject, subject, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlp SuperLink")])
    return (
        _builder(key.public_key(), subject, ca.subject, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _builder(
    key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file with its final mode from the first byte."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
