"""State of a run on the server, and its parts, which all verbs of the strategy read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedlp.errors import FedLPError
from fedlp.federation.aggregation.aggregator import Aggregator, CoverageAverageRule
from fedlp.federation.aggregation.server_optimizer import PlainAverage, ServerOptimizer
from fedlp.federation.costs import Costs
from fedlp.federation.server.central_privacy import CentralPrivacy
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.client_evaluation import ClientEvaluationSettings, ClientEvaluator
from fedlp.federation.server.device_budgets import DeviceBudgets
from fedlp.federation.server.frozen_tensors import EncodedDownlink
from fedlp.federation.server.roster import Roster
from fedlp.federation.server.round_record import RoundUnderWay
from fedlp.federation.server.round_settings import RoundSettings
from fedlp.federation.server.server_step import ServerStep
from fedlp.federation.strategies.policy import Policy, offset_of
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.downloads import Download
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.tasks import Sums
from fedlp.types import Budget, ClientFailure, RoundRecord, SubModel

log = logging.getLogger("fedlp")

Evaluate = Callable[[Mapping[str, Tensor], int, int, SubModel], Sums]
"""Sums of a sub-model's metrics over test examples [start, stop)."""

Observer = Callable[[RoundRecord, ServerState], object]
"""Called with every finished round, and the state of its checkpoint; True ends the run."""

Ledger = Callable[[int, Sequence[int]], Mapping[str, float]]
"""Returns what is on record of privacy after a round, from its number and its cohort."""


class ClientCalibration(Protocol):
    """Asks clients for calibration sums between rounds, and counts their costs."""

    def connect(self, grid: Grid, roster: Roster) -> None:
        """Take the clients to ask."""

    def spent(self) -> list[RoundRecord]:
        """Return records with costs and failures since the last call."""


class StrategyState(Strategy):
    """State of a run; see ``FedLPStrategy`` for its parameters."""

    def __init__(
        self,
        submodels: SubModels,
        policy: Policy,
        settings: RoundSettings,
        *,
        encoding: Encoding | None = None,
        download: Download | None = None,
        aggregator: Aggregator | None = None,
        server_optimizer: ServerOptimizer | None = None,
        evaluate: Evaluate | None = None,
        num_test: int = 0,
        client_evaluation: ClientEvaluationSettings | None = None,
        tiers: Mapping[int, str] | None = None,
        fit: Callable[[Mapping[int, Budget]], Policy] | None = None,
        takes_part: Callable[[int], bool] = lambda client_id: True,
        calibration: ClientCalibration | None = None,
        central_privacy: CentralPrivacy | None = None,
        ledger: Ledger | None = None,
        observers: Iterable[Observer] = (),
        state: ServerState | None = None,
    ) -> None:
        self.submodels, self.policy, self.settings, self.state = submodels, policy, settings, state
        self._costs = Costs(submodels)
        self._encoding: Encoding = encoding or Float32()
        self._downlink = EncodedDownlink(submodels, download or Download(), settings.seed)
        self._server = ServerStep(
            submodels.spec,
            aggregator or CoverageAverageRule(),
            server_optimizer or PlainAverage(),
            sends_weights=not settings.sends_deltas,
            private=central_privacy,
        )
        self._evaluate, self._num_test = evaluate, num_test if evaluate is not None else 0
        self._clients = ClientEvaluator(submodels, client_evaluation) if client_evaluation else None
        self._tiers = tiers or {}
        self._takes_part, self._observers = takes_part, tuple(observers)
        self._calibration = calibration
        self._private, self._ledger = central_privacy, ledger
        self._roster = Roster(settings.num_clients, settings.min_clients)
        self._budgets = DeviceBudgets(self._roster, fit)
        self._round = RoundUnderWay(0, ())
        self._found: tuple[Sequence[int], Policy, Sequence[int]] = (), policy, ()  # present, policy, candidates
        self._evaluated, self._like = SubModel(), 0  # the sub-model that is evaluated, and a client that holds it
        self._evaluates_sent = False  # whether the whole model is evaluated as clients receive it

    def _received(self, layout: SubModelLayout, client_id: int) -> dict[str, Tensor]:
        """Return the values that a client receives: its slice of the global model, and its offset."""
        assert self.state is not None
        values = layout.slice(self.state.params)
        if layout.is_whole:
            return values
        for name, offset in offset_of(self.policy, client_id, self.state.memory).values.items():
            values[name] = values[name] + offset
        return values

    def _held_values(self, layout: SubModelLayout, client_id: int) -> dict[str, Tensor]:
        """Return the values that a client works with: those it receives, decoded."""
        return self._downlink.decoded(layout, self._received(layout, client_id))

    def _encoded_values(self, layout: SubModelLayout, client_id: int, whole: ArrayRecord) -> messages.Sent:
        """Return the encoded values of a client's sub-model; ``whole`` are those of the global model as they are."""
        if self._downlink.encodes(layout):
            return self._downlink.encode(layout, self._received(layout, client_id))
        return messages.Sent(whole if layout.is_whole else messages.encode_params(self._received(layout, client_id)))

    def _evaluated_values(self) -> dict[str, Tensor] | None:
        """Return the values of the evaluated sub-model as clients hold them; None for the global model's own."""
        layout = self.submodels.layout(self._evaluated)
        if layout.is_whole and not self._evaluates_sent:
            return None
        return self._held_values(layout, self._like)

    def _present(self, server_round: int) -> Sequence[int]:
        """Return the clients that are available in a round and have data, sorted. Not to be modified."""
        return self.settings.availability.present(server_round, self._roster.client_ids)

    def _candidates(self, present: Sequence[int]) -> Sequence[int]:
        """Return the present clients that may be sampled; found anew where they, or the policy, are other objects."""
        was, policy, _ = self._found
        if was is not present or policy is not self.policy:
            self._found = present, self.policy, [i for i in present if self._takes_part(i)]
        return self._found[2]

    def _fail(self, client_id: int, reason: str, error: FedLPError) -> None:
        """Count and name a failed client."""
        self._round.failures.append(ClientFailure(client_id, reason, str(error)))
        level = logging.INFO if reason in _EXPECTED else logging.WARNING
        log.log(level, "round %d: client %d failed (%s): %s", self._round.server_round, client_id, reason, error)

    @property
    def _measures_statistics(self) -> bool:
        """Whether batch norm statistics are measured before an evaluation."""
        return self.settings.measures_statistics or bool(getattr(self.policy, "measures_statistics", False))

    def _encode_model(self, state: ServerState) -> ArrayRecord:
        return messages.encode_params({name: state.params[name] for name in self.submodels.spec.tensors})


_EXPECTED = ("dropped_out", "surplus", "late", "left")  # on record, but nothing to warn of
