"""Devices with data of their own, and a server without any."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.data.device_data import OwnPlace, describe_for_devices, load_at
from fedlp.data.examples import Examples, Rows, concatenate
from fedlp.errors import ConfigError, DataError
from fedlp.simulation.local import LocalGrid
from tests.integration.own_images import READS, write_devices, write_images
from tests.integration.running import TINY, Call, Finished, assert_refused, read, run

FOUR = (*TINY, *READS, "num_clients=4", "clients_per_round=4", "strategy=fedavg", "local.lr=0.1", "local.epochs=5")


def run_devices(out: Path, places: Mapping[int, Path], *overrides: str) -> Finished:
    """Run on the local engine, whose workers stand in for SuperNodes with ``data`` in their config."""
    config = compose((*FOUR, *overrides))
    cfg = to_yaml(config)

    def app(message: Message, context: Context) -> Message:
        client_id = context.node_config["partition-id"]
        assert isinstance(client_id, int)
        if client_id in places:
            context.node_config["data"] = str(places[client_id])
        return assembly.client_app(message, context)

    plan = assembly.make_plan(cfg)
    with LocalGrid(
        lambda: app,  # type: ignore[arg-type, return-value]
        num_clients=config.num_clients,
        num_workers=2,
        message_bytes=8 * plan.submodels.spec.num_params,
        run_config={"cfg": cfg, "out": str(out)},
    ) as grid:
        grid.holds_test_set = False  # the server's lies with the server, as it does where SuperNodes are
        assembly.serve_run(grid, cfg, out)
    return read(out)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return dict(enumerate(write_devices(tmp_path_factory.mktemp("devices"))))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_devices_train_on_their_own_folders_and_evaluate_there(
    tmp_path: Path, devices: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fedlp"):
        done = run_devices(tmp_path / "run", devices, "evaluation=clients", "num_rounds=6")
    assert [line["cohort"] for line in done.rounds] == [[0, 1]] * 6
    trained = [cost for cost in done.rounds[0]["clients"] if cost["num_examples"]]
    assert {cost["client_id"]: cost["num_examples"] for cost in trained} == {0: 30, 1: 12}
    last = done.rounds[-1]
    assert [one["num_examples"] for one in last["evaluations"]] == [10, 4]
    assert last["metrics"]["client_accuracy_worst"] == min(one["metrics"]["accuracy"] for one in last["evaluations"])
    assert last["metrics"]["client_accuracy_worst"] > 0.6
    assert "accuracy" not in last["metrics"]
    said = [record.getMessage() for record in caplog.records]
    (unknown,) = (line for line in said if "client 2" in line)
    (empty,) = (line for line in said if "client 3" in line)
    assert "cannot take part" in unknown
    assert "unknown class violet" in unknown
    assert "holds 0 images" in empty


def test_the_server_may_have_a_test_set_of_its_own(tmp_path: Path, devices: dict[int, Path]) -> None:
    test = write_images(tmp_path / "test", ("blue", "green", "red"), 5, (12, 12))
    done = run_devices(tmp_path / "run", devices, f"dataset.server={test}", "evaluation=both", "num_rounds=1")
    assert {"accuracy", "client_accuracy"} <= done.rounds[-1]["metrics"].keys()


def test_a_device_without_a_place_says_so(
    tmp_path: Path, devices: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    some = {0: devices[0], 1: devices[0] / "nowhere"}
    with caplog.at_level(logging.WARNING, "fedlp"):
        done = run_devices(tmp_path / "run", some, "evaluation=clients", "num_rounds=1")
    assert done.rounds[0]["cohort"] == [0]
    assert "the node has no data" in caplog.text
    assert "client 1: imagefolder: no folder" in caplog.text


def test_the_config_decides_what_a_label_is(devices: dict[int, Path]) -> None:
    config = compose((*FOUR, "evaluation=clients"))
    info = describe_for_devices(config.dataset)
    assert info.labels == ("blue", "green", "red")
    examples = load_at(config.dataset, str(devices[1]), info, seed=0)
    assert set(examples.targets.tolist()) == {1, 2}
    runtime = assembly.make_runtime(to_yaml(config), "", OwnPlace(1, str(devices[1])))
    assert runtime.profile(1).num_examples == 12
    with pytest.raises(DataError, match="there is no client 0"):
        runtime.profile(0)


def test_tables_are_described_by_the_config_alone(tmp_path: Path) -> None:
    rows = ["size,kind,owner,target", "1.0,a,x,yes", "3.0,b,x,no", "5.0,a,y,no"]
    (tmp_path / "own.csv").write_text("\n".join(rows))
    table = ("dataset=csv", "dataset.on_devices=true", "dataset.target=target", "dataset.columns=[size,kind]")
    facts = ("dataset.labels=[no,yes,maybe]", "dataset.categories={kind: [a, b, c]}")
    norms = ("dataset.mean=[2,0,0,0]", "dataset.std=[1,1,1,1]")
    config = compose((*table, *facts, *norms)).dataset
    info = describe_for_devices(config)
    assert (info.input_shape, info.num_classes, info.mean) == ((4,), 3, (2, 0, 0, 0))
    examples = load_at(config, str(tmp_path / "own.csv"), info, seed=0)
    assert sorted(examples.targets.tolist()) == [0, 0, 1]
    assert examples.inputs.shape == (3, 4)
    for left_out, name in ((facts[0], "task"), (norms[0], "given together"), (facts[1], "categories")):
        others = [option for option in (*table, *facts, *norms, "dataset.categorical=[kind]") if option != left_out]
        with pytest.raises(ConfigError, match=name):
            describe_for_devices(compose(others).dataset)


def test_examples_of_one_file_are_joined_without_a_copy() -> None:
    whole = torch.arange(10)
    one, other = (Examples(Rows(whole, index), index, None) for index in (torch.arange(3), torch.arange(5, 7)))  # type: ignore[arg-type]
    joined = concatenate(one, other)
    assert isinstance(joined.inputs, Rows)
    assert joined.inputs[:5].tolist() == joined.targets.tolist() == [0, 1, 2, 5, 6]
    plain = Examples(torch.zeros(2, 3), torch.tensor([1, 0]), np.array([4, 5]))
    assert concatenate(plain, plain).inputs.shape == (4, 3)
    assert concatenate(plain, plain).groups is not None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset=imagefolder", "dataset.on_devices=true"], "fedlp describe writes them"),
        (["dataset=digits", "dataset.on_devices=true"], "devices cannot bring their own"),
        ([*READS, "evaluation=both"], r"dataset\.server=PATH"),
        ([*READS, "federated=true", "sparsity=0.3", "model=fedlp_cnn"], r"dataset\.server=PATH"),
        (["dataset.server=here"], r"dataset\.on_devices=true too"),
    ],
)
def test_wrong_options_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assembly.federation_of(compose(overrides))


def test_a_node_with_data_in_a_run_without_is_refused_by_name(
    tmp_path: Path, devices: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            context.node_config["data"] = str(devices[0])
        return assembly.client_app(message, context)

    with caplog.at_level(logging.WARNING, "fedlp"):
        done = run(tmp_path / "run", *TINY, "clients_per_round=6", "num_rounds=1", app=app)  # type: ignore[arg-type]
    assert done.rounds[0]["cohort"] == [0, 2, 3, 4, 5]
    (line,) = (record.getMessage() for record in caplog.records if "cannot take part" in record.getMessage())
    assert "client 1: the node brings data=" in line
    assert "dataset.on_devices=true" in line


def test_a_simulation_has_no_devices(call: Call) -> None:
    assert_refused(call(*READS, "evaluation=clients"), "is for SuperNodes")


def test_a_dry_run_needs_no_data(call: Call, tmp_path: Path) -> None:
    code, _, _ = call(*READS, "evaluation=clients", "dry_run=true", f"hydra.run.dir={tmp_path / 'dry'}")
    assert code == 0
