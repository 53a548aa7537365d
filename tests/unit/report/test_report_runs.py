"""Reading run directories, whole ones and damaged ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedlp.errors import DataError
from fedlp.report import find_runs, load_run

WriteRun = Callable[..., Path]


def test_a_run_is_read_whole(write_run: WriteRun) -> None:
    path = write_run(seed=3)
    run = load_run(path)
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    assert (run.seed, run.num_rounds, run.last_round, run.finished, run.dry) == (3, 6, 6, True, False)
    assert [record.server_round for record in run.rounds] == list(range(7))
    records = [json.loads(json.dumps(asdict(record))) for record in run.rounds]
    optional = (
        "evaluations",
        "absent",
        "phases",
        "privacy",
        "clipped",
        "staleness",
        "simulated",
    )  # not in the file where they are empty
    assert [{k: v for k, v in one.items() if v or k not in optional} for one in records] == lines
    for name in ("bytes_up", "bytes_down", "params_up", "params_down", "macs", "wall_time_s"):
        assert run.totals[name] == sum(line[name] for line in lines)
    assert run.totals["contacts"] == 6 * 4
    assert run.totals["rounds"] == 6


def test_a_dry_run_has_its_manifest_alone(write_run: WriteRun) -> None:
    run = load_run(write_run(dry_run=True))
    assert run.dry
    assert not run.finished
    assert run.rounds == ()
    assert run.expected["params_down_per_client"] == 328_900
    assert set(run.totals.values()) == {0.0}


def test_a_torn_last_line_is_left_out(write_run: WriteRun) -> None:
    path = write_run(stop_after=4)
    whole = (path / "rounds.jsonl").read_bytes()
    (path / "rounds.jsonl").write_bytes(whole[:-30])
    run = load_run(path)
    assert run.last_round == 3
    assert not run.finished


def test_an_unfinished_run_needs_no_manifest(write_run: WriteRun) -> None:
    path = write_run(stop_after=2)
    (path / "manifest.json").unlink()
    assert load_run(path).last_round == 2


def test_the_later_line_of_a_round_run_again_holds(write_run: WriteRun) -> None:
    def run_again(lines: list[dict[str, Any]]) -> None:
        lines.insert(3, {**lines[3], "wall_time_s": 9.0})

    run = load_run(write_run(edit=run_again))
    assert [record.server_round for record in run.rounds] == list(range(7))
    assert run.totals["wall_time_s"] == 6 * 1.5


def test_numbers_that_are_not_finite_are_read(write_run: WriteRun) -> None:
    def diverge(lines: list[dict[str, Any]]) -> None:
        lines[1]["metrics"] = {"accuracy": math.nan, "loss": math.inf}
        lines[2]["metrics"] = {"accuracy": None}

    first, second = load_run(write_run(edit=diverge)).rounds[1:3]
    assert math.isnan(first.metrics["accuracy"])
    assert math.isinf(first.metrics["loss"])
    assert math.isnan(second.metrics["accuracy"])


def test_totals_come_from_the_manifest_where_the_rounds_are_lost(write_run: WriteRun) -> None:
    path = write_run(manifest={"totals": {"bytes_up": 5, "macs": 7.0, "rounds": 6}})
    (path / "rounds.jsonl").unlink()
    assert load_run(path).totals["bytes_up"] == 5
    assert load_run(path).totals["contacts"] == 0


def _replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new, 1))

    return damage


def _cut_line(path: Path) -> None:
    lines = (path / "rounds.jsonl").read_text().split("\n")
    lines[2] = lines[2][:40]
    (path / "rounds.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut_line, r"rounds\.jsonl, line 3 is damaged: it is not JSON"),
        (_replace("rounds.jsonl", '"server_round": 2', '"server_round": "two"'), "line 3: server_round is 'two'"),
        (_replace("rounds.jsonl", '{"server_round": 1', '7\n{"server_round": 1'), "line 2 is damaged: it holds int"),
        (_replace("rounds.jsonl", '"bytes_up": 5', '"bytes_up": -5'), "line 2: bytes_up is -5"),
        (_replace("rounds.jsonl", '"macs": 10', '"nothing": 10'), "line 2 is damaged: it has no macs"),
        (
            _replace("rounds.jsonl", '"macs": 10', '"staleness": {"3": -1}, "macs": 10'),
            "not a count of steps by client",
        ),
        (
            _replace("rounds.jsonl", '"conv3": 1.0', '"conv3": 1.5'),
            r"line 2: coverage of conv3 is 1\.5, not in \[0, 1\]",
        ),
        (_replace("rounds.jsonl", '"accuracy": 0', '"accuracy": "0", "x": 0'), "line 1: metrics: accuracy is '0'"),
        (_replace("rounds.jsonl", '"wall_time_s": 1.5', '"wall_time_s": NaN'), "line 2: wall_time_s is nan"),
        (_replace("rounds.jsonl", '"failures": []', '"failures": 1'), "line 1: failures is not a list"),
        (
            _replace("rounds.jsonl", '"cohort": [', '"cohort": ["a"'),
            "rounds.jsonl, line 1: cohort is not a list of client",
        ),
        (_replace("manifest.json", "{", "{{"), r"manifest\.json, line 1 is damaged: it is not JSON"),
        (_replace("manifest.json", '"expected": {', '"expected": 3, "was": {'), "manifest.json: expected is damaged"),
        (_replace("config.yaml", "seed: 0", "seed: [0"), r"config\.yaml, line \d+ is damaged: it is not YAML"),
        (
            _replace("manifest.json", '"seed": 0', '"seed": "first"'),
            r"manifest\.json: seed is 'first', not a whole number",
        ),
        (lambda path: (path / "config.yaml").write_bytes(b"\xff\xfe\x00"), r"config\.yaml is damaged"),
    ],
)
def test_damage_is_named_in_one_line(write_run: WriteRun, damage: Callable[[Path], object], words: str) -> None:
    path = write_run()
    damage(path)
    with pytest.raises(DataError, match=words) as caught:
        load_run(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("- 1", "holds no config"), ("{seed: first}", "seed is 'first'")])
def test_a_config_without_its_values_is_damage(write_run: WriteRun, text: str, words: str) -> None:
    path = write_run(stop_after=2)
    (path / "manifest.json").unlink()
    (path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"config\.yaml:? {words}"):
        load_run(path)


def test_the_manifest_knows_how_far_a_resumed_run_went(write_run: WriteRun) -> None:
    path = write_run(num_rounds=8)
    (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("num_rounds: 8", "num_rounds: 6"))
    assert load_run(path).num_rounds == 8


def test_what_is_no_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run directory"):
        load_run(tmp_path)
    with pytest.raises(DataError, match="no run in"):
        find_runs([tmp_path])
    with pytest.raises(DataError, match="there is no folder"):
        find_runs([tmp_path / "absent"])


def test_folders_are_searched_in_natural_order_and_once(write_run: WriteRun, tmp_path: Path) -> None:
    for name in ("sweep/10", "sweep/2", "sweep/2/checkpoint", "sweep/.hydra", "deep/a/b/c"):
        write_run(name)
    (tmp_path / "sweep" / "again").symlink_to(tmp_path / "sweep")
    runs = find_runs([tmp_path / "sweep", tmp_path / "deep", tmp_path / "sweep" / "2"])
    assert [str(run.path.relative_to(tmp_path)) for run in runs] == ["sweep/2", "sweep/10", "deep/a/b/c"]


def test_importing_the_report_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'flwr', 'hydra', 'omegaconf', 'matplotlib', 'transformers'}"
    code = f"import sys, fedlp.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
