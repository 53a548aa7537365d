"""ClientApp of a federation in worker processes: inherited by forked ones, made again in spawned ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedlp import registry
from fedlp.config import RunConfig, TrackerConfig, to_plain
from fedlp.data.examples import DataInfo, Examples, FederatedData
from fedlp.federation.client.app import make_client_app
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.models.blueprint import Blueprint
from fedlp.simulation.flower_apps import settings_of


class Source(Protocol):
    """Federation that clients of this machine belong to."""

    config: RunConfig
    own_blueprint: Blueprint | None

    @property
    def parts(self) -> Sequence[NDArray[np.int64]]:
        """Indices of each client's training examples."""

    def data_for_workers(self) -> FederatedData | None:
        """Return the data to hand over."""

    def runtime(self, state_dir: str) -> ClientRuntime:
        """Return the runtime of a client process."""


class AppOf:
    """Maker of the ClientApp of a federation.

    It pickles as what makes an equal federation in another process: config, the user's model, parts by name, data as
    arrays, and the indices of each client.
    """

    def __init__(self, federation: Source) -> None:
        self._federation = federation

    def __call__(self) -> Any:
        """Return the app, a Flower ClientApp."""
        return make_client_app(lambda cfg, state_dir, own=None: self._federation.runtime(state_dir), settings_of)

    def __reduce__(self) -> tuple[Callable[..., AppOf], tuple[Any, ...]]:
        federation, data = self._federation, self._federation.data_for_workers()
        config = replace(federation.config, callbacks=[], tracker=TrackerConfig())  # which stay with the server
        return _make_again, (
            registry.own_parts(_texts(to_plain(config))),
            type(federation),
            config,
            federation.own_blueprint,
            None if data is None else (data.info, _Arrays.of(data.train), _Arrays.of(data.test)),
            np.concatenate(federation.parts),
            [len(part) for part in federation.parts],
            bool(logging.getLogger("fedlp").handlers),
        )


@dataclass(frozen=True)
class _Arrays:
    """Examples as arrays, which travel in shared memory."""

    inputs: NDArray[Any]
    targets: NDArray[Any]
    groups: NDArray[np.int64] | None

    @classmethod
    def of(cls, examples: Examples) -> _Arrays:
        """Return the arrays of examples; those of files are read."""
        inputs, targets = examples.rows(0, len(examples))
        return cls(inputs.contiguous().numpy(), targets.contiguous().numpy(), examples.groups)

    def examples(self) -> Examples:
        """Return the examples, without a copy."""
        return Examples(torch.from_numpy(self.inputs), torch.from_numpy(self.targets), self.groups)


def _make_again(
    own: Sequence[tuple[str, str, Callable[..., Any]]],
    make: Callable[..., Source],
    config: RunConfig,
    blueprint: Blueprint | None,
    data: tuple[DataInfo, _Arrays, _Arrays] | None,
    indices: NDArray[np.int64],
    lengths: Sequence[int],
    has_handlers: bool,
) -> AppOf:
    for kind, name, part in own:
        registry.register(kind, name)(part)
    held = None if data is None else FederatedData(data[0], data[1].examples(), data[2].examples())
    log = logging.getLogger("fedlp")
    log.disabled = True  # the parent has said it
    parts = np.split(indices, np.cumsum(lengths)[:-1])
    app = AppOf(make(config, blueprint=blueprint, data=held, parts=parts))
    log.disabled = False
    if has_handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fedlp: %(message)s"))
        log.handlers, log.propagate = [handler], False
    return app


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a plain config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
