"""``fedlp-search federated=true`` over a SuperLink finds what it finds on the local engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlp.config import to_yaml
from fedlp.simulation.flower_process import write_app
from tests.deploy.bench import bench_or_loopback, ignore
from tests.integration.test_federated_search import search, sharp_model  # noqa: F401 # a fixture

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
FEW = ("num_clients=2", "clients_per_round=2", "search.evaluations=3", "search.modes=[evolution]")


def test_the_function_is_that_of_the_local_engine(
    folder: Path,
    tmp_path: Path,
    sharp_model: Path,  # noqa: F811
) -> None:
    here = search(tmp_path / "here", sharp_model, *FEW)
    out = tmp_path / "there"
    with bench_or_loopback(folder) as made:
        for i in range(2):
            made.start(i)
        made.federation.run(write_app(folder), {"cfg": to_yaml(here.config), "out": str(out)}, ignore)
    report = json.loads((out / "search.json").read_text())
    assert {key: value for key, value in report.items() if not key.endswith("_s")} == here.untimed
    assert report["failures"] == 0
