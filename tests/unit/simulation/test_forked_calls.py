"""Calls in forked processes: the values of one process in their order, and one line for what fails there."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import pytest

from fedlp.errors import ConfigError, FedLPError
from fedlp.simulation.forked_calls import ForkedCalls


def work(value: dict[str, Any]) -> list[float]:
    time.sleep(0.002 * (value["n"] % 3))  # replies come in another order
    return [math.sqrt(value["n"]), float("inf")]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_values_come_in_order_from_any_number_of_workers(workers: int) -> None:
    values = [{"n": n} for n in range(10)]
    with ForkedCalls(work, workers) as calls:
        assert calls.map(values) == [[math.sqrt(n), math.inf] for n in range(10)]
        assert calls.map([]) == []
        assert calls.map(values[:1]) == [[0.0, math.inf]]


def test_processes_inherit_the_function_and_end_with_the_context() -> None:
    held = object()  # nothing that could travel
    with ForkedCalls(lambda _: [os.getpid(), id(held)], 2) as calls:
        found = calls.map(list(range(8)))
        pids = {pid for pid, _ in found}
        assert os.getpid() not in pids
        assert {identity for _, identity in found} == {id(held)}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError("set a=1"), "^set a=1$"),
        (ZeroDivisionError("by zero"), "^a worker process failed: ZeroDivisionError: by zero$"),
    ],
)
def test_an_error_of_a_worker_is_one_line(error: Exception, words: str) -> None:
    def fail(value: int) -> int:
        if value == 2:
            raise error
        return value

    with ForkedCalls(fail, 2) as calls, pytest.raises(FedLPError, match=words):
        calls.map([0, 1, 2, 3])


def test_a_worker_that_is_killed_is_one_line() -> None:
    with (
        ForkedCalls(lambda _: os._exit(9), 2) as calls,
        pytest.raises(FedLPError, match=r"a worker process ended \(exit code 9\)"),
    ):
        calls.map([0])


def test_where_a_system_cannot_fork_this_process_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlp.simulation.forked_calls.start_method", lambda _: "spawn")
    with ForkedCalls(lambda _: os.getpid(), 3) as calls:
        assert calls.map([0, 1]) == [os.getpid()] * 2
