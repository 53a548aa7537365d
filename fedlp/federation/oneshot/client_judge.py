"""Server side of judging plans on clients: their divergences, added up."""

from __future__ import annotations

from collections.abc import Sequence

from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.messages import Question
from fedlp.federation.oneshot.plans import Plan, RefitStates, encode_plans, judgement_parts
from fedlp.federation.oneshot.server import ClientPool
from fedlp.federation.oneshot.settings import Share


class ClientJudge:
    """Judge of plans by the clients of a pool.

    Parameters
    ----------
    states : RefitStates
        What clients hold once they were asked.
    labels : int
        Labels of each example.
    """

    def __init__(self, pool: ClientPool, states: RefitStates, labels: int) -> None:
        self._pool, self._states, self._labels = pool, states, labels

    def divergences(self, plans: Sequence[Plan], share: Share) -> list[float]:
        """Return each plan's mean KL divergence from the dense model over the good clients' labels, in nats.

        All plans travel in one message, and are measured on the same clients.

        Raises
        ------
        FedLPError
            If too few clients give a good answer.
        """
        levels = encode_plans(plans, self._states.layers)
        question = Question(wire.JUDGE, plans=levels, share=share, passes=len(plans) + 1)  # and of the dense model
        parts = judgement_parts(len(plans), self._labels)
        sums, counts = self._pool.total(question, parts, self._states)
        found: list[float] = (sums[parts[0].name] / (self._labels * sum(counts))).tolist()
        return found
