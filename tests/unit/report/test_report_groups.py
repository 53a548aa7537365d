"""Names of runs and groups over seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlp.report import find_runs, group_runs, run_label
from fedlp.report.groups import differences

WriteRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("strategy", "label"),
    [
        ({"name": "fedavg"}, "FedAvg"),
        ({"name": "fedlp_homo", "layer_preserving_rate": 0.5}, "FedLP-Homo(0.5)"),
        ({"name": "fedlp_homo", "layer_preserving_rate": [0.5, 0.2]}, "FedLP-Homo(per client)"),
        ({"name": "fedlp_hetero", "depths": "u"}, "FedLP-Hetero(u)"),
        ({"name": "fedlp_hetero", "depths": 3}, "FedLP-Hetero(3)"),
        ({"name": "heterofl"}, "HeteroFL"),
        ({"name": "fjord"}, "FjORD"),
        ({"name": "fedrolex"}, "FedRolex"),
        ({"name": "new_idea"}, "new_idea"),
    ],
)
def test_a_run_is_named_by_its_method(strategy: dict[str, Any], label: str) -> None:
    assert run_label({"strategy": strategy}) == label
    assert run_label({"strategy": strategy, "label": "my\n run"}) == "my run"


def test_runs_that_differ_only_in_seed_are_one_group(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0", seed=0)
    write_run("1", seed=1, dataset__root="/elsewhere")
    write_run("2", seed=1, strategy__name="fedlp_homo", strategy__layer_preserving_rate=0.5)
    groups = group_runs(find_runs([tmp_path]))
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("FedAvg", [0, 1]),
        ("FedLP-Homo(0.5)", [1]),
    ]
    assert differences(groups) == {
        "strategy.name": ["fedavg", "fedlp_homo"],
        "strategy.layer_preserving_rate": ["1", "0.5"],
    }


def test_labels_tell_groups_apart(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0")
    write_run("1", partition__name="dirichlet", partition__alpha=0.3)
    write_run("2", partition__name="dirichlet", partition__alpha=0.3, local__lr=0.1)
    write_run("3", strategy__name="fedlp_homo", strategy__layer_preserving_rate=0.5, local__lr=0.2)
    write_run("4", dry_run=True)
    write_run("5", label="mine", local__lr=0.3)
    write_run("6", label="mine", local__lr=0.4, strategy__widths=[0.125] * 20)
    labels = [group.label for group in group_runs(find_runs([tmp_path]))]
    assert labels == [
        "FedAvg, iid",
        "FedAvg, dirichlet(0.3), lr=0.05",
        "FedAvg, dirichlet(0.3), lr=0.1",
        "FedLP-Homo(0.5), iid",
        "FedAvg, iid, dry run",
        "mine, widths=[1], lr=0.3",
        "mine, widths=[0.125, 0.125, 0.125, 0…, lr=0.4",
    ]


def test_a_run_older_than_an_option_had_its_default(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/old", seed=0, strategy__name="fedlp_plan")
    write_run("runs/new", seed=1, strategy__name="fedlp_plan", strategy__ramp_from=0.0)
    write_run("runs/other", seed=0, strategy__name="fedlp_plan", strategy__ramp_from=0.9)
    groups = group_runs(find_runs([tmp_path / "runs"]))
    assert sorted(len(group.runs) for group in groups) == [1, 2]
    assert differences(groups).keys() == {"strategy.ramp_from"}


def test_groups_that_differ_in_nothing_to_show_are_numbered(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0")
    write_run("1", label="FedAvg")
    assert [group.label for group in group_runs(find_runs([tmp_path]))] == ["FedAvg, #1", "FedAvg, #2"]


def test_finished_runs_count_once_a_seed(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0", seed=0, stop_after=5)
    write_run("1", seed=1)
    write_run("2", seed=1)
    (group,) = group_runs(find_runs([tmp_path]))
    assert [run.path.name for run in group.counted] == ["1"]
    (tmp_path / "1" / "rounds.jsonl").unlink()
    (group,) = group_runs(find_runs([tmp_path]))
    assert [run.path.name for run in group.counted] == ["2"]


def test_unfinished_runs_count_where_none_has_finished(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0", seed=0, stop_after=2)
    write_run("1", seed=0, stop_after=5)
    write_run("2", seed=1, stop_after=0)
    (group,) = group_runs(find_runs([tmp_path]))
    assert [run.path.name for run in group.counted] == ["1", "2"]
