"""Language modelling: documents become windows of token ids; each document is the natural owner of its windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples, FederatedData
from fedlp.data.reader import HeldOut
from fedlp.data.tokenizers import encode_documents, vocabulary_size
from fedlp.errors import ConfigError, DataError
from fedlp.rng import Stream, generator


@dataclass(frozen=True, kw_only=True)
class LanguageData(HeldOut, ABC):
    """Documents for language modelling.

    Attributes
    ----------
    tokenizer : str
        "bytes", or a Hugging Face tokenizer's name or folder; "auto" is the model's own for ``model=hf``, else bytes.
    sequence_length : int
        Tokens of context per example, >= 2.
    """

    tokenizer: str = "auto"
    sequence_length: int = 128

    name: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 2:
            raise ConfigError(f"dataset.sequence_length is {self.sequence_length}; it must be at least 2")

    @abstractmethod
    def read_documents(self) -> list[str]:
        """Return the documents in a fixed order; DataError if the text is absent, unreadable or empty."""

    def describe(self) -> DataInfo:
        """Return the facts; only a Hugging Face tokenizer is loaded, for its vocabulary's size."""
        return DataInfo(
            name=self.name,
            task="causal_lm",
            input_shape=(self.sequence_length,),
            num_classes=vocabulary_size(self.tokenizer),
            num_train=None,
            num_test=None,
        )

    def load(self, seed: int) -> FederatedData:
        """Return windows of ``sequence_length + 1`` tokens, each one token into the next, cut document by document.

        No token of a test window is in a training window (see :func:`split_lengths`). A remainder of fewer than two
        tokens predicts nothing and is dropped. Documents that are wholly held out leave their number unused among the
        owners.

        Raises
        ------
        DataError
            If there are fewer than two windows, or the text cannot be read.
        """
        info = self.describe()
        tokens, lengths = encode_documents(self.read_documents(), self.tokenizer, self.name)
        stops = np.cumsum(lengths)
        starts = stops - lengths
        length, rng = self.sequence_length, generator(seed, Stream.DATA, 0)
        cuts = starts + split_lengths(lengths, length, self.test_fraction, rng)
        train = _windows(tokens, starts, cuts, length, self.max_train_examples, (seed, 1))
        test = _windows(tokens, cuts, stops, length, self.max_test_examples, (seed, 2))
        return FederatedData(info, train, test)


def count_windows(lengths: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    """Return the number of windows of stretches of ``lengths`` tokens: one per ``sequence_length`` predicted tokens."""
    return np.maximum(-((1 - lengths) // sequence_length), 0)


def split_lengths(
    lengths: NDArray[np.int64], sequence_length: int, test_fraction: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the number of leading training tokens of each document, (documents,), in [0, length].

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
