"""The report's numbers against naive sums over the files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlp.report import Group, find_runs, group_runs, summary_table, write_report
from fedlp.report.export import summary_json
from fedlp.report.plots import draw_plots
from fedlp.report.summary import METRICS, client_uploads, coverage, curve, mean_coverage, metric_of, summarize

WriteRun = Callable[..., Path]
ACCURACY, PERPLEXITY, LOSS = (next(m for m in METRICS if m.name == name) for name in ("accuracy", "perplexity", "loss"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]


def _group(folder: Path) -> Group:
    (group,) = group_runs(find_runs([folder]))
    return group


def _write_seeds(write_run: WriteRun, count: int) -> list[Path]:
    values = {"strategy__name": "fedlp_homo", "strategy__layer_preserving_rate": 0.5}
    return [write_run(f"{seed}", seed=seed, **values) for seed in range(count)]


def test_a_row_equals_naive_sums(write_run: WriteRun, tmp_path: Path) -> None:
    runs = [_lines(path) for path in _write_seeds(write_run, 3)]
    (group,) = json.loads(summary_json([_group(tmp_path)]))["groups"]
    finals = [100 * run[-1]["metrics"]["accuracy"] for run in runs]
    bests = [max(100 * line["metrics"]["accuracy"] for line in run) for run in runs]
    assert group["final"] == pytest.approx({"mean": statistics.mean(finals), "std": statistics.stdev(finals)})
    assert group["best"] == pytest.approx({"mean": statistics.mean(bests), "std": statistics.stdev(bests)})
    for name in ("bytes_up", "bytes_down", "macs", "wall_time_s"):
        assert group[name] == pytest.approx(statistics.mean(sum(line[name] for line in run) for run in runs))
    assert group["bytes_up_per_round"] == pytest.approx(group["bytes_up"] / 6)
    params = sum(line["params_up"] + line["params_down"] for run in runs for line in run)
    assert group["params_per_client"] == pytest.approx(
        params / sum(len(line["cohort"]) for run in runs for line in run)
    )
    assert group["expected_params_per_client"] == 1.5 * 328_900
    assert group["seeds"] == [0, 1, 2]
    assert [run["final"] for run in group["runs"]] == pytest.approx(finals)
    assert [run["totals"]["bytes_up"] for run in group["runs"]] == [
        sum(line["bytes_up"] for line in run) for run in runs
    ]
    for layer, value in group["coverage"].items():
        assert value == pytest.approx(
            statistics.mean(line["coverage"][layer] for run in runs for line in run if line["coverage"])
        )


@pytest.mark.parametrize("seeds", [1, 2, 3, 4])
def test_bands_are_the_range_of_two_and_the_deviation_of_more(write_run: WriteRun, tmp_path: Path, seeds: int) -> None:
    runs = [_lines(path) for path in _write_seeds(write_run, seeds)]
    found = curve(_group(tmp_path), ACCURACY)
    assert found is not None
    assert found.rounds.tolist() == list(range(7))
    for index in range(7):
        values = [100 * run[index]["metrics"]["accuracy"] for run in runs]
        mean = statistics.mean(values)
        spread = statistics.stdev(values) if seeds > 2 else None
        low, high = (min(values), max(values)) if spread is None else (mean - spread, mean + spread)
        assert (found.mean[index], found.low[index], found.high[index]) == pytest.approx((mean, low, high))
        spent = [sum(line["bytes_up"] for line in run[: index + 1]) for run in runs]
        assert found.bytes_up[index] == pytest.approx(statistics.mean(spent))
        assert found.macs[index] == pytest.approx(index * 4 * 2.5e9)


def test_a_curve_covers_the_rounds_that_all_evaluated(write_run: WriteRun, tmp_path: Path) -> None:
    def evaluate_some(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["metrics"] = line["metrics"] if line["server_round"] in (2, 4, 6) else {"train_loss": 1.0}

    write_run("0", seed=0, edit=evaluate_some)
    write_run("1", seed=1)
    found = curve(_group(tmp_path), ACCURACY)
    assert found is not None
    assert found.rounds.tolist() == [2, 4, 6]


def test_a_diverged_seed_is_not_averaged_away(write_run: WriteRun, tmp_path: Path) -> None:
    def diverge(lines: list[dict[str, Any]]) -> None:
        for line in lines[4:]:
            line["metrics"]["accuracy"] = math.inf

    write_run("0", seed=0, edit=diverge)
    write_run("1", seed=1)
    group = _group(tmp_path)
    row, found = summarize(group), curve(group, ACCURACY)
    assert found is not None
    assert np.isfinite(found.mean).tolist() == [True] * 4 + [False] * 3
    assert row.final is not None
    assert row.best is not None
    assert math.isnan(row.final.mean)
    assert math.isfinite(row.best.mean)
    exported = json.loads(summary_json([group]))["groups"][0]
    assert exported["final"] == {"mean": None, "std": None}
    assert exported["curve"]["mean"][4:] == [None, None, None]


def test_perplexity_is_best_where_it_is_lowest(write_run: WriteRun, tmp_path: Path) -> None:
    path = write_run("0", metric="perplexity")
    row = summarize(_group(tmp_path))
    assert row.metric == PERPLEXITY
    assert row.best is not None
    assert row.best.mean == min(line["metrics"]["perplexity"] for line in _lines(path))


def test_a_run_with_its_manifest_alone_has_its_final_metrics(write_run: WriteRun, tmp_path: Path) -> None:
    path = write_run("0", manifest={"totals": {"bytes_up": 12e6, "rounds": 6}})
    (path / "rounds.jsonl").unlink()
    row = summarize(_group(tmp_path))
    assert row.final is not None
    assert row.bytes_up_per_round == 2e6
    assert row.params_per_client is None
    assert curve(_group(tmp_path), ACCURACY) is None


def test_final_metrics_stand_in_for_rounds_that_were_not_evaluated(write_run: WriteRun, tmp_path: Path) -> None:
    def drop(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["metrics"] = {}
        lines.pop()

    write_run("0", edit=drop, manifest={"final_metrics": {"loss": 0.5}})
    group = _group(tmp_path)
    assert metric_of(group) == LOSS
    found = curve(group, LOSS)
    assert found is not None
    assert found.rounds.tolist() == [6]
    assert found.bytes_up[0] == sum(line["bytes_up"] for line in _lines(tmp_path / "0"))


def test_zero_rounds_have_a_metric_and_no_costs(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0", num_rounds=0)
    row = summarize(_group(tmp_path))
    assert row.final is not None
    assert (row.rounds, row.bytes_up, row.bytes_up_per_round, row.params_per_client) == (0, 0.0, None, None)


def test_a_dry_run_has_what_is_expected(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0", dry_run=True)
    row = summarize(_group(tmp_path))
    assert row.final is None
    assert row.bytes_up_per_round == 4 * 1_315_700
    assert row.bytes_down == 6 * 4 * 1_315_800
    assert row.expected_params_per_client == 2 * 328_900


def test_a_dry_run_knows_its_own_totals_best(write_run: WriteRun, tmp_path: Path) -> None:
    totals = {"bytes_up": 6e6, "bytes_down": 12e6, "macs": 3e9}
    write_run("0", dry_run=True, manifest={"expected_totals": totals})
    row = summarize(_group(tmp_path))
    assert (row.bytes_up_per_round, row.bytes_down, row.macs) == (1e6, 12e6, 3e9)


def test_coverage_is_unknown_where_a_run_is_silent(write_run: WriteRun, tmp_path: Path) -> None:
    def silence(lines: list[dict[str, Any]]) -> None:
        lines[2]["coverage"] = {}
        lines[3]["coverage"]["conv1"] = 0.5

    write_run("0", seed=0, edit=silence)
    write_run("1", seed=1)
    layers, rounds, values = coverage(_group(tmp_path))
    assert layers[0] == "conv1"
    assert rounds.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isnan(values[:, 1]).all()
    assert values[0, 2] == 0.75
    assert mean_coverage(values)[0] == pytest.approx((0.75 + 4) / 5)


def test_every_client_and_round_is_in_the_uplink_distribution(write_run: WriteRun, tmp_path: Path) -> None:
    paths = _write_seeds(write_run, 2)
    naive = [client["bytes_up"] for path in paths for line in _lines(path) for client in line["clients"]]
    assert client_uploads(_group(tmp_path)).tolist() == naive


def test_a_metric_of_a_users_own_is_drawn_without_a_best_value(write_run: WriteRun, tmp_path: Path) -> None:
    def rename(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["metrics"] = {"margin/2": line["server_round"] / 8, "loss": 0.5, "train_loss": 0.7, "client_loss": 0.1}

    write_run("0", edit=rename, manifest={"final_metrics": {"margin/2": 0.75, "loss": 0.5}})
    group = _group(tmp_path)
    metric = metric_of(group)
    assert metric is not None
    assert (metric.name, metric.higher_is_better) == ("margin/2", None)
    row = summarize(group)
    assert row.final is not None
    assert row.final.mean == 0.75
    assert row.best is None
    plots = [plot.file for plot in draw_plots([group])]
    assert "margin_2_vs_rounds.png" in plots
    page = write_report([tmp_path], tmp_path / "report")
    assert "margin/2" in page.read_text()
    assert "margin/2" in summary_table([group])
