"""Server side of a round, one strategy for every method.

Down once, up once: sample a cohort, send each client its sub-model and upload set, average the updates entry by
entry, evaluate, record. Flower's :class:`~flwr.serverapp.strategy.Strategy` gives the verbs; ``start`` is our own,
because a run must be able to resume, to wait no longer than a deadline, and to count and name failures instead of dying
of them.

Longer than other files: the verbs of one round, each of which a virtual clock or secure aggregation overrides. Their
work is elsewhere: receipt of updates in ``update_collector``, the new model in ``server_step``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedlp.errors import AllocationError, ConfigError, FedLPError
from fedlp.federation.aggregation.noised_sum import Holders, NoisedSum
from fedlp.federation.sampling import sample_cohort
from fedlp.federation.server.availability import draw_dropouts
from fedlp.federation.server.central_privacy import expected_holders
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.cohorts import Instructed, Packer, StackingGrid
from fedlp.federation.server.evaluating import EvaluatingStrategy
from fedlp.federation.server.exchange import exchange, exchange_first
from fedlp.federation.server.frozen_tensors import holds, note_holders
from fedlp.federation.server.round_record import RoundUnderWay, Tally
from fedlp.federation.server.round_settings import RoundSettings
from fedlp.federation.server.stacked_exchange import exchange_stacks
from fedlp.federation.server.starved_layers import warn_of_starved_layers
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.server.strategy_state import Evaluate, Observer
from fedlp.federation.server.update_collector import UpdateCollector, most_examples
from fedlp.federation.strategies.policy import offset_of, prepared
from fedlp.federation.submodels import SubModelLayout
from fedlp.federation.wire import messages
from fedlp.rng import Stream, generator
from fedlp.types import Assignment, ClientCost

__all__ = ["Evaluate", "FedLPStrategy", "Observer", "RoundSettings"]

log = logging.getLogger("fedlp")


class FedLPStrategy(EvaluatingStrategy):
    """Flower strategy of all methods here: FedAvg, FedLP, HeteroFL, FjORD, FedRolex, FedLP-Plan. The policy differs.

    Parameters
    ----------
    submodels : SubModels
        Sub-models of the global model.
    policy : Policy
        Sub-model and upload set of each client in each round.
    settings : RoundSettings
        Settings of the rounds.
    encoding, download, aggregator, server_optimizer
        Parts; values as they are (up, and frozen ones down), the coverage average, and the plain average if absent.
    evaluate, num_test : callable, int
        Sums of test metrics over ranges of ``num_test`` examples; no evaluation where 0.
    client_evaluation : ClientEvaluationSettings, optional
        Settings of evaluations on clients; none without.
    tiers : mapping from client id to str, optional
        Tier or device class of each client; the share of the parameters that it holds if absent.
    fit : callable, optional
        Returns the policy that meets devices' own budgets; without it, ``policy`` holds for all.
    takes_part : callable, optional
        Returns whether a client may be sampled; all may if absent. Read again when clients join or the policy changes.
    calibration : ClientCalibration, optional
        Asks clients for calibration sums before rounds; its costs count in the round.
    central_privacy : CentralPrivacy, optional
        Poisson sampling, clipping and noise in place of the aggregator.
    ledger : callable, optional
        Returns the record of privacy after a round.
    observers : callables
        Called after every round, in order.
    state : ServerState, optional
        State to resume from; ``start`` begins after its round.
    """

    # ---- the run
    def summary(self) -> None:
        """Log one line about the strategy."""
        log.info("%s, %d clients a round", type(self.policy).__name__, self.settings.clients_per_round)

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
        """Run the remaining rounds and return the final model.

        Parameters
        ----------
        initial_arrays : ArrayRecord
            Packed initial model; not used if the strategy resumes from a state.
        timeout : float
            Deadline of a round in seconds; an evaluation on own nodes has none.
        evaluate_fn : callable, optional
            Returns further metrics of the global model after a round that is evaluated.
        train_config, evaluate_config : ConfigRecord
            Part of Flower's signature; ConfigError unless empty, since clients read the run's config.
        """
        if train_config or evaluate_config:
            raise ConfigError(
                "train_config and evaluate_config are not sent to clients; set options of the run instead"
            )
        if self.state is None:
            self.state = ServerState(0, messages.view_model(initial_arrays, self.submodels))
        del initial_arrays  # a model's memory, once the first encoding has its values
        self.summary()
        self._roster.join(grid, timeout)
        self.policy = self._budgets.meet_or_dismiss(self.policy)
        if self._calibration is not None:
            self._calibration.connect(grid, self._roster)
        self._prepare(self.state.server_round + 1)
        members, measured = self._roster.client_ids, self._measures_statistics
        warn_of_starved_layers(self.policy, self.submodels, self.state, members, measured)
        result = Result()
        arrays = self._hold_once(self.state)
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            started = time.monotonic()
            self.policy = self._budgets.welcome(self.policy, server_round, grid, timeout)
            self._prepare(server_round)
            arrays, metrics = self._train_round(server_round, arrays, grid, timeout)
            result.train_metrics_clientapp[server_round] = metrics
            if server_round % self.settings.eval_every == 0 or server_round == num_rounds:
                arrays = self._evaluate_round(server_round, arrays, grid, timeout, evaluate_fn)
                if server_round == num_rounds and self.settings.evaluates_tiers and self._num_test:
                    self._evaluate_tiers(server_round, grid, timeout)
                result.evaluate_metrics_serverapp[server_round] = MetricRecord(dict(self._round.tested))
            record = self._round.finish(time.monotonic() - started)
            answers = [observer(record, self.state) for observer in self._observers]
            if any(answer is True for answer in answers):
                break
        result.arrays = arrays
        return result

    def _train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Send the instructions of a round, aggregate the replies; return the new model and the round's metrics."""
        if isinstance(grid, StackingGrid) and self._trains_stacks(grid):
            packer, cohort = self._packer(grid.cohort), self._begin_round(server_round)
            collector = self._collector(server_round)
            exchange_stacks(grid, packer, self._present_ones(server_round, cohort, arrays, packer), collector, timeout)
            return self._conclude(server_round, collector.tally, self._num_good())
        requests = self.configure_train(server_round, arrays, ConfigRecord(), grid)
        return self.aggregate_train(server_round, self._exchange(server_round, grid, requests, timeout))

    def _trains_stacks(self, grid: StackingGrid) -> bool:
        """Return whether one message may be for several clients."""
        return grid.stacks and not self.settings.extra_clients and self._private is None

    def _prepare(self, server_round: int) -> None:
        """Run the policy's measurements on the server before a round, if it has any."""
        assert self.state is not None
        memory = prepared(self.policy, self.state.memory, server_round, self.state.params)
        if memory is not self.state.memory:
            self.state = replace(self.state, memory=memory)

    # ---- down
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Open the round, and return its instructions lazily, in the order of client ids."""
        return self._messages(server_round, self._begin_round(server_round), arrays)

    def _messages(self, server_round: int, cohort: Sequence[int], arrays: ArrayRecord) -> Iterator[Message]:
        packer = self._packer()
        for one in self._present_ones(server_round, cohort, arrays, packer):
            parcel = packer.single(one)
            self._round.assigned.append((one.instruction, parcel.bytes_down))
            yield parcel.message

    def _packer(self, size: int = 1) -> Packer:
        return Packer(self.submodels, self._roster.node, size, self.settings.timeout_s)

    def _begin_round(self, server_round: int) -> tuple[int, ...]:
        """Open the record of a round; return its cohort."""
        settings, present = self.settings, self._present(server_round)
        wanted = settings.clients_per_round + settings.extra_clients
        candidates = self._candidates(present)
        if self._private is not None:
            cohort = self._private.cohort(server_round, candidates)
        else:
            cohort = sample_cohort(settings.seed, server_round, candidates, wanted, is_sorted=True)
        self._open_record(server_round, cohort, present)
        return cohort

    def _open_record(self, server_round: int, cohort: tuple[int, ...], present: Sequence[int]) -> None:
        """Open the record of a round; it begins with the costs of calibration, if there were any."""
        self._round = RoundUnderWay(server_round, cohort, absent=self._roster.absent(present))
        if self._calibration is not None:
            for spent in self._calibration.spent():
                self._round.take_over(spent)

    def _present_ones(
        self, server_round: int, cohort: Sequence[int], arrays: ArrayRecord, packer: Packer
    ) -> Iterator[Instructed]:
        """Yield the instructions of clients that stay, lazily; those that drop out are counted."""
        for one, is_lost in self._instruct(server_round, cohort, arrays):
            if is_lost:
                self._drop(one.instruction, packer.single(one).bytes_down)
            else:
                yield one

    def _instruct(
        self, server_round: int, cohort: Sequence[int], arrays: ArrayRecord
    ) -> Iterator[tuple[Instructed, bool]]:
        """Yield each client's instruction, lazily, and whether the client drops out once it has it."""
        dropped = self._draw_dropouts(server_round, cohort)
        encoded: dict[tuple[SubModelLayout, str, bool], messages.Sent] = {}  # what several clients share, encoded once
        digests: dict[tuple[SubModelLayout, str], bytes] = {}
        assert self.state is not None
        for client_id in cohort:
            try:
                assigned = self.policy.assign(server_round, client_id, self.state.memory, self.state.params)
            except AllocationError as error:
                self._fail(client_id, "refused", error)
                continue
            layout = self.submodels.layout(assigned.submodel)
            kind = layout, offset_of(self.policy, client_id, self.state.memory).kind
            if kind not in digests:
                digests[kind] = self._downlink.digest(layout, self._received(layout, client_id))
            digest = digests[kind]
            held = bool(digest) and holds(self.state.memory, client_id, digest)
            as_it_is = layout.is_whole and not held and not self._downlink.encodes(layout)
            record: ArrayRecord | messages.Sent | None = arrays if as_it_is else encoded.get((*kind, held))
            if record is None:
                encoded = dict(list(encoded.items())[-7:])
                values = self._received(layout, client_id)
                record = encoded[*kind, held] = self._downlink.encode(layout, values, held)
            if digest:
                self._round.frozen[client_id] = digest
            instruction = assigned
            if frozen := self.submodels.spec.frozen:
                instruction = replace(assigned, uploads=assigned.uploads - frozen)
            one = Instructed(instruction, record, digest if held else b"", bool(digest))
            yield one, client_id in dropped

    def _draw_dropouts(self, server_round: int, cohort: Sequence[int]) -> frozenset[int]:
        """Return the clients that drop out after they got their sub-model."""
        return draw_dropouts(self.settings.seed, server_round, cohort, self.settings.dropout)

    def _drop(self, instruction: Assignment, bytes_down: int) -> None:
        """Count a client that received its sub-model and dropped out."""
        client_id, layout = instruction.client_id, self.submodels.layout(instruction.submodel)
        self._round.costs.append(ClientCost(client_id, 0, bytes_down, 0, layout.num_params(), 0, 0.0))
        self._fail(client_id, "dropped_out", FedLPError("it dropped out, as fleet.dropout has it"))

    def _exchange(
        self, server_round: int, grid: Grid, requests: Iterable[Message], timeout: float
    ) -> Iterator[Message]:
        """Yield the replies to instructions, in their order; with extra clients the first ones, then errors."""
        settings = self.settings
        if not settings.extra_clients:
            return exchange(grid, requests, timeout)

        def order(count: int) -> list[int]:
            found: list[int] = generator(settings.seed, Stream.ARRIVAL, server_round).permutation(count).tolist()
            return found

        return exchange_first(grid, requests, timeout, settings.clients_per_round, order)

    # ---- up
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Average the updates entry by entry as they arrive; entries without an update keep their value.

        ``replies`` holds one reply per instruction, in order.
        """
        collector = self._collector(server_round)
        for reply in replies:
            collector.collect(*self._round.assigned.popleft(), reply)
            del reply  # and its memory, before the next one's
        return self._conclude(server_round, collector.tally, self._num_good())

    def _collector(self, server_round: int) -> UpdateCollector:
        """Return the receiver of the updates of the round whose record is open."""
        assert self.state is not None
        average = self._server.begin(server_round, self.state, lambda: self._expected_holders(server_round))
        return UpdateCollector(
            submodels=self.submodels,
            settings=self.settings,
            costs=self._costs,
            encoding=self._encoding,
            roster=self._roster,
            record=self._round,
            tally=Tally(average, self._guard()),
            fail=self._fail,
            most_examples=most_examples(self._server.aggregator, self._round.cohort, self._roster),
            shows_losses=self._private is None,
        )

    def _guard(self) -> RoundGuard:
        """Return the check of a round's updates."""
        assert self.state is not None
        return RoundGuard(self.state, self._server.trainable, self._server.sends_weights)

    def _expected_holders(self, server_round: int) -> Holders:
        """Return the expected number of clients that return each entry."""
        assert self.state is not None
        assert self._private is not None
        clients = [client_id for client_id in range(self.settings.num_clients) if self._takes_part(client_id)]
        rate, memory, params = self._private.sampling_rate, self.state.memory, self.state.params
        return expected_holders(self.policy, self.submodels, server_round, clients, rate, memory, params)

    def _num_good(self) -> int:
        return len(self._round.cohort) - len(self._round.failures)

    def _conclude(self, server_round: int, tally: Tally, good: int) -> tuple[ArrayRecord, MetricRecord]:
        """Make the aggregate of ``good`` updates the new model, where they are enough and it is sound."""
        assert self.state is not None
        before = after = self.state
        uncovered = {layer.name: 0.0 for layer in self.submodels.spec.layers}
        if tally.losses:
            self._round.metrics["train_loss"] = tally.mean_loss()
        if good >= self.settings.min_clients or self._private is not None:
            after, self._round.coverage = self._aggregate(server_round, tally)
        else:
            least = self.settings.min_clients
            log.warning("round %d: %d good updates, min_clients=%d: the model stays", server_round, good, least)
        lost = frozenset(failure.client_id for failure in self._round.failures)
        memory = note_holders(after.memory, self._round.frozen, lost)
        self.state = tally.guard.accept(
            replace(after, server_round=server_round, memory=memory),
            self._fail if self._private is None else None,  # suspicion would come from values without noise
        )
        tally.release()
        self._note_privacy(server_round, before)
        if self.state.params is before.params:
            self._round.coverage = uncovered
        return self._hold_once(self.state), MetricRecord(dict(self._round.metrics))

    def _hold_once(self, state: ServerState) -> ArrayRecord:
        """Return the encoded model; the state's becomes a view of it, so that memory holds it once."""
        arrays = self._encode_model(state)
        views = messages.view_model(arrays, self.submodels)
        self.state = replace(state, params={name: views[name] for name in state.params})
        return arrays

    def _aggregate(self, server_round: int, tally: Tally) -> tuple[ServerState, dict[str, float]]:
        """Return the state with the new model and what policy and privacy remember, and each layer's coverage."""
        assert self.state is not None
        after, coverage = self._server.apply(self.state, tally.average)
        self._note_clipped(tally)
        memory = self.policy.remember(after.memory, server_round, tally.answers)
        if self._private is not None and isinstance(tally.average, NoisedSum):
            memory = self._private.remember(memory, server_round, tally.average)
        return replace(after, memory=memory), coverage

    def _note_privacy(self, server_round: int, before: ServerState) -> None:
        """Record the clipping norm of the round, and the ledger's entries."""
        if self._private is not None:
            self._round.privacy["clipping_norm"] = self._private.clip(before.memory)
        if self._ledger is not None:
            self._round.privacy |= self._ledger(server_round, self._round.cohort)

    def _note_clipped(self, tally: Tally) -> None:
        """Record and name the clients whose updates were scaled down."""
        self._round.clipped |= (clipped := tally.scaled_down())
        if clipped:
            log.info("round %d: updates beyond aggregator.max_norm, scaled down: %s", self._round.server_round, clipped)
