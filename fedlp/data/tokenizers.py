"""Tokenizers: bytes, or one of Hugging Face."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import DataError

BYTES: Final = ("bytes", "auto")
"""Names of the tokenizer that takes every byte for a token; "auto" where no model is known that has one."""

_ENCODE_BATCH: Final = 1000


def vocabulary_size(tokenizer: str) -> int:
    """Return the number of tokens, 256 for bytes; DataError if the tokenizer cannot be loaded."""
    return 256 if tokenizer in BYTES else len(load_tokenizer(tokenizer))


def encode_texts(texts: list[str], tokenizer: str, longest: int | None = None) -> list[NDArray[Any]]:
    """Return the token ids of each text, cut to ``longest`` where that is given.

    A Hugging Face tokenizer adds the special tokens it adds to any text, such as LLaMA's at the beginning and BERT's at
    both ends, which truncation keeps.
    """
    if tokenizer in BYTES:
        return [np.frombuffer(text.encode(), dtype=np.uint8)[:longest] for text in texts]
    encode = load_tokenizer(tokenizer)
    limits = {} if longest is None else {"truncation": True, "max_length": longest}
    parts: list[NDArray[Any]] = []
    for begin in range(0, len(texts), _ENCODE_BATCH):
        batch = texts[begin : begin + _ENCODE_BATCH]
        encoded = encode(batch, return_attention_mask=False, return_token_type_ids=False, verbose=False, **limits)
        parts.extend(np.array(ids, dtype=np.int64) for ids in encoded["input_ids"])
    return parts


def encode_documents(documents: list[str], tokenizer: str, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all tokens in a row and each document's length; documents of fewer than two tokens are left out."""
    parts = [part for part in encode_texts(documents, tokenizer) if len(part) > 1]
    if not parts:
        raise DataError(f"{name}: no document has two tokens; give more text")
    return np.concatenate(parts, dtype=np.int64), np.array([len(part) for part in parts], dtype=np.int64)


def load_tokenizer(name: str) -> Any:
    """Return a tokenizer by name or folder; DataError if it cannot be loaded."""
    from fedlp.models.torchvision_compat import import_torchvision

    import_torchvision()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library lets anything through, from OSError to its hub client's own errors
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot load dataset.tokenizer={name} ({reason}); give the model's own tokenizer, a folder or a name, or "
            "'bytes' for a model that was trained on bytes"
        ) from error
