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


def pair_separator(tokenizer: str) -> int | None:
    """Return the token that ends the first of two texts; None where the model of a tokenizer reads no token types.

    Raises
    ------
    DataError
        If the tokenizer does not join two texts, or its token types are not 0 up to that token and 1 after it.
    """
    if tokenizer in BYTES:
        raise DataError("dataset.text_pair_column needs dataset.tokenizer: a tokenizer that joins two texts")
    found = load_tokenizer(tokenizer)
    pair = found("one", "two", return_token_type_ids=True)
    if "token_type_ids" not in found.model_input_names or not any(pair["token_type_ids"]):
        return None
    tokens, types = np.array(pair["input_ids"]), np.array(pair["token_type_ids"])
    separator = int(tokens[types.argmax() - 1])
    if not np.array_equal(types, token_types(tokens, separator)):
        raise DataError(f"the token types of dataset.tokenizer={tokenizer} are not 0 for one text and 1 for the other")
    return separator


def token_types(tokens: Any, separator: int) -> Any:
    """Return 0 for each token up to the first separator and 1 for those after it, (..., tokens), array or tensor."""
    ends = (tokens == separator) * 1
    return (ends.cumsum(-1) - ends > 0) * 1


def encode_texts(
    texts: list[str], tokenizer: str, longest: int | None = None, pairs: list[str] | None = None
) -> list[NDArray[Any]]:
    """Return the token ids of each text, cut to ``longest`` where that is given.

    With ``pairs`` each text is joined with another one as the tokenizer does it, and the longer of them is cut.

    A Hugging Face tokenizer adds the special tokens it adds to any text, such as LLaMA's at the beginning and BERT's at
    both ends, which truncation keeps.
    """
    if tokenizer in BYTES:
        return [np.frombuffer(text.encode(), dtype=np.uint8)[:longest] for text in texts]
    encode = load_tokenizer(tokenizer)
    limits = {} if longest is None else {"truncation": True, "max_length": longest}
    parts: list[NDArray[Any]] = []
    for begin in range(0, len(texts), _ENCODE_BATCH):
        chosen = slice(begin, begin + _ENCODE_BATCH)
        others = {} if pairs is None else {"text_pair": pairs[chosen]}
        encoded = encode(
            texts[chosen], **others, return_attention_mask=False, return_token_type_ids=False, verbose=False, **limits
        )
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
