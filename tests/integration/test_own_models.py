"""Models of one's own under methods that cut them: what no width rule covers stays whole, which is said once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedlp import cli
from tests.integration.running import Call, assert_refused, execute, read

NETS = Path(__file__).parent / "own" / "nets.py"
SMALL = (
    "num_rounds=2",
    "num_clients=4",
    "clients_per_round=4",
    "simulation.workers=1",
    "dataset.max_train_examples=120",
)
TIERS = ("fleet=tiers", "fleet.fractions=[1.0,0.6]")
SAID = {
    "cosine": "fedlp: head, second stay whole: no width rule covers CosineHead",
    "reshaping": "fedlp: second stays whole: no width rule covers reshape in ReshapingHead: it asks for 48 entries; "
    "x.flatten(1) takes any number",
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder outside the checkout with the networks in it."""
    shutil.copy(NETS, tmp_path / "nets_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("net", SAID)
@pytest.mark.parametrize(
    "method",
    [("strategy=fedlp_plan", *TIERS), ("strategy=heterofl", "strategy.widths=[1.0,0.4]")],
    ids=["plan", "slices"],
)
def test_narrow_clients_train_and_it_is_said_once(
    elsewhere: Path, call: Call, net: str, method: tuple[str, ...]
) -> None:
    code, _, errors = call(f"model=nets_of_mine:{net}", *method, *SMALL, f"hydra.run.dir={elsewhere}/run")
    assert code == 0, errors
    assert [line for line in errors.splitlines() if line.startswith("fedlp: ")] == [SAID[net]]
    done = read(elsewhere / "run")
    assert not done.failures
    assert len({client["params_down"] for line in done.rounds for client in line["clients"]}) > 1
    assert done.manifest["final_metrics"]["accuracy"] > 0.0


@pytest.mark.slow
def test_a_dry_run_a_profile_and_a_pruning_say_it(elsewhere: Path, call: Call) -> None:
    model = "model=nets_of_mine:cosine"
    code, _, errors = call(model, "strategy=fedlp_plan", *TIERS, *SMALL, "dry_run=true", "hydra.run.dir=dry")
    assert (code, errors.splitlines()) == (0, [SAID["cosine"]])
    code, _, errors = call(model, "repeats=1", "hydra.run.dir=profiled", main=cli.profile_main)
    assert (code, errors.splitlines()) == (0, [SAID["cosine"]])
    assert call(model, "strategy=fedavg", *SMALL, "hydra.run.dir=run")[0] == 0
    wanted = ("sparsity=0.5", "calibration.examples=64", "pruner=magnitude", "hydra.run.dir=pruned")
    code, _, errors = call("run=run", *wanted, main=cli.prune_main)
    assert code == 0, errors
    assert [line for line in errors.splitlines() if line.startswith("fedlp: ")] == [SAID["cosine"]]
    report = json.loads((elsewhere / "pruned" / "prune.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == ["first"]
    assert report["params_after"] < report["params_before"]


def test_methods_that_cut_nothing_say_nothing(elsewhere: Path, call: Call) -> None:
    code, _, errors = call("model=nets_of_mine:cosine", "strategy=fedavg", *SMALL, "hydra.run.dir=run")
    assert code == 0
    assert "whole" not in errors


def test_a_model_of_which_nothing_can_be_cut_trains_whole(elsewhere: Path, call: Call) -> None:
    model = "model=nets_of_mine:Branching"
    for number, method in enumerate((("strategy=fedlp_plan",), ("strategy=heterofl", "strategy.widths=[1.0]"))):
        code, _, errors = call(model, *method, *SMALL, f"hydra.run.dir=run{number}")
        assert code == 0, errors
        assert not read(elsewhere / f"run{number}").failures


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            ("strategy=fedlp_plan", *TIERS),
            r"client \d has a budget of 366 params, but nothing of model Branching can be cut: Branching stays whole",
        ),
        (
            ("strategy=heterofl", "strategy.widths=[1.0,0.5]"),
            "asks for narrow sub-models, but nothing of model Branching",
        ),
    ],
)
def test_where_it_would_have_to_be_cut_it_is_refused(
    elsewhere: Path, call: Call, method: tuple[str, ...], words: str
) -> None:
    assert_refused(call("model=nets_of_mine:Branching", *method, *SMALL, "hydra.run.dir=run"), words)


@pytest.mark.slow
@pytest.mark.ray
def test_it_is_said_once_on_flowers_runtime_with_the_same_bytes(elsewhere: Path) -> None:
    overrides = ("model=nets_of_mine:cosine", "strategy=fedlp_plan", *TIERS, *SMALL)
    local = execute("fedlp", *overrides, "hydra.run.dir=local", cwd=elsewhere)
    ray = execute("fedlp", *overrides, "simulation=flower", "hydra.run.dir=ray", cwd=elsewhere, timeout=400)
    for done in (local, ray):
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(SAID["cosine"]) == 1
    assert read(elsewhere / "ray").model == read(elsewhere / "local").model
