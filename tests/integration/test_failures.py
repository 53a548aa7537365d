"""Clients that misbehave: the run goes on, the failure is named and counted, and the model never feels it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedlp.apps import runs as assembly
from fedlp.errors import FedLPError, TrainingError
from fedlp.federation.wire import messages
from fedlp.training.loop import train_locally
from tests.integration.running import TINY, App, Finished, read, run
from tests.reference import federated_loop

BAD = {2, 5}  # clients that misbehave in every round
HOMO = (*TINY, "strategy=fedlp_homo", "clients_per_round=6")
HONEST = assembly.client_app
Fault = Callable[[Message, RecordDict], RecordDict]


def app_with(fault: Fault, clients: set[int] = BAD, kind: str = "train") -> App:
    """Return the clients' app, in which ``fault`` turns the honest replies of some clients into others."""

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == kind and context.node_config["partition-id"] in clients:
            honest = HONEST(message, context) if kind == "train" else message
            return Message(fault(message, honest.content), reply_to=message)
        return HONEST(message, context)

    return app


# ---- faults
def raises(request: Message, reply: RecordDict) -> RecordDict:
    raise RuntimeError("the disk is full\nand more that nobody needs")


def gives_up(request: Message, reply: RecordDict) -> RecordDict:
    raise SystemExit(3)


def dies(request: Message, reply: RecordDict) -> RecordDict:
    os._exit(9)


def poison(value: float) -> Fault:
    def fault(request: Message, reply: RecordDict) -> RecordDict:
        values = decode(reply)
        values[len(values) // 2] = value
        return replace_params(reply, values)

    return fault


def shorter(request: Message, reply: RecordDict) -> RecordDict:
    return replace_params(reply, decode(reply)[:-1])


def longer(request: Message, reply: RecordDict) -> RecordDict:
    return replace_params(reply, np.append(decode(reply), np.float32(1)))


def too_long_for_its_slot(request: Message, reply: RecordDict) -> RecordDict:
    return replace_params(reply, np.zeros(4_000_000, dtype=np.float32))


def another_dtype(request: Message, reply: RecordDict) -> RecordDict:
    reply["params"] = ArrayRecord({"float64": Array(decode(reply).astype(np.float64))})
    return reply


def garbled(request: Message, reply: RecordDict) -> RecordDict:
    array = reply.array_records["params"]["float32"]
    reply.array_records["params"]["float32"] = Array(array.dtype, array.shape, array.stype, b"\x93NUMPY" + b"x" * 500)
    return reply


def set_config(**values: int | bytes) -> Fault:
    def fault(request: Message, reply: RecordDict) -> RecordDict:
        for key, value in values.items():
            reply.config_records["update"][key.replace("_", "-")] = value
        return reply

    return fault


def set_metric(key: str, value: float) -> Fault:
    def fault(request: Message, reply: RecordDict) -> RecordDict:
        reply.metric_records["metrics"][key] = value
        return reply

    return fault


def without(record: str) -> Fault:
    def fault(request: Message, reply: RecordDict) -> RecordDict:
        del reply[record]
        return reply

    return fault


def nothing(request: Message, reply: RecordDict) -> RecordDict:
    return RecordDict()


def other_records(request: Message, reply: RecordDict) -> RecordDict:
    return RecordDict({"params": MetricRecord({"a": 1}), "update": ArrayRecord(), "metrics": ConfigRecord({"b": "c"})})


def all_layers(request: Message, reply: RecordDict) -> RecordDict:
    """Send the whole model, whatever was asked for."""
    reply["params"] = request.content["params"]
    reply.config_records["update"]["uploads"] = b"\xff" * len(reply.config_records["update"]["uploads"])  # type: ignore[arg-type]
    return reply


def decode(reply: RecordDict) -> np.ndarray:
    values: np.ndarray = reply.array_records["params"]["float32"].numpy()
    return values.copy()


def replace_params(reply: RecordDict, values: np.ndarray) -> RecordDict:
    reply["params"] = ArrayRecord({"float32": Array("float32", values.shape, "numpy.ndarray", npy(values))})
    return reply


def npy(values: np.ndarray) -> bytes:
    return bytes(messages.encode_params({"x": torch.from_numpy(values)})["float32"].data)


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "raises": (raises, "raised", "RuntimeError: the disk is full"),
    "exits": (gives_up, "crashed", "exit code 3"),
    "dies": (dies, "crashed", "exit code 9"),
    "NaN": (poison(float("nan")), "rejected", "NaN or infinite"),
    "infinity": (poison(float("-inf")), "rejected", "NaN or infinite"),
    "too few values": (shorter, "rejected", "array float32"),
    "too many values": (longer, "rejected", "array float32"),
    "too many bytes": (too_long_for_its_slot, "raised", "larger than"),
    "another dtype": (another_dtype, "rejected", "float64"),
    "garbled bytes": (garbled, "rejected", "array float32"),
    "another round's reply": (set_config(server_round=77), "rejected", "of round 77"),
    "another client's reply": (set_config(client_id=0), "rejected", "of client 0"),
    "an index set that is too short": (set_config(uploads=b""), "rejected", "bitmap"),
    "layers that were not asked for": (all_layers, "rejected", "other tensors"),
    "no examples": (set_metric("num-examples", 0), "rejected", "num-examples is 0"),
    "negative examples": (set_metric("num-examples", -5), "rejected", "num-examples is -5"),
    "a million examples": (set_metric("num-examples", 10**6), "rejected", "num-examples is 1000000"),
    "half an example": (set_metric("num-examples", 0.5), "rejected", "num-examples is 0.5"),
    "a metric of NaN": (set_metric("train-loss", float("nan")), "rejected", "not a finite number"),
    "no params": (without("params"), "rejected", "params"),
    "no update record": (without("update"), "rejected", "update"),
    "no metrics": (without("metrics"), "rejected", "metrics"),
    "an empty reply": (nothing, "rejected", "missing"),
    "records of other kinds": (other_records, "rejected", "record update is no config"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_update_is_named_and_left_out(name: str, tmp_path: Path) -> None:
    fault, reason, words = FAULTS[name]
    rounds = (1, 2) if name in ("raises", "dies", "NaN") else (1,)
    done = run(tmp_path, *HOMO, f"num_rounds={len(rounds)}", app=app_with(fault))
    assert done.failures == [(server_round, client, reason) for server_round in rounds for client in sorted(BAD)]
    for line in done.rounds:
        assert all(words in failure["message"] and "\n" not in failure["message"] for failure in line["failures"])
        assert line["cohort"] == [0, 1, 2, 3, 4, 5]
        assert [client["client_id"] for client in line["clients"]] == line["cohort"]
        failed = [client for client in line["clients"] if client["client_id"] in BAD]
        assert all(client["params_up"] == client["macs"] == client["num_examples"] == 0 for client in failed)
        assert all(client["bytes_down"] > 0 for client in failed), "what was sent was sent"
    assert done.manifest["totals"]["failures"] == 2 * len(rounds)
    absent = [(server_round, client) for server_round in rounds for client in BAD]
    expected = federated_loop.run(done.config, train_locally, absent)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in done.tensors.items())


def test_a_silent_client_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    def sleeps(request: Message, reply: RecordDict) -> RecordDict:
        time.sleep(600)
        return reply

    started = time.monotonic()
    deadline = ("simulation.round_timeout_s=3", "num_rounds=1")
    done = run(tmp_path, *HOMO, *deadline, app=app_with(sleeps, {3}))
    assert time.monotonic() - started < 60
    assert done.failures == [(1, 3, "no_reply")]
    assert done.rounds[0]["failures"][0]["message"] == "no reply within 3 s"
    expected = federated_loop.run(done.config, train_locally, [(1, 3)])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in done.tensors.items())


@pytest.mark.parametrize("optimizer", ["none", "adam"])
def test_too_few_good_updates_leave_the_model_as_it_was(optimizer: str, tmp_path: Path) -> None:
    def in_round_1(request: Message, reply: RecordDict) -> RecordDict:
        if request.content.config_records["instruction"]["server-round"] == 1:
            raise RuntimeError("not today")
        return reply

    chosen = (*HOMO, "strategy=fedavg", "min_clients=5", f"server_optimizer={optimizer}")
    done = run(tmp_path / "two", *chosen, app=app_with(in_round_1))
    assert [set(line["coverage"].values()) for line in done.rounds] == [{0.0}, {1.0}]
    assert [len(line["failures"]) for line in done.rounds] == [2, 0]
    with pytest.raises(TrainingError, match="no round of 1 had a good update"):
        run(tmp_path / "one", *chosen, "num_rounds=1", app=app_with(in_round_1))
    only = read(tmp_path / "one")
    initial = assembly.make_plan((only.path / "config.yaml").read_text()).initial_params()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in only.tensors.items())


def test_a_run_in_which_all_clients_fail_ends_with_its_first_model(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no round of 2 had a good update; 12 updates failed, most of them raised"):
        run(tmp_path, *HOMO, app=app_with(raises, set(range(6))))
    done = read(tmp_path)
    assert len(done.failures) == 12
    assert all("accuracy" in line["metrics"] and "train_loss" not in line["metrics"] for line in done.rounds)
    initial = assembly.make_plan((done.path / "config.yaml").read_text()).initial_params()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in done.tensors.items())


def test_a_failure_does_not_touch_other_methods(tmp_path: Path) -> None:
    done = run(tmp_path, *TINY, "strategy=heterofl", "clients_per_round=6", app=app_with(poison(float("nan"))))
    assert len(done.failures) == 4
    assert all(bool(torch.isfinite(tensor).all()) for tensor in done.tensors.values())


def test_a_round_may_do_without_any_good_update(tmp_path: Path) -> None:
    def in_round_1(request: Message, reply: RecordDict) -> RecordDict:
        return raises(request, reply) if request.content.config_records["instruction"]["server-round"] == 1 else reply

    done = run(tmp_path, *HOMO, "min_clients=0", app=app_with(in_round_1, set(range(6))))
    assert len(done.failures) == 6
    assert set(done.rounds[0]["coverage"].values()) == {0.0}


def test_clients_that_cannot_say_who_they_are_are_left_out(tmp_path: Path) -> None:
    done = run(tmp_path, *HOMO, app=app_with(raises, kind="query.capabilities"))
    assert [line["cohort"] for line in done.rounds] == [[0, 1, 3, 4], [0, 1, 3, 4]]


def test_a_run_without_any_client_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(FedLPError, match="none of the 6 clients can take part"):
        run(tmp_path, *HOMO, app=app_with(nothing, set(range(6)), kind="query.capabilities"))


def test_an_evaluation_that_fails_ends_the_run_and_keeps_the_rounds_before(tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == messages.EVALUATE and message.metadata.group_id == "2":
            raise RuntimeError("no test set")
        return HONEST(message, context)

    words = f"evaluation of the global model failed: RuntimeError: no test set; go on with: fedlp resume={tmp_path}"
    with pytest.raises(FedLPError, match=f"^{re.escape(words)}$"):
        run(tmp_path, *HOMO, app=app)
    assert (tmp_path / "checkpoint" / "round-000001.json").is_file()
    assert (tmp_path / "rounds.jsonl").read_bytes().count(b"\n") == 1


def test_a_process_that_dies_while_it_evaluates_is_no_reason_to_stop(
    tmp_path: Path, once: Callable[..., Finished], caplog: pytest.LogCaptureFixture
) -> None:
    marks = tmp_path / "killed"
    marks.mkdir()

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == messages.EVALUATE and len(list(marks.iterdir())) < 2:
            (marks / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return HONEST(message, context)

    done = run(tmp_path / "run", *HOMO, "eval_batch_size=4", app=app)
    whole = once(*HOMO, "eval_batch_size=4")
    assert len(list(marks.iterdir())) == 2
    assert (done.model, done.untimed, done.failures) == (whole.model, whole.untimed, [])
    assert "evaluate.central failed at node" in caplog.text
    assert "exit code -9" in caplog.text


@pytest.mark.slow
def test_a_slow_evaluation_is_no_reason_to_stop(tmp_path: Path) -> None:
    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == messages.EVALUATE:
            time.sleep(3)
        return HONEST(message, context)

    done = run(tmp_path, *HOMO, "simulation.round_timeout_s=2.5", "num_rounds=1", app=app)
    assert "accuracy" in done.rounds[0]["metrics"]
