"""Default tokenizer: the model's own; bytes for a model without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from fedlp.config.schema import DatasetConfig, ModelConfig

AUTO, BYTES = "auto", "bytes"
_FILES = ("tokenizer*", "vocab.*", "spiece.model")
_NUM_BYTES = 256


def with_tokenizer(dataset: DatasetConfig, model: ModelConfig) -> DatasetConfig:
    """Return a data set config with ``tokenizer`` "auto" resolved.

    A model of Hugging Face uses its own tokenizer. A local folder without a tokenizer and with a vocabulary of 256
    reads bytes, as does any other model.
    """
    if dataset.options.get("tokenizer") != AUTO:
        return dataset
    path = model.options.get("path") if model.source == "hf" else None
    reads_bytes = not isinstance(path, str) or _is_byte_model(Path(path).expanduser())
    return replace(dataset, options=dataset.options | {"tokenizer": BYTES if reads_bytes else path})


def _is_byte_model(folder: Path) -> bool:
    """Return whether a folder holds a model of 256 tokens and no tokenizer."""
    if not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in _FILES):
        return False
    try:
        sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what loads the model says what is wrong
        return True
    return isinstance(sizes, dict) and sizes.get("vocab_size") == _NUM_BYTES
