"""The command that runs a group again says what its config says."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from fedlp.config import compose, to_plain
from fedlp.report import find_runs, group_runs
from fedlp.report.groups import flatten
from fedlp.report.reproduce import command, spell

WriteRun = Callable[..., Path]

AWKWARD = [
    None,
    True,
    3,
    0.1,
    1e-05,
    "u",
    "3",
    "null",
    "true",
    "1e3",
    "",
    "a,b",
    "two words",
    "it's",
    "ends with \\",
    "a\\'b\\\\c",
    'say "x"',
    "FedLP(0.5) = {x}",
    "$HOME",
    "/data/set-1_a.b",
    [1.0, 0.5],
    ["a b", None, "3", [True]],
]


@pytest.mark.parametrize("value", AWKWARD)
def test_hydra_reads_back_what_was_spelt(value: Any) -> None:
    override = OverridesParser.create().parse_override(f"key={spell(value)}")
    found = override.value()
    assert found == value
    assert type(found) is type(value)


def test_a_shell_and_hydra_give_back_the_config(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(f"{seed}", seed=seed, label="it's, $one", strategy__widths=[1.0, 0.5])
    (group,) = group_runs(find_runs([tmp_path]))
    program, *words = shlex.split(command(group).replace("\\\n", " "))
    assert program == "fedlp"
    assert words[:2] == ["-m", "seed=0,1"]
    overrides = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(words[2:])}
    left_out = ("seed", "resume")
    assert overrides == {key: value for key, value in flatten(group.config).items() if key not in left_out}


@pytest.mark.parametrize(
    "overrides",
    [
        ["dry_run=true"],
        ["model=resnet18", "dataset=cifar10", "strategy=heterofl", "local=adam", "seed=3"],
        [
            "model=llama_tiny",
            "dataset=text",
            "partition=natural",
            "strategy=fedlp_hetero",
            "strategy.depths=2",
            "label=a b",
        ],
    ],
)
def test_the_command_composes_to_the_same_config(write_run: WriteRun, overrides: list[str]) -> None:
    config = compose(overrides)
    (group,) = group_runs(find_runs([write_run(manifest={"config": to_plain(config)})]))
    words = shlex.split(command(group).replace("\\\n", " "))
    assert words[0] == "fedlp"
    assert compose(words[1:]) == config
