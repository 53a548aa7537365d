"""Evaluation on clients: each client's sub-model on its own test examples, and the distribution over clients.

Only sums over a client's examples travel, checked like all numbers from outside. The record of a round holds, for
``loss`` and each metric of the task, such as ``accuracy``:

==========================  ============================================================
``client_accuracy``         mean over clients, weighted by their test examples
``client_accuracy_mean``    plain mean
``client_accuracy_median``
``client_accuracy_worst``   mean of the worst tenth of the clients, at least one
``client_accuracy_best``    mean of the best tenth
``client_accuracy_tier_T``  weighted mean of the clients of tier T, where there are several
==========================  ============================================================

With privacy, only the metrics of all clients' total sums are recorded.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import nn

from fedlp.data.examples import DataInfo
from fedlp.errors import DataError, FedLPError, ProtocolError
from fedlp.federation.costs import Costs
from fedlp.federation.sampling import sample_cohort
from fedlp.federation.server.exchange import exchange, kind_of, reason_of
from fedlp.federation.server.round_record import RoundUnderWay
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire import evaluation_messages, messages
from fedlp.federation.wire.ranges import MOST_EXAMPLES
from fedlp.rng import Stream, generator
from fedlp.tasks import Sums, Task, add_sums, task_of
from fedlp.training.evaluation import evaluate_sums
from fedlp.types import ClientCost, ClientEvaluation, EvaluationRequest, SubModel

log = logging.getLogger("fedlp")

PREFIX = "client_"
_DECILE = 0.1
_ROUNDING = 1e-6
_TRAINING_PASSES = 3  # of a training step, in forward passes

Values = Callable[[SubModelLayout, int, ArrayRecord], messages.Sent]
"""Returns the encoded values of a layout for a client, by its id; those of the global model are given."""

Fail = Callable[[int, str, FedLPError], None]
"""Counts and names a failed client: its id, the kind of failure, the error."""


@dataclass(frozen=True)
class ClientEvaluationSettings:
    """Settings of evaluations on clients.

    Attributes
    ----------
    task : Task
        Task whose metrics are computed from sums.
    lengths : mapping from name to int
        Length of each sum from clients; 0 for a scalar. See :func:`sum_lengths`.
    seed : int
        Seed of the draw of clients, >= 0.
    num_clients : int or None
        Clients that evaluate; all if None.
    most_predictions : float
        Most predictions of an example.
    steps_examples : int
        Examples that a client trains on before it evaluates, for the count of its MACs.
    is_private : bool
        Whether only metrics of all clients' sums together are recorded.
    """

    task: Task
    lengths: Mapping[str, int]
    seed: int = 0
    num_clients: int | None = None
    most_predictions: float = math.inf
    steps_examples: int = 0
    is_private: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """Evaluating client: its node, sub-model, tier, and number of test examples as its profile says, if it does."""

    client_id: int
    node: int
    submodel: SubModel
    tier: str
    measures_statistics: bool
    num_test: int | None = None


class ClientEvaluator:
    """Evaluation round on clients."""

    def __init__(self, submodels: SubModels, settings: ClientEvaluationSettings) -> None:
        self._submodels, self.settings, self._costs = submodels, settings, Costs(submodels)

    def choose(self, server_round: int, client_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the evaluating clients of a round, sorted."""
        if not client_ids:
            return ()
        count = self.settings.num_clients or len(client_ids)
        return sample_cohort(self.settings.seed, server_round, client_ids, count, Stream.EVALUATION)

    def run(
        self,
        grid: Grid,
        asked: Iterable[Asked],
        values: Values,
        whole: ArrayRecord,
        round_: RoundUnderWay,
        fail: Fail,
        timeout: float,
    ) -> dict[str, float]:
        """Return the distribution of metrics over clients; a client's metrics and costs go into the round's record.

        Parameters
        ----------
        values : callable
            Returns the encoded values of a layout that a client receives.
        whole : ArrayRecord
            The encoded global values.
        """
        waiting: deque[tuple[Asked, SubModelLayout, int]] = deque()
        requests = self.requests(round_.server_round, asked, values, whole, waiting, timeout)
        found: list[ClientEvaluation] = []
        totals: list[Sums] = []
        for reply in exchange(grid, requests, timeout):
            client, layout, bytes_down = waiting.popleft()
            count = 0
            try:
                sums, evaluation = self._read(client, reply)
                totals.append(sums)
                found.append(evaluation)
                count = evaluation.num_examples
            except FedLPError as error:
                kind = kind_of(reply.error) if reply.has_error() else "rejected"
                fail(client.client_id, kind, error)
            bytes_up = messages.count_bytes(reply.content) if reply.has_content() else 0
            macs = self.macs(client.submodel, count)
            round_.costs.append(ClientCost(client.client_id, 0, bytes_down, bytes_up, layout.num_params(), 0, macs))
        if not found:
            return {}
        if self.settings.is_private:
            return {PREFIX + name: value for name, value in total_metrics(self.settings.task, totals).items()}
        round_.evaluations += found
        return summarize_clients(found, directions(self.settings.task))

    def requests(
        self,
        server_round: int,
        asked: Iterable[Asked],
        values: Values,
        whole: ArrayRecord,
        waiting: deque[tuple[Asked, SubModelLayout, int]],
        timeout: float,
    ) -> Iterator[Message]:
        """Yield the requests lazily; consecutive clients of one layout and tier share an encoding."""
        last: tuple[tuple[SubModelLayout, str], messages.Sent] | None = None
        for client in asked:
            layout = self._submodels.layout(client.submodel)
            key = layout, client.tier
            if last is None or last[0] != key:
                last = key, values(layout, client.client_id, whole)
            request = EvaluationRequest(server_round, client.client_id, client.submodel, {}, client.measures_statistics)
            content = evaluation_messages.encode_evaluation_request(request, last[1], self._submodels)
            waiting.append((client, layout, messages.count_bytes(content)))
            kind, group = messages.EVALUATE_CLIENT, str(server_round)
            yield Message(content, client.node, kind, group_id=group, ttl=timeout)

    def _read(self, client: Asked, reply: Message) -> tuple[Sums, ClientEvaluation]:
        """Return a client's sums and metrics; FedLPError if it failed or they are impossible."""
        if reply.has_error():
            raise FedLPError(reason_of(reply))
        who = f"client {client.client_id}"
        most = MOST_EXAMPLES if client.num_test is None else client.num_test
        sums, count = evaluation_messages.decode_client_sums(
            reply.content, self.settings.lengths, who, most, self.settings.most_predictions
        )
        metrics = read_metrics(self.settings.task, sums, who)
        return sums, ClientEvaluation(client.client_id, client.tier, count, metrics)

    def macs(self, submodel: SubModel, num_examples: int) -> float:
        """Return the MACs of an evaluation."""
        training = self._costs.macs(submodel).training
        steps = self.settings.steps_examples if num_examples else 0
        return training / _TRAINING_PASSES * num_examples + training * steps


def read_metrics(task: Task, sums: Sums, who: str) -> dict[str, float]:
    """Return the metrics of a client's sums; ProtocolError if sums of its examples cannot give them."""
    try:
        metrics = task.summarize(sums)
    except (DataError, ArithmeticError, ValueError, LookupError, TypeError) as error:
        raise ProtocolError(f"{who}: its evaluation sums give no metrics ({type(error).__name__}: {error})") from error
    bounds = {metric.label: getattr(metric, "bounds", (-math.inf, math.inf)) for metric in task.measures()}
    for label, (low, high) in {**bounds, "loss": (task.least_loss, math.inf)}.items():
        value = metrics[label]
        if value < low - _ROUNDING or value > high + _ROUNDING:
            raise ProtocolError(f"{who}: its {label} is {value:g}, outside [{low:g}, {high:g}]")
    return metrics


def total_metrics(task: Task, parts: Sequence[Sums]) -> dict[str, float]:
    """Return the metrics of all clients' sums together; none, with a warning, where the total cannot give them."""
    try:
        return read_metrics(task, add_sums(parts), "the sum of all clients")
    except ProtocolError as error:
        log.warning("no metrics of clients: %s", error)
        return {}


def sum_lengths(model: nn.Module, info: DataInfo) -> dict[str, int]:
    """Return the length of each evaluation sum of a task, 0 for a scalar: found on two random examples."""
    examples = task_of(info).draw_examples(info, 2, generator(0, Stream.EVALUATION))
    sums = evaluate_sums(model, examples, info, batch_size=2)
    return {name: len(value) if isinstance(value, list) else 0 for name, value in sums.items()}


def directions(task: Task) -> dict[str, bool]:
    """Return whether larger is better, for ``loss`` and each metric of a task."""
    return {"loss": False} | {metric.label: metric.larger_is_better for metric in task.measures()}


def summarize_clients(
    evaluations: Sequence[ClientEvaluation], larger_is_better: Mapping[str, bool]
) -> dict[str, float]:
    """Return the distribution of each metric over clients; values that are not finite are left out.

    Parameters
    ----------
    evaluations : sequence of ClientEvaluation
        At least one.
    larger_is_better : mapping from metric to bool
    """
    tiers = sorted({evaluation.tier for evaluation in evaluations})
    found: dict[str, float] = {}
    for name, larger in larger_is_better.items():
        known = [one for one in evaluations if math.isfinite(one.metrics[name])]
        values = np.array([one.metrics[name] for one in known])
        if not known:
            continue
        ordered = np.sort(values) if larger else np.sort(values)[::-1]  # the worst first
        tenth = max(1, round(_DECILE * len(values)))
        key = PREFIX + name
        found |= {
            key: _weighted_mean(known, name),
            f"{key}_mean": float(values.mean()),
            f"{key}_median": float(np.median(values)),
            f"{key}_worst": float(ordered[:tenth].mean()),
            f"{key}_best": float(ordered[-tenth:].mean()),
        }
        for tier in tiers if len(tiers) > 1 else ():
            if members := [one for one in known if one.tier == tier]:
                found[f"{key}_tier_{tier}"] = _weighted_mean(members, name)
    return found


def _weighted_mean(evaluations: Sequence[ClientEvaluation], name: str) -> float:
    values = [one.metrics[name] for one in evaluations]
    return float(np.average(values, weights=[one.num_examples for one in evaluations]))
