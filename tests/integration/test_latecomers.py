"""Clients that join in the middle of a run: they take part from then on, and nobody who cannot ends the run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.federation.server import roster
from fedlp.simulation.local import LocalGrid
from tests.integration.running import TINY, read, run

CASE = (*TINY, "strategy=fedavg", "clients_per_round=6", "num_rounds=3", "min_clients=2")


class Filling(LocalGrid):
    """A grid on which three nodes are there at first, and six from the second round on."""

    asked = 0

    def get_node_ids(self) -> Iterable[int]:
        self.asked += 1
        return list(super().get_node_ids())[: 3 if self.asked < 4 else 6]


def test_latecomers_take_part_but_for_one_whose_budget_cannot_be_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hours = count(0, 3600)  # one passes whenever the roster looks at the clock
    monkeypatch.setattr(roster, "time", SimpleNamespace(monotonic=lambda: next(hours), sleep=lambda _: None))
    budget = tmp_path / "budget.yaml"
    budget.write_text("params: 1000\n")

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 4:
            context.node_config["budget"] = str(budget)
        return assembly.client_app(message, context)

    cfg = to_yaml(compose(CASE))
    with Filling(lambda: app, 6, 2, 4_000_000, {"cfg": cfg}) as grid:  # type: ignore[arg-type, return-value]
        assembly.serve_run(grid, cfg, tmp_path / "run")
    done = read(tmp_path / "run")
    assert [line["cohort"] for line in done.rounds] == [[0, 1, 2], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]
    assert caplog.messages[0].startswith("the run begins without 3 of 6 clients")
    assert caplog.messages[1] == "round 2: client 3 has joined"
    assert caplog.messages[2].startswith("node 5 cannot take part: ")
    assert caplog.messages[3] == "round 2: client 5 has joined"

    def absent(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            client, server_round = context.node_config["partition-id"], message.metadata.group_id
            assert client != 4
            assert client in (0, 1, 2) or server_round != "1"
        return assembly.client_app(message, context)

    assert done.model == run(tmp_path / "same", *CASE, app=absent).model
