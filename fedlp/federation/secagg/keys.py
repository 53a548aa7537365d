"""Key agreement, sealed shares and masks, all by primitives of ``cryptography``.

X25519 (RFC 7748) agrees on a secret, HKDF-SHA256 (RFC 5869) makes keys of it, AES-256-GCM seals shares, and AES-256 in
counter mode expands a key to a mask. Flower's own mask generator folds its seed to 32 bits, which can be searched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedlp.federation.secagg.shamir import SHARE_BYTES

KEY_BYTES, DIGEST_BYTES, TAG_BYTES = 32, 32, 16
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
_CHUNK = 1 << 18  # bytes of a mask that are made at a time: within the cache
_ZEROS = bytes(_CHUNK)

Words = NDArray[np.uint32] | NDArray[np.uint64]
"""Integers modulo 2^32 or 2^64."""


def public_key(private: bytes) -> bytes:
    """Return the public key of a private one; 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: str, server_round: int, one: int, other: int) -> bytes:
    """Return the key that two clients share for a purpose in a round, whichever of the two asks; 32 bytes.

    Raises
    ------
    ValueError
        For a public key that gives no secret, such as zero.
    """
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    low, high = sorted((one, other))
    info = f"fedlp secagg {purpose} {server_round} {low} {high}".encode()
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def seal(key: bytes, plaintext: bytes, server_round: int, sender: int, receiver: int) -> bytes:
    """Return a message that only the receiver can open; a key seals one message each way."""
    return AESGCM(key).encrypt(sender.to_bytes(12), plaintext, _names(server_round, sender, receiver))


def open_sealed(key: bytes, sealed: bytes, server_round: int, sender: int, receiver: int) -> bytes | None:
    """Return the plaintext that the sender sealed; None if the sender did not."""
    try:
        return AESGCM(key).decrypt(sender.to_bytes(12), sealed, _names(server_round, sender, receiver))
    except InvalidTag:
        return None


def commit(share: bytes, kind: str, server_round: int, owner: int, holder: int) -> bytes:
    """Return the digest that binds an owner to the share that it gives a holder; 32 bytes."""
    return hashlib.sha256(f"fedlp secagg {kind} {server_round} {owner} {holder} ".encode() + share).digest()


def _names(server_round: int, sender: int, receiver: int) -> bytes:
    return f"{server_round} {sender} {receiver}".encode()


def add_mask(parts: Sequence[Words], key: bytes, sign: int) -> None:
    """Add a mask to vectors, or subtract it, in place and modulo the size of their words.

    Parameters
    ----------
    parts : sequence of (n,) arrays of uint32 or uint64
        The mask runs on from one to the next.
    key : bytes
        32 of them; used for one mask alone.
    sign : 1 or -1
    """
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
    buffer = bytearray(_CHUNK + 16)
    for words in parts:
        step = _CHUNK // words.itemsize
        kind = words.dtype.newbyteorder("<")
        for start in range(0, len(words), step):
            chunk = words[start : start + step]
            stream.update_into(_ZEROS[: chunk.nbytes], buffer)
            mask = np.frombuffer(buffer, kind, len(chunk))
            if sign > 0:
                np.add(chunk, mask, out=chunk)
            else:
                np.subtract(chunk, mask, out=chunk)
