"""User data: a function or class given as ``module:object``, or objects in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedlp.data.conversion import as_examples, describe_examples
from fedlp.data.examples import DataInfo, Examples, FederatedData
from fedlp.data.reader import HeldOut, held_out_rows
from fedlp.errors import ConfigError, DataError, FedLPError, one_line
from fedlp.registry import register
from fedlp.rng import Stream, generator

_TESTS = ("test", "validation", "valid")


@dataclass(frozen=True, kw_only=True)
class OwnData(HeldOut):
    """Return value of a user's function.

    Attributes
    ----------
    source : str
        Name of the function, for messages.
    make : callable
        Returns FederatedData; a pair (train, test); a mapping of ``train`` and ``test``; or training data alone, of
        which a share is held out. Data have any form of :func:`fedlp.data.conversion.as_examples`.
    """

    source: str
    make: Callable[..., Any]

    def describe(self) -> DataInfo:
        """Return the facts; calls the function."""
        made = self._made
        return made.info if isinstance(made, FederatedData) else describe_examples(self.source, made[0], made[1])

    def load(self, seed: int) -> FederatedData:
        """Return the examples; DataError if the function fails or returns no data."""
        made = self._made
        if isinstance(made, FederatedData):
            return FederatedData(made.info, *self.limit(made.train, made.test, seed))
        train, test = made
        info = describe_examples(self.source, train, test)
        if test is None:
            one_class = train.targets.ndim == 1 and not train.targets.is_floating_point()
            strata = train.targets.numpy() if one_class else np.zeros(len(train), dtype=np.int64)
            held_out = held_out_rows(strata, self.test_fraction, generator(seed, Stream.DATA, 0))
            train, test = (train.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return FederatedData(info, *self.limit(train, test, seed))

    @cached_property
    def _made(self) -> FederatedData | tuple[Examples, Examples | None]:
        from fedlp.models.torchvision_compat import ensure_operators  # torch takes seconds

        ensure_operators()  # the function may import torchvision
        try:
            made = self.make()
        except FedLPError:
            raise
        except Exception as error:
            raise DataError(f"dataset={self.source} failed: {type(error).__name__}: {one_line(error)}") from error
        if isinstance(made, FederatedData):
            return made
        train, test = _split(made)
        found = as_examples(train, what=f"{self.source} (train)")
        return found, None if test is None else as_examples(test, what=f"{self.source} (test)")


@dataclass(frozen=True)
class Loaded:
    """Reader of data in memory."""

    data: FederatedData

    def describe(self) -> DataInfo:
        """Return the facts."""
        return self.data.info

    def load(self, seed: int) -> FederatedData:
        """Return the data as they are."""
        return self.data


@register("dataset", "object")
@dataclass(frozen=True)
class InMemory:
    """Data given to ``fedlp.simulate`` as objects; a config cannot read them again."""

    def describe(self) -> DataInfo:
        """Raise ConfigError: the examples were objects of another process."""
        raise ConfigError(
            "dataset=object: the data were objects of the script that began this run; give them again there"
        )

    def load(self, seed: int) -> FederatedData:
        """Raise ConfigError."""
        raise ConfigError(
            f"dataset=object: the data of this run (seed {seed}) were objects of a script; give them again"
        )


def _split(made: Any) -> tuple[Any, Any]:
    """Return training and test data from a function's result; None if there are no test data."""
    if isinstance(made, Mapping) and "train" in made:
        return made["train"], next((made[name] for name in _TESTS if name in made), None)
    if isinstance(made, tuple) and len(made) == 2 and not _are_arrays(made):
        return made
    return made, None


def _are_arrays(pair: tuple[Any, Any]) -> bool:
    """Whether a pair is (X, y), and not (train, test)."""
    first, second = (getattr(part, "ndim", None) for part in pair)
    return first is not None and second is not None
