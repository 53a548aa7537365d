"""Entry to every data set: facts without loading, then examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples, FederatedData
from fedlp.data.own_data import Loaded, OwnData
from fedlp.data.reader import Reader
from fedlp.data.tokenizers import BYTES
from fedlp.errors import ConfigError
from fedlp.registry import lookup

if TYPE_CHECKING:
    from fedlp.config import DatasetConfig

__all__ = [
    "IGNORE_INDEX",
    "DataInfo",
    "Examples",
    "FederatedData",
    "Loaded",
    "Reader",
    "describe_dataset",
    "load_dataset",
    "make_reader",
    "tokenizer_of",
]


def make_reader(config: DatasetConfig) -> Reader:
    """Return the reader of a config; a function of a user's own is called when its data are needed.

    Raises
    ------
    ConfigError
        If the name is unknown or a value is out of range.
    """
    part = config.make()
    if isinstance(part, Reader):
        return part
    if isinstance(lookup("dataset", config.name), type):
        raise ConfigError(f"dataset={config.name} is a class without describe() and load(seed)")
    limits = {key: getattr(config, key) for key in ("max_train_examples", "max_test_examples")}
    return OwnData(source=config.name.rpartition(":")[2], make=part, **limits)


def tokenizer_of(config: DatasetConfig) -> str:
    """Return the tokenizer of a data set of text; "bytes" for any other."""
    name = config.options.get("tokenizer", "bytes")
    return "bytes" if name in BYTES else str(name)


def describe_dataset(config: DatasetConfig) -> DataInfo:
    """Return the facts that a model needs; as few examples as possible are read.

    Raises
    ------
    ConfigError
        If the name is unknown or a value is out of range.
    DataError
        If files or a tokenizer cannot be read.
    """
    return make_reader(config).describe()


def load_dataset(config: DatasetConfig, seed: int) -> FederatedData:
    """Return a data set's examples, split and truncated as ``config`` says.

    The same config and seed give the same examples in the same order. ``max_train_examples`` and
    ``max_test_examples`` keep a random subset, in the order of the whole set.

    Raises
    ------
    ConfigError
        If the name is unknown or a value is out of range.
    DataError
        If files are absent, damaged, unreadable or too few; names the place and how to get them.
    """
    return make_reader(config).load(seed)
