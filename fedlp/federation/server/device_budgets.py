"""Budgets that devices bring: the policy is fitted to them, and a client whose budget cannot be met is dismissed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedlp.errors import FedLPError
from fedlp.federation.server.roster import Roster
from fedlp.federation.strategies.policy import Policy
from fedlp.types import Budget

log = logging.getLogger("fedlp")


@dataclass(frozen=True, slots=True)
class DeviceBudgets:
    """Budgets of the clients of a roster.

    Attributes
    ----------
    fit : callable, optional
        Returns the policy that meets the budgets by client id; without it, one policy holds for all.
    """

    roster: Roster
    fit: Callable[[Mapping[int, Budget]], Policy] | None

    def meet(self, policy: Policy) -> Policy:
        """Return the policy fitted to devices' own budgets; ``policy`` if no device brings one."""
        if (brought := self.roster.budgets) and self.fit is not None:
            return self.fit(brought)
        return policy

    def meet_or_dismiss(self, policy: Policy) -> Policy:
        """Return the fitted policy; dismiss clients whose budgets cannot be met, unless that leaves none."""
        try:
            return self.meet(policy)
        except FedLPError:
            assert self.fit is not None
            for client_id, budget in self.roster.budgets.items():
                try:
                    self.fit({client_id: budget})
                except FedLPError as error:
                    self.roster.dismiss(client_id, error)
            if not self.roster.client_ids:
                raise
            return self.meet(policy)

    def welcome(self, policy: Policy, server_round: int, grid: Grid, timeout: float) -> Policy:
        """Admit clients that joined since the last round, or dismiss them; return the fitted policy."""
        for client_id in self.roster.refresh(grid, timeout):
            try:
                policy = self.meet(policy)
            except FedLPError as error:
                self.roster.dismiss(client_id, error)
            else:
                log.warning("round %d: client %d has joined", server_round, client_id)
        return policy
