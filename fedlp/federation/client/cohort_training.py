"""Clients of one shape train together: same sub-model, same trained tensors; the others train one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fedlp.data.examples import DataInfo, Examples
from fedlp.federation.client.cohort_app import attempt
from fedlp.federation.client.ordered_dropout import NestedWidth
from fedlp.federation.client.settings import ClientSettings
from fedlp.rng import Stream, generator
from fedlp.tasks import task_of
from fedlp.training.schedules import Moment
from fedlp.training.stacked import Trained, Trainee, train_stacked
from fedlp.training.stacked_pass import find_obstacle
from fedlp.training.stacked_rule import pays
from fedlp.types import TrainInstruction

Ways = tuple[bool, bool]
"""Whether clients of a shape train together, and whether small batches are padded."""


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
    """

    instruction: TrainInstruction
    model: nn.Module
    state: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    examples: Examples
    nested: Sequence[NestedWidth]
    frozen: frozenset[str]
    masks: Mapping[str, Tensor]

    def rng(self, seed: int) -> np.random.Generator:
        """Return the generator of the client's training, from its start."""
        return generator(seed, Stream.LOCAL_TRAINING, self.instruction.server_round, self.instruction.client_id)


class CohortTrainer:
    """Trains together the clients that can."""

    def __init__(self, settings: ClientSettings, info: DataInfo) -> None:
        self._settings, self._info = settings, info
        self._ways: dict[tuple[int, frozenset[str]], tuple[nn.Module, Ways]] = {}

    def train(self, cohort: Sequence[Prepared]) -> dict[int, Trained]:
        """Return the results of clients that trained together, by client id; others are absent."""
        if not self._settings.batched:
            return {}
        groups: dict[tuple[int, frozenset[str], int], list[Prepared]] = {}
        for one in cohort:
            if not one.nested and self._has_plain_loss(one.examples):
                key = id(one.model), one.frozen, one.instruction.server_round
                groups.setdefault(key, []).append(one)
        found: dict[int, Trained] = {}
        for members in groups.values():
            stacks, pads = self._way(members[0])
            if stacks:
                found |= self._train_group(members, pads)
        return found

    def _train_group(self, members: Sequence[Prepared], pads: bool) -> dict[int, Trained]:
        """Return the trained clients of a group; none where one of them breaks the stack: then each says why itself."""
        settings, first = self._settings, members[0]
        trainees = [Trainee(one.values, one.examples, one.rng(settings.seed), one.masks) for one in members]
        moment = Moment(first.instruction.server_round, settings.num_rounds)
        trained = attempt(
            lambda stack: train_stacked(first.model, stack, self._info, settings.local, first.frozen, moment, pads),
            trainees,
        )
        if isinstance(trained, Exception):
            return {}
        return {one.instruction.client_id: result for one, result in zip(members, trained, strict=True)}

    def _has_plain_loss(self, examples: Examples) -> bool:
        """Return whether the loss of a batch does not depend on the client's other examples."""
        task = task_of(self._info)
        return task.criterion(examples) == task.loss

    def _way(self, one: Prepared) -> Ways:
        """Return how clients of a shape train, which is found once."""
        key = id(one.model), one.frozen
        if key not in self._ways:
            self._ways[key] = one.model, self._find_way(one)  # holding the model keeps its id from being used again
        return self._ways[key][1]

    def _find_way(self, one: Prepared) -> Ways:
        local = self._settings.local
        if self._settings.batched == "auto" and not pays(one.model):
            return False, False
        if find_obstacle(one.model, self._info, local, one.frozen, pads=False):
            return False, False
        return True, not find_obstacle(one.model, self._info, local, one.frozen, pads=True)
