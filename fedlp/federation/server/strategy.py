"""Server side of a round, one strategy for every method.

Down once, up once: sample a cohort, send each client its sub-model and upload set, average the updates entry by
entry, evaluate, record. Flower's :class:`~flwr.serverapp.strategy.Strategy` gives the verbs; ``start`` is our own,
because a run must be able to resume, to wait no longer than a deadline, and to count and name failures instead of dying
of them.

Longer than other files: Flower's strategy is one class, and every step here is one of its verbs.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedlp.errors import AllocationError, ConfigError, FedLPError, ProtocolError
from fedlp.federation.aggregation.aggregator import Accumulator, add_stack
from fedlp.federation.aggregation.noised_sum import NoisedSum
from fedlp.federation.aggregation.norm_bounds import MIN_HOLDERS, lower_median
from fedlp.federation.aggregation.server_optimizer import apply_server_optimizer
from fedlp.federation.flower_compat import make_reply
from fedlp.federation.sampling import sample_cohort
from fedlp.federation.server.availability import draw_dropouts
from fedlp.federation.server.central_privacy import expected_holders
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.cohorts import Instructed, Packer, Parcel, StackingGrid
from fedlp.federation.server.evaluating import EvaluatingStrategy
from fedlp.federation.server.exchange import ERROR_KINDS, exchange, exchange_first, reason_of
from fedlp.federation.server.frozen_tensors import holds, note_holders
from fedlp.federation.server.round_record import RoundUnderWay, Tally, layer_coverage
from fedlp.federation.server.round_settings import RoundSettings
from fedlp.federation.server.state_check import RoundGuard
from fedlp.federation.server.strategy_state import Evaluate, Observer
from fedlp.federation.strategies.policy import offset_of, prepared
from fedlp.federation.submodels import SubModelLayout
from fedlp.federation.wire import messages
from fedlp.federation.wire.digests import digest_tensors
from fedlp.federation.wire.index_sets import encode_names
from fedlp.federation.wire.ranges import are_in_range, find_bounds
from fedlp.federation.wire.stacks import client_message, decode_updates
from fedlp.rng import Stream, generator
from fedlp.types import Assignment, ClientCost, ClientReport, ClientUpdate, SubModel

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
    encoding, aggregator, server_optimizer
        Parts; values as they are, the coverage average, and the plain average if absent.
    evaluate, num_test : callable, int
        Sums of test metrics over ranges of ``num_test`` examples; no evaluation where 0.
    client_evaluation : ClientEvaluationSettings, optional
        Settings of evaluations on clients; none without.
    tiers : mapping from client id to str, optional
        Tier or device class of each client; the share of the parameters that it holds if absent.
    fit : callable, optional
        Returns the policy that meets devices' own budgets; without it, ``policy`` holds for all.
    takes_part : callable, optional
        Returns whether a client may be sampled; all may if absent.
    calibration : ClientCalibration, optional
        Asks clients for calibration sums before rounds; its costs are those of the round.
    central_privacy : CentralPrivacy, optional
        Poisson sampling, clipping and noise in place of the aggregator.
    ledger : callable, optional
        Returns what is on record of privacy after a round.
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
            self.state = ServerState(0, messages.decode_model(initial_arrays, self.submodels))
        self.summary()
        self._roster.join(grid, timeout)
        self._meet_or_dismiss()
        if self._calibration is not None:
            self._calibration.connect(grid, self._roster)
        self._prepare(self.state.server_round + 1)
        self._warn_of_starved_layers()
        result = Result()
        arrays = self._encode_model(self.state)
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            started = time.monotonic()
            self._welcome(server_round, grid, timeout)
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
            return self._train_together(server_round, arrays, grid, timeout)
        requests = self.configure_train(server_round, arrays, ConfigRecord(), grid)
        return self.aggregate_train(server_round, self._exchange(server_round, grid, requests, timeout))

    def _trains_stacks(self, grid: StackingGrid) -> bool:
        """Return whether one message may be for several clients."""
        return grid.stacks and not self.settings.extra_clients and self._private is None

    def _meet_budgets(self) -> None:
        """Fit the policy to devices' own budgets."""
        if (brought := self._roster.budgets) and self._fit is not None:
            self.policy = self._fit(brought)

    def _prepare(self, server_round: int) -> None:
        """Run the policy's measurements on the server before a round, if it has any."""
        assert self.state is not None
        memory = prepared(self.policy, self.state.memory, server_round, self.state.params)
        if memory is not self.state.memory:
            self.state = replace(self.state, memory=memory)

    def _frozen_digest(self, layout: SubModelLayout, client_id: int) -> bytes:
        """Return the digest of the frozen tensors of a client's sub-model; empty if it has none."""
        frozen = layout.name_set & self.submodels.spec.frozen
        if not frozen:
            return b""
        values = self._received(layout, client_id)
        return digest_tensors({name: values[name] for name in frozen})

    def _meet_or_dismiss(self) -> None:
        """Fit the policy to devices' own budgets; a client whose budget cannot be met is dismissed."""
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
        """Admit clients that joined since the last round; one whose budget cannot be met is dismissed."""
        for client_id in self._roster.refresh(grid, timeout):
            try:
                self._meet_budgets()
            except FedLPError as error:
                self._roster.dismiss(client_id, error)
            else:
                log.warning("round %d: client %d has joined", server_round, client_id)

    def _warn_of_starved_layers(self) -> None:
        """Warn of layers that no client will ever return, such as the head if no client has full depth."""
        assert self.state is not None
        layouts = []
        for client_id in self._roster.client_ids:
            with suppress(AllocationError):  # said in every round in which the client would take part
                submodel = self.policy.assign(1, client_id, self.state.memory, self.state.params).submodel
                layouts.append(self.submodels.layout(submodel))
        returned = {name for layout in set(layouts) for name in layout.names}
        self._warn_of_narrow_clients(set(layouts))
        starved = [layer.name for layer in self.submodels.spec.layers if returned.isdisjoint(layer.tensors)]
        if starved:
            names = ", ".join(starved if len(starved) < 4 else [*starved[:2], "...", starved[-1]])
            log.warning("no client trains %s (%d layers): their values stay as they are", names, len(starved))

    def _warn_of_narrow_clients(self, layouts: set[SubModelLayout]) -> None:
        """Warn that no client holds the whole model, so that the largest sub-model is evaluated."""
        if layouts and not any(layout.is_whole for layout in layouts):
            most = max(layout.num_params() for layout in layouts) / self.submodels.spec.num_params
            measured = ", and is what is evaluated" if self._measures_statistics else ""
            log.warning(
                "no client holds the whole model: the largest sub-model has %.0f %% of it%s", 100 * most, measured
            )

    # ---- down
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Yield the round's instructions lazily, in the order of client ids."""
        packer = self._packer()
        for one, is_lost in self._instruct(server_round, self._begin_round(server_round), arrays):
            parcel = packer.single(one)
            if is_lost:
                self._drop(one.instruction, parcel.bytes_down)
            else:
                self._round.assigned.append((one.instruction, parcel.bytes_down))
                yield parcel.message

    def _packer(self, size: int = 1) -> Packer:
        return Packer(self.submodels, self._roster.node, size, self.settings.timeout_s)

    def _begin_round(self, server_round: int) -> tuple[int, ...]:
        """Open the record of a round; return its cohort."""
        settings, present = self.settings, self._present(server_round)
        wanted = settings.clients_per_round + settings.extra_clients
        candidates = [client_id for client_id in present if self._takes_part(client_id)]
        if self._private is not None:
            cohort = self._private.cohort(server_round, candidates)
        else:
            cohort = sample_cohort(settings.seed, server_round, candidates, wanted)
        self._open_record(server_round, cohort, present)
        return cohort

    def _open_record(self, server_round: int, cohort: tuple[int, ...], present: Sequence[int]) -> None:
        """Open the record of a round; it begins with the costs of calibration, if there were any."""
        self._round = RoundUnderWay(server_round, cohort, absent=self._absent(present))
        self._round.most_examples = self._most_examples(cohort)
        if self._calibration is not None:
            costs, failures = self._calibration.spent()
            self._round.costs.extend(costs)
            self._round.failures.extend(failures)

    def _instruct(
        self, server_round: int, cohort: Sequence[int], arrays: ArrayRecord
    ) -> Iterator[tuple[Instructed, bool]]:
        """Yield each client's instruction, lazily, and whether the client drops out once it has it."""
        dropped = self._draw_dropouts(server_round, cohort)
        encoded: dict[tuple[SubModelLayout, str, bool], ArrayRecord] = {}  # what several clients share, encoded once
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
                digests[kind] = self._frozen_digest(layout, client_id)
            digest = digests[kind]
            held = bool(digest) and holds(self.state.memory, client_id, digest)
            record = arrays if layout.is_whole and not held else encoded.get((*kind, held))
            if record is None:
                encoded = dict(list(encoded.items())[-7:])
                values = self._received(layout, client_id)
                names = [name for name in values if not (held and name in self.submodels.spec.frozen)]
                record = encoded[*kind, held] = messages.encode_params({name: values[name] for name in names})
            if digest:
                self._round.frozen[client_id] = digest
            instruction = assigned
            if frozen := self.submodels.spec.frozen:
                instruction = replace(assigned, uploads=assigned.uploads - frozen)
            one = Instructed(instruction, record, digest if held else b"", bool(digest))
            yield one, client_id in dropped

    def _absent(self, present: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return the clients that could not be sampled, by reason."""
        joined = self._roster.client_ids
        found = {
            "unavailable": tuple(sorted({*joined} - {*present})) if len(joined) > len(present) else (),
            "no_data": tuple(self._roster.idle_ids),
        }
        return {reason: client_ids for reason, client_ids in found.items() if client_ids}

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
        tally = self._tally(server_round)
        for reply in replies:
            self._count(tally, *self._round.assigned.popleft(), reply)
        return self._conclude(server_round, tally, self._num_good())

    def _train_together(
        self, server_round: int, arrays: ArrayRecord, grid: StackingGrid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Train and aggregate clients of equal assignments in stacks; whom a stack fails is asked alone."""
        packer, sent = self._packer(grid.cohort), deque[Parcel]()
        tally, again = self._tally(server_round), list[Parcel]()

        def note(parcels: Iterable[Parcel]) -> Iterator[Message]:
            for parcel in parcels:
                sent.append(parcel)
                yield parcel.message

        def present() -> Iterator[Instructed]:
            for one, is_lost in self._instruct(server_round, self._begin_round(server_round), arrays):
                if is_lost:
                    self._drop(one.instruction, packer.single(one).bytes_down)
                else:
                    yield one

        for reply in grid.stream(note(packer.parcels(present())), timeout):
            parcel = sent.popleft()
            if not parcel.is_stack:
                self._count(tally, parcel.clients[0].instruction, parcel.bytes_down, reply)
            elif reply.has_error():
                log.debug("round %d: %s; clients of this stack are asked alone", server_round, reason_of(reply))
                again.extend(packer.single(one) for one in parcel.clients)
            else:
                self._count_stack(tally, parcel, reply)
        for reply in grid.stream(note(again), timeout):
            parcel = sent.popleft()
            self._count(tally, parcel.clients[0].instruction, parcel.bytes_down, reply)
        order = {client_id: number for number, client_id in enumerate(self._round.cohort)}
        self._round.costs.sort(key=lambda cost: order.get(cost.client_id, -1))
        tally.answers.sort(key=lambda answer: order[answer[0].client_id])
        return self._conclude(server_round, tally, self._num_good())

    def _num_good(self) -> int:
        return len(self._round.cohort) - len(self._round.failures)

    def _tally(self, server_round: int) -> Tally:
        """Return the empty tally of a round."""
        assert self.state is not None
        guard = RoundGuard(self.state, self._trainable, self._sends_weights)
        return Tally(self._begin(server_round, self.state), guard)

    def _count(self, tally: Tally, instruction: Assignment, bytes_down: int, reply: Message) -> None:
        """Count in the reply of one client."""
        update = self._receive(instruction, bytes_down, reply, tally.guard)
        if update is None:
            return
        layout = self.submodels.layout(SubModel(instruction.submodel.depth, update.widths))
        tally.average.add(update.params, layout.keeps, self._weight(update.num_examples, instruction))
        self._take(tally, instruction, update.report())

    def _take(self, tally: Tally, instruction: Assignment, report: ClientReport) -> None:
        tally.answers.append((instruction, report))
        tally.arrived.append(instruction.client_id)
        if "train-loss" in report.metrics and self._private is None:
            tally.losses.append((report.metrics["train-loss"], report.num_examples))

    def _count_stack(self, tally: Tally, parcel: Parcel, reply: Message) -> None:
        """Count in the reply of several clients; those whose values are out of range are looked at one by one."""
        assigned, first = [one.instruction for one in parcel.clients], parcel.clients[0].instruction
        layout = self.submodels.layout(first.submodel)
        try:
            stack = decode_updates(reply.content, assigned, layout.signature(first.uploads))
        except ProtocolError as error:
            for instruction in assigned:
                self._cost(instruction, parcel.bytes_down, 0, None)
                self._fail(instruction.client_id, "rejected", error)
            return
        uploads = encode_names(first.uploads, self.submodels.names)
        limits = np.array([self._roster.profile(client_id).num_examples for client_id in stack.client_ids])
        examples = np.array(stack.num_examples)
        bounds = find_bounds(stack.params)
        floats = frozenset(name for name, x in stack.params.items() if x.is_floating_point())
        sound = (examples >= 1) & (examples <= limits) & are_in_range(bounds, floats)
        sound &= tally.guard.admit_stack(stack.client_ids, bounds, floats, sound)
        sizes: dict[bool, int] = {}
        parameters = layout.num_params(), layout.num_params(first.uploads)
        macs, epochs = self._costs.macs(first.submodel).training, self.settings.local_epochs
        widths = first.submodel.widths
        good = np.flatnonzero(sound).tolist()
        weights = {k: self._weight(stack.num_examples[k], assigned[k]) for k in good}
        add_stack(tally.average, stack.params, layout.keeps, weights)
        for k in good:
            instruction, loss, count = assigned[k], stack.losses[k], stack.num_examples[k]
            has_loss = math.isfinite(loss)
            if has_loss not in sizes:
                sizes[has_loss] = messages.count_bytes(client_message(stack, k, uploads))
            spent = parcel.bytes_down, sizes[has_loss], *parameters, macs * count * epochs
            self._round.costs.append(ClientCost(instruction.client_id, count, *spent, loss if has_loss else None))
            metrics = {"train-loss": loss} if has_loss else {}
            report = ClientReport(first.server_round, instruction.client_id, count, metrics, widths)
            self._take(tally, instruction, report)
        for k in np.flatnonzero(~sound).tolist():
            message = make_reply(client_message(stack, k, uploads), parcel.message)
            self._count(tally, assigned[k], parcel.bytes_down, message)

    def _before_round(self) -> Mapping[str, Tensor]:
        """Return the values that updates are averaged over: the model's, or zeros where they are differences."""
        assert self.state is not None
        return self.state.params if self._sends_weights else _without_floats(self.state.params)

    def _conclude(
        self,
        server_round: int,
        tally: Tally,
        good: int,
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Make the aggregate of ``good`` updates the new model, where they are enough and it is sound."""
        assert self.state is not None
        state, average, losses = self.state, tally.average, tally.losses
        if losses:
            total = sum(count for _, count in losses)
            self._round.metrics["train_loss"] = sum(loss * count for loss, count in losses) / total
        params, optimizer, memory = dict(state.params), dict(state.optimizer), state.memory
        if good >= self.settings.min_clients or self._private is not None:
            params, coverage = average.result()
            self._note_clipped(tally)
            if not self._sends_weights:
                for name, values in params.items():
                    if values.is_floating_point():
                        values += state.params[name]
            params, optimizer = apply_server_optimizer(
                self._optimizer, state.params, params, state.optimizer, average.covered, self._trainable
            )
            self._round.coverage = layer_coverage(coverage, self.submodels.spec)
            memory = self.policy.remember(memory, server_round, tally.answers)
            if self._private is not None and isinstance(average, NoisedSum):
                memory = self._private.remember(memory, server_round, average)
        else:
            log.warning(
                "round %d: %d good updates, min_clients=%d: the model stays",
                server_round,
                good,
                self.settings.min_clients,
            )
            self._round.coverage = {layer.name: 0.0 for layer in self.submodels.spec.layers}
        lost = frozenset(failure.client_id for failure in self._round.failures)
        memory = note_holders(memory, self._round.frozen, lost)
        self.state = tally.guard.accept(
            replace(state, server_round=server_round, params=params, optimizer=optimizer, memory=memory),
            self._fail if self._private is None else None,  # suspicion would come from values without noise
        )
        if self._private is not None:
            self._round.privacy["clipping_norm"] = self._private.clip(state.memory)
        if self._ledger is not None:
            self._round.privacy |= self._ledger(server_round, self._round.cohort)
        if self.state.params is state.params:
            self._round.coverage = {layer.name: 0.0 for layer in self.submodels.spec.layers}
        return self._encode_model(self.state), MetricRecord(dict(self._round.metrics))

    def _begin(self, server_round: int, state: ServerState) -> Accumulator:
        """Return the round's accumulator."""
        params = self._before_round()
        if self._private is None:
            if (begin := getattr(self._aggregator, "begin_round", None)) is not None:
                bounded: Accumulator = begin(params, self._trainable)
                return bounded
            return self._aggregator.begin(params)
        clients = [client_id for client_id in range(self.settings.num_clients) if self._takes_part(client_id)]
        holders = expected_holders(
            self.policy,
            self.submodels,
            server_round,
            clients,
            self._private.sampling_rate,
            state.memory,
            state.params,
        )
        return self._private.begin(server_round, params, holders, state.memory)

    def _receive(
        self, instruction: Assignment, bytes_down: int, reply: Message, guard: RoundGuard
    ) -> ClientUpdate | None:
        """Return the update of a reply, or None after counting the failure; either way its cost is recorded."""
        client_id = instruction.client_id
        update: ClientUpdate | None = None
        bytes_up = messages.count_bytes(reply.content) if reply.has_content() else 0
        try:
            if reply.has_error():
                raise FedLPError(reason_of(reply))
            profile, coded = self._roster.profile(client_id), self.settings.entropy_coding
            decoded = messages.decode_update(reply.content, instruction, profile, self.submodels, self._encoding, coded)
            guard.admit(decoded, self.submodels.layout(SubModel(instruction.submodel.depth, decoded.widths)).keeps)
            update = decoded
        except FedLPError as error:
            rejected = isinstance(error, ProtocolError)
            self._fail(client_id, "rejected" if rejected else ERROR_KINDS.get(reply.error.code, "error"), error)
        self._cost(instruction, bytes_down, bytes_up, update)
        return update

    def _cost(self, instruction: Assignment, bytes_down: int, bytes_up: int, update: ClientReport | None) -> None:
        """Record the cost of a client, whose update is None if it was not used."""
        layout = self.submodels.layout(instruction.submodel)
        examples = update.num_examples if update else 0
        self._round.costs.append(
            ClientCost(
                client_id=instruction.client_id,
                num_examples=examples,
                bytes_down=bytes_down,
                bytes_up=bytes_up,
                params_down=layout.num_params(),
                params_up=self._num_returned(instruction, update) if update else 0,
                macs=self._costs.macs(instruction.submodel).training * examples * self.settings.local_epochs
                + (update.metrics.get("pruning-macs", 0.0) if update else 0.0),
                train_loss=update.metrics.get("train-loss") if update and self._private is None else None,
            )
        )

    def _weight(self, num_examples: int, instruction: Assignment) -> float:
        """Return the weight of an update in the average."""
        examples = min(float(num_examples), self._round.most_examples)
        match self.settings.weighting:
            case "examples":
                return examples
            case "held":
                held = self.submodels.layout(instruction.submodel).num_params()
                return examples * held / self.submodels.spec.num_params
            case _:
                return 1.0

    def _most_examples(self, cohort: Sequence[int]) -> float:
        """Return the largest number of examples that counts: a multiple of the median of the cohort's profiles."""
        multiple: float | None = getattr(self._aggregator, "max_examples", None)
        if multiple is None or len(cohort) < MIN_HOLDERS:
            return math.inf
        return multiple * lower_median([self._roster.profile(client_id).num_examples for client_id in cohort])

    def _note_clipped(self, tally: Tally) -> None:
        """Record and name the clients whose updates were scaled down."""
        scales: Sequence[float] = getattr(tally.average, "scales", ())
        for client_id, scale in sorted(zip(tally.arrived, scales, strict=False)):
            if scale < 1.0:
                self._round.clipped[client_id] = scale
        if clipped := self._round.clipped:
            log.info("round %d: updates beyond aggregator.max_norm, scaled down: %s", self._round.server_round, clipped)

    def _num_returned(self, instruction: Assignment, update: ClientReport) -> int:
        """Return the number of trainable entries received."""
        layout = self.submodels.layout(SubModel(instruction.submodel.depth, update.widths))
        return layout.num_params(instruction.uploads)

    # ---- helpers
    @property
    def _sends_weights(self) -> bool:
        """Whether updates hold weights; else differences from the sent values, except integers."""
        return not self.settings.sends_deltas

    @property
    def _trainable(self) -> frozenset[str]:
        return frozenset(name for name, info in self.submodels.spec.tensors.items() if info.trainable)


def _without_floats(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros in place of the weights, for sums of differences."""
    return {name: torch.zeros_like(values) if values.is_floating_point() else values for name, values in params.items()}
