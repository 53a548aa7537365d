"""Floating-point format of stored weights."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # bytes, as safetensors itself allows


def stored_dtype(path: Path) -> torch.dtype | None:
    """Return the floating-point format of most weights of a safetensors file, or of all such files of a folder.

    None if there is no readable file; loading the weights then reports the fault.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    sizes: Counter[torch.dtype] = Counter()
    for file in files:
        for entry in _entries(file):
            dtype = _DTYPES.get(str(entry.get("dtype")))
            if dtype is not None:
                sizes[dtype] += math.prod(entry["shape"])
    return sizes.most_common(1)[0][0] if sizes else None


def model_dtype(path: str | None, config: Any) -> torch.dtype:
    """Return the format of a transformers model: that of a local folder's weights, else that of its config."""
    if path is None:
        return torch.float32
    said = getattr(config, "dtype", None)
    return stored_dtype(Path(path).expanduser()) or (said if isinstance(said, torch.dtype) else torch.float32)


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """Yield dtype and shape of every tensor from a file's header: its length in 8 bytes, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, _MAX_HEADER)))
        yield from (entry for name, entry in header.items() if name != "__metadata__")
    except (OSError, struct.error, ValueError, AttributeError):
        return
