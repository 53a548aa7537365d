"""A run that goes on under ``flwr run``: the settings of the command line, and clients that cannot see its folder."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.superlink.grid import InMemoryGrid

from fedlp.apps import runs as assembly
from fedlp.config import FederatedSearchConfig, compose_federated_search, from_yaml, to_yaml
from fedlp.errors import ConfigError
from fedlp.simulation.flower_apps import check_size, read_settings
from fedlp.simulation.local import LocalGrid
from tests.integration.running import TINY, Finished, read
from tests.integration.test_resume import assert_same

Once = Callable[..., Finished]
CASE = (*TINY, "strategy=fedlp_hetero")


@pytest.fixture
def stopped(once: Once, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once(*CASE, "num_rounds=2").path, tmp_path / "run"))


def context(**settings: str) -> Context:
    return Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=dict(settings))


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_clients_that_are_told_its_config(
    stopped: Path, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stopped.parent)
    with LocalGrid(
        lambda: assembly.client_app,
        num_clients=6,
        num_workers=2,
        message_bytes=4_000_000,
        run_config={"overrides": "resume=/not/on/this/device"},
    ) as grid:
        assembly.server_app(grid, context(overrides="resume=run num_rounds=4 simulation.workers=1"))
    whole = once(*CASE, "num_rounds=4", "simulation.workers=1")
    assert_same(read(stopped), whole)


def test_a_search_is_that_of_its_command() -> None:
    words = ("federated=true", "model=hf", "model.path=folder", "num_clients=17")
    cfg, folder = read_settings(context(overrides=shlex.join(("fedlp-search", *words)), out="/out"))
    assert (cfg, folder) == (to_yaml(compose_federated_search(words)), Path("/out"))
    assert isinstance(from_yaml(cfg), FederatedSearchConfig)


@pytest.mark.parametrize("out", ["", "run", "{run}", "./run/../run"])
def test_it_stays_in_its_folder(out: str, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stopped.parent)
    cfg, folder = read_settings(context(overrides=f"resume={stopped}", out=out.format(run=stopped)))
    assert folder == stopped
    assert assembly.from_yaml(cfg).resume == str(stopped)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overrides": "resume=/nonexistent"}, "resume=/nonexistent: that is not a run directory"),
        ({"overrides": "resume={run} seed=3"}, "drop seed$"),
        ({"overrides": "resume={run} num_rounds=0"}, "at least 1"),
        ({"overrides": "resume={run}", "out": "elsewhere"}, "drop out$"),
        ({"overrides": "resume={run} num_rounds=1"}, "has done 2"),
    ],
)
def test_what_the_command_line_refuses_is_refused(settings: dict[str, str], words: str, stopped: Path) -> None:
    filled = {key: value.format(run=stopped) for key, value in settings.items()}
    with (
        LocalGrid(lambda: assembly.client_app, num_clients=6, num_workers=1, message_bytes=4_000_000) as grid,
        pytest.raises(ConfigError, match=words),
    ):
        assembly.server_app(grid, context(**filled))


def test_a_simulation_of_another_size_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = InMemoryGrid.__new__(InMemoryGrid)
    monkeypatch.setattr(InMemoryGrid, "get_node_ids", lambda self: [7, 8])
    words = "simulates 2 SuperNodes, but the run has num_clients=20; add --federation-config num-supernodes=20"
    with pytest.raises(ConfigError, match=words):
        check_size(grid, 20, patience_s=0.0)
    check_size(grid, 2, patience_s=0.0)
