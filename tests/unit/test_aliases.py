"""Old names of options: each still works, and says once which one is new; configs of earlier versions are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlp.config import FederatedPruneConfig, aliases, compose, from_yaml
from fedlp.config.aliases import RENAMED, RENAMED_CHOICES, current_override
from fedlp.report.packed import read_packed

PLAN, INT8, ADAM = "strategy=fedlp_plan", "upload=int8", "server_optimizer=adam"
CASES = {
    "strategy.masks": ("client", PLAN, "strategy.train_sent=false"),
    "strategy.mask_unit": ("tensor",),
    "strategy.weighting": ("held",),
    "strategy.batch_norm": ("whole",),
    "strategy.encoding": ("int8",),
    "strategy.entropy_coding": ("true", INT8),
    "strategy.coarseness": ("2", INT8),
    "strategy.values": ("deltas",),
    "strategy.error_feedback": ("true", INT8, "upload.values=deltas"),
    "strategy.skip_backward": ("true",),
    "strategy.server_optimizer": ("momentum",),
    "strategy.server_lr": ("0.5",),
    "strategy.server_momentum": ("0.5", ADAM),
    "strategy.server_beta2": ("0.5", ADAM),
    "strategy.server_epsilon": ("0.5", ADAM),
}
RESULTS = sorted((Path(__file__).parents[2] / "experiments").glob("*/results/*.runs.jsonl.xz"))


@pytest.fixture(autouse=True)
def _untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "_told", set())


def test_every_old_name_has_a_case() -> None:
    assert CASES.keys() == RENAMED.keys()


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_option_is_the_new_one_and_says_so_once(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, *others = CASES[old]
    new = compose([*others, f"{RENAMED[old]}={value}"])
    assert capsys.readouterr().err == ""
    assert new != compose(others)
    for _ in range(2):
        assert compose([*others, f"{old}={value}"]) == new
    assert capsys.readouterr().err == f"fedlp: {old} is now {RENAMED[old]}; the old name works for now\n"


@pytest.mark.parametrize(("group", "old"), RENAMED_CHOICES)
def test_an_old_choice_is_the_new_one_and_says_so_once(
    group: str, old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new = RENAMED_CHOICES[group, old]
    for _ in range(2):
        assert compose([f"{group}={old}"]) == compose([f"{group}={new}"])
    assert capsys.readouterr().err == f"fedlp: {group}={old} is now {group}={new}; the old name works for now\n"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("strategy=fedavg,fedlp,fedlp_homo", "strategy=fedavg,fedlp_plan,fedlp_homo"),
        ("strategy=fedlp_homo", "strategy=fedlp_homo"),
        ("+strategy.masks=client", "+strategy.unit_selection=client"),
        ("++strategy.encoding=int8", "upload=int8"),
        ("strategy.encoding=int8,int4", "upload=int8,int4"),
        ("strategy.encoding=float64", "sums=float64"),
        ("label=fedlp", "label=fedlp"),
    ],
)
def test_overrides_keep_their_form(override: str, wanted: str) -> None:
    assert current_override(override) == wanted


def test_sums_of_one_shot_pruning_had_an_encoding() -> None:
    config = compose(["strategy=oneshot", "strategy.encoding=float64", "strategy.masks=client"])
    assert isinstance(config, FederatedPruneConfig)
    assert (config.sums, config.unit_selection, config.sparsity, config.model.name) == (
        "float64",
        "client",
        0.33,
        "fedlp_cnn",
    )


# ---- stored configs
OLD = """
seed: 3
num_rounds: 7
num_clients: 8
clients_per_round: 4
model: {name: small_cnn, source: small_cnn, variant: plain, norm: batch, pretrained: false, path: null, frozen: [],
  hidden_size: 64, intermediate_size: 172, num_layers: 4, num_heads: 4, num_kv_heads: 2}
dataset: {name: digits}
partition: {name: dirichlet, alpha: 0.3}
strategy: {name: NAME, layer_preserving_rate: 1.0, mask_unit: layer, depths: u, persist_heads: true, widths: [1.0],
  width_probabilities: null, sparsity: 0.25, spread: macs, masks: client, criterion: weights, compensate: false,
  refresh_every: 10, warmup_rounds: 0, ramp_rounds: 0, ramp_from: 0.0, width_multiple: 1, regrow: 0.5,
  train_sent: false, weighting: held, batch_norm: whole, encoding: ENCODING, entropy_coding: true, coarseness: 2.0,
  values: deltas, error_feedback: true, skip_backward: true, server_optimizer: momentum, server_lr: 0.5,
  server_momentum: 0.7, server_beta2: 0.99, server_epsilon: 0.001}
local: {optimizer: sgd}
simulation: {engine: local}
fleet: {name: full}
pruner: {name: obs, recovery: least_squares}
allocator: {name: dp, amplitude: null, path: null}
"""


def test_a_config_of_an_earlier_version_is_divided_into_todays_groups() -> None:
    config = from_yaml(OLD.replace("NAME", "fedlp").replace("ENCODING", "int4"))
    assert (config.strategy.name, config.strategy.unit_selection, config.strategy.regrow) == (
        "fedlp_plan",
        "client",
        0.5,
    )
    assert "widths" not in config.strategy.options
    upload = config.upload
    assert (upload.name, upload.values, upload.coarseness, upload.entropy_coding) == ("int4", "deltas", 2.0, True)
    assert (config.aggregator.name, config.aggregator.weighting) == ("coverage_average", "held")
    assert config.aggregator.batch_norm == "whole"
    optimizer = config.server_optimizer
    assert (optimizer.name, optimizer.lr, optimizer.options["momentum"]) == ("momentum", 0.5, 0.7)
    assert config.local.skip_backward
    assert config.model.options == {}


def test_a_one_shot_config_of_an_earlier_version_keeps_the_type_of_its_sums() -> None:
    text = OLD.replace("NAME", "oneshot").replace("ENCODING", "float64").replace("coarseness: 2.0", "coarseness: 1.0")
    config = from_yaml(text)
    assert isinstance(config, FederatedPruneConfig)
    assert (config.sums, config.sparsity, config.unit_selection, config.strategy.name) == (
        "float64",
        0.25,
        "client",
        "fedavg",
    )


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: f"{path.parents[1].name}/{path.name}")
def test_configs_of_published_results_are_read(file: Path) -> None:
    for files in list(read_packed(file).values())[::7]:
        if files.config is not None:
            assert from_yaml(files.config).num_rounds >= 1
