"""Runs with central differential privacy: noise, budget, resume, sub-models, and what is refused."""

from __future__ import annotations

import builtins
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import ConfigError
from fedlp.federation.privacy_accounting import Accountant
from fedlp.report import load_run
from fedlp.report.groups import group_runs
from fedlp.report.tables import summary_table
from tests.integration.running import TINY, Call, Finished, assert_refused, run

Once = Callable[..., Finished]
CENTRAL = ("privacy=central_dp", "aggregator.weighting=equal", "privacy.accountant=rdp")
NOISE = (*CENTRAL, "privacy.noise_multiplier=2", "privacy.clipping_norm=0.02")  # too little to learn, not to diverge
FEDAVG = "strategy=fedavg"


def test_rounds_have_their_epsilon_and_show_no_loss_of_clients(once: Once) -> None:
    done = once(*TINY, FEDAVG, *NOISE)
    accountant = Accountant("rdp", 2.0, 4 / 6, 1e-5)
    for line in done.rounds:
        assert line["privacy"]["epsilon"] == accountant.epsilon(line["server_round"])
        assert line["privacy"]["noise_multiplier"] == 2.0
        assert "train_loss" not in line["metrics"]
        assert all(cost["train_loss"] is None for cost in line["clients"])
    assert "epsilon" not in once(*TINY, FEDAVG).rounds[0].get("privacy", {})
    table = summary_table(group_runs([load_run(done.path)]))
    assert f"{accountant.epsilon(2):.2f}" in table
    assert "epsilon" in table


def test_the_model_moves_by_the_noise_that_is_claimed(once: Once) -> None:
    overrides = (*TINY, "num_rounds=1", FEDAVG, *CENTRAL, "privacy.noise_multiplier=2", "privacy.clipping_norm=0.001")
    done = once(*overrides)
    before = assembly.make_plan(to_yaml(compose(overrides))).initial_params()
    moved = torch.cat([(value - before[name]).double().flatten() for name, value in done.tensors.items()])
    deviation = 2.0 * 0.001 / 4  # of 4 expected clients; their sum is at most 0.004 long, in 37,000 entries
    spread = float((moved / deviation).square().sum())
    assert 1e-6 < stats.chi2(moved.numel()).cdf(spread) < 1 - 1e-6


def test_hardly_any_noise_and_a_loose_clip_are_the_plain_average(once: Once) -> None:
    loose = ("privacy.noise_multiplier=1e-9", "privacy.clipping_norm=100", "clients_per_round=6")
    noised = once(*TINY, FEDAVG, *CENTRAL, *loose)
    plain = once(*TINY, FEDAVG, "aggregator.weighting=equal", "clients_per_round=6")
    for name, value in noised.tensors.items():
        torch.testing.assert_close(value, plain.tensors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("given", [("privacy.clipping_quantile=0.5",), ("server_optimizer=momentum",)])
def test_a_stopped_run_goes_on_to_the_same_bytes(given: tuple[str, ...], once: Once, tmp_path: Path) -> None:
    overrides = (*TINY, "num_rounds=4", FEDAVG, *NOISE, *given)
    whole = once(*overrides)
    run(tmp_path / "run", *overrides, "callbacks=[tests.integration.test_central_privacy:stop_after_two]")
    config = compose(overrides)
    config.resume = str(tmp_path / "run")
    assembly.run_locally(to_yaml(config), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole.model
    lines = [line["privacy"] for line in whole.rounds]
    assert [dict(record.privacy) for record in load_run(tmp_path / "run").rounds] == lines
    clips = {line["clipping_norm"] for line in lines}
    assert len(clips) == (4 if "quantile" in given[0] else 1)


def stop_after_two(record: Any, state: Any) -> bool:
    return bool(record.server_round == 2)


def test_a_run_ends_before_it_would_pass_its_budget(once: Once, tmp_path: Path) -> None:
    accountant = Accountant("rdp", 2.0, 4 / 6, 1e-5)
    limit = (accountant.epsilon(2) + accountant.epsilon(3)) / 2
    overrides = (*TINY, "num_rounds=5", FEDAVG, *NOISE, f"privacy.max_epsilon={limit}")
    done = run(tmp_path / "run", *overrides)
    assert [line["server_round"] for line in done.rounds] == [1, 2]
    assert done.manifest["stopped_by"] == "privacy.max_epsilon"
    assert done.model == once(*TINY, FEDAVG, *NOISE).model
    config = compose(overrides)
    config.resume = str(tmp_path / "run")
    assembly.run_locally(to_yaml(config), tmp_path / "run")
    assert len(load_run(tmp_path / "run").rounds) == 2, "nor does it go on"


@pytest.mark.slow
def test_noise_is_found_for_an_epsilon_and_other_lengths_are_refused(tmp_path: Path) -> None:
    overrides = (*TINY, FEDAVG, *CENTRAL, "privacy.epsilon=3", "privacy.clipping_norm=0.02")
    done = run(tmp_path / "run", *overrides)
    assert 2.9 < done.rounds[-1]["privacy"]["epsilon"] <= 3.0
    config = compose((*overrides, "num_rounds=4"))
    config.resume = str(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"round 1 was run with noise_multiplier=.*num_rounds that the run began with"
    ):
        assembly.run_locally(to_yaml(config), tmp_path / "run")


SUBMODELS = {
    "layer draws": ("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.5"),
    "depths": ("strategy=fedlp_hetero",),
    "widths": ("strategy=heterofl", "strategy.widths=[1.0,0.5]"),
    "rolling widths": ("strategy=fedrolex", "strategy.widths=[0.5]"),
    "plans": ("strategy=fedlp_plan", "strategy.regrow=0", "pruner=random", "upload=int8", "upload.values=deltas"),
    "budgets": ("strategy=fedlp_plan", "strategy.regrow=0", "pruner=random", "fleet=tiers", "fleet.fractions=[1,0.4]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SUBMODELS)
def test_sub_models(case: str, once: Once) -> None:
    given = (*TINY, "num_rounds=3", "clients_per_round=6", "aggregator.weighting=equal", *SUBMODELS[case])
    small = once(*given, *CENTRAL, "privacy.noise_multiplier=1e-9", "privacy.clipping_norm=100")
    assert small.failures == []
    plain = once(*given).tensors
    if case != "layer draws":  # where a draw has not its expected number of holders
        for name, value in small.tensors.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)
    before = assembly.make_plan(to_yaml(compose((*given, *NOISE)))).initial_params()
    for name, value in once(*given, *NOISE).tensors.items():
        assert torch.equal(value, before[name]) == torch.equal(plain[name], before[name]), "noise where anybody trains"
        assert bool(value.isfinite().all())


def test_randomness_of_the_operating_system_is_new_every_time(tmp_path: Path) -> None:
    overrides = (*TINY, "num_rounds=1", FEDAVG, *NOISE, "clients_per_round=6", "privacy.secure_noise=true")
    assert run(tmp_path / "a", *overrides).model != run(tmp_path / "b", *overrides).model


def test_a_round_without_clients_is_noise_alone(tmp_path: Path) -> None:
    done = run(tmp_path / "run", *TINY, "num_rounds=8", "clients_per_round=1", FEDAVG, *NOISE)
    sizes = [len(line["cohort"]) for line in done.rounds]
    assert 0 in sizes
    assert len({line["metrics"]["loss"] for line in done.rounds}) == 8, "each round moves the model"
    assert done.manifest["totals"]["good_rounds"] == 8


# ---- local
def test_uploads_of_a_client_add_up_in_local_privacy(once: Once) -> None:
    done = once(*TINY, FEDAVG, "privacy=local_dp", "privacy.clipping_norm=0.01", "privacy.epsilon=0.5")
    noise = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.5
    most = max(sum(client in line["cohort"] for line in done.rounds) for client in range(6))
    assert most == 2, "4 of 6 in each of two rounds"
    assert done.rounds[0]["privacy"]["epsilon"] == Accountant("pld", noise, 1.0, 1e-5).epsilon(1)
    assert done.rounds[1]["privacy"]["epsilon"] == Accountant("pld", noise, 1.0, 1e-5).epsilon(2)
    assert done.rounds[0]["privacy"]["epsilon"] < 0.5, "the formula of the noise is not tight"


def test_a_budget_ends_a_run_of_local_privacy(tmp_path: Path) -> None:
    options = ("privacy=local_dp", "privacy.clipping_norm=0.01", "privacy.epsilon=0.5", "privacy.max_epsilon=0.5")
    done = run(tmp_path / "run", *TINY, "num_rounds=3", "clients_per_round=6", FEDAVG, *options)
    assert len(done.rounds) == 1


# ---- what is refused
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", r"one of privacy.noise_multiplier=1 .* and privacy.epsilon=8"),
        ("privacy.noise_multiplier=1 privacy.epsilon=1", "one of privacy.noise_multiplier=1"),
        ("privacy.noise_multiplier=1 aggregator.weighting=examples", "aggregator.weighting=equal: each client counts"),
        ("privacy.noise_multiplier=1 aggregator=median", "aggregator=coverage_average: only a sum"),
        ("privacy.noise_multiplier=1 min_clients=2", "min_clients=1"),
        ("privacy.noise_multiplier=1 fleet.extra_clients=2", "fleet.extra_clients=0"),
        ("privacy.noise_multiplier=1 evaluation=clients dataset.client_test_fraction=0.2", "evaluation=central"),
        ("privacy.noise_multiplier=1 strategy=fedlp_plan strategy.unit_selection=client", "unit_selection=server"),
        ("privacy.noise_multiplier=1 strategy=fedlp_plan", "strategy.regrow=0"),
        ("privacy.noise_multiplier=1 strategy=fedlp_plan strategy.regrow=0", "pruner=random"),
        (
            "privacy.noise_multiplier=1 strategy=fedlp_plan strategy.regrow=0 pruner=random allocator=owl",
            "allocator=uniform: norms of clients' inputs",
        ),
        ("privacy.noise_multiplier=1 model=fedlp_cnn", "bn1.running_mean is one.*model=small_cnn, or model.norm=group"),
        ("privacy.noise_multiplier=1 privacy.seeded=true", "privacy=central_dp does not read privacy.seeded"),
        ("privacy.noise_multiplier=1 privacy.max_epsilon=0.5", "the first round alone costs"),
        ("privacy.noise_multiplier=0", "privacy.noise_multiplier=0"),
        ("privacy.noise_multiplier=1 privacy.clipping_quantile=1", r"privacy.clipping_quantile=1.* in \(0, 1\)"),
        ("privacy.noise_multiplier=1 privacy.accountant=prv", "privacy.accountant=prv.*one of pld, rdp"),
        (
            "privacy=local_dp strategy=fedavg privacy.secure_noise=true",
            "privacy=local_dp does not read privacy.secure_noise",
        ),
    ],
)
def test_what_the_noise_would_not_cover(arguments: str, words: str, call: Call) -> None:
    assert_refused(call("model=fedlp_mlp", *CENTRAL, *arguments.split()), words)


def test_without_the_accountant_a_line_says_what_to_install(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    for name in [name for name in sys.modules if name.startswith("dp_accounting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert_refused(call("model=fedlp_mlp", *NOISE), r'dp-accounting; run: pip install "fedlp\[dp\]"')


def test_a_dry_run_says_what_the_run_will_cost(tmp_path: Path) -> None:
    cfg = to_yaml(compose((*TINY, "num_rounds=30", FEDAVG, *NOISE, "dry_run=true")))
    found = assembly.dry_run(cfg, tmp_path / "dry")["expected"]
    assert found["epsilon"] == Accountant("rdp", 2.0, 4 / 6, 1e-5).epsilon(30)
