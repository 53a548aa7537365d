"""Server side of federated one-shot pruning: clients send sums over their examples, the server prunes.

Sums of disjoint data sets add up, so pruning on all clients' sums is pruning on their data in one place; no client
sends data, and since the server only adds, neither would it have to see a single client's sums.

Longer than other files: one cohort, all of whose questions read the states that clients have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedlp.errors import FedLPError, ProtocolError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.accounts import PoolAccounts
from fedlp.federation.oneshot.messages import Part, Question, Request
from fedlp.federation.oneshot.model import States
from fedlp.federation.oneshot.outliers import drop_outliers
from fedlp.federation.oneshot.secure_pool import SecurePool
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.sampling import sample_cohort
from fedlp.federation.server.exchange import exchange, kind_of, reason_of
from fedlp.federation.server.roster import Roster
from fedlp.federation.wire.messages import count_bytes, encode_params
from fedlp.types import Keep, RoundRecord

_Answer = TypeVar("_Answer")


class ClientPool:
    """Clients whose data are pooled: one cohort for the whole run.

    Parameters
    ----------
    grid, roster
        Clients that have joined.
    axes : sequence of str
        The model's width axes.
    macs : float
        Largest cost of one example per question.
    candidates : sequence of int, optional
        Clients that the cohort is drawn from; all on the roster if absent.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        settings: OneShotSettings,
        axes: Sequence[str],
        macs: float,
        candidates: Sequence[int] | None = None,
    ) -> None:
        self._axes = tuple(axes)
        self.batch_size = settings.batch_size
        self._grid, self._roster, self._settings = grid, roster, settings
        self._accounts = PoolAccounts(macs)
        candidates = roster.client_ids if candidates is None else candidates
        self.cohort = sample_cohort(settings.seed, 1, candidates, settings.clients_per_round)
        self._has = dict.fromkeys(self.cohort, 0)  # the last state that each client is known to have
        self.dtype = settings.dtype
        self.dismissed: set[int] = set()  # clients that are proven to have dealt false shares
        self._secure = self._secure_pool()

    def _secure_pool(self) -> SecurePool | None:
        """Return the secure sums of the answers; None without secure aggregation."""
        settings = self._settings
        if settings.secagg is None:
            return None
        calls = self._roster.node, self._most_examples, self._accounts.fail, self._dismiss
        return SecurePool(settings.secagg, self._grid, *calls, settings.timeout_s, settings.batch_size)

    # ---- rounds: one per layer
    def begin(self, server_round: int) -> None:
        """Start the counts of a new line of ``rounds.jsonl``."""
        self._accounts.begin(server_round)

    def finish(self, coverage: Mapping[str, float], metrics: dict[str, float], wall_time_s: float) -> RoundRecord:
        """Return the record since :meth:`begin`; its cohort holds all clients that were asked."""
        return self._accounts.finish(coverage, metrics, wall_time_s)

    def send_model(self, params: Mapping[str, Tensor]) -> None:
        """Send the cohort the model that questions are about; a client that does not take it on is asked nothing."""
        content = RecordDict({wire.PARAMS: encode_params(params)})
        size, numbers = count_bytes(content), sum(tensor.numel() for tensor in params.values())
        ttl, group = self._settings.timeout_s, str(self._accounts.record.server_round)
        requests = [
            Message(content, self._roster.node(client_id), wire.MODEL, group_id=group, ttl=ttl)
            for client_id in self.cohort
        ]
        taken = []
        for client_id, reply in zip(self.cohort, exchange(self._grid, requests, ttl), strict=True):
            self._accounts.spend(client_id, bytes_down=size, params_down=numbers)
            if reply.has_error() or not wire.is_taken(reply.content):
                reason = reason_of(reply) if reply.has_error() else "it has not taken on the model"
                self._accounts.fail(client_id, "error", FedLPError(reason))
                continue
            self._accounts.spend(client_id, bytes_up=count_bytes(reply.content))
            taken.append(client_id)
        self.cohort = tuple(taken)
        if not taken:
            raise FedLPError("no client has taken on the model; the lines above say why")

    # ---- questions
    def total(self, question: Question, parts: Sequence[Part], states: States) -> tuple[dict[str, Tensor], list[int]]:
        """Return the clients' sums added up in the order of their ids, and each good client's number of examples.

        Symmetric sums are (n, n), filled on and below the diagonal.

        Raises
        ------
        FedLPError
            If fewer than ``min_clients``, or none, give a good answer.
        """
        return self._add(question, parts, states, 1)[0]

    def halves(
        self, question: Question, parts: Sequence[Part], states: States
    ) -> list[tuple[dict[str, Tensor], list[int]]]:
        """Return two halves of :meth:`total`: of every other good client and of the rest, if any.

        A cohort of one client is asked twice, about every other one of its examples and about the rest.
        """
        is_alone = self._secure is None and len(self.cohort) == 1
        if is_alone and self._most_examples(self.cohort[0], question.share) > 1:
            return [self.total(replace(question, half=half), parts, states) for half in (1, 2)]
        return self._add(question, parts, states, 2)

    def _add(
        self, question: Question, parts: Sequence[Part], states: States, groups: int
    ) -> list[tuple[dict[str, Tensor], list[int]]]:
        """Return the sums and example counts of the good clients by turns in some groups, those of nobody left out.

        With secure aggregation there is one example count of a group.
        """
        if self._secure is not None:
            return self._add_secure(question, parts, states, groups)
        sums: list[dict[str, Tensor]] = [{} for _ in range(groups)]
        counts: list[list[int]] = [[] for _ in range(groups)]
        for number, (values, count) in enumerate(self.answers(question, parts, states)):
            group = number % groups
            before = sums[group]
            sums[group] = {name: before[name] + value for name, value in values.items()} if before else dict(values)
            counts[group].append(count)
        return [(_unpack(found, parts), asked) for found, asked in zip(sums, counts, strict=True) if asked]

    def _add_secure(
        self, question: Question, parts: Sequence[Part], states: States, groups: int
    ) -> list[tuple[dict[str, Tensor], list[int]]]:
        """Return the opened sums of some groups of clients, lost ones left out; each with its number of examples."""
        assert self._secure is not None
        requests = list(self._contents(question, states, self.cohort))
        answers, spent = self._secure.ask(question, parts, requests, groups, self._accounts.record)
        shares = {x: answer.num_examples // len(answer.survivors) for answer in answers for x in answer.survivors}
        for client_id, member in spent.items():
            self._has[client_id] = len(states.changed) if client_id in shares else 0  # it may have taken none of them
            sent = sum(part.num_sent for part in parts) if client_id in shares else 0
            cost = {"bytes_down": member.bytes_down, "bytes_up": member.bytes_up, "params_up": sent}
            self._accounts.spend(client_id, question.passes, num_examples=shares.get(client_id, 0), **cost)
        self._require(len(shares), question, states)
        return [(_unpack(answer.sums, parts), [answer.num_examples]) for answer in answers]

    def answers(
        self, question: Question, parts: Sequence[Part], states: States
    ) -> Iterator[tuple[Mapping[str, Tensor], int]]:
        """Yield the sums and number of examples of each good client; see :meth:`total`."""

        def decode(content: RecordDict, most: int, who: str) -> tuple[dict[str, Tensor], int]:
            return wire.decode_sums(content, parts, question.layer, most, self.dtype, who)

        def reject(client_id: int, error: ProtocolError) -> None:
            who = f"client {client_id}, {self._describe(question, states)}"
            self._accounts.fail(client_id, "rejected", ProtocolError(f"{who}: {error}"))

        asked = self.ask(question, states, decode, sum(part.num_sent for part in parts))
        good = 0
        for answer in drop_outliers(asked, question.kind, parts, reject):
            good += 1
            yield answer
        self._require(good, question, states)

    def votes(self, question: Question, axes: Mapping[str, int], states: States) -> dict[str, Tensor]:
        """Return how many clients keep each unit of each layer; with secure aggregation their sum alone is seen."""
        parts = wire.vote_parts(question.kept, axes)
        if self._secure is not None:
            return self._add_secure(question, parts, states, 1)[0][0]

        def decode(content: RecordDict, most: int, who: str) -> tuple[dict[str, Keep], int]:
            return wire.decode_vote(content, question.kept, axes, most, who)

        found = {part.name: torch.zeros(part.shape, dtype=torch.float64) for part in parts}
        for _, vote, _ in self.ask(question, states, decode):
            for name, ballots in wire.ballots(vote).items():
                found[name] += ballots
        return found

    def ask(
        self,
        question: Question,
        states: States,
        decode: Callable[[RecordDict, int, str], tuple[_Answer, int]],
        params_up: int = 0,
    ) -> Iterator[tuple[int, _Answer, int]]:
        """Yield each client's id, answer and number of examples, in order; failures are counted and named.

        Clients that lack the expected base state are sent all changes at the end.

        Parameters
        ----------
        decode : callable
            Returns an answer from its records, the most examples allowed and the client's name in errors.
        params_up : int
            Numbers in an answer.
        """
        good, asked = 0, list(self.cohort)
        for is_last in (False, True):
            if not asked:
                break
            lacking: list[int] = []
            replies = exchange(self._grid, self._requests(question, states, asked), self._settings.timeout_s)
            for client_id, reply in zip(asked, replies, strict=True):
                if reply.has_content() and wire.is_lack(reply.content) and not is_last:
                    self._accounts.spend(client_id, bytes_up=count_bytes(reply.content))
                    self._has[client_id] = 0
                    lacking.append(client_id)
                elif (answer := self._receive(question, states, client_id, reply, decode)) is not None:
                    self._has[client_id] = len(states.changed)
                    self._accounts.spend(client_id, params_up=params_up)
                    good += 1
                    yield client_id, *answer
            asked = lacking
        self._require(good, question, states)

    def _require(self, good: int, question: Question, states: States) -> None:
        """Raise FedLPError if too few answers are good."""
        if good < max(1, self._settings.min_clients):
            raise FedLPError(
                f"{self._describe(question, states)}: {good} of {len(self.cohort)} clients gave a good answer, "
                f"min_clients={self._settings.min_clients}; the lines above say why"
            )

    def _requests(self, question: Question, states: States, asked: Sequence[int]) -> Iterator[Message]:
        for client_id, content in self._contents(question, states, asked):
            self._accounts.spend(client_id, bytes_down=count_bytes(content))
            ttl = self._settings.timeout_s
            group = str(self._accounts.record.server_round)
            yield Message(content, self._roster.node(client_id), question.kind, group_id=group, ttl=ttl)

    def _contents(self, question: Question, states: States, asked: Sequence[int]) -> Iterator[tuple[int, RecordDict]]:
        """Yield each client's request."""
        encoded: dict[int, tuple[Request, ArrayRecord]] = {}  # what several clients lack is encoded once
        for client_id in asked:
            has = self._has[client_id]
            if has not in encoded:
                layers = tuple(states.changed[has:])
                tensors = states.tensors(layers)
                request = Request(question, states.names[has], states.name, layers, tensors)
                encoded[has] = request, encode_params(tensors)
            request, params = encoded[has]
            content = wire.encode_request(request, self._axes, params)
            numbers = sum(tensor.numel() for tensor in request.tensors.values())
            numbers += 0 if question.reference is None else len(question.reference)
            self._accounts.spend(client_id, params_down=numbers)
            yield client_id, content

    def _receive(
        self,
        question: Question,
        states: States,
        client_id: int,
        reply: Message,
        decode: Callable[[RecordDict, int, str], tuple[_Answer, int]],
    ) -> tuple[_Answer, int] | None:
        """Return the answer of a reply, or None after counting the failure; either way its cost is recorded."""
        who = f"client {client_id}, {self._describe(question, states)}"
        try:
            if reply.has_error():
                raise FedLPError(reason_of(reply))
            self._accounts.spend(client_id, bytes_up=count_bytes(reply.content))
            if wire.is_lack(reply.content):
                raise ProtocolError(f"{who}: it cannot reach the server's model; its initial model must be another")
            most = self._most_examples(client_id, question.share)
            answer, num_examples = decode(reply.content, most, who)
        except FedLPError as error:
            reason = "rejected" if isinstance(error, ProtocolError) else kind_of(reply.error)
            self._accounts.fail(client_id, reason, error)
            return None
        self._accounts.spend(client_id, question.passes, num_examples=num_examples)
        return answer, num_examples

    def _most_examples(self, client_id: int, share: int) -> int:
        """Return the most examples that a client's answer may be of."""
        return min(self._roster.profile(client_id).num_examples, self._settings.most_examples(share))

    def _dismiss(self, client_id: int) -> None:
        """Ask a client nothing any more."""
        self.dismissed.add(client_id)
        self.cohort = tuple(other for other in self.cohort if other != client_id)

    @staticmethod
    def _describe(question: Question, states: States) -> str:
        return question.kind + (f" of {states.layers[question.layer].name}" if question.kind == wire.MOMENTS else "")


def _unpack(sums: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return sums of which symmetric ones are (n, n)."""
    symmetric = [part for part in parts if part.symmetric]
    return {**sums, **{part.name: wire.unpack_symmetric(sums[part.name], part.shape[0]) for part in symmetric}}


def most_votes(votes: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Keep]:
    """Return the units of each layer that most votes keep, ``kept`` of them; the lower index where votes are equal."""
    widths = {}
    for name, count in kept.items():
        order = torch.sort(votes[name], descending=True, stable=True).indices
        widths[name] = Keep.from_indices(order[:count].sort().values.numpy(), len(votes[name]))
    return widths
