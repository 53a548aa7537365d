"""Section on failures and attacks: clients that failed, were refused or clipped, and those that were absent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fedlp.report.groups import Group
from fedlp.report.html import table

_MOST_FAILURES = 200


def failures_section(groups: Sequence[Group]) -> str:
    """Return the counts by method and reason, and each failure; empty where nothing happened."""
    failed = list(_failed(groups))
    counted = Counter((row[0], "failed or refused", row[4]) for row in failed)
    for group in groups:
        for record in (record for run in group.runs for record in run.rounds):
            if record.clipped:
                counted[group.label, "clipped", "its norm was beyond the bound"] += len(record.clipped)
            for reason, clients in record.absent.items():
                counted[group.label, "not sampled", reason] += len(clients)
    if not counted:
        return ""
    caption = "Clients by what happened to them, counted once a round. A hostile update is refused under its reason."
    head = ["method", "what happened", "reason", "count"]
    found = table(head, [[*key, count] for key, count in counted.items()], caption)
    return found + (_each(failed) if failed else "")


def _each(failed: Sequence[Sequence[Any]]) -> str:
    head = ["method", "seed", "round", "client", "reason", "message"]
    more = len(failed) - _MOST_FAILURES
    rest = f'<p class="soft">and {more} more.</p>' if more > 0 else ""
    rows = table(head, failed[:_MOST_FAILURES], "Client failures.")
    return f"<details><summary>Each failure</summary>{rows}{rest}</details>"


def _failed(groups: Sequence[Group]) -> Iterator[list[Any]]:
    for group in groups:
        for run in group.runs:
            for record in run.rounds:
                for one in record.failures:
                    yield [group.label, run.seed, record.server_round, one.client_id, one.reason, one.message]
