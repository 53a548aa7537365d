"""Tables of a run's end by tier of the fleet: size, bytes and metrics; budgets and what of them was used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fedlp.allocation.budget.costs import given_limits
from fedlp.errors import AllocationError
from fedlp.types import Budget, SubModel

_BYTES = ("bytes_up", "bytes_down")


def describe_tiers(
    tiers: Mapping[int, str],
    held: Callable[[int], SubModel],
    cost: Callable[[SubModel], Mapping[str, float]],
    rounds: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """Return one entry per tier, from the largest sub-model to the smallest.

    Parameters
    ----------
    tiers : mapping from client id to str
        Tier of each client.
    held : callable
        Returns the sub-model of a client; AllocationError where it has none.
    cost : callable
        Returns the costs of a sub-model: ``params``, ``macs``, ``memory_bytes``.
    rounds : sequence of mapping
        Lines of ``rounds.jsonl``.
    metrics : mapping
        Final metrics, of which ``tier_NAME_...`` are the tier's.
    """
    found: dict[str, dict[str, float]] = {}
    for client_id, name in sorted(tiers.items()):
        if name in found:
            found[name]["clients"] += 1
            continue
        with suppress(AllocationError):
            costs = cost(held(client_id))
            found[name] = {"clients": 1, **{key: costs[key] for key in ("params", "macs", "memory_bytes")}}
    for name, entry in found.items():
        spent = [x for line in rounds for x in line["clients"] if tiers.get(x["client_id"]) == name]
        entry |= {key: sum(x[key] for x in spent) for key in _BYTES}
        prefix = f"tier_{name}_"
        entry |= {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: -item[1]["params"]))


def describe_budgets(
    budgets: Sequence[Budget | None],
    tiers: Mapping[int, str],
    held: Callable[[int], SubModel],
    cost: Callable[[SubModel], Mapping[str, float]],
    rounds: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Return limit and use of each limit of each tier; a device with a budget of its own is a tier.

    Parameters
    ----------
    budgets : sequence of Budget or None
        By client id.
    tiers, held, cost, rounds
        As of :func:`describe_tiers`.

    Returns
    -------
    dict
        Tier -> name of the limit -> ``limit`` and ``used``. Used upload bytes are the most that a client of the tier
        sent in one round; the rest are costs of the last round's sub-model. Seconds of a step have no entry.
    """
    groups: dict[tuple[str, Budget], list[int]] = {}
    for client_id, budget in enumerate(budgets):
        if budget is not None:
            groups.setdefault((tiers.get(client_id, ""), budget), []).append(client_id)
    shared = Counter(name for name, _ in groups)
    sent: dict[int, float] = {}
    for client in (client for line in rounds for client in line["clients"]):
        sent[client["client_id"]] = max(sent.get(client["client_id"], 0.0), float(client["bytes_up"]))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, budget), members in groups.items():
        with suppress(AllocationError):
            used = {**cost(held(members[0])), "upload_bytes": max(sent.get(member, 0.0) for member in members)}
            title = name if name and shared[name] == 1 else f"client {members[0]}"
            limits = given_limits(budget)
            found[title] = {key: {"limit": limit, "used": used[key]} for key, limit in limits if key in used}
    return found


def tier_table(tiers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the entries as lines of text; memory is the estimate that budgets are met by."""
    known = {"clients", "params", "macs", "memory_bytes", *_BYTES}
    names = list(dict.fromkeys(key for entry in tiers.values() for key in entry if key not in known))
    head = f"{'tier':<12}{'clients':>8}{'params':>14}{'memory':>12}{'up':>12}{'down':>12}"
    lines = [head + "".join(f"{name:>14}" for name in names)]
    for name, entry in tiers.items():
        line = f"{name:<12}{entry['clients']:>8}{entry['params']:>14,.0f}"
        line += "".join(f"{entry[key] / 1e6:>9,.1f} MB" for key in ("memory_bytes", *_BYTES))
        lines.append(line + "".join(_cell(entry.get(key)) for key in names))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-':>14}" if value is None else f"{value:>14.4f}"
