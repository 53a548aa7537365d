"""``fedlp-profile``: measures this device and leaves a table and a budget, or one line about what is wrong."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from fedlp import cli
from fedlp.allocation.budget.costs import LatencyTable
from fedlp.types import Budget
from tests.integration.running import Call, assert_refused

QUICK = ("model=fedlp_mlp", "dataset=digits", "repeats=2", "densities=[0.25,0.5,1]")


@pytest.mark.slow
def test_a_profile_is_a_table_and_a_budget(tmp_path: Path, call: Call) -> None:
    out = tmp_path / "profile"
    code, printed, errors = call(*QUICK, "latency_s=0.5", f"hydra.run.dir={out}", main=cli.profile_main)
    assert code == 0, errors
    assert printed.startswith("loading digits and fedlp_mlp")
    assert printed.count("\n") == 6  # what loads, a head, three densities and where the budget is
    report = json.loads((out / "profile.json").read_text())
    assert report["densities"] == [0.25, 0.5, 1.0]
    assert report["model"] == "fedlp_mlp"
    assert report["params"][-1] == 64 * 500 + 500 + 500 * 10 + 10
    assert report["upload_bytes"][-1] == 4 * report["params"][-1]
    assert report["step_macs"][-1] > 2 * 32 * report["macs"][-1] * 0.5
    for name in ("params", "macs", "step_macs", "memory_bytes", "upload_bytes"):
        assert all(small < large for small, large in pairwise(report[name])), name
    assert LatencyTable(tuple(report["macs"]), tuple(report["step_s"])).time(report["macs"][-1]) > 0
    budget = Budget(**yaml.safe_load((out / "budget.yaml").read_text()))
    assert budget.latency_s == 0.5
    assert budget.memory_bytes is not None
    assert budget.memory_bytes > 1e6
    assert_refused(call(*QUICK, f"hydra.run.dir={out}", main=cli.profile_main), "already holds a profile")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("densities=[0.5]", r"densities=\[0.5\] is not allowed: .* 1 among them"),
        ("densities=[0,1]", "densities"),
        ("repeats=0", "repeats=0"),
        ("latency_s=-1", r"latency_s=-1\.0 is not allowed"),
        ("device=tpu", "device=tpu"),
        ("model.variant=linear", "no prunable units"),
        ("repeat=3", "did you mean repeats"),
    ],
)
def test_bad_input_is_refused_in_one_line(override: str, words: str, call: Call) -> None:
    assert_refused(call(*QUICK, override, main=cli.profile_main), words)
