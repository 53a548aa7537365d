"""Digest of tensors, by which server and client confirm equal values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Part = tuple[str, torch.dtype, Sequence[int], Iterable[Tensor]]
"""Name, dtype and shape of a tensor, and its values in parts of consecutive entries."""


def digest_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 of names, dtypes, shapes and values, independent of the order of names; 32 bytes."""
    return digest_parts((name, x.dtype, x.shape, [x]) for name, x in sorted(tensors.items()))


def digest_parts(tensors: Iterable[Part]) -> bytes:
    """Return the digest of tensors, in the order of their names, that are not held whole."""
    found = hashlib.sha256()
    for name, dtype, shape, parts in tensors:
        found.update(f"{name} {dtype} {tuple(shape)};".encode())
        for part in parts:
            if part.numel():
                found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
