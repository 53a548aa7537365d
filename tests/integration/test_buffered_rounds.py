"""Asynchronous rounds on the wall clock: the order of arrival decides, and what goes wrong has a name."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlp.apps import runs as assembly
from fedlp.apps.runs import federation_of
from fedlp.config import compose, from_yaml, to_yaml
from fedlp.errors import ConfigError
from fedlp.federation import flower_compat
from fedlp.federation.server import buffered_rounds, open_exchange, reply_polling, roster
from fedlp.federation.server.checkpoint import load_checkpoint
from fedlp.training.loop import train_locally
from tests.integration.running import TINY, Finished, read, run
from tests.integration.test_virtual_time import BUFFERED, VARIANTS
from tests.reference import fedbuff

Once = Callable[..., Finished]
Seconds = Callable[[int], float]
"""Seconds of a client's next part."""

EVERYBODY = (*TINY, "strategy=fedavg", "num_clients=6", "clients_per_round=6", "num_rounds=3")
ASYNCHRONOUS = ("rounds=asynchronous", "rounds.staleness_exponent=0.5")
WALL = (*TINY, "strategy=fedavg", "num_clients=8", "num_rounds=6", "rounds=asynchronous", "rounds.buffer_size=2")
SPEEDS = (1.0, 2.3, 0.4, 3.1, 0.9, 7.7, 1.7, 0.6)


class DeviceGrid(Grid):
    """SuperNodes of given speeds, in time that passes where the server waits.

    Parameters
    ----------
    fates : mapping of (round, client) to str
        What becomes of a part: ``raises``, ``silent``, ``gone``, ``broken`` or ``twice``.
    joins : mapping of int to float
        Second at which a node appears.
    """

    def __init__(
        self,
        cfg: str,
        out: Path,
        seconds: Seconds,
        fates: Mapping[tuple[int, int], str] | None = None,
        joins: Mapping[int, float] | None = None,
    ) -> None:
        flower_compat.become_server()
        self._run_config: dict[str, bool | float | int | str] = {"cfg": cfg, "out": str(out)}
        self._num_clients = from_yaml(cfg).num_clients
        self._seconds, self._fates, self._joins = seconds, fates or {}, joins or {}
        self._due: dict[str, tuple[float, list[Message]]] = {}
        self._count = 0
        self.now = 0.0

    def get_node_ids(self) -> Iterable[int]:
        return [i + 1 for i in range(self._num_clients) if self._joins.get(i, 0.0) <= self.now]

    def push_messages(self, messages: Collection[Message]) -> list[str]:  # type: ignore[override]
        return [self._push(message, message.metadata.dst_node_id - 1) for message in messages]

    def _push(self, message: Message, client_id: int) -> str:
        self._count += 1
        flower_compat.set_message_id(message, f"message-{self._count}")
        about = message.metadata
        if about.message_type != "train":
            self._due[about.message_id] = self.now, [self._answer(message, client_id)]
            return about.message_id
        fate = self._fates.get((int(about.group_id), client_id), "")
        if fate == "gone":
            return ""
        replies = [Message(Error(2, "OSError: no disk"), reply_to=message)]
        if fate != "raises":
            replies = [self._answer(message, client_id)]
        if fate == "broken":
            image = replies[0].content["params"]["float32"].numpy()
            replies[0].content["params"] = ArrayRecord({"float32": Array(image * math.nan)})
        ends = self.now + (math.inf if fate == "silent" else self._seconds(client_id))
        self._due[about.message_id] = ends, replies * (2 if fate == "twice" else 1)
        return about.message_id

    def _answer(self, message: Message, client_id: int) -> Message:
        about = message.metadata
        received = flower_compat.make_instruction(
            message.content, about.message_id, client_id + 1, about.message_type, about.group_id
        )
        place = {"partition-id": client_id, "num-partitions": self._num_clients}
        context = Context(1, client_id + 1, place, RecordDict(), self._run_config)  # type: ignore[arg-type]
        return flower_compat.make_reply(assembly.client_app(received, context).content, message)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        unknown = flower_compat.make_instruction(RecordDict(), "of another run", 1, "train", "1")
        found = [Message(RecordDict(), reply_to=unknown)]
        for key in message_ids:
            if key in self._due and self._due[key][0] <= self.now:
                found += self._due.pop(key)[1]
        return found

    def wait(self, _: float) -> None:
        """Let time pass until the next answer, or for ten seconds."""
        self.now = min((ends for ends, _ in self._due.values() if self.now < ends < math.inf), default=self.now + 10.0)

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> Any: ...

    create_message = send_and_receive = None  # type: ignore[assignment]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Return a function that runs a config over a :class:`DeviceGrid`."""
    monkeypatch.setattr(reply_polling, "_REST_S", 0.0)

    def serve(seconds: Seconds, *overrides: str, out: Path = tmp_path / "run", **options: Any) -> Finished:
        config = compose(overrides)
        if (out / "config.yaml").exists():
            config.resume = str(out)
        cfg = to_yaml(config)
        grid = DeviceGrid(cfg, out, seconds, **options)
        clock = SimpleNamespace(monotonic=lambda: grid.now, sleep=grid.wait)
        for module in (open_exchange, buffered_rounds):
            monkeypatch.setattr(module, "time", clock)
        assembly.make_runtime(cfg, str(out / "clients"))
        assembly.serve_run(grid, cfg, out)
        return read(out)

    return serve


def always(client_id: int) -> float:
    return SPEEDS[client_id]


# ---- the order of arrival
def test_the_buffer_is_that_of_the_naive_loop(served: Callable[..., Finished]) -> None:
    done = served(always, *WALL)
    expected, steps = fedbuff.run(done.config, SPEEDS, train_locally)
    found = [sorted((int(i), steps) for i, steps in line["staleness"].items()) for line in done.rounds]
    assert found == steps
    assert max(staleness for step in steps for _, staleness in step) > 1
    assert [line["cohort"] for line in done.rounds] == [[client for client, _ in step] for step in steps]
    for name, values in done.tensors.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["weights", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plan", "heads"))]
)
def test_arrivals_of_the_virtual_clock_give_its_bytes(name: str, served: Callable[..., Finished], once: Once) -> None:
    timed = once(*BUFFERED, *VARIANTS[name])
    times = [time for line in timed.rounds for time in line["simulated"]["clients"]]
    parts: dict[int, deque[float]] = {}
    for time in sorted(times, key=lambda time: time["started_s"]):
        spent = time["download_s"] + time["training_s"] + time["upload_s"]
        parts.setdefault(time["client_id"], deque()).append(spent)
    plain = [option for option in BUFFERED if option != "fleet.clock=virtual"]
    done = served(lambda i: parts[i].popleft() if parts.get(i) else math.inf, *plain, *VARIANTS[name])
    assert [line["cohort"] for line in done.rounds] == [line["cohort"] for line in timed.rounds]
    assert [line["clients"] for line in done.rounds] == [line["clients"] for line in timed.rounds]
    assert done.model == timed.model


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_with_a_buffer_for_everybody_it_is_fedavg(workers: int, once: Once, tmp_path: Path) -> None:
    done, plain = run(tmp_path, *EVERYBODY, *ASYNCHRONOUS, f"simulation.workers={workers}"), once(*EVERYBODY)
    assert done.model == plain.model
    assert [line["cohort"] for line in done.rounds] == [line["cohort"] for line in plain.rounds]
    assert [line["metrics"] for line in done.rounds] == [line["metrics"] for line in plain.rounds]
    assert [{*line["staleness"].values()} for line in done.rounds] == [{0}] * 3


@pytest.mark.slow
def test_real_workers_fill_the_buffer(tmp_path: Path) -> None:
    done = run(tmp_path, *WALL)
    for line in done.rounds:
        assert len(line["cohort"]) == len(line["staleness"]) == 2
        assert sum(cost["num_examples"] > 0 for cost in line["clients"]) == 2
    assert done.failures == []
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())


# ---- what goes wrong
def test_failures_are_named_and_the_model_is_the_others(served: Callable[..., Finished], tmp_path: Path) -> None:
    fates = {
        (1, 0): "raises",
        (1, 1): "silent",
        (1, 5): "twice",
        (2, 2): "gone",
        (2, 3): "broken",
        (3, 4): "raises",
        (3, 0): "twice",
    }
    case = (*EVERYBODY, "simulation.round_timeout_s=60")
    done = served(always, *case, *ASYNCHRONOUS, fates=fates)
    assert sorted(done.failures) == [
        (1, 0, "raised"),
        (1, 1, "no_reply"),
        (2, 2, "gone"),
        (2, 3, "rejected"),
        (3, 4, "raised"),
    ]
    assert [line["cohort"] for line in done.rounds] == [[*range(6)]] * 3

    def absent(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            part = int(message.metadata.group_id), int(str(context.node_config["partition-id"]))
            assert fates.get(part, "twice") == "twice"
        return assembly.client_app(message, context)

    assert done.model == run(tmp_path / "same", *case, app=absent).model


@pytest.mark.slow
def test_an_idle_client_takes_the_place_of_one_that_fails(served: Callable[..., Finished]) -> None:
    done = served(always, *WALL, "num_rounds=1", "rounds.buffer_size=4", fates={(1, i): "raises" for i in range(4)})
    assert {client for _, client, _ in done.failures} <= {*range(4)}
    assert sum(cost["num_examples"] > 0 for cost in done.rounds[0]["clients"]) == 4


@pytest.mark.slow
def test_drop_outs_and_absent_clients_are_counted(served: Callable[..., Finished]) -> None:
    done = served(always, *WALL, "fleet.dropout=0.4", "fleet.availability=0.6")
    assert {reason for *_, reason in done.failures} == {"dropped_out"}
    assert any("absent" in line for line in done.rounds)
    assert all(sum(cost["num_examples"] > 0 for cost in line["clients"]) <= 2 for line in done.rounds)


def test_a_node_that_joins_while_the_buffer_fills_is_asked(
    served: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hours = iter(range(0, 10**6, 3600))
    monkeypatch.setattr(roster, "time", SimpleNamespace(monotonic=lambda: next(hours), sleep=lambda _: None))
    case = (*EVERYBODY, *ASYNCHRONOUS, "min_clients=2", "rounds.buffer_size=5", "num_rounds=1")
    done = served(lambda i: 20.0 + i, *case, joins={4: 10.0, 5: 1000.0})
    assert "round 1: client 4 has joined" in caplog.messages
    assert done.rounds[0]["cohort"] == [0, 1, 2, 3, 4]
    assert done.failures == []


# ---- the end
def test_a_resumed_run_asks_anew(
    served: Callable[..., Finished], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = served(always, *WALL, "num_rounds=3", out=tmp_path / "run")
    state = load_checkpoint(half.path / "checkpoint")
    assert state is not None
    assert not state.clock
    assert not any("asked anew" in line for line in caplog.messages)
    done = served(always, *WALL, out=tmp_path / "run")
    assert "after round 3: clients in flight are asked anew, and their old answers are not read" in caplog.messages
    assert [line["server_round"] for line in done.rounds] == [1, 2, 3, 4, 5, 6]
    assert done.untimed[:3] == half.untimed
    assert {*done.rounds[3]["staleness"].values()} == {0}
    assert any(max(line["staleness"].values()) > 0 for line in done.rounds[4:])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["fleet.extra_clients=1"], "needs fleet.extra_clients=0"),
        (["privacy=central_dp"], "needs privacy=none or local_dp"),
        (["privacy=secagg"], "needs privacy=none or local_dp"),
        (["simulation.batched=auto"], "needs simulation.batched=false"),
        (["rounds.deadline_s=5"], "simulation.round_timeout_s"),
        (["rounds.buffer_size=99"], "num_clients=20"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        federation_of(compose(["rounds=asynchronous", *overrides]))
