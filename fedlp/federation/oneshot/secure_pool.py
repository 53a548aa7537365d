"""Questions of one-shot pruning by secure aggregation: the server learns sums over groups of clients alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedlp.errors import FedLPError, ProtocolError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.messages import Part, Question
from fedlp.federation.secagg.group_sum import GroupSum
from fedlp.federation.secagg.phases import Fail, Group, Member, SecureExchange
from fedlp.federation.secagg.pooled_sums import PooledSums
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.server.round_record import RoundUnderWay


@dataclass(frozen=True)
class PooledAnswer:
    """The sum of a group.

    Attributes
    ----------
    sums : dict from part name to Tensor
        Packed as sent, float64.
    """

    sums: dict[str, Tensor]
    num_examples: int
    survivors: tuple[int, ...]


@dataclass(frozen=True)
class SecurePool:
    """Secure sums of the answers to questions.

    Attributes
    ----------
    node : callable
        Returns the node of a client.
    most_examples : callable
        Returns the most examples that a client's answer about a share of its examples may be of.
    fail : callable
        Counts and names a client that failed.
    convict : callable
        Told of a client that is proven to have dealt false shares.
    timeout_s : float
        Deadline of an answer.
    batch_size : int
        Examples of a client's batch.
    """

    settings: SecAggSettings
    grid: Grid
    node: Callable[[int], int]
    most_examples: Callable[[int, int], int]
    fail: Fail
    convict: Callable[[int], None]
    timeout_s: float
    batch_size: int

    def ask(
        self,
        question: Question,
        parts: Sequence[Part],
        requests: Sequence[tuple[int, RecordDict]],
        groups: int,
        round_: RoundUnderWay,
    ) -> tuple[list[PooledAnswer], dict[int, Member]]:
        """Return the sums of clients by turns in some groups, lost ones left out; and what each client cost.

        Parameters
        ----------
        requests : sequence of (int, RecordDict)
            Request of each client.
        round_ : RoundUnderWay
            Counts the bytes of each phase.
        """
        run = SecureExchange(self.settings, self.grid, self.node, round_, self.fail)
        made: list[tuple[Group, PooledSums]] = []
        for number in range(groups):
            members = {client_id: Member(content) for client_id, content in requests[number::groups]}
            if run.is_large_enough(members):
                layout = PooledSums(question.kind, parts, len(members))
                secure = GroupSum(self.settings, round_.server_round)
                most = max(self.most_examples(client_id, question.share) for client_id in members)
                made.append((Group(members, secure, 0, layout.size, most), layout))
        kind = question.kind
        run.run([group for group, _ in made], kind.removeprefix("query."), kind, self.timeout_s)
        answers = [self._open(run, group, question, parts) for group, _ in made]
        spent = {client_id: member for group, _ in made for client_id, member in group.members.items()}
        return [answer for answer in answers if answer is not None], spent

    def _open(
        self, run: SecureExchange, group: Group, question: Question, parts: Sequence[Part]
    ) -> PooledAnswer | None:
        """Return the checked sum of a group; None where it is lost, whose clients are counted."""
        total = run.open(group, self.convict)
        if total is None:
            return None
        survivors = group.sum.survivors
        layout = PooledSums(question.kind, parts, len(group.sum.dealers))
        sums, examples = layout.decode(total[1])
        if question.kind != wire.VOTE:
            sums = layout.padded(sums)  # as factorisations need them
        try:
            size = self.batch_size if question.kind == wire.NORMS else 1  # whose examples are whole batches
            most = sum(-(-self.most_examples(x, question.share) // size) * size for x in survivors)
            if not len(survivors) <= examples <= most:
                raise ProtocolError(f"the sum of {len(survivors)} answers is of {examples} examples, not up to {most}")
            who = f"the sum of {len(survivors)} clients"
            if question.kind == wire.VOTE:
                wire.check_ballots(sums, question.kept, len(survivors), who)
            else:
                wire.check_sums(sums, parts, examples, who)
        except ProtocolError as error:
            run.give_up(group, FedLPError(str(error)))
            return None
        return PooledAnswer(sums, examples, survivors)
