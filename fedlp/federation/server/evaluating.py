"""Evaluation after a round: batch norm statistics, the global model, clients' own models, tiers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedlp.errors import AllocationError, EvaluationError, FedLPError, ProtocolError
from fedlp.federation.server.batch_norm_statistics import Statistics, merge_statistics, pool_statistics
from fedlp.federation.server.client_evaluation import PREFIX, Asked
from fedlp.federation.server.exchange import exchange, exchange_again, node_ids, reason_of
from fedlp.federation.server.state_check import find_fault
from fedlp.federation.server.strategy_state import StrategyState
from fedlp.federation.submodels import SubModelLayout
from fedlp.federation.wire import evaluation_messages, messages
from fedlp.rng import Stream, generator
from fedlp.tasks import Sums, add_sums
from fedlp.training.evaluation import metrics_from_sums
from fedlp.types import ClientCost, SubModel

log = logging.getLogger("fedlp")

EVAL_BATCHES = 4  # batches per evaluation message


class EvaluatingStrategy(StrategyState):
    """The verbs of Flower's strategy that evaluate; see ``FedLPStrategy`` for its parameters."""

    def _measure_statistics(self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> ArrayRecord:
        """Request batch norm statistics of the evaluated sub-model from clients; their costs count in the round.

        It is the whole model if some client holds it, else the largest sub-model of this round.
        """
        self._evaluated, asked = self._largest_submodel(server_round)
        self._like = asked[0] if asked else 0
        return self._measure(server_round, self._evaluated, asked, arrays, grid, timeout)

    def _measure(
        self,
        server_round: int,
        submodel: SubModel,
        asked: Iterable[int],
        arrays: ArrayRecord,
        grid: Grid,
        timeout: float,
    ) -> ArrayRecord:
        """Request batch norm statistics of a held sub-model from some clients; return the model with them."""
        assert self.state is not None
        layout, asked = self.submodels.layout(submodel), list(asked)
        sent = self._encoded_values(layout, asked[0], arrays) if asked else messages.Sent(arrays)
        content = evaluation_messages.encode_submodel(sent, submodel, self.submodels)
        requests = [
            Message(content, self._roster.node(client_id), messages.STATISTICS, group_id=str(server_round), ttl=timeout)
            for client_id in asked
        ]
        parts: list[Statistics] = []
        for client_id, reply in zip(asked, exchange(grid, requests, timeout), strict=True):
            count = 0
            try:
                if reply.has_error():
                    raise FedLPError(reason_of(reply))
                profile = self._roster.profile(client_id)
                parts.append(evaluation_messages.decode_statistics(reply.content, profile, submodel, self.submodels))
                count = parts[-1][1]
            except FedLPError as error:
                self._fail(client_id, "rejected" if isinstance(error, ProtocolError) else "error", error)
            up = messages.count_bytes(reply.content) if reply.has_content() else 0
            macs = self._costs.macs(submodel).training / _TRAINING_PASSES * count
            self._round.costs.append(
                ClientCost(client_id, 0, messages.count_bytes(content), up, layout.num_params(), 0, macs)
            )
        if parts:
            measured = replace(self.state, params=merge_statistics(self.state.params, pool_statistics(parts), layout))
            if fault := find_fault(measured):
                log.warning("round %d: batch norms keep their statistics: %s", server_round, fault.text)
            else:
                self.state = measured
                arrays = self._encode_model(self.state)
        return arrays

    def _largest_submodel(self, server_round: int) -> tuple[SubModel, list[int]]:
        """Return the largest sub-model of a round, and its clients, in an order drawn for the round."""
        assert self.state is not None
        rng = generator(self.settings.seed, Stream.STATISTICS, server_round)
        holders: dict[SubModelLayout, list[int]] = {}
        submodels: dict[SubModelLayout, SubModel] = {}
        for client_id in rng.permutation(self._present(server_round)).tolist():
            with suppress(AllocationError):
                submodel = self.policy.assign(server_round, client_id, self.state.memory, self.state.params).submodel
                layout = self.submodels.layout(submodel)
                if layout.is_whole and len(holders.get(layout, ())) == _STATISTICS_CLIENTS - 1:
                    return SubModel(), [*holders[layout], client_id]
                submodels.setdefault(layout, replace(submodel, nested_levels=()))
                holders.setdefault(layout, []).append(client_id)
        if not holders:
            return SubModel(), []
        largest = max(holders, key=lambda layout: layout.num_params())
        return submodels[largest], holders[largest][:_STATISTICS_CLIENTS]

    def _evaluate_on_clients(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> Mapping[str, float]:
        """Return the distribution over clients of the metrics of their sub-models on their own test examples.

        With static batch norms, a client of any other than the measured sub-model measures its own.
        """
        assert self._clients is not None
        asked = self._asked_clients(server_round)
        return self._clients.run(grid, asked, self._encoded_values, arrays, self._round, self._fail, timeout)

    def _asked_clients(self, server_round: int) -> list[Asked]:
        """Return the clients that are to evaluate their sub-models."""
        assert self.state is not None
        assert self._clients is not None
        chosen = self._clients.choose(server_round, self._with_test_examples(server_round))
        measured = self.submodels.layout(self._evaluated)
        return [
            Asked(
                client_id,
                self._roster.node(client_id),
                submodel,
                self._tier(client_id, submodel),
                self._measures_statistics and self.submodels.layout(submodel) is not measured,
                self._roster.profile(client_id).num_test,
            )
            for client_id, submodel in self._held(server_round, chosen)
        ]

    def _with_test_examples(self, server_round: int) -> list[int]:
        """Return the clients present that hold out examples; the round's record names the others."""
        client_ids = self._present(server_round)
        without = tuple(i for i in client_ids if self._roster.profile(i).num_test == 0)
        if without:
            self._round.absent = {**self._round.absent, "no_test_examples": without}
        if len(without) == len(client_ids):
            log.warning("round %d: no client evaluates, since none holds out an example", server_round)
        return [client_id for client_id in client_ids if client_id not in without]

    def _held(self, server_round: int, client_ids: Iterable[int]) -> Iterator[tuple[int, SubModel]]:
        """Yield clients and their sub-models in a round; a client whose budget cannot be met is left out."""
        assert self.state is not None
        for client_id in client_ids:
            with suppress(AllocationError):
                submodel = self.policy.assign(server_round, client_id, self.state.memory, self.state.params).submodel
                yield client_id, replace(submodel, nested_levels=())

    def _tier(self, client_id: int, submodel: SubModel) -> str:
        """Return the tier of a client."""
        held = self.submodels.layout(submodel).num_params() / self.submodels.spec.num_params
        return self._tiers.get(client_id) or f"{held:.3g}"

    def _evaluate_tiers(self, server_round: int, grid: Grid, timeout: float) -> None:
        """Record the metrics of each tier's sub-model on the test set, with its own batch norm statistics.

        Sub-models with a personal head cannot be evaluated here. The model's statistics are not changed.
        """
        assert self.state is not None
        state, evaluated = self.state, self._evaluated
        for tier, (submodel, holders) in self._tier_submodels(server_round).items():
            metrics = {name: value for name, value in self._round.tested.items() if not name.startswith(PREFIX)}
            layout = self.submodels.layout(submodel)
            if layout is not self.submodels.layout(evaluated) or self._downlink.encodes(layout):
                arrays = self._encode_model(state)
                if self._measures_statistics:
                    arrays = self._measure(server_round, submodel, holders, arrays, grid, timeout)
                self._evaluated, self._like, self._evaluates_sent = submodel, holders[0], True
                asked = self.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
                metrics = _numbers(self.aggregate_evaluate(server_round, exchange_again(grid, asked, math.inf)))
                self.state = state
            self._round.metrics.update({f"tier_{tier}_{name}": value for name, value in metrics.items()})
        self._evaluated, self._evaluates_sent = evaluated, False

    def _tier_submodels(self, server_round: int) -> dict[str, tuple[SubModel, list[int]]]:
        """Return the sub-model of the first client of each tier, and up to three clients that hold it."""
        found: dict[str, tuple[SubModel, list[int]]] = {}
        for client_id, submodel in self._held(server_round, self._present(server_round)):
            if submodel.depth in (None, len(self.submodels.spec.depths)):
                first, holders = found.setdefault(self._tier(client_id, submodel), (submodel, []))
                same = self.submodels.layout(first) is self.submodels.layout(submodel)
                if same and len(holders) < _STATISTICS_CLIENTS:
                    holders.append(client_id)
        return found

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield requests for metrics of ranges of the test set, if the grid's nodes hold it; else none."""
        assert self.state is not None
        if getattr(grid, "holds_test_set", False):
            values, nodes = self._evaluated_values(), node_ids(grid)
            record = arrays if values is None else messages.encode_params(values)
            for i, (start, stop) in enumerate(self._ranges()):
                content = evaluation_messages.encode_range(record, start, stop, self._evaluated, self.submodels)
                yield Message(content, nodes[i % len(nodes)], messages.EVALUATE, group_id=str(server_round))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Return the test metrics of the evaluated model; computed here if no node was asked."""
        assert self.state is not None
        parts = [_decode_sums(reply) for reply in replies]
        if not parts and self._evaluate is not None:
            params = self._evaluated_values() or dict(self.state.params)
            parts = [self._evaluate(params, start, stop, self._evaluated) for start, stop in self._ranges()]
        sums = add_sums(parts)
        if not sums.get("count"):
            raise EvaluationError("evaluation of the global model failed: there are no test examples")
        return MetricRecord(dict(metrics_from_sums(sums, self.submodels.spec.task)))

    def _ranges(self) -> list[tuple[int, int]]:
        step = self.settings.eval_batch_size * EVAL_BATCHES
        return [(start, min(start + step, self._num_test)) for start in range(0, self._num_test, step)]

    def _evaluate_round(
        self,
        server_round: int,
        arrays: ArrayRecord,
        grid: Grid,
        timeout: float,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> ArrayRecord:
        """Evaluate the model after a round; return its arrays, with measured batch norm statistics, if any."""
        self._evaluated = SubModel()
        if self._measures_statistics:
            arrays = self._measure_statistics(server_round, arrays, grid, timeout)
        if self._num_test:
            asked = self.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
            self._note(self.aggregate_evaluate(server_round, exchange_again(grid, asked, math.inf)))
        if self._clients is not None:
            self._note(MetricRecord(dict(self._evaluate_on_clients(server_round, arrays, grid, timeout))))
        if evaluate_fn is not None:
            self._note(evaluate_fn(server_round, arrays) or MetricRecord())
        return arrays

    def _note(self, metrics: MetricRecord) -> None:
        found = _numbers(metrics)
        self._round.tested |= found
        self._round.metrics.update(found)


_STATISTICS_CLIENTS = 3
_TRAINING_PASSES = 3  # of a training step, in forward passes


def _numbers(metrics: MetricRecord) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}  # type: ignore[arg-type]


def _decode_sums(reply: Message) -> Sums:
    if reply.has_error():
        raise EvaluationError(f"evaluation of the global model failed: {reason_of(reply)}")
    return evaluation_messages.decode_sums(reply.content)
