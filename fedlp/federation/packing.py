"""Tensors to flat buffers and back: one array per dtype, in the order of the model.

A message holds no names and no shapes: both sides know the model, the sub-model and the upload set, so the values
alone travel. Each array is a one-dimensional ``.npy`` image, which every Flower mod can read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMPY_TYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<i2"),  # numpy has no bfloat16: its bits travel as int16
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("|u1"),
    "bool": np.dtype("|b1"),
}

Signature = Sequence[tuple[str, tuple[int, ...], torch.dtype]]
"""Names, shapes and dtypes of the tensors of a message, in order."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=1024)
def npy_header(name: str, count: int) -> bytes:
    """Return the ``.npy`` header of a one-dimensional array of ``count`` values."""
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(_NUMPY_TYPE[name]), "fortran_order": False, "shape": (count,)}
    )
    return buffer.getvalue()


def pack_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, bytes]]:
    """Return ``dtype name -> (count, npy image)`` of the tensors, concatenated in order.

    Raises
    ------
    KeyError
        For a dtype that has no encoding.
    """
    by_dtype: dict[str, list[Tensor]] = {}
    for tensor in tensors.values():
        by_dtype.setdefault(dtype_name(tensor.dtype), []).append(tensor)
    packed: dict[str, tuple[int, bytes]] = {}
    for name, group in by_dtype.items():
        count = sum(tensor.numel() for tensor in group)
        header = npy_header(name, count)
        itemsize = _NUMPY_TYPE[name].itemsize
        image = bytearray(len(header) + count * itemsize)
        image[: len(header)] = header
        flat = np.frombuffer(image, dtype=_NUMPY_TYPE[name], offset=len(header))
        start = 0
        for tensor in group:
            values = tensor.detach().cpu().contiguous().reshape(-1)
            if name == "bfloat16":
                values = values.view(torch.int16)
            flat[start : start + values.numel()] = values.numpy()
            start += values.numel()
        packed[name] = (count, bytes(image))
    return packed


def unpack_tensors(packed: Mapping[str, memoryview | bytes], signature: Signature) -> dict[str, Tensor]:
    """Return the tensors of ``signature`` as read-only views into the packed images.

    Raises
    ------
    ValueError
        Where an array is missing, left over, or not exactly of the expected type and length; says which.
    """
    counts: dict[str, int] = {}
    for _, shape, dtype in signature:
        counts[dtype_name(dtype)] = counts.get(dtype_name(dtype), 0) + math.prod(shape)
    if counts.keys() != packed.keys():
        raise ValueError(f"arrays {sorted(packed)} came, {sorted(counts)} were expected")
    flats = {name: _open_image(name, count, packed[name]) for name, count in counts.items()}
    starts = dict.fromkeys(counts, 0)
    tensors: dict[str, Tensor] = {}
    for name, shape, dtype in signature:
        kind = dtype_name(dtype)
        start, count = starts[kind], math.prod(shape)
        tensors[name] = flats[kind][start : start + count].view(shape)
        starts[kind] = start + count
    return tensors


def _open_image(name: str, count: int, image: memoryview | bytes) -> Tensor:
    header = npy_header(name, count)
    expected = len(header) + count * _NUMPY_TYPE[name].itemsize
    if len(image) != expected or bytes(image[: len(header)]) != header:
        raise ValueError(
            f"array {name} holds {len(image)} bytes that are not the {expected} of {count} values of {name}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the view is read-only; nobody writes into it
        flat = torch.from_numpy(np.frombuffer(image, dtype=_NUMPY_TYPE[name], offset=len(header)))
    return flat.view(torch.bfloat16) if name == "bfloat16" else flat
