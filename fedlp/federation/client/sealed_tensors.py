"""Tensors as safetensors bytes with their own SHA-256, for the detection of damaged files."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_METADATA, _DIGEST = "__metadata__", "sha256"


def seal_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file whose metadata hold the SHA-256 of its tensors: names, dtypes, shapes and values."""
    entries, body = _split(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
    header = json.dumps({_METADATA: {_DIGEST: _digest(entries, body)}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((_LENGTH.pack(len(header)), header, body))


def open_sealed(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a sealed file; those of a file without metadata, of an earlier version, are not checked.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    try:
        entries, body = _split(data)
        metadata = entries.pop(_METADATA, None)
        if metadata is not None and metadata[_DIGEST] != _digest(entries, body):
            raise ValueError("its SHA-256 differs")
        tensors: dict[str, Tensor] = load(data)
    except (struct.error, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError("it is no whole safetensors file") from error
    return tensors


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    (length,) = _LENGTH.unpack_from(data)
    return json.loads(data[_LENGTH.size : _LENGTH.size + length]), memoryview(data)[_LENGTH.size + length :]


def _digest(entries: Mapping[str, Any], body: memoryview) -> str:
    found = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    found.update(body)
    return found.hexdigest()
