"""Language modelling: documents become windows of token ids; each document is the natural owner of its windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedlp.data.documents import read_documents
from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples, FederatedData
from fedlp.errors import ConfigError, DataError
from fedlp.rng import Stream, generator

if TYPE_CHECKING:
    from fedlp.config import DatasetConfig

SETS: Final = ("topics", "text", "hf")
_BYTES: Final = "bytes"
_ENCODE_BATCH: Final = 1000


def describe_language(config: DatasetConfig) -> DataInfo:
    """Return what a language model needs to know; ``num_classes`` is the vocabulary's size, 256 for bytes."""
    if config.sequence_length < 2:
        raise ConfigError(f"dataset.sequence_length is {config.sequence_length}; it must be at least 2")
    vocabulary = 256 if config.tokenizer == _BYTES else len(_load_tokenizer(config.tokenizer))
    return DataInfo(config.name, "causal_lm", (config.sequence_length,), vocabulary, None, None)


def load_language(config: DatasetConfig, seed: int) -> FederatedData:
    """Return windows of ``sequence_length + 1`` tokens, each one token into the next, cut document by document.

    No token of a test window is in a training window (see :func:`split_lengths`). A remainder of fewer than two tokens
    predicts nothing and is dropped. Documents that are wholly held out leave their number unused among the owners.

    Raises
    ------
    DataError
        If there are fewer than two windows, or the text cannot be had.
    """
    info = describe_language(config)
    tokens, lengths = _encode(read_documents(config), config)
    stops = np.cumsum(lengths)
    starts = stops - lengths
    cuts = starts + split_lengths(
        lengths, config.sequence_length, config.test_fraction, generator(seed, Stream.DATA, 0)
    )
    train = _windows(tokens, starts, cuts, config.sequence_length, config.max_train_examples, (seed, 1))
    test = _windows(tokens, cuts, stops, config.sequence_length, config.max_test_examples, (seed, 2))
    return FederatedData(info, train, test)


def count_windows(lengths: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    """Return how many windows stretches of ``lengths`` tokens make: one per ``sequence_length`` predicted tokens."""
    return np.maximum(-((1 - lengths) // sequence_length), 0)


def split_lengths(
    lengths: NDArray[np.int64], sequence_length: int, test_fraction: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return how many leading tokens of each document are for training, (documents,), in [0, length].

    The ends of documents are held out, in proportion to their windows but for the first, which every document keeps;
    numbers of windows are rounded up or down at random, so that the fraction is met on average. Where documents are too
    short for that, whole ones are held out instead, each with probability ``test_fraction``. Both parts are non-empty.

    Raises
    ------
    DataError
        If all documents together have fewer than two windows.
    """
    windows = count_windows(lengths, sequence_length)
    if windows.sum() < 2:
        raise DataError(
            f"the text has {int(lengths.sum())} tokens in {len(lengths)} documents, too few for a training and a test "
            f"window of {sequence_length}; lower dataset.sequence_length or give more text"
        )
    wanted, spare = test_fraction * windows.sum(), windows - 1
    draws = rng.random(len(windows))
    if len(windows) > 1 and spare.sum() < wanted:
        whole = draws < test_fraction
        whole[draws.argmin()], whole[draws.argmax()] = True, False
        return np.where(whole, 0, lengths)
    held_out = np.floor(spare * min(wanted / spare.sum(), 1.0) + draws).astype(np.int64)
    held_out[spare.argmax()] = max(held_out[spare.argmax()], 1)
    # The token that ends the last training window stays out of the test part, which has at least two tokens.
    return np.where(held_out == 0, lengths, np.minimum((windows - held_out) * sequence_length + 1, lengths - 2))


def _windows(
    tokens: NDArray[np.int64],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    sequence_length: int,
    limit: int | None,
    key: tuple[int, int],
) -> Examples:
    """Cut the stretches ``[starts, stops)`` of ``tokens`` into at most ``limit`` windows; one stretch per document."""
    import torch

    counts = count_windows(stops - starts, sequence_length)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    if limit is not None and limit < len(document):
        seed, part = key
        chosen = np.sort(generator(seed, Stream.DATA, part).permutation(len(document))[:limit])
        document, number = document[chosen], number[chosen]
    position = (starts[document] + number * sequence_length)[:, None] + np.arange(sequence_length + 1)
    padding = position >= stops[document][:, None]
    inputs = tokens[np.minimum(position, len(tokens) - 1, out=position)]
    inputs[padding] = IGNORE_INDEX
    return Examples(torch.from_numpy(inputs), torch.from_numpy(document), document)


def _encode(documents: list[str], config: DatasetConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all tokens in a row and each document's length; documents of fewer than two tokens are left out.

    A Hugging Face tokenizer adds the special tokens it adds to any text, such as LLaMA's at the beginning.
    """
    if config.tokenizer == _BYTES:
        parts = [np.frombuffer(document.encode(), dtype=np.uint8) for document in documents]
    else:
        tokenizer = _load_tokenizer(config.tokenizer)
        parts = []
        for begin in range(0, len(documents), _ENCODE_BATCH):
            batch = documents[begin : begin + _ENCODE_BATCH]
            encoded = tokenizer(batch, return_attention_mask=False, return_token_type_ids=False, verbose=False)
            parts.extend(np.array(ids, dtype=np.int64) for ids in encoded["input_ids"])
    parts = [part for part in parts if len(part) > 1]
    if not parts:
        raise DataError(f"{config.name}: no document has two tokens; give more text")
    return np.concatenate(parts, dtype=np.int64), np.array([len(part) for part in parts], dtype=np.int64)


def _load_tokenizer(name: str) -> Any:
    from fedlp.models.torchvision_compat import import_torchvision

    import_torchvision()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library lets anything through, from OSError to its hub client's own errors
        reason = " ".join(str(error).split())
        raise DataError(f"cannot load dataset.tokenizer={name} ({reason}); give 'bytes', a folder or a name") from error
