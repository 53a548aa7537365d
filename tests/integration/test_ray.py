"""The Ray engine: the bytes of the local one, on one node and on two; nodes that die; one line where it cannot run."""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import fedlp
from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import ConfigError
from fedlp.simulation.flower_process import processes_in
from fedlp.simulation.parcel import HandOver
from fedlp.simulation.ray_cluster import RaySettings
from fedlp.simulation.ray_grid import RayGrid
from tests.integration.running import TINY, Call, Finished, execute, read
from tests.integration.test_central_privacy import NOISE

Once = Callable[..., Finished]
CASE = (*TINY, "strategy=fedavg")
PLAN = (*TINY, "strategy=fedlp_plan", "fleet=tiers", "fleet.fractions=[1.0,0.5]", "upload=int8")
PLAN = (*PLAN, "upload.error_feedback=true")
PATIENCE_S = 400

pytestmark = [  # Ray leaves files of its processes open
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes with one CPU each on this machine, which soon notices that one has died."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    )
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()
    gc.collect()  # while their warnings are ignored


def test_nothing_answers_at_the_address(call: Call) -> None:
    code, _, errors = call("simulation=ray", "simulation.address=127.0.0.1:1")
    assert code == 2
    assert errors.count("\n") == 1
    assert errors.startswith("fedlp: simulation.address=127.0.0.1:1: no Ray cluster answers there (")


def test_a_model_object_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    data = torch.zeros(40, 8), torch.arange(40) % 2
    with pytest.raises(ConfigError, match=r"^simulation=ray: the model is an object \(Linear\).*give"):
        fedlp.simulate(torch.nn.Linear(8, 2), data, clients=4, simulation="ray", out=tmp_path / "run")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc")
def test_a_private_ray_gives_the_bytes_of_the_local_engine(
    once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="f"))
    monkeypatch.setenv("TMPDIR", str(folder))
    done = execute("fedlp", *PLAN, "simulation=ray", "hydra.run.dir=run", cwd=tmp_path, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    said = [line.split(":")[1].split()[1] for line in done.stderr.splitlines()]
    assert said == ["1/2", "2/2"], f"Ray is silent: {done.stderr}"
    ray, local = read(tmp_path / "run"), once(*PLAN)
    assert ray.model == local.model
    assert ray.untimed == local.untimed
    assert processes_in(folder) == []
    assert list(folder.glob("fedlp-*")) == []
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_the_local_engine(once: Once, tmp_path: Path, cluster: Any) -> None:
    for number, case in enumerate((CASE, PLAN)):
        out = tmp_path / f"run{number}"
        assembly.run_locally(to_yaml(compose([*case, "simulation=ray", f"simulation.address={cluster.address}"])), out)
        assert read(out).model == once(*case).model
        assert read(out).untimed == once(*case).untimed
        assert not list(out.glob(".shared-*"))


def on_two_nodes(case: tuple[str, ...], cluster: Any, out: Path) -> Finished:
    """Return a run on the cluster; what was saved of a client lies in a folder that both nodes see."""
    assembly.run_locally(to_yaml(compose([*case, "simulation=ray", f"simulation.address={cluster.address}"])), out)
    return read(out)


@pytest.mark.ray
@pytest.mark.slow
def test_central_privacy_adds_the_noise_of_the_local_engine(once: Once, tmp_path: Path, cluster: Any) -> None:
    case = (*CASE, *NOISE)
    ray, local = on_two_nodes(case, cluster, tmp_path / "run"), once(*case)
    assert ray.failures == []
    assert ray.model == local.model
    assert ray.untimed == local.untimed
    assert all(line["privacy"]["epsilon"] > 0 for line in ray.rounds)


@pytest.mark.ray
@pytest.mark.slow
def test_secure_aggregation_gives_the_sums_of_the_local_engine(once: Once, tmp_path: Path, cluster: Any) -> None:
    case = (*CASE, "privacy=secagg", "evaluation=both", "dataset.client_test_fraction=0.25")
    ray, local = on_two_nodes(case, cluster, tmp_path / "run"), once(*case)
    assert ray.failures == []
    assert ray.model == local.model, "whatever the keys, masks cancel"
    assert ray.untimed == local.untimed
    assert {"keys", "shares", "train", "unmask"} <= ray.rounds[0]["phases"].keys()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_outlives_a_node(once: Once, tmp_path: Path, cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    def kill(record: Any, state: Any) -> None:
        if record.server_round == 1:
            cluster.remove_node(cluster.second, allow_graceful=False)

    assembly.run_locally(
        to_yaml(compose([*PLAN, "simulation=ray", f"simulation.address={cluster.address}"])), tmp_path / "run", [kill]
    )
    assert any("of the Ray cluster died" in line or "; tried again: client" in line for line in caplog.messages)
    found = read(tmp_path / "run")
    assert not found.failures  # states are in a folder that both nodes see
    assert found.model == once(*PLAN).model


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("pins", [False, True])
def test_messages_of_a_node_that_dies_in_their_midst(
    cluster: Any, pins: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    content = HandOver("tests.integration.ray_apps:make_app", {"seconds": 0.5}, {"numbers": np.arange(100_000)})
    with RayGrid(content, RaySettings(cluster.address), 8, 8, 1000) as grid:
        grid._pool.pins = pins
        lost = {i for i in range(8) if grid._pool.home(i).node_id == cluster.second.node_id}
        assert len(lost) == 4
        replies = []
        about = RecordDict({"about": ConfigRecord({"n": 1})})
        for reply in grid.stream([Message(about, i + 1, "train") for i in range(8)], 60.0):
            if not replies:
                cluster.remove_node(cluster.second, allow_graceful=False)
            replies.append(reply)
    good = [reply for reply in replies if not reply.has_error()]
    assert all(reply.content["found"]["sum"] == 4_999_950_000 for reply in good)
    failed = {i for i, reply in enumerate(replies) if reply.has_error()}
    assert [reply.content["found"]["client"] for reply in good] == [i for i in range(8) if i not in failed]
    if pins:
        assert failed
        assert failed <= lost
        assert any("of the Ray cluster died, and its workers with it" in line for line in caplog.messages)
        assert {replies[i].error.code for i in failed} == {8}
    else:
        assert not failed
        assert any("; tried again: client" in line for line in caplog.messages)
