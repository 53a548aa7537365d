"""``fedlp-search``: the same search for any number of workers, stopped and resumed or not; its winner is a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedlp import cli
from tests.integration.running import Call, assert_refused
from tests.integration.test_prune import language_model, text_model

__all__ = ["language_model"]
FAST = (
    *("calibration.examples=64", "search.evaluations=12", "search.population=6", "search.ratios=[0.3,0.5]"),
    *("search.fitness_examples=8", "search.held_out_examples=4"),
)


def arguments(model: Path, out: Path, *more: str) -> tuple[str, ...]:
    data = [item for item in text_model(model) if not item.startswith("calibration")]
    return (*data, *FAST, f"hydra.run.dir={out}", *more)


def untimed(out: Path) -> dict[str, object]:
    report = json.loads((out / "search.json").read_text())
    return {key: value for key, value in report.items() if not key.endswith("_s")}


@pytest.mark.slow
def test_workers_and_interruptions_do_not_change_a_search(language_model: Path, tmp_path: Path, call: Call) -> None:
    code, printed, errors = call(*arguments(language_model, tmp_path / "a", "search.workers=1"), main=cli.search_main)
    assert code == 0, errors
    assert "wins" in printed
    lines = (tmp_path / "a" / "search.jsonl").read_text().splitlines()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "search.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[-1][:9])
    assert call(*arguments(language_model, tmp_path / "b", "search.workers=2"), main=cli.search_main)[0] == 0
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert (tmp_path / "a" / "search.png").stat().st_size > 1000
    report = untimed(tmp_path / "a")
    assert set(report["modes"]) == {"evolution", "random", "vector"}  # type: ignore[call-overload]
    assert all(mode["evaluations"] == 12 for mode in report["modes"].values())  # type: ignore[attr-defined]
    assert_refused(
        call(*arguments(language_model, tmp_path / "a"), main=cli.search_main), "already holds a finished search"
    )


def test_a_damaged_log_is_one_line(language_model: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "search.jsonl").write_text("{}\n")
    assert_refused(call(*arguments(language_model, tmp_path), main=cli.search_main), r"search\.jsonl is damaged")


@pytest.mark.slow
def test_the_space_that_dsa_published_is_one_config_of_it(language_model: Path, tmp_path: Path, call: Call) -> None:
    more = ("search.space=chains", "search.modes=[evolution]", "search.workers=1")
    code, _, errors = call(*arguments(language_model, tmp_path, *more), main=cli.search_main)
    assert code == 0, errors
    assert untimed(tmp_path)["modes"]["evolution"]["text"].startswith("W:(")  # type: ignore[index]


@pytest.mark.parametrize(
    "values",
    [{"function": "add(depth,minmax(wanda,log,var))", "amplitude": 0.3, "power": 1.0}, {"rule": "log_depth"}],
)
def test_a_winner_is_an_allocator(values: dict[str, object], language_model: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "winner.yaml").write_text("# found\n" + yaml.safe_dump(values))
    out = tmp_path / "pruned"
    used = ("allocator=dsa", f"allocator.path={tmp_path / 'winner.yaml'}", "sparsity=0.4", f"hydra.run.dir={out}")
    code, _, errors = call(*text_model(language_model), *used, main=cli.prune_main)
    assert code == 0, errors
    layers = json.loads((out / "prune.json").read_text())["layers"]
    removed = [1 - layer["kept_units"] / layer["num_units"] for layer in layers if layer["name"].endswith("mlp")]
    assert removed[-1] > removed[0]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["owl", "dlp", "alphapruning", "erk", "dsa", "depth_line"])
def test_every_hand_rule_prunes(rule: str, language_model: Path, tmp_path: Path, call: Call) -> None:
    used = (f"allocator={rule}", "sparsity=0.4", f"hydra.run.dir={tmp_path}")
    code, _, errors = call(*text_model(language_model), *used, "evaluate=false", main=cli.prune_main)
    assert code == 0, errors


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("search.space=graphs", "search.space=graphs is not allowed: it must be one of trees, chains"),
        ("search.modes=[luck]", "search.modes=luck is not allowed"),
        ("search.ratios=[1.5]", r"search.ratios=\[1.5\] is not allowed"),
        ("search.evaluation=3", "did you mean search.evaluations"),
        ("calibration.examples=100000", "calibration.examples=.* but the data set has"),
    ],
)
def test_bad_input_is_one_line(more: str, words: str, language_model: Path, tmp_path: Path, call: Call) -> None:
    assert_refused(call(*arguments(language_model, tmp_path, more), main=cli.search_main), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("function: add(depth\namplitude: 1\npower: 1", "add"),
        ("rule: luck", "has neither a function nor a rule"),
        ("[1, 2]", "does not map names to values"),
        ("function: depth\namplitude: -1\npower: 1", "amplitude=-1"),
    ],
)
def test_a_file_that_is_no_allocator_is_one_line(
    content: str, words: str, language_model: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "winner.yaml").write_text(content)
    used = ("allocator=dsa", f"allocator.path={tmp_path / 'winner.yaml'}", "sparsity=0.4")
    assert_refused(call(*text_model(language_model), *used, main=cli.prune_main), words)
