"""Whole runs of batched cohorts with a worker that attacks: in a stack each client is checked as if it came alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message

from fedlp.federation.wire.stacks import TRAIN_COHORT
from tests.hostile.attacks import HEADER, Attack, absent, attacked
from tests.integration.running import TINY, Finished, run

STACKED = (*TINY, "clients_per_round=6", "strategy=fedavg", "simulation.batched=true")
EVERYBODY, VICTIM, NEIGHBOUR = tuple(range(6)), 4, 5  # stacks are of two


def row(change: Callable[[np.ndarray], None]) -> Attack:
    """Change the float32 values of one client's row in place."""

    def attack(_: Message, reply: Message) -> Message:
        record, arrays = reply.content["update"], reply.content["params"]
        assert isinstance(arrays, ArrayRecord)
        ids, data = record["client-ids"], bytearray(arrays["float32"].data)
        length = len(data) // len(ids)
        rows = np.frombuffer(data, dtype=np.uint8).reshape(len(ids), length)
        if VICTIM in ids:
            change(rows[ids.index(VICTIM), HEADER:].view("<f4"))
        arrays["float32"] = Array("float32", (len(data),), "numpy.ndarray", bytes(data))
        return reply

    return attack


def fill(value: float) -> Attack:
    def change(values: np.ndarray) -> None:
        values[:] = value

    return row(change)


def listed(record: str, key: str, change: Callable[[list, int], list]) -> Attack:  # type: ignore[type-arg]
    """Change a list with one number per client, given where the victim stands in it."""

    def attack(_: Message, reply: Message) -> Message:
        ids = reply.content["update"]["client-ids"]
        if VICTIM in ids:
            reply.content[record][key] = change(list(reply.content[record][key]), ids.index(VICTIM))
        return reply

    return attack


def replaced(value: float) -> Callable[[list, int], list]:  # type: ignore[type-arg]
    return lambda numbers, k: [*numbers[:k], value, *numbers[k + 1 :]]


def cut(_: Message, reply: Message) -> Message:
    arrays = reply.content["params"]
    assert isinstance(arrays, ArrayRecord)
    if VICTIM in reply.content["update"]["client-ids"]:
        arrays["float32"] = Array("float32", (1,), "numpy.ndarray", bytes(arrays["float32"].data[:-4]))
    return reply


ONE = {  # one client's part is out of range
    "NaN": (fill(float("nan")), "NaN or infinite"),
    "3e38": (fill(3e38), "beyond ±1e+15"),
    "1e9": (fill(1e9), "out of proportion"),
    "more examples than it has": (listed("metrics", "num-examples", replaced(10**6)), "1000000"),
    "a loss of 1e300": (listed("metrics", "train-losses", replaced(1e300)), "train-loss is 1e+300"),
}
ALL = {  # what no part of the stack can be told from
    "an array cut short": (cut, "array float32"),
    "other clients": (listed("update", "client-ids", lambda ids, _: ids[::-1]), "of other clients"),
    "a client twice": (listed("update", "client-ids", lambda ids, k: [ids[k]] * len(ids)), "of other clients"),
    "a number too many": (listed("metrics", "num-examples", lambda counts, _: [*counts, 5]), "no list of 2 numbers"),
}


def assert_close(one: Finished, other: Finished) -> None:
    """Assert that models are equal up to rounding: clients of a stack sum in another order than alone."""
    for name, values in other.tensors.items():
        torch.testing.assert_close(one.tensors[name], values, rtol=1e-4, atol=1e-5)


def first(names: dict[str, object]) -> list[object]:
    """Return the names as parameters, all but the first one slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(names)]


@pytest.mark.parametrize("name", first(ONE))
def test_a_part_out_of_range_is_refused_by_name_and_the_others_count(name: str, tmp_path: Path) -> None:
    attack, words = ONE[name]
    done = run(tmp_path / "a", *STACKED, app=attacked(attack, EVERYBODY, TRAIN_COHORT))
    assert done.failures == [(number, VICTIM, "rejected") for number in (1, 2)]
    assert all(words in line["failures"][0]["message"] for line in done.rounds)
    without = run(tmp_path / "b", *STACKED[:-1], app=attacked(absent, (VICTIM,)))
    assert_close(done, without)


@pytest.mark.parametrize("name", first(ALL))
def test_a_stack_of_another_form_counts_for_none_of_its_clients(name: str, tmp_path: Path) -> None:
    attack, words = ALL[name]
    done = run(tmp_path / "a", *STACKED, app=attacked(attack, EVERYBODY, TRAIN_COHORT))
    assert done.failures == [(number, client, "rejected") for number in (1, 2) for client in (VICTIM, NEIGHBOUR)]
    assert all(words in failure["message"] for line in done.rounds for failure in line["failures"])
    without = run(tmp_path / "b", *STACKED[:-1], app=attacked(absent, (VICTIM, NEIGHBOUR)))
    assert_close(done, without)


def test_poison_in_a_stack_is_scaled_down_by_name(tmp_path: Path) -> None:
    def scale(values: np.ndarray) -> None:
        values *= -10.0

    done = run(tmp_path, *STACKED, app=attacked(row(scale), EVERYBODY, TRAIN_COHORT))
    assert done.failures == []
    assert [list(line["clipped"]) for line in done.rounds] == [[str(VICTIM)]] * 2
