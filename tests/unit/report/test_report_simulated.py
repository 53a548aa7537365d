"""Simulated time in reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlp.errors import DataError
from fedlp.report import write_report
from fedlp.report.groups import group_runs
from fedlp.report.interactive import figures
from fedlp.report.runs import find_runs
from fedlp.report.simulated import class_uses, simulated_section
from tests.unit.report.conftest import RunWriter


def with_clock(folder: Path, **changes: object) -> Path:
    """Give a run's rounds a clock: a fast class of two clients, and a slow one whose only client is always late."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        phases = {"download_s": 1.0, "training_s": 2.0, "upload_s": 1.0, "staleness": 0}
        start = 3600.0 * (line["server_round"] - 1)
        line["simulated"] = {
            "seconds": 3600.0,
            "since_start_s": start + 3600.0,
            "clients": [
                {"client_id": 0, "device": "fast", "started_s": start, "finished": True, **phases},
                {"client_id": 2, "device": "slow", "started_s": start, "finished": False, **phases},
            ],
            "devices": {
                "fast": {"clients": 2, "asked": 1, "finished": 1, "busy_s": 720.0, "utilisation": 0.1, "energy_j": 7.0},
                "slow": {
                    "clients": 1,
                    "asked": 1,
                    "finished": 0,
                    "busy_s": 3600.0,
                    "utilisation": 1.0,
                    "energy_j": None,
                },
            },
            **changes,
        }
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_classes_are_summed_over_rounds(write_run: RunWriter) -> None:
    (group,) = group_runs(find_runs([with_clock(write_run("a"))]))
    fast, slow = class_uses(group)
    assert (fast.device, fast.clients, fast.asked, fast.finished, fast.never) == ("fast", 2, 6, 6, 0)
    assert (fast.utilisation, fast.energy_j) == (pytest.approx(0.1), 42.0)
    assert (slow.device, slow.asked, slow.finished, slow.never, slow.energy_j) == ("slow", 6, 0, 1, None)
    assert "No client finishes in: FedAvg: slow." in simulated_section([group])


def test_hours_are_an_axis_and_utilisation_a_figure(write_run: RunWriter, tmp_path: Path) -> None:
    groups = group_runs(find_runs([with_clock(write_run("a"))]))
    curves, *more = figures(groups)
    assert {"key": "simulated_s", "label": "simulated time so far, h"} in curves["axes"]
    assert curves["curves"][0]["x"]["simulated_s"] == list(range(7))
    bars = next(one for one in more if one["title"] == "Utilisation by device class")
    assert [part["values"] for part in bars["parts"]] == [[10.0], [100.0]]
    page = write_report([tmp_path / "a"], tmp_path / "report")
    assert 'id="simulated-time"' in page.read_text()
    assert (tmp_path / "report" / "accuracy_vs_time.png").is_file()


def test_without_a_clock_nothing_is_said(write_run: RunWriter) -> None:
    groups = group_runs(find_runs([write_run("a")]))
    assert simulated_section(groups) == ""
    assert "simulated_s" not in {axis["key"] for axis in figures(groups)[0]["axes"]}


@pytest.mark.parametrize("change", [{"seconds": -1}, {"devices": []}, {"clients": [{"client_id": 0}]}])
def test_a_damaged_clock_is_named(change: dict[str, object], write_run: RunWriter) -> None:
    folder = with_clock(write_run("a"), **change)
    with pytest.raises(DataError, match=r"rounds\.jsonl"):
        find_runs([folder])
