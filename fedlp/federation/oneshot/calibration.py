"""Calibration examples of the clients of one process, the same every time; in a search divided into shares."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlp.data.datasets import DataInfo
from fedlp.data.examples import Examples
from fedlp.errors import DataError
from fedlp.federation.oneshot.settings import OneShotSettings, Share
from fedlp.pruning.calibration import Calibration
from fedlp.rng import Stream, generator, torch_seed
from fedlp.training.calibration_data import batch_calibration, whole_examples

_MOST_DRAWN = 48  # shares that one process remembers
_PARTIAL = 4  # one batch in so many of the fitness examples is its part


class ClientExamples:
    """Calibration examples of clients.

    Parameters
    ----------
    examples_of : callable
        Returns the training examples of a client.
    forget : callable
        Told of a client whose examples are no longer remembered.
    """

    def __init__(
        self,
        settings: OneShotSettings,
        info: DataInfo,
        examples_of: Callable[[int], Examples],
        device: torch.device,
        forget: Callable[[int], None],
    ) -> None:
        self._settings, self._info, self._examples_of = settings, info, examples_of
        self._device, self._forget = device, forget
        self._drawn: OrderedDict[tuple[int, Share], Calibration] = OrderedDict()

    def of(self, client_id: int, share: Share = Share.STATISTICS) -> Calibration:
        """Return a client's examples of a share that is no part of another one."""
        key = client_id, share
        if key not in self._drawn:
            self._drawn[key] = self._draw(client_id, share)
        self._drawn.move_to_end(key)
        while len(self._drawn) > _MOST_DRAWN:
            self._forget(self._drawn.popitem(last=False)[0][0])
        return self._drawn[key]

    def batches(self, client_id: int, share: Share) -> Sequence[Tensor]:
        """Return a client's batches of a share."""
        if share != Share.PART:
            return self.of(client_id, share).batches
        batches = self.of(client_id, Share.FITNESS).batches
        return batches[: max(1, len(batches) // _PARTIAL)]

    def _draw(self, client_id: int, share: Share) -> Calibration:
        """Return some of a client's examples, or all where it has fewer."""
        whole = whole_examples(self._examples_of(client_id), self._info)
        if not len(whole):
            raise DataError(f"client {client_id} has no window without padding; lower dataset.sequence_length")
        seed, wanted = self._settings.seed, self._settings
        statistics, fitness, held_out = wanted.divide(len(whole))
        start = {Share.STATISTICS: 0, Share.FITNESS: statistics, Share.HELD_OUT: statistics + fitness}[share]
        count = {Share.STATISTICS: statistics, Share.FITNESS: fitness, Share.HELD_OUT: held_out}[share]
        order = generator(seed, Stream.CALIBRATION, 2, client_id).permutation(len(whole))
        own_seed = torch_seed(seed, Stream.CALIBRATION, 3, client_id)
        chosen = whole.select(order[start : start + count])
        return batch_calibration(chosen, self._info, wanted.batch_size, own_seed, self._device)
