"""Central differential privacy over a SuperLink: noise, epsilon and model are those of the local engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.bench import SMALL, WHOLE, bench_or_loopback
from tests.integration.running import run
from tests.integration.test_central_privacy import NOISE

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]


def test_a_noised_run_gives_the_bytes_of_the_local_engine(folder: Path, tmp_path: Path) -> None:
    case = (WHOLE, *NOISE)
    with bench_or_loopback(folder) as made:
        made.start(0)
        made.start(1)
        done = made.run(tmp_path / "run", *case)
    here = run(tmp_path / "here", *SMALL, *case)
    assert done.failures == []
    assert done.model == here.model
    assert [line["privacy"] for line in done.rounds] == [line["privacy"] for line in here.rounds]
    assert [line["cohort"] for line in done.rounds] == [line["cohort"] for line in here.rounds]
    assert all(line["privacy"]["epsilon"] > 0 for line in done.rounds)
