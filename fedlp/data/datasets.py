"""One door to every data set: what it is, without loading it, and its examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlp.data import text, vision
from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples, FederatedData
from fedlp.errors import ConfigError

if TYPE_CHECKING:
    from fedlp.config import DatasetConfig

__all__ = ["IGNORE_INDEX", "DataInfo", "Examples", "FederatedData", "describe_dataset", "load_dataset"]


def describe_dataset(config: DatasetConfig) -> DataInfo:
    """Return what a model needs to know of a data set; reads no examples.

    Only a Hugging Face tokenizer is loaded, for its vocabulary's size.

    Raises
    ------
    ConfigError
        If the name is unknown or a value is out of range.
    DataError
        If the tokenizer cannot be loaded.
    """
    _check(config)
    return vision.describe_vision(config) if config.name in vision.SETS else text.describe_language(config)


def load_dataset(config: DatasetConfig, seed: int) -> FederatedData:
    """Return a data set's examples, split and truncated as ``config`` says.

    The same config and seed give the same examples in the same order. ``max_train_examples`` and
    ``max_test_examples`` keep a random subset, in the order of the whole set.

    Raises
    ------
    ConfigError
        If the name is unknown or a value is out of range.
    DataError
        If files are absent, damaged, unreadable or too few; says where it looked and how to get them.
    """
    _check(config)
    return vision.load_vision(config, seed) if config.name in vision.SETS else text.load_language(config, seed)


def _check(config: DatasetConfig) -> None:
    names = (*vision.SETS, *text.SETS)
    if config.name not in names:
        raise ConfigError(f"dataset.name is {config.name!r}; choose one of {', '.join(names)}")
    if not 0 < config.test_fraction < 1:
        raise ConfigError(f"dataset.test_fraction is {config.test_fraction}; it must be in (0, 1)")
    if config.augment and config.name in text.SETS:
        raise ConfigError(f"dataset.augment is for images; dataset.name is {config.name!r}, so leave it false")
    for key in ("max_train_examples", "max_test_examples"):
        limit = getattr(config, key)
        if limit is not None and limit < 1:
            raise ConfigError(f"dataset.{key} is {limit}; it must be at least 1, or null for all")
