"""Devices' own data: read by the run's reader at another path, checked against the facts of the config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedlp import registry
from fedlp.data.datasets import make_reader
from fedlp.data.examples import DataInfo, Examples, concatenate
from fedlp.data.reader import Reader
from fedlp.errors import ConfigError, DataError, FedLPError, one_line

if TYPE_CHECKING:
    from fedlp.config import DatasetConfig

_PLACES = ("path", "root")


@dataclass(frozen=True)
class OwnPlace:
    """Location of a device's examples.

    Attributes
    ----------
    client_id : int
        Client id of the device.
    path : str
        File or folder in the format of the run's ``dataset``.
    """

    client_id: int
    path: str


def reader_at(config: DatasetConfig, place: str | None) -> Reader:
    """Return the reader of a config at another file or folder; None for facts of the config alone.

    Raises
    ------
    ConfigError
        If the data set has no option for a path.
    """
    known = registry.options("dataset", config.target)
    option = next((name for name in _PLACES if name in known), None)
    if option is None:
        raise ConfigError(
            f"dataset={config.name} reads no file or folder, so that devices cannot bring their own; choose "
            "imagefolder, csv, parquet, arrays, hf or text, or a reader of your own with an option path"
        )
    moved = {option: place} | ({"test_path": None} if "test_path" in known else {})
    return make_reader(replace(config, options={**config.options, **moved}))


def describe_for_devices(config: DatasetConfig) -> DataInfo:
    """Return the facts of the config alone, equal on all devices and on the server.

    Raises
    ------
    ConfigError
        If facts depend on data: classes not listed, columns not named.
    """
    try:
        return reader_at(config, None).describe()
    except FedLPError as error:
        if isinstance(error, ConfigError) and "devices" in str(error):
            raise
        raise ConfigError(
            "dataset.on_devices=true takes classes, columns, tokenizer and normalisation from the config, so they must "
            f"be there; fedlp describe writes them from a sample ({error})"
        ) from error


def load_at(config: DatasetConfig, place: str, info: DataInfo, seed: int) -> Examples:
    """Return all examples of a file or folder: training and test parts of the reader together.

    Parameters
    ----------
    info : DataInfo
        Facts that they must fit.

    Raises
    ------
    DataError
        If the place is absent, empty or unreadable, holds an unknown label, or examples of another kind; names it.
    """
    try:
        data = reader_at(config, place).load(seed)
    except OSError as error:
        raise DataError(f"{place} cannot be read ({one_line(error)})") from error
    found = data.info
    for name in ("input_shape", "num_classes", "labels", "vocabulary"):
        if getattr(found, name) != getattr(info, name):
            raise DataError(
                f"{place} does not fit the run: its {name.replace('_', ' ')} is {getattr(found, name)}, the config's "
                f"{getattr(info, name)}"
            )
    return concatenate(data.train, data.test)


def facts_of(config: DatasetConfig) -> dict[str, Any]:
    """Return the options by which devices and a server without data know the facts that a sample's reader finds.

    Raises
    ------
    ConfigError
        If devices cannot bring data of this kind, or the options do not describe the sample.
    DataError
        If the sample cannot be read.
    """
    reader = make_reader(config)
    facts: dict[str, Any] = dict(getattr(reader, "facts", dict)())
    described = describe_for_devices(replace(config, options={**config.options, **facts}))
    found = reader.describe()
    for name in ("input_shape", "num_classes", "vocabulary"):
        if getattr(described, name) != getattr(found, name):
            raise ConfigError(
                f"the options of dataset={config.name} do not describe the sample: its {name.replace('_', ' ')} is "
                f"{getattr(found, name)}, theirs {getattr(described, name)}"
            )
    return facts
