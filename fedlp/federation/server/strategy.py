"""The server's side of a round, one strategy for every method.

Down once, up once: sample a cohort, send each client its sub-model and upload set, average what comes back entry by
entry, evaluate, record. Flower's :class:`~flwr.serverapp.strategy.Strategy` gives the verbs; ``start`` is our own,
because a run must be able to resume, to wait no longer than a deadline, and to count and name failures instead of dying
of them.

Longer than other files: Flower's strategy is one class, and every step here is one of its verbs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedlp.config import RunConfig
from fedlp.errors import AllocationError, EvaluationError, FedLPError, ProtocolError
from fedlp.federation.aggregation.coverage_average import CoverageAverage
from fedlp.federation.aggregation.server_optimizer import apply_server_optimizer
from fedlp.federation.server.batch_norm_statistics import Statistics, pool_statistics
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.exchange import exchange, exchange_again, reason_of
from fedlp.federation.server.roster import Roster
from fedlp.federation.server.round_record import RoundUnderWay, layer_coverage
from fedlp.federation.server.sampling import sample_cohort
from fedlp.federation.server.state_check import RoundGuard, find_fault
from fedlp.federation.strategies.policies import Policy, Returned
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire import messages
from fedlp.rng import Stream, generator
from fedlp.training.local_training import metrics_from_sums
from fedlp.types import Budget, ClientCost, ClientFailure, ClientUpdate, RoundRecord, SubModel, TrainInstruction

log = logging.getLogger("fedlp")

Evaluate = Callable[[Mapping[str, Tensor], int, int], dict[str, float]]
"""Sums of the global model's metrics over test examples [start, stop)."""

Observer = Callable[[RoundRecord, ServerState], None]
"""Told of every finished round, and of the state that a checkpoint holds."""

EVAL_BATCHES = 4  # batches per evaluation message


class FedLPStrategy(Strategy):
    """FedAvg, FedLP, HeteroFL, FjORD and FedRolex: one strategy, the policy makes the difference.

    Parameters
    ----------
    evaluate, num_test : callable, int
        The global test metrics, summed over ranges of ``num_test`` examples.
    macs : callable
        MACs of one training step per example in a sub-model.
    fit : callable, optional
        Returns the policy that meets budgets which devices brought; without it, ``policy`` holds for all.
    observers : callables
        Called after every round, in order.
    state : ServerState, optional
        Where to go on; ``start`` begins after its round.
    """

    def __init__(
        self,
        config: RunConfig,
        submodels: SubModels,
        policy: Policy,
        *,
        evaluate: Evaluate,
        num_test: int,
        macs: Callable[[SubModel], float],
        fit: Callable[[Mapping[int, Budget]], Policy] | None = None,
        observers: Iterable[Observer] = (),
        state: ServerState | None = None,
    ) -> None:
        self.config = config
        self.submodels = submodels
        self.policy = policy
        self.macs = macs
        self.state = state
        self._evaluate = evaluate
        self._fit = fit
        self._num_test = num_test
        self._observers = tuple(observers)
        self._roster = Roster(config.num_clients, config.min_clients)
        self._round = RoundUnderWay(0, ())

    # ---- the run
    def summary(self) -> None:
        """Log one line about the strategy."""
        log.info("strategy %s, %d clients a round", self.config.strategy.name, self.config.clients_per_round)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds that are left and return the final model.

        Parameters
        ----------
        initial_arrays : ArrayRecord
            The packed initial model; not used where the strategy was given a state to go on from.
        timeout : float
            Seconds a round waits for its clients; an evaluation on own nodes takes the time it takes.
        train_config, evaluate_config, evaluate_fn
            Part of Flower's signature; the config and the evaluation were given at construction.
        """
        if self.state is None:
            self.state = ServerState(0, messages.decode_model(initial_arrays, self.submodels))
        self.summary()
        self._roster.join(grid, timeout)
        self._meet_or_dismiss()
        self._warn_of_starved_layers()
        result = Result()
        arrays = self._encode_model(self.state)
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            started = time.monotonic()
            self._welcome(server_round, grid, timeout)
            requests = self.configure_train(server_round, arrays, ConfigRecord(), grid)
            arrays, metrics = self.aggregate_train(server_round, exchange(grid, requests, timeout))
            result.train_metrics_clientapp[server_round] = metrics
            if server_round % self.config.eval_every == 0 or server_round == num_rounds:
                if self.config.strategy.batch_norm == "static":
                    arrays = self._measure_statistics(server_round, arrays, grid, timeout)
                asked = self.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
                evaluated = self.aggregate_evaluate(server_round, exchange_again(grid, asked, math.inf))
                result.evaluate_metrics_serverapp[server_round] = evaluated
                self._round.metrics.update({key: float(value) for key, value in evaluated.items()})  # type: ignore[arg-type]
            record = self._round.finish(time.monotonic() - started)
            for observer in self._observers:
                observer(record, self.state)
        result.arrays = arrays
        return result

    def _meet_budgets(self) -> None:
        """Let the policy meet the budgets that devices brought."""
        if (brought := self._roster.budgets) and self._fit is not None:
            self.policy = self._fit(brought)

    def _meet_or_dismiss(self) -> None:
        """Let the policy meet the budgets that devices brought; a client whose budget cannot be met stays out."""
        try:
            self._meet_budgets()
        except FedLPError:
            assert self._fit is not None
            for client_id, budget in self._roster.budgets.items():
                try:
                    self._fit({client_id: budget})
                except FedLPError as error:
                    self._roster.dismiss(client_id, error)
            if not self._roster.client_ids:
                raise
            self._meet_budgets()

    def _welcome(self, server_round: int, grid: Grid, timeout: float) -> None:
        """Let clients take part that joined since the last round; one whose budget cannot be met stays out."""
        for client_id in self._roster.refresh(grid, timeout):
            try:
                self._meet_budgets()
            except FedLPError as error:
                self._roster.dismiss(client_id, error)
            else:
                log.warning("round %d: client %d has joined", server_round, client_id)

    def _warn_of_starved_layers(self) -> None:
        """Say which layers no client will ever return, such as the head where nobody has full depth."""
        assert self.state is not None
        layouts = []
        for client_id in self._roster.client_ids:
            with suppress(AllocationError):  # said in every round in which the client would take part
                submodel = self.policy.assign(1, client_id, self.state.memory).submodel
                layouts.append(self.submodels.layout(submodel))
        returned = {name for layout in set(layouts) for name in layout.names}
        starved = [layer.name for layer in self.submodels.spec.layers if returned.isdisjoint(layer.tensors)]
        if starved:
            names = ", ".join(starved if len(starved) < 4 else [*starved[:2], "...", starved[-1]])
            log.warning("no client trains %s (%d layers): their values stay as they are", names, len(starved))

    # ---- down
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield the round's instructions in the order of client ids, made only when they are needed."""
        cohort = sample_cohort(self.config.seed, server_round, self._roster.client_ids, self.config.clients_per_round)
        self._round = RoundUnderWay(server_round, cohort)
        encoded: dict[SubModelLayout, ArrayRecord] = {}  # sub-models that several clients share are encoded once
        assert self.state is not None
        params = self.state.params
        for client_id in cohort:
            try:
                assigned = self.policy.assign(server_round, client_id, self.state.memory)
            except AllocationError as error:
                self._fail(client_id, "refused", error)
                continue
            layout = self.submodels.layout(assigned.submodel)
            record = arrays if layout.is_whole else encoded.get(layout)
            if record is None:
                encoded = dict(list(encoded.items())[-7:])
                record = encoded[layout] = messages.encode_params(layout.slice(params))
            instruction = TrainInstruction(
                server_round,
                client_id,
                {},
                assigned.submodel,
                assigned.uploads - self.submodels.spec.frozen,
                assigned.kept,
                assigned.returned,
                assigned.scored,
            )
            content = messages.encode_instruction(instruction, record, self.submodels)
            self._round.assigned.append((instruction, messages.count_bytes(content)))
            ttl = self.config.simulation.round_timeout_s
            yield Message(content, self._roster.node(client_id), messages.TRAIN, group_id=str(server_round), ttl=ttl)

    # ---- up
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Average the updates entry by entry as they come; what nobody returned keeps its value.

        ``replies`` holds one reply per instruction, in order.
        """
        assert self.state is not None
        state = self.state
        average = CoverageAverage(state.params if self._sends_weights else _without_floats(state.params))
        guard = RoundGuard(state, self._trainable, self._sends_weights)
        losses: list[tuple[float, int]] = []
        answers: list[Returned] = []
        for reply in replies:
            instruction, bytes_down = self._round.assigned.popleft()
            update = self._receive(instruction, bytes_down, reply, guard)
            if update is None:
                continue
            weight = self._weight(update, instruction)
            layout = self.submodels.layout(SubModel(instruction.submodel.depth, update.widths))
            average.add(update.params, layout.keeps, weight)
            answers.append(
                Returned(
                    update.client_id, update.num_examples, instruction.submodel.widths, update.widths, update.scores
                )
            )
            if "train-loss" in update.metrics:
                losses.append((update.metrics["train-loss"], update.num_examples))
        if losses:
            total = sum(count for _, count in losses)
            self._round.metrics["train_loss"] = sum(loss * count for loss, count in losses) / total
        params, optimizer, memory = dict(state.params), dict(state.optimizer), state.memory
        good = len(self._round.cohort) - len(self._round.failures)
        if good >= self.config.min_clients:
            params, coverage = average.result()
            if not self._sends_weights:
                for name, values in params.items():
                    if values.is_floating_point():
                        values += state.params[name]
            params, optimizer = apply_server_optimizer(
                self.config.strategy, state.params, params, state.optimizer, average.covered, self._trainable
            )
            self._round.coverage = layer_coverage(coverage, self.submodels.spec)
            memory = self.policy.remember(memory, server_round, answers)
        else:
            log.warning(
                "round %d: %d good updates, min_clients=%d: the model stays",
                server_round,
                good,
                self.config.min_clients,
            )
            self._round.coverage = {layer.name: 0.0 for layer in self.submodels.spec.layers}
        self.state = guard.accept(
            replace(state, server_round=server_round, params=params, optimizer=optimizer, memory=memory), self._fail
        )
        if self.state.params is state.params:
            self._round.coverage = {layer.name: 0.0 for layer in self.submodels.spec.layers}
        return self._encode_model(self.state), MetricRecord(dict(self._round.metrics))

    def _receive(
        self, instruction: TrainInstruction, bytes_down: int, reply: Message, guard: RoundGuard
    ) -> ClientUpdate | None:
        """Return the update of a reply, or None after counting the failure; either way its cost is recorded."""
        client_id = instruction.client_id
        layout = self.submodels.layout(instruction.submodel)
        update: ClientUpdate | None = None
        bytes_up = messages.count_bytes(reply.content) if reply.has_content() else 0
        try:
            if reply.has_error():
                raise FedLPError(reason_of(reply))
            profile, strategy = self._roster.profile(client_id), self.config.strategy
            decoded = messages.decode_update(
                reply.content, instruction, profile, self.submodels, strategy.encoding, strategy.entropy_coding
            )
            guard.admit(decoded, self.submodels.layout(SubModel(instruction.submodel.depth, decoded.widths)).keeps)
            update = decoded
        except FedLPError as error:
            rejected = isinstance(error, ProtocolError)
            self._fail(client_id, "rejected" if rejected else _ERROR_KINDS.get(reply.error.code, "error"), error)
        examples = update.num_examples if update else 0
        self._round.costs.append(
            ClientCost(
                client_id=client_id,
                num_examples=examples,
                bytes_down=bytes_down,
                bytes_up=bytes_up,
                params_down=layout.num_params(),
                params_up=self._num_returned(instruction, update) if update else 0,
                macs=self.macs(instruction.submodel) * examples * self.config.local.epochs
                + (update.metrics.get("pruning-macs", 0.0) if update else 0.0),
            )
        )
        return update

    def _weight(self, update: ClientUpdate, instruction: TrainInstruction) -> float:
        """Return what an update counts in the average."""
        match self.config.strategy.weighting:
            case "examples":
                return float(update.num_examples)
            case "held":
                held = self.submodels.layout(instruction.submodel).num_params()
                return update.num_examples * held / self.submodels.spec.num_params
            case _:
                return 1.0

    def _num_returned(self, instruction: TrainInstruction, update: ClientUpdate) -> int:
        """Return how many trainable numbers came."""
        layout = self.submodels.layout(SubModel(instruction.submodel.depth, update.widths))
        return layout.num_params(instruction.uploads)

    def _fail(self, client_id: int, reason: str, error: FedLPError) -> None:
        """Count and name a client whose part in the round is lost."""
        self._round.failures.append(ClientFailure(client_id, reason, str(error)))
        log.warning("round %d: client %d failed (%s): %s", self._round.server_round, client_id, reason, error)

    # ---- static batch norms
    def _measure_statistics(self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float) -> ArrayRecord:
        """Ask clients that hold the whole model for its batch norm statistics; what they cost counts in the round."""
        assert self.state is not None
        asked = list(islice(self._whole_clients(server_round), _STATISTICS_CLIENTS))
        content = messages.encode_whole(arrays)
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
                parts.append(messages.decode_statistics(reply.content, self._roster.profile(client_id), self.submodels))
                count = parts[-1][1]
            except FedLPError as error:
                self._fail(client_id, "rejected" if isinstance(error, ProtocolError) else "error", error)
            up = messages.count_bytes(reply.content) if reply.has_content() else 0
            macs = self.macs(SubModel()) / _TRAINING_PASSES * count
            self._round.costs.append(
                ClientCost(client_id, 0, messages.count_bytes(content), up, self.submodels.spec.num_params, 0, macs)
            )
        if parts:
            measured = replace(self.state, params={**self.state.params, **pool_statistics(parts)})
            if fault := find_fault(measured):
                log.warning("round %d: batch norms keep their statistics: %s", server_round, fault.text)
            else:
                self.state = measured
                arrays = self._encode_model(self.state)
        return arrays

    def _whole_clients(self, server_round: int) -> Iterator[int]:
        """Yield the clients that hold the whole model, in an order drawn for the round."""
        assert self.state is not None
        rng = generator(self.config.seed, Stream.STATISTICS, server_round)
        for client_id in rng.permutation(self._roster.client_ids).tolist():
            with suppress(AllocationError):
                submodel = self.policy.assign(server_round, client_id, self.state.memory).submodel
                if self.submodels.layout(submodel).is_whole:
                    yield client_id

    # ---- evaluation
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield requests for the metrics of ranges of the test set, where the grid's nodes hold it; else none."""
        if getattr(grid, "holds_test_set", False):
            nodes = list(grid.get_node_ids())
            for i, (start, stop) in enumerate(self._ranges()):
                content = messages.encode_range(arrays, start, stop)
                yield Message(content, nodes[i % len(nodes)], messages.EVALUATE, group_id=str(server_round))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Return the global model's test metrics; computed here where no node was asked."""
        assert self.state is not None
        parts = [_decode_sums(reply) for reply in replies]
        if not parts:
            parts = [self._evaluate(self.state.params, start, stop) for start, stop in self._ranges()]
        sums: dict[str, float] = {}
        for part in parts:
            for key, value in part.items():
                sums[key] = sums.get(key, 0.0) + value
        if not sums.get("count"):
            raise EvaluationError("evaluation of the global model failed: there are no test examples")
        return MetricRecord(dict(metrics_from_sums(sums, self.submodels.spec.task)))

    def _ranges(self) -> list[tuple[int, int]]:
        step = self.config.eval_batch_size * EVAL_BATCHES
        return [(start, min(start + step, self._num_test)) for start in range(0, self._num_test, step)]

    # ---- helpers
    @property
    def _sends_weights(self) -> bool:
        """Whether updates hold weights; else differences from what was sent down, but for integers."""
        return self.config.strategy.values == "weights"

    @property
    def _trainable(self) -> frozenset[str]:
        return frozenset(name for name, info in self.submodels.spec.tensors.items() if info.trainable)

    def _encode_model(self, state: ServerState) -> ArrayRecord:
        return messages.encode_params({name: state.params[name] for name in self.submodels.spec.tensors})


_STATISTICS_CLIENTS = 3
_TRAINING_PASSES = 3  # of a training step, in forward passes
_ERROR_KINDS = {2: "raised", 3: "no_reply", 5: "gone", 8: "crashed"}


def _decode_sums(reply: Message) -> dict[str, float]:
    if reply.has_error():
        raise EvaluationError(f"evaluation of the global model failed: {reason_of(reply)}")
    return messages.decode_sums(reply.content)


def _without_floats(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros in place of the weights, to which differences are added up."""
    return {name: torch.zeros_like(values) if values.is_floating_point() else values for name, values in params.items()}
