"""Clients of one shape train together: same sub-model, same trained tensors; the others train one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fedlp.data.examples import DataInfo, Examples
from fedlp.federation.client.cohort_app import attempt
from fedlp.federation.client.ordered_dropout import NestedWidth
from fedlp.federation.client.settings import ClientSettings
from fedlp.federation.wire.encoded_tensors import EncodedTensors
from fedlp.rng import Stream, generator, generators
from fedlp.tasks import task_of
from fedlp.training.schedules import Moment
from fedlp.training.stacked import train_stacked
from fedlp.training.stacked_adapters import find_adapters
from fedlp.training.stacked_chain import find_chain
from fedlp.training.stacked_cohort import Trained, Trainee, Way
from fedlp.training.stacked_pass import find_obstacle
from fedlp.training.stacked_rule import pays
from fedlp.types import TrainInstruction


@dataclass(frozen=True)
class Prepared:
    """All that the training of one client needs.

    Attributes
    ----------
    model, state
        Sub-model of the client's shape, which clients of this shape share, and its live tensors.
    values : mapping from name to Tensor
        Tensors that the client starts from.
    nested : sequence of NestedWidth
        Nested widths that steps draw from.
    frozen : frozenset of str
        Parameters that are not trained.
    masks : mapping from name to Tensor
        Factors of gradients.
    base : EncodedTensors or None
        Frozen tensors that stay encoded.
    """

    instruction: TrainInstruction
    model: nn.Module
    state: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    examples: Examples
    nested: Sequence[NestedWidth]
    frozen: frozenset[str]
    masks: Mapping[str, Tensor]
    base: EncodedTensors | None = None

    def rng(self, seed: int) -> np.random.Generator:
        """Return the generator of the client's training, from its start."""
        return generator(seed, Stream.LOCAL_TRAINING, self.instruction.server_round, self.instruction.client_id)


class CohortTrainer:
    """Trains together the clients that can."""

    def __init__(self, settings: ClientSettings, info: DataInfo) -> None:
        self._settings, self._info = settings, info
        self._ways: dict[tuple[int, frozenset[str]], tuple[nn.Module, Way]] = {}

    def train(self, cohort: Sequence[Prepared]) -> dict[int, Trained]:
        """Return the results of clients that trained together, by client id; others are absent."""
        if not self._settings.batched:
            return {}
        groups: dict[tuple[int, frozenset[str], int], list[Prepared]] = {}
        for one in cohort:
            if not one.nested and one.base is None and not one.instruction.least and self.has_plain_loss(one.examples):
                key = id(one.model), one.frozen, one.instruction.server_round
                groups.setdefault(key, []).append(one)
        found: dict[int, Trained] = {}
        for members in groups.values():
            way = self.way(members[0].model, members[0].frozen)
            if way.stacks:
                found |= self._train_group(members, way)
        return found

    def _train_group(self, members: Sequence[Prepared], way: Way) -> dict[int, Trained]:
        """Return the trained clients of a group; none where one of them breaks the stack: then each says why itself."""
        settings, first = self._settings, members[0]
        trainees = [Trainee(one.values, one.examples, one.rng(settings.seed), one.masks) for one in members]
        moment = Moment(first.instruction.server_round, settings.num_rounds)
        trained = attempt(
            lambda stack: train_stacked(first.model, stack, self._info, settings.local, first.frozen, moment, way),
            trainees,
        )
        if isinstance(trained, Exception):
            return {}
        return {one.instruction.client_id: result for one, result in zip(members, trained, strict=True)}

    def generators(self, server_round: int, client_ids: Sequence[int]) -> Iterable[np.random.Generator]:
        """Return the generators of clients' training, each from its start; see ``Cohort.rngs``."""
        seed, key = self._settings.seed, (Stream.LOCAL_TRAINING, server_round)
        if self._info.augment:
            return [generator(seed, *key, client_id) for client_id in client_ids]
        return generators(seed, *key, last=client_ids)

    def has_plain_loss(self, examples: Examples) -> bool:
        """Return whether the loss of a batch does not depend on the client's other examples."""
        task = task_of(self._info)
        return task.criterion(examples) == task.loss

    def way(self, model: nn.Module, frozen: frozenset[str]) -> Way:
        """Return how clients of a shape train, which is found once."""
        key = id(model), frozen
        if key not in self._ways:
            self._ways[key] = model, self._find_way(model, frozen)  # holding the model keeps its id from being reused
        return self._ways[key][1]

    def _find_way(self, model: nn.Module, frozen: frozenset[str]) -> Way:
        local = self._settings.local
        if self._settings.batched == "auto" and not pays(model, local.batch_size * self._info.input_shape[0]):
            return Way(stacks=False)
        if find_obstacle(model, self._info, local, frozen, pads=False):
            return Way(stacks=False)
        pads = not find_obstacle(model, self._info, local, frozen, pads=True)
        return Way(pads=pads, chain=find_chain(model), adapters=find_adapters(model, frozen))
