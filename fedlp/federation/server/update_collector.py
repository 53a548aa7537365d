"""Receipt of a round's updates: each reply is checked, its cost recorded, its values added to the average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message
from torch import Tensor

from fedlp.errors import FedLPError, ProtocolError
from fedlp.federation.aggregation.aggregator import Aggregator
from fedlp.federation.aggregation.norm_bounds import MIN_HOLDERS, lower_median
from fedlp.federation.costs import Costs
from fedlp.federation.server.exchange import kind_of, reason_of
from fedlp.federation.server.roster import Roster
from fedlp.federation.server.round_record import RoundUnderWay, Tally
from fedlp.federation.server.round_settings import RoundSettings
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.encodings import Encoding
from fedlp.types import Assignment, ClientCost, ClientReport, ClientUpdate, SubModel

Sent = Callable[[Assignment, ClientUpdate], Mapping[str, Tensor]]
"""Returns the values that a client received of the units that it returns."""


@dataclass(frozen=True, slots=True)
class UpdateCollector:
    """Receiver of one round's updates.

    Attributes
    ----------
    record : RoundUnderWay
        Record of the round, which gets the costs.
    fail : callable
        Counts a failed client: client id, reason and error.
    most_examples : float
        Largest number of examples that counts as a weight.
    shows_losses : bool
        Whether training losses are recorded.
    """

    submodels: SubModels
    settings: RoundSettings
    costs: Costs
    encoding: Encoding
    roster: Roster
    record: RoundUnderWay
    tally: Tally
    fail: Callable[[int, str, FedLPError], None]
    most_examples: float = math.inf
    shows_losses: bool = True

    def collect(self, instruction: Assignment, bytes_down: int, reply: Message) -> None:
        """Receive the reply of one client and count in its update."""
        if (update := self.receive(instruction, bytes_down, reply)) is not None:
            self.add(instruction, update, update.params)

    def receive(
        self, instruction: Assignment, bytes_down: int, reply: Message, sent: Sent | None = None
    ) -> ClientUpdate | None:
        """Return the update of a reply, or None after counting the failure; either way its cost is recorded.

        Parameters
        ----------
        sent : callable, optional
            Returns the values from which a stale update's differences are.
        """
        client_id = instruction.client_id
        update: ClientUpdate | None = None
        bytes_up = messages.count_bytes(reply.content) if reply.has_content() else 0
        try:
            if reply.has_error():
                raise FedLPError(reason_of(reply))
            profile, coded = self.roster.profile(client_id), self.settings.entropy_coding
            decoded = messages.decode_update(reply.content, instruction, profile, self.submodels, self.encoding, coded)
            before = None if sent is None else sent(instruction, decoded)
            self.tally.guard.admit(decoded, self._returned(instruction, decoded).keeps, before)
            update = decoded
        except FedLPError as error:
            rejected = isinstance(error, ProtocolError)
            self.fail(client_id, "rejected" if rejected else kind_of(reply.error), error)
        self.spend(instruction, bytes_down, bytes_up, update)
        return update

    def add(self, instruction: Assignment, update: ClientUpdate, values: Mapping[str, Tensor]) -> None:
        """Count in an update; ``values`` are averaged in place of its own."""
        keeps, weight = self._returned(instruction, update).keeps, self.weight(update.num_examples, instruction)
        self.tally.average.add(values, keeps, weight)
        self.note(instruction, update.report())

    def note(self, instruction: Assignment, report: ClientReport) -> None:
        """Note the client of an update that is counted in, its answer and its training loss."""
        self.tally.answers.append((instruction, report))
        self.tally.arrived.append(instruction.client_id)
        if "train-loss" in report.metrics and self.shows_losses:
            self.tally.losses.append((report.metrics["train-loss"], report.num_examples))

    def spend(self, instruction: Assignment, bytes_down: int, bytes_up: int, update: ClientReport | None) -> None:
        """Record the cost of a client, whose update is None if it was not used."""
        examples = update.num_examples if update else 0
        returned = self._returned(instruction, update).num_params(instruction.uploads) if update else 0
        self.record.costs.append(
            ClientCost(
                client_id=instruction.client_id,
                num_examples=examples,
                bytes_down=bytes_down,
                bytes_up=bytes_up,
                params_down=self.submodels.layout(instruction.submodel).num_params(),
                params_up=returned,
                macs=self.training_macs(instruction, examples)
                + (update.metrics.get("pruning-macs", 0.0) if update else 0.0),
                train_loss=update.metrics.get("train-loss") if update and self.shows_losses else None,
            )
        )

    def training_macs(self, instruction: Assignment, num_examples: int) -> float:
        """Return the multiply-accumulates of a client's training."""
        return self.costs.macs(instruction.submodel).training * num_examples * self.settings.local_epochs

    def weight(self, num_examples: int, instruction: Assignment) -> float:
        """Return the weight of an update in the average."""
        examples = min(float(num_examples), self.most_examples)
        match self.settings.weighting:
            case "examples":
                return examples
            case "held":
                held = self.submodels.layout(instruction.submodel).num_params()
                return examples * held / self.submodels.spec.num_params
            case _:
                return 1.0

    def _returned(self, instruction: Assignment, update: ClientReport) -> SubModelLayout:
        """Return the layout of the units that a client returns."""
        return self.submodels.layout(SubModel(instruction.submodel.depth, update.widths))


def most_examples(aggregator: Aggregator, cohort: Sequence[int], roster: Roster) -> float:
    """Return the largest number of examples that counts: a multiple of the median of the cohort's profiles."""
    multiple: float | None = getattr(aggregator, "max_examples", None)
    if multiple is None or len(cohort) < MIN_HOLDERS:
        return math.inf
    return multiple * lower_median([roster.profile(client_id).num_examples for client_id in cohort])
