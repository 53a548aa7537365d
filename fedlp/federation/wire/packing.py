"""Tensors to flat buffers and back: one array per dtype, in the order of the model.

A message holds no names and no shapes: both sides know the model, the sub-model and the upload set, so values
suffice. Each array is a one-dimensional ``.npy`` image, which every Flower mod can read. In a coded message,
arrays of single bytes are Huffman codes instead (raw DEFLATE without matches): quantised differences are mostly zeros.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUMPY_TYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<i2"),  # numpy has no bfloat16: its bits travel as int16
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int8": np.dtype("|i1"),
    "uint8": np.dtype("|u1"),
    "bool": np.dtype("|b1"),
}

_BYTES = ("int8", "uint8", "bool")  # what may be coded

Signature = Sequence[tuple[str, tuple[int, ...], torch.dtype]]
"""Names, shapes and dtypes of the tensors of a message, in order."""


@lru_cache(maxsize=64)
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


Reserve = Callable[[int], memoryview | None]
"""Memory for the image of an array of a number of bytes; None where there is none."""

_LEAST_PLACED = 1 << 16  # bytes of an image that is worth a place of its own
_reserve: list[Reserve] = []  # of the message under way, if it is to lie somewhere


@contextmanager
def placed_in(reserve: Reserve) -> Iterator[None]:
    """Let images lie in given memory for a while, where they would have to be copied to."""
    _reserve.append(reserve)
    try:
        yield
    finally:
        _reserve.pop()


def _place(size: int) -> memoryview | None:
    return _reserve[-1](size) if _reserve and size >= _LEAST_PLACED else None


def _join(header: bytes, parts: Sequence[Any]) -> Any:
    """Return header and values as one image."""
    image = _place(len(header) + sum(part.nbytes for part in parts))
    if image is None:
        return b"".join((header, *parts))  # one allocation, one copy: it reads the tensors' memory
    image[: len(header)] = header
    np.concatenate([part.reshape(-1) for part in parts], out=np.frombuffer(image[len(header) :], parts[0].dtype))
    return image


def pack_tensors(tensors: Mapping[str, Tensor], coded: bool = False) -> dict[str, tuple[int, Any]]:
    """Return ``dtype name -> (count, image)`` of the tensors, concatenated in order.

    Parameters
    ----------
    coded : bool
        Whether arrays of single bytes are Huffman coded.

    Raises
    ------
    KeyError
        For a dtype without an encoding.
    """
    counts: dict[str, int] = {}
    parts: dict[str, list[Any]] = {}
    for tensor in tensors.values():
        name = dtype_name(tensor.dtype)
        values = tensor.detach().cpu().contiguous()
        if name == "bfloat16":
            values = values.view(torch.int16)
        counts[name] = counts.get(name, 0) + values.numel()
        parts.setdefault(name, []).append(values.numpy())
    return {
        name: (
            count,
            _code(parts[name]) if coded and name in _BYTES else _join(npy_header(name, count), parts[name]),
        )
        for name, count in counts.items()
    }


def unpack_tensors(
    packed: Mapping[str, memoryview | bytes], signature: Signature, coded: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of ``signature`` as read-only views; uncoded ones point into the packed images.

    Raises
    ------
    ValueError
        If an array is missing, left over, or not exactly of the expected type and length; names it.
    """
    counts: dict[str, int] = {}
    sizes = [math.prod(shape) for _, shape, _ in signature]
    kinds = [dtype_name(dtype) for _, _, dtype in signature]
    for kind, size in zip(kinds, sizes, strict=True):
        counts[kind] = counts.get(kind, 0) + size
    if counts.keys() != packed.keys():
        raise ValueError(f"arrays {sorted(packed)} came, {sorted(counts)} were expected")
    flats = {
        name: (_decode if coded and name in _BYTES else _open_image)(name, count, packed[name])
        for name, count in counts.items()
    }
    starts = dict.fromkeys(counts, 0)
    tensors: dict[str, Tensor] = {}
    for (name, shape, _), kind, size in zip(signature, kinds, sizes, strict=True):
        start = starts[kind]
        tensors[name] = flats[kind][start : start + size].view(shape)
        starts[kind] = start + size
    return tensors


def pack_stacks(stacks: Mapping[str, Tensor]) -> dict[str, NDArray[np.uint8]]:
    """Return ``dtype name -> images`` of several clients' tensors, (clients, bytes): in each row that of one client.

    Parameters
    ----------
    stacks : mapping from name to (clients, ...)
        Concatenated in order, as :func:`pack_tensors` does.
    """
    parts: dict[str, list[NDArray[Any]]] = {}
    for stack in stacks.values():
        name, values = dtype_name(stack.dtype), stack.detach().cpu()
        values = values.view(torch.int16) if name == "bfloat16" else values
        parts.setdefault(name, []).append(values.reshape(len(values), -1).numpy())
    images = {}
    for name, found in parts.items():
        count = sum(part.shape[1] for part in found)
        header = np.frombuffer(npy_header(name, count), dtype=np.uint8)
        shape = len(found[0]), len(header) + count * _NUMPY_TYPE[name].itemsize
        place = _place(math.prod(shape))
        memory = np.empty(shape, dtype=np.uint8) if place is None else np.frombuffer(place, np.uint8).reshape(shape)
        images[name] = rows = memory
        rows[:, : len(header)] = header
        np.concatenate(found, axis=1, out=rows[:, len(header) :].view(_NUMPY_TYPE[name]))
    return images


def unpack_stacks(images: Mapping[str, NDArray[np.uint8]], signature: Signature) -> dict[str, Tensor]:
    """Return the tensors of ``signature`` of several clients, (clients, ...), as read-only views; see ``pack_stacks``.

    Raises
    ------
    ValueError
        If an array is missing, left over, or not exactly of the expected type and length; names it.
    """
    counts: dict[str, int] = {}
    for _, shape, dtype in signature:
        counts[dtype_name(dtype)] = counts.get(dtype_name(dtype), 0) + math.prod(shape)
    if counts.keys() != images.keys():
        raise ValueError(f"arrays {sorted(images)} came, {sorted(counts)} were expected")
    flats = {name: _open_images(name, count, images[name]) for name, count in counts.items()}
    starts = dict.fromkeys(counts, 0)
    tensors: dict[str, Tensor] = {}
    for name, shape, dtype in signature:
        kind, size = dtype_name(dtype), math.prod(shape)
        start = starts[kind]
        part = flats[kind][:, start : start + size]
        tensors[name] = part.view(len(part), *shape)
        starts[kind] = start + size
    return tensors


def _open_images(name: str, count: int, rows: NDArray[np.uint8]) -> Tensor:
    header = np.frombuffer(npy_header(name, count), dtype=np.uint8)
    expected = len(header) + count * _NUMPY_TYPE[name].itemsize
    if rows.shape[1] != expected or not (rows[:, : len(header)] == header).all():
        raise ValueError(f"array {name} holds {rows.shape[1]} bytes a client that are not {count} values of {name}")
    return _as_tensor(name, rows[:, len(header) :].view(_NUMPY_TYPE[name]))


def _open_image(name: str, count: int, image: memoryview | bytes) -> Tensor:
    header = npy_header(name, count)
    expected = len(header) + count * _NUMPY_TYPE[name].itemsize
    if len(image) != expected or bytes(image[: len(header)]) != header:
        raise ValueError(
            f"array {name} holds {len(image)} bytes that are not the {expected} of {count} values of {name}"
        )
    return _view(name, image, len(header))


def _code(parts: Sequence[Any]) -> bytes:
    """Return the Huffman codes of some bytes; random bytes hardly grow."""
    coder = zlib.compressobj(wbits=-zlib.MAX_WBITS, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return b"".join([*(coder.compress(part) for part in parts), coder.flush()])


def _decode(name: str, count: int, image: memoryview | bytes) -> Tensor:
    """Return the decoded bytes; output is bounded by the expected length for any input."""
    decoder = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        values = decoder.decompress(image, count + 1)
    except zlib.error as error:
        raise ValueError(f"array {name} is no Huffman code: {error}") from error
    if len(values) != count or not decoder.eof or decoder.unused_data:
        raise ValueError(f"array {name} is not the Huffman code of {count} bytes")
    return _view(name, values, 0)


def _view(name: str, image: memoryview | bytes, offset: int) -> Tensor:
    return _as_tensor(name, np.frombuffer(image, dtype=_NUMPY_TYPE[name], offset=offset))


def _as_tensor(name: str, values: NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the view is read-only; nobody writes into it
        tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor
