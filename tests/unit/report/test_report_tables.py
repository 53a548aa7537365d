"""The terminal's table."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlp.report import find_runs, group_runs, summary_table
from fedlp.report.summary import Spread
from fedlp.report.tables import duration, notes, number, plus_minus

WriteRun = Callable[..., Path]


def _table(folder: Path) -> list[str]:
    return summary_table(group_runs(find_runs([folder]))).splitlines()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "nan"),
        (math.inf, "nan"),
        (0.0, "0.00"),
        (0.0123456, "0.0123"),
        (827.2, "827.20"),
        (1102.932, "1102.93"),
        (1234567.0, "1,234,567"),
        (2.5e8, "2.50e+08"),
        (1e-5, "1.00e-05"),
    ],
)
def test_numbers_have_the_digits_a_reader_needs(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_deviation_has_the_digits_of_its_mean() -> None:
    assert plus_minus(Spread(77.94, 0.1234)) == "77.94 ± 0.12"
    assert plus_minus(Spread(77.94, None)) == "77.94"
    assert plus_minus(Spread(0.01234, 0.00056)) == "0.0123 ± 0.0006"
    assert plus_minus(Spread(3e8, 2e7)) == "3.00e+08 ± 2.00e+07"
    assert plus_minus(Spread(math.nan, math.nan)) == "nan ± nan"


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (1.26, "1.3 s"), (89.0, "89.0 s"), (90.0, "1.5 min"), (7200.0, "2.0 h")]
)
def test_times_have_their_natural_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_cells_stand_under_their_titles(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(f"a/{seed}", seed=seed)
    write_run("b", strategy__name="fedlp_homo", strategy__layer_preserving_rate=0.5, stop_after=4)
    titles, units, rule, first, second, *rest = _table(tmp_path)
    assert " ".join(titles.split()) == "method seeds rounds accuracy MB up MB down k params GMACs time"
    assert units.split("  ")[-1] == "in all"
    assert set(rule) == {"-"}
    for line in (first, second):
        assert len(line) == len(titles) == len(rule) <= 110
    assert first[titles.index("seeds") :].split()[:2] == ["3", "6"]
    assert "±" in first
    assert "657.80" in first  # whole model down and up: 2 x 328.9 k
    assert "4/6" in second
    assert rest == ["* FedLP-Homo(0.5), seed 0: stopped after round 4 of 6."]


def test_long_labels_wrap_and_nothing_is_wider_than_the_terminal(write_run: WriteRun, tmp_path: Path) -> None:
    for index, label in enumerate(("a method with a very long name that says all of what it does", "x" * 130)):
        for seed in range(2):
            write_run(f"{index}/{seed}", seed=seed, label=label, num_clients=10)
    lines = _table(tmp_path)
    assert max(map(len, lines)) <= 110
    assert "".join(line.split("  ")[0] for line in lines[6:]).count("x") == 130 - lines[5].count("x")


def test_notes_say_what_a_reader_must_know(write_run: WriteRun, tmp_path: Path) -> None:
    def trouble(lines: list[dict[str, Any]]) -> None:
        lines[2]["failures"] = [{"client_id": 1, "reason": "timeout", "message": "late"}]
        lines[5]["metrics"]["accuracy"] = math.nan
        for line in lines[1:]:
            line["coverage"]["fc1"] = 0.0

    write_run("0", seed=0, edit=trouble)
    write_run("1", seed=1, edit=trouble, stop_after=5)
    write_run("2", seed=0, edit=trouble)
    write_run("3", dry_run=True)
    assert notes(group_runs(find_runs([tmp_path]))) == [
        "FedAvg, seed 1: stopped after round 5 of 6; not counted.",
        f"FedAvg, seed 0: {tmp_path / '2'} repeats a seed and is not counted.",
        "FedAvg, seed 0: accuracy is not a finite number, first in round 5.",
        "FedAvg: 1 client failure.",
        "FedAvg: never updated: fc1.",
        "FedAvg, dry run: figures marked ~ are expected, none is measured.",
    ]
    assert sum(line.startswith("* ") for line in _table(tmp_path)) == 6


def test_different_metrics_name_themselves_in_their_cells(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("0")
    write_run("1", metric="perplexity", dataset__name="text")
    write_run("2", dataset__name="mnist", edit=lambda lines: [line.update(metrics={}) for line in lines])
    titles, _, _, first, second, third = _table(tmp_path)
    assert "metric" in titles
    assert "FedAvg, cifar10" in first
    assert "%" in first
    assert "perplexity" in second
    assert "–" in third


def test_no_group_is_an_empty_table() -> None:
    assert len(summary_table([]).splitlines()) == 3
