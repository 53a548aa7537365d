"""Every file of the config tree composes, and a dry run says what FedLP's paper says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlp import registry
from fedlp.apps import runs as assembly
from fedlp.config import PruneConfig, RunConfig, compose, compose_prune, config_dir, from_yaml, to_plain, to_yaml
from fedlp.config.reading import part_groups

FILES = sorted(config_dir().glob("*/*.yaml"))
PROMISED = {
    "model": "fedlp_cnn fedlp_mlp resnet18 vgg11_bn mobilenet_v2 llama_tiny hf",
    "dataset": "digits cifar10 cifar100 mnist fashion_mnist topics text hf imagefolder csv parquet arrays",
    "task": "auto classification causal_lm regression multi_label sequence_classification",
    "partition": "iid dirichlet shards mixed natural devices column",
    "strategy": "fedavg fedlp_homo fedlp_hetero heterofl fjord fedrolex fedlp_plan",
    "upload": "float32 bfloat16 int8 int4 int2 topk",
    "download": "float32 bfloat16 int8 block8 block4 nf4",
    "aggregator": "coverage_average trimmed_mean median krum norm_clipping norm_filter centred_clipping",
    "server_optimizer": "none momentum adam yogi adagrad",
    "local": "sgd adam adamw",
    "simulation": "local ray",
    "experiment": "demo",
    "pruner": "obs slimgpt magnitude wanda flap taylor random",
    "allocator": "uniform depth_line log_depth owl alphapruning dlp flap erk dp dsa plan",
    "finetune": "none newton lora full",
    "fleet": "full tiers mixed",
    "privacy": "none local_dp",
}
PRUNING = ("pruner", "allocator", "finetune")  # groups of fedlp-prune


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_file_composes_and_survives_its_own_yaml(path: Path) -> None:
    group, option = path.parent.name, path.stem
    if group in PRUNING:
        needed = ["allocator.path=plan.yaml"] if option == "plan" else []
        config: RunConfig | PruneConfig = compose_prune([f"{group}={option}", "sparsity=0.5", *needed])
    else:
        config = compose([f"{group}={option}"])
        assert from_yaml(to_yaml(config)) == config
    if group != "experiment":
        values = yaml.safe_load(path.read_text())
        values.pop("defaults", None)
        is_global = "# @package _global_" in path.read_text()
        for name, node in (values if is_global else {group: values}).items():
            assert given(to_plain(config)[name], node) == node


def given(chosen: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``chosen`` that a file gives; others have their defaults."""
    return {key: given(chosen[key], value) if isinstance(value, dict) else chosen[key] for key, value in node.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_file_says_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert any(line.startswith("# ") and not line.startswith("# @package") for line in lines[:2])


def test_the_options_that_people_rely_on_exist() -> None:
    found = {f"{path.parent.name}={path.stem}" for path in FILES}
    assert {f"{group}={name}" for group, names in PROMISED.items() for name in names.split()} <= found


PARTS = [
    (group, part.kind, name) for group, part in part_groups(RunConfig).items() for name in registry.names(part.kind)
]
NEEDED = {"allocator=plan": ["allocator.path=plan.yaml"]}


@pytest.mark.parametrize(("group", "kind", "name"), PARTS, ids=lambda value: value)
def test_every_built_in_part_composes_by_its_name(group: str, kind: str, name: str) -> None:
    """With its own defaults where it has no YAML, and with a docstring whose first line says what it is."""
    method = ["strategy=fedlp_plan"] if group in PRUNING else []
    config = compose([*method, f"{group}={name}", *NEEDED.get(f"{group}={name}", [])])
    part = getattr(config, group)
    assert getattr(part, part.key) == name
    assert set(part.options) <= set(registry.options(kind, part.target))
    assert from_yaml(to_yaml(config)) == config
    assert registry.summary(part.target)


@pytest.mark.parametrize("path", sorted((config_dir() / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_opens_with_its_command_and_can_be_costed(path: Path, tmp_path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert any(re.match(r"# (fedlp|python|make|\.venv)", line) for line in header)
    needed = {"pretrained": ["model=llama_tiny", "dataset=topics"]}.get(
        path.stem, []
    )  # a model and a text of the user's
    manifest = assembly.dry_run(to_yaml(compose([f"experiment={path.stem}", *needed])), tmp_path)
    assert manifest["expected_totals"]["bytes_down"] > 0


def dry_run(out: Path, *overrides: str) -> dict[str, float]:
    """Return what a dry run with FedLP's CNN on CIFAR-10 expects; the data set is not here, and need not be."""
    cfg = to_yaml(compose(["model=fedlp_cnn", "dataset=cifar10", f"dataset.root={out}/absent", *overrides]))
    assembly.dry_run(cfg, out)
    assert [entry.name for entry in out.iterdir()] == ["manifest.json"]
    expected: dict[str, float] = json.loads((out / "manifest.json").read_text())["expected"]
    return expected


# The columns of the table in FedLP's README. It prints 36.36 M MACs for the whole model where the counter that it calls
# gives 39.36, and the error runs through its other values: these are the counter's.
PAPER = [
    (("strategy=fedavg",), "1102.93", "39.36"),
    (("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.1"), "606.61", "39.36"),
    (("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.3"), "716.91", "39.36"),
    (("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.5"), "827.20", "39.36"),
    (("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.7"), "937.49", "39.36"),
    (("strategy=fedlp_hetero", "strategy.depths=1"), "169.60", "18.03"),
    (("strategy=fedlp_hetero", "strategy.depths=3"), "225.28", "24.91"),
    (("strategy=fedlp_hetero", "strategy.depths=u"), "318.66", "24.43"),
    (("strategy=fedlp_hetero", "strategy.depths=5"), "710.80", "31.89"),
]


@pytest.mark.parametrize(
    ("overrides", "params", "macs"), PAPER, ids=lambda value: str(value[-1]) if isinstance(value, tuple) else value
)
def test_a_dry_run_gives_the_papers_costs_without_any_data(
    overrides: tuple[str, ...], params: str, macs: str, tmp_path: Path
) -> None:
    expected = dry_run(tmp_path, *overrides)
    both_ways = expected["params_down_per_client"] + expected["params_up_per_client"]
    assert f"{both_ways / 1e3:.2f}" == params
    assert f"{expected['macs_per_example'] / 1e6:.2f}" == macs


def test_the_mask_unit_does_not_change_what_is_expected(tmp_path: Path) -> None:
    one = dry_run(tmp_path, "strategy=fedlp_homo", "strategy.upload_unit=tensor")
    assert f"{(one['params_down_per_client'] + one['params_up_per_client']) / 1e3:.2f}" == "827.20"


def test_one_rate_per_client_costs_their_mean(tmp_path: Path) -> None:
    rates = "strategy.layer_preserving_rate=[0.1,0.3,0.5,0.7,0.9]"
    mean = dry_run(tmp_path, "strategy=fedlp_homo", rates, "num_clients=5", "clients_per_round=5")
    assert mean["params_up_per_client"] == pytest.approx(0.5 * 551_466)


def test_the_totals_of_a_dry_run_are_those_of_its_rounds(tmp_path: Path) -> None:
    cfg = to_yaml(
        compose(["strategy=fedavg", "num_rounds=7", "num_clients=10", "clients_per_round=3", "local.epochs=2"])
    )
    manifest = assembly.dry_run(cfg, tmp_path)
    expected, totals = manifest["expected"], manifest["expected_totals"]
    assert totals["bytes_down"] == 21 * expected["bytes_down_per_client"]
    assert totals["bytes_up"] == 21 * expected["bytes_up_per_client"]
    assert totals["macs"] == pytest.approx(7 * 3 * 2 * 143.8 * expected["training_macs_per_example"])
