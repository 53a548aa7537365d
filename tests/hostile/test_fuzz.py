"""A mutation fuzzer over every kind of reply: refused by name in no time, or accepted and in range; nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from fedlp.errors import ProtocolError
from fedlp.federation.flower_compat import become_server
from fedlp.federation.server.exchange import reason_of
from fedlp.federation.wire import messages
from tests.hostile.conftest import Figures
from tests.hostile.mutations import TEXTS, mutate
from tests.hostile.targets import Target, all_targets

TARGETS = list(all_targets())
MOST_SECONDS = 1.0
LONGEST_TEXT = 400


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_an_honest_reply_is_accepted(target: Target) -> None:
    target.decode(target.honest)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_any_mutation_is_refused_by_name_or_harmless(target: Target, num_cases: int, figures: Figures) -> None:
    refused, seconds = 0, [0.0]
    cases = -(-num_cases // len(TARGETS))
    for seed in range(cases):
        content = mutate(np.random.default_rng((seed, 7)), target.honest)
        started = time.process_time()
        messages.count_bytes(content)
        try:
            target.decode(content)
        except ProtocolError as error:
            text = str(error)
            assert text.startswith(target.named), f"case {seed}: {text}"
            assert text.isprintable(), f"case {seed}: {text!r}"
            assert len(text) < LONGEST_TEXT, f"case {seed}: {text}"
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {seed} of {target.name}: {type(error).__name__}: {error}") from error
        taken = time.process_time() - started
        assert taken < MOST_SECONDS, f"case {seed} took {taken:.1f} s"
        seconds.append(taken)
    assert refused > cases // 4, "the fuzzer hardly finds what is refused"
    target.decode(target.honest)
    figures[target.name] = {
        "cases": cases,
        "refused": refused,
        "cpu_s": round(sum(seconds), 2),
        "slowest_s": round(max(seconds), 4),
    }


def test_any_reason_of_an_error_is_one_short_line(num_cases: int, figures: Figures) -> None:
    started = time.process_time()
    become_server()
    to = Message(RecordDict(), 1, "train")
    for seed in range(num_cases // 10):
        rng = np.random.default_rng(seed)
        parts = [TEXTS[int(i)] for i in rng.integers(len(TEXTS), size=int(rng.integers(0, 6)))]
        parts.append("".join(map(chr, rng.integers(0, 0xD800, size=int(rng.integers(0, 400))))))
        text = reason_of(Message(Error(int(rng.integers(-5, 1000)), "".join(parts)), reply_to=to))
        assert text
        assert text.isprintable()
        assert len(text) <= 203
    figures["error reply"] = {"cases": num_cases // 10, "cpu_s": round(time.process_time() - started, 2)}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_what_is_refused_leaves_no_memory_behind(num_cases: int, figures: Figures) -> None:
    target = TARGETS[1]
    cases = num_cases // 10

    def spend(first: int) -> None:
        for seed in range(first, first + cases):
            try:
                target.decode(mutate(np.random.default_rng((seed, 8)), target.honest))
            except ProtocolError:
                continue

    spend(0)
    before = resident()
    spend(cases)
    grown = resident() - before
    assert grown < 64e6
    figures["memory after refusals"] = {"cases": cases, "grown_mb": round(grown / 1e6, 1)}
