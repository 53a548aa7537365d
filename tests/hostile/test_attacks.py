"""Whole runs with attackers: what is refused is as if its sender were absent; what is not leaves a usable run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.federation.oneshot import messages as pooling
from fedlp.federation.wire import messages
from fedlp.report import load_run
from tests.hostile import attacks
from tests.hostile.attacks import Attack, absent, attacked
from tests.integration.running import TINY, Finished, run
from tests.integration.test_adapter_ranks import RANKED, RULES

ATTACKERS = (1, 4)
NORMED = (
    *(word for word in TINY if "variant" not in word),
    "model=fedlp_cnn",
    "clients_per_round=6",
    "strategy=fedavg",
)
ADAM = ("server_optimizer=adam", "server_optimizer.lr=0.01")
MOMENTUM = ("server_optimizer=momentum",)
ONESHOT = (
    *("federated=true", "model=small_cnn", "dataset=digits", "dataset.max_train_examples=120", "num_clients=4"),
    *("dataset.max_test_examples=30", "clients_per_round=4", "sparsity=0.4", "simulation.workers=2"),
    *("calibration.examples=30", "pruner=slimgpt", "allocator=log_depth", "sums=float64"),
)
Absent = Callable[..., Finished]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Absent:
    """Return the run of some overrides in which the attackers are absent; equal ones run once."""
    done: dict[tuple[str, ...], Finished] = {}

    def get(*overrides: str) -> Finished:
        if overrides not in done:
            done[overrides] = run(tmp_path_factory.mktemp("run"), *overrides, app=attacked(absent, ATTACKERS))
        return done[overrides]

    return get


REFUSED: dict[str, tuple[tuple[str, ...], Attack, str, str]] = {
    "a blank reason": ((), attacks.error(" "), "error", "no reason given"),
    "a reason of line breaks": ((), attacks.error("\n\r\n"), "error", "no reason given"),
    "a code of the server's own": ((), attacks.error("late", 1001), "error", "late"),
    "a reason of escapes": ((), attacks.error("\x1b[2J\x1b]0;x\x07" * 10**5), "error", "?[2J?]0;x?"),
    "weights of 3e38": ((), attacks.fill("float32", 3e38), "rejected", "beyond ±1e+15"),
    "weights of 3e38, adam": (ADAM, attacks.fill("float32", 3e38), "rejected", "beyond ±1e+15"),
    "weights of 3e38, momentum": (MOMENTUM, attacks.fill("float32", -3e38), "rejected", "beyond ±1e+15"),
    "one weight of 1e9": ((), attacks.set_entries("float32", 1e9, 0, 1), "rejected", "out of proportion"),
    "a shape too short": ((), attacks.shortened, "rejected", "array float32 holds"),
    "negative counts of batches": ((), attacks.fill("int64", -(2**63)), "rejected", "holds a count outside"),
    "MACs of 1.7e308": ((), attacks.metric("pruning-macs", 1.7e308), "rejected", "metric pruning-macs is 1.7e+308"),
    "a plan of 10 MB": ((), attacks.config("update", "widths", b"\x00" * 10**5), "rejected", "100000 bytes"),
    "nothing": ((), attacks.nothing, "rejected", "'update' is missing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_as_if_its_sender_were_absent(name: str, without: Absent, tmp_path: Path) -> None:
    overrides, attack, reason, words = REFUSED[name]
    done = run(tmp_path, *NORMED, *overrides, app=attacked(attack, ATTACKERS))
    assert done.failures == [(number, client, reason) for number in (1, 2) for client in ATTACKERS]
    for failure in (failure for line in done.rounds for failure in line["failures"]):
        assert words in failure["message"]
        assert failure["message"].isprintable()
        assert len(failure["message"]) < 400
    assert attacks.line_length(done.rounds) < 10_000
    assert done.model == without(*NORMED, *overrides).model
    assert load_run(done.path).finished


def variances() -> tuple[int, int]:
    """Return where the first running variances lie among the float32 values of an update."""
    plan = assembly.make_plan(to_yaml(compose(NORMED)))
    start = 0
    for name, info in plan.submodels.spec.tensors.items():
        numel = torch.Size(info.shape).numel()
        if name.endswith("running_var"):
            return start, start + numel
        start += numel if info.dtype == torch.float32 else 0
    raise AssertionError("no batch norm")


@pytest.mark.parametrize("values", ["weights", "deltas"])
def test_a_negative_variance_is_refused(values: str, without: Absent, tmp_path: Path) -> None:
    """One client once: before, 95 % accuracy fell to 10 %, for good."""
    start, stop = variances()
    overrides = (*NORMED, f"upload.values={values}")
    attack = attacks.set_entries("float32", -50.0, start, stop)
    done = run(tmp_path, *overrides, app=attacked(attack, ATTACKERS))
    assert {failure["client_id"] for line in done.rounds for failure in line["failures"]} == set(ATTACKERS)
    assert all("negative variances" in failure["message"] for line in done.rounds for failure in line["failures"])
    assert done.model == without(*overrides).model


def test_a_round_that_breaks_the_model_is_undone_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The attacker's weights are in proportion; the server's learning rate carries them out of range."""
    overrides = (*NORMED, *MOMENTUM, "server_optimizer.lr=1e13", "aggregator.max_norm=null")
    done = run(tmp_path, *overrides, app=attacked(attacks.set_entries("float32", 9e3, 0, 1), (4,)))
    assert done.failures[0] == (1, 4, "suspected")
    assert "with its update, conv1.weight would hold values beyond ±1e+15" in done.rounds[0]["failures"][0]["message"]
    assert "round 1 is undone" in caplog.text
    assert set(done.rounds[0]["coverage"].values()) == {0.0}
    assert set(done.rounds[1]["coverage"].values()) == {1.0}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in done.tensors.values())
    assert (2, 4, "rejected") in done.failures
    assert "its updates are not used any more" in done.rounds[1]["failures"][0]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [-10.0, 1e3])
def test_poison_in_proportion_passes_and_the_model_stays_finite(factor: float, tmp_path: Path) -> None:
    """An average has a breakdown point of 0: ``docs/security.md`` says so."""
    done = run(tmp_path, *NORMED, app=attacked(attacks.scale(factor), ATTACKERS[:1]))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in done.tensors.values())
    assert load_run(done.path).finished


def test_poison_beyond_the_bound_is_scaled_down_by_name(tmp_path: Path) -> None:
    overrides = (*TINY, "clients_per_round=6", "strategy=fedavg")
    done = run(tmp_path / "a", *overrides, app=attacked(attacks.scale(-10.0), (4,)))
    assert [list(line["clipped"]) for line in done.rounds] == [["4"]] * 2
    assert all(0 < line["clipped"]["4"] < 1 for line in done.rounds)
    assert load_run(done.path).rounds[-1].clipped == {4: done.rounds[-1]["clipped"]["4"]}
    plain = run(tmp_path / "b", *overrides, "aggregator.max_norm=null", app=attacked(attacks.scale(-10.0), (4,)))
    assert all("clipped" not in line for line in plain.rounds)
    honest = run(tmp_path / "c", *overrides)

    def distance(other: Finished) -> float:
        return sum(float((other.tensors[name] - values).norm()) for name, values in honest.tensors.items())

    assert 3 * distance(done) < distance(plain)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_factors_of_an_adapter_beyond_the_bound_are_scaled_down_by_name(rule: str, tmp_path: Path) -> None:
    """Before, the largest product had the largest weight (hetlora), or the largest singular values (flexlora)."""
    overrides = (*RANKED, "clients_per_round=6", "num_rounds=1", f"aggregator={rule}")
    done = run(tmp_path / "a", *overrides, app=attacked(attacks.scale(50.0), (4,)))
    assert list(done.rounds[0]["clipped"]) == ["4"]
    assert done.failures == []
    honest = run(tmp_path / "b", *overrides)
    assert "clipped" not in honest.rounds[0]
    plain = run(tmp_path / "c", *overrides, "aggregator.max_norm=null", app=attacked(attacks.scale(50.0), (4,)))
    losses = [line.rounds[0]["metrics"]["loss"] for line in (honest, done, plain)]
    assert losses[1] < losses[0] + 0.1 * (losses[2] - losses[0])


def test_more_examples_than_anybody_has_keep_a_client_out(tmp_path: Path) -> None:
    attack = attacks.config("profile", "num-examples", 2**63 - 1)
    done = run(tmp_path, *TINY, "clients_per_round=6", app=attacked(attack, ATTACKERS, messages.CAPABILITIES))
    assert [line["cohort"] for line in done.rounds] == [[0, 2, 3, 5]] * 2


# ---- one-shot pruning
@pytest.mark.parametrize("factor", [200.0, 1e20])
def test_huge_moments_are_left_out_by_name(factor: float, tmp_path: Path) -> None:
    done = run(tmp_path / "a", *ONESHOT, app=attacked(attacks.moments(factor), (2,), pooling.MOMENTS))
    whole = run(tmp_path / "b", *ONESHOT, app=attacked(absent, (2,), pooling.MOMENTS))
    assert done.failures == [(number, client, "rejected") for number, client, _ in whole.failures]
    assert done.failures
    message = done.rounds[1]["failures"][0]["message"]
    assert message.startswith("client 2, query.moments of ")
    assert "times that of the median client, per example" in message
    assert done.model == whole.model
