"""A federation as JSON values and arrays, from which another process of this machine builds an equal one.

::

    {"config": YAML, "own": [[kind, name, "module:qualname"], ...], "info": {...} or null, "logs": bool}

``info`` holds the facts of data that are handed over, whose arrays are ``train.inputs``, ``train.targets``,
``train.groups``, and so on; null where the process reads the data of the config itself. ``parts.indices`` and
``parts.lengths`` are the clients' examples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedlp import registry
from fedlp.config import RunConfig, TrackerConfig, from_yaml, to_plain, to_yaml
from fedlp.data.examples import DataInfo, Examples, FederatedData
from fedlp.errors import DataError, FedLPError
from fedlp.models.blueprint import Blueprint
from fedlp.simulation.named import find_named, name_of

Arrays = Mapping[str, NDArray[Any]]

_FIELDS = {"config", "own", "info", "logs"}
_TUPLES = ("input_shape", "mean", "std", "labels")  # fields of DataInfo


class Source(Protocol):
    """Federation that clients of this machine belong to."""

    config: RunConfig
    own_blueprint: Blueprint | None

    @property
    def parts(self) -> Sequence[NDArray[np.int64]]:
        """Indices of each client's training examples."""

    def data_for_workers(self) -> FederatedData | None:
        """Return the data to hand over."""


@dataclass(frozen=True)
class Packed:
    """Description of a federation, from which another process builds an equal one.

    Attributes
    ----------
    data : FederatedData or None
        Examples as views of arrays; None if the config's are read.
    parts : list of (n_k,) int64
        Indices of each client's training examples.
    """

    config: RunConfig
    data: FederatedData | None
    parts: list[NDArray[np.int64]]


def find_obstacle(federation: Source) -> str | None:
    """Return why no other process can build an equal federation, and what to do; None if one can."""
    if federation.own_blueprint is not None:
        return (
            f"the model is an object ({federation.own_blueprint.name}), which another process cannot build; give "
            'model="module:name", or a function or class of the top level of a module or script that makes it'
        )
    data = federation.data_for_workers()
    if data is not None and not isinstance(data.info.task, str):
        return f"the task of the data set {data.info.name} is an object; give the name of a registered task"
    for kind, name, part in _own_parts(federation.config):
        if name_of(part) is None:
            return (
                f"{kind} {name} cannot be imported by another process; define it as a function or class at the top "
                "level of a module or script"
            )
    return None


def pack(federation: Source) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return JSON values and arrays of a federation without obstacle; arrays of tensors are not copied."""
    config, data = federation.config, federation.data_for_workers()
    config = replace(config, callbacks=[], tracker=TrackerConfig(), resume=None)  # which stay with the server
    about = {
        "config": to_yaml(config),
        "own": [(kind, name, name_of(part)) for kind, name, part in _own_parts(config)],
        "info": None if data is None else asdict(data.info),
        "logs": bool(logging.getLogger("fedlp").handlers),
    }
    arrays = {
        "parts.indices": np.concatenate(federation.parts).astype(np.int64, copy=False),
        "parts.lengths": np.array([len(part) for part in federation.parts], dtype=np.int64),
    }
    if data is not None:
        for name, examples in (("train", data.train), ("test", data.test)):
            arrays |= {f"{name}.{key}": array for key, array in _arrays_of(examples).items()}
    return about, arrays


def unpack(about: Mapping[str, Any], arrays: Arrays) -> Packed:
    """Return the arguments of :func:`pack`; the user's own parts are imported by name and registered.

    Raises
    ------
    FedLPError
        If a value has the wrong form, or a part cannot be imported.
    """
    if about.keys() != _FIELDS or not isinstance(about["config"], str) or not isinstance(about["own"], list):
        raise _wrong("its fields are not config, own, info and logs")
    for entry in about["own"]:
        if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(text, str) for text in entry):
            raise _wrong("a part of one's own is not given as kind, name and module:qualname")
        kind, name, path = entry
        registry.register(kind, name)(find_named(path))
    config = from_yaml(about["config"])
    data = None
    if about["info"] is not None:
        data = FederatedData(_read_info(about["info"]), _examples(arrays, "train"), _examples(arrays, "test"))
    parts = _read_parts(arrays, None if data is None else len(data.train))
    if len(parts) != config.num_clients:
        raise _wrong(f"it divides the data among {len(parts)} clients, not {config.num_clients}")
    return Packed(config, data, parts)


# ---- parts of one's own
def _own_parts(config: RunConfig) -> list[tuple[str, str, Any]]:
    """Return the user's own parts of a config but for callbacks and trackers, which stay with the server."""
    config = replace(config, callbacks=[], tracker=TrackerConfig())
    found = registry.own_parts(_texts(to_plain(config)))
    return [one for one in found if one[0] not in ("callback", "tracker")]  # of the same name as another part


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a plain config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


# ---- data
def _arrays_of(examples: Examples) -> dict[str, NDArray[Any]]:
    """Return the arrays of examples; those of files are read."""
    inputs, targets = examples.rows(0, len(examples))
    found = {"inputs": inputs.contiguous().numpy(), "targets": targets.contiguous().numpy()}
    return found if examples.groups is None else {**found, "groups": examples.groups.astype(np.int64, copy=False)}


def _examples(arrays: Arrays, name: str) -> Examples:
    """Return examples, without a copy."""
    inputs, targets, groups = (arrays.get(f"{name}.{key}") for key in ("inputs", "targets", "groups"))
    if inputs is None or targets is None or not inputs.ndim or len(inputs) != len(targets):
        raise _wrong(f"the {name} examples lack inputs or targets, or have different numbers of them")
    if groups is not None and (groups.dtype != np.int64 or groups.shape != (len(inputs),)):
        raise _wrong(f"the {name} examples' groups are not one int64 each")
    return Examples(torch.from_numpy(inputs), torch.from_numpy(targets), groups)


def _read_parts(arrays: Arrays, count: int | None) -> list[NDArray[np.int64]]:
    """Return the indices of each client's examples, of ``count`` in all."""
    indices, lengths = arrays.get("parts.indices"), arrays.get("parts.lengths")
    if indices is None or lengths is None or any(x.dtype != np.int64 or x.ndim != 1 for x in (indices, lengths)):
        raise _wrong("clients' indices are not given as vectors of int64")
    if (lengths < 0).any() or lengths.sum() != len(indices):
        raise _wrong("clients' indices do not add up")
    if len(indices) and (indices.min() < 0 or (count is not None and indices.max() >= count)):
        raise _wrong(f"an index of a client is not below the {count} examples")
    return np.split(indices, np.cumsum(lengths)[:-1])


def _read_info(node: Any) -> DataInfo:
    """Return the facts of a data set."""
    if not isinstance(node, dict) or node.keys() != {f.name for f in fields(DataInfo)}:
        raise _wrong("the facts of the data have other fields than a DataInfo")
    node = {key: tuple(value) if key in _TUPLES and isinstance(value, list) else value for key, value in node.items()}
    kinds = {f.name: _KINDS[str(f.type)] for f in fields(DataInfo)}
    for key, value in node.items():
        if not kinds[key](value):
            raise _wrong(f"{key} of the data is {str(value)[:40]!r}")
    return DataInfo(**node)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "Any": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": _is_count,
    "int | None": lambda value: value is None or _is_count(value),
    "tuple[int, ...]": lambda value: isinstance(value, tuple) and all(map(_is_count, value)),
    "tuple[float, ...]": lambda value: isinstance(value, tuple) and all(type(x) in (int, float) for x in value),
    "tuple[str, ...]": lambda value: isinstance(value, tuple) and all(isinstance(x, str) for x in value),
}


def _wrong(what: str) -> FedLPError:
    return DataError(f"what this process was handed of the federation cannot be read: {what}; start the run again")
