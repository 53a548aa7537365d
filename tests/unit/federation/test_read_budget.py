"""Budget files that devices bring: what ``fedlp-profile`` writes is read, everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlp.errors import DataError
from fedlp.federation.budgets import read_budget
from fedlp.types import Budget


def write(folder: Path, text: str) -> Path:
    path = folder / "budget.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params: null\nmacs: 2000000\nmemory_bytes: 1.5e+9\n", Budget(macs=2e6, memory_bytes=1.5e9)),
        ('{"upload_bytes": 400000}', Budget(upload_bytes=4e5)),
        ("params: null\n", None),
    ],
)
def test_fields_that_are_given_are_limits(tmp_path: Path, text: str, expected: Budget | None) -> None:
    assert read_budget(write(tmp_path, text)) == expected


def test_seconds_become_macs_by_what_was_measured_here(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps({"macs": [1e6, 2e6, 4e6], "step_s": [0.1, 0.2, 0.4]}))
    found = read_budget(write(tmp_path, "latency_s: 0.3\nupload_bytes: 10\n"))
    assert found is not None
    assert found.macs == pytest.approx(3e6)
    assert (found.latency_s, found.upload_bytes) == (None, 10)
    assert read_budget(write(tmp_path, "latency_s: 0.3\nmacs: 5.0\n")) == Budget(macs=5.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", "must hold limits on params, macs"),
        ("watts: 5", "and nothing else"),
        ("macs: -1", "macs=-1"),
        ("macs: .inf", "macs=inf"),
        ("macs: 1" + "0" * 400, "macs=1000"),
        ("macs: true", "macs=True"),
        ("macs: many", "macs='many'"),
        ("macs: [", "cannot be read"),
        ("latency_s: 0.1", r"needs the device's .*profile\.json"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_budget(write(tmp_path, text))


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_budget(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "report",
    [
        {"macs": [[1, 2], [3, 4]], "step_s": [[1, 2], [3, 4]]},
        {"macs": [10**400], "step_s": [1.0]},
        {"macs": [1.0, 1.0], "step_s": [1.0, 2.0]},
        {"macs": [1.0]},
        [1.0],
    ],
    ids=["nested", "huge", "level", "no seconds", "a list"],
)
def test_measurements_of_another_form_are_refused(tmp_path: Path, report: object) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match=r"profile\.json, which cannot be read"):
        read_budget(write(tmp_path, "latency_s: 0.3"))
