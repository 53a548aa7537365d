"""Shamir's secret sharing (CACM 1979) of 32 bytes, over the prime field of 2^256 + 297.

Flower's own helper is for multiples of 16 bytes in GF(2^128); recovering one secret of 30 shares takes it 70 ms, and a
round of 50 clients needs 50 of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split_secret(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Return shares of a secret, of which any ``threshold`` determine it and fewer tell nothing.

    Parameters
    ----------
    secret : bytes
        32 of them.
    threshold, count : int
        1 <= threshold <= count.

    Returns
    -------
    list of bytes
        Values of a random polynomial at 1, 2, ..., count; 33 bytes each.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"{len(secret)} bytes cannot be shared as {threshold} of {count}")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for point in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES))
    return shares


def combine_shares(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of some shares by their points; ValueError if they give more than 32 bytes."""
    points = sorted(shares)
    terms = zip(_weights(tuple(points)), (int.from_bytes(shares[point]) for point in points), strict=True)
    secret = sum(weight * value for weight, value in terms) % PRIME
    if secret >= 2**256:
        raise ValueError("the shares do not give one secret")
    return secret.to_bytes(SECRET_BYTES)


@lru_cache(maxsize=16)
def _weights(points: Sequence[int]) -> tuple[int, ...]:
    """Return Lagrange's weights at 0 of some points."""
    found = []
    for point in points:
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        found.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(found)
