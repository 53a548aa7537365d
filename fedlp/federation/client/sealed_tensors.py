"""Tensors as safetensors bytes with their own SHA-256, for the detection of damaged files."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_METADATA, _DIGEST = "__metadata__", "sha256"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def seal_tensors(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file whose metadata hold the SHA-256 of names, dtypes, shapes and values.

    Parts are views of the tensors, of which no copy is made.
    """
    entries: dict[str, Any] = {}
    parts: list[memoryview] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):  # keeps them aligned
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts.append(flat.numpy().data)
        start, end = end, end + flat.numel()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps({_METADATA: {_DIGEST: _digest(entries, *parts)}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    return [_LENGTH.pack(len(header)) + header, *parts]


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


def _digest(entries: Mapping[str, Any], *parts: memoryview) -> str:
    found = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    for part in parts:
        found.update(part)
    return found.hexdigest()
