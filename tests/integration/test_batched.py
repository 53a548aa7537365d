"""Batched cohorts: the same run as one by one up to rounding, whatever is asked of the clients."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from flwr.app import Message
from torch import Tensor

from fedlp.apps.federate import Federation
from fedlp.config import compose
from fedlp.errors import ConfigError, DataError
from fedlp.federation.client import cohort_training
from fedlp.federation.client.runtime import ClientRuntime
from fedlp.federation.wire.stacks import count_clients
from fedlp.simulation.local import LocalGrid
from fedlp.training import stacked_pass
from fedlp.types import ClientUpdate, TrainInstruction
from tests.integration.running import TINY, Finished, run
from tests.integration.test_round import Once

BATCHED = "simulation.batched=true"
UNEQUAL = ("partition=dirichlet", "partition.min_examples=4", "num_clients=12", "clients_per_round=12")
STRATEGIES = {
    "fedavg": ("strategy=fedavg",),
    "fedlp_homo": ("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.5"),
    "fedlp_hetero": ("strategy=fedlp_hetero",),
    "heterofl": ("strategy=heterofl",),
    "fedrolex": ("strategy=fedrolex",),
    "fjord": ("strategy=fjord",),
    "fedlp_plan": ("strategy=fedlp_plan", "pruner=magnitude"),
    "fedlp_plan, obs": ("strategy=fedlp_plan",),
}
OPTIONS = {
    "momentum": ("local.momentum=0.9", "local.weight_decay=0.01"),
    "clipping and proximal": ("local.max_grad_norm=0.5", "local.proximal=0.1"),
    "adam": ("local=adam",),
    "schedule": ("local.schedule=cosine",),
    "smoothing": ("task=classification", "task.label_smoothing=0.1"),
    "frozen layers": ("model.frozen=[fc1]",),
    "backward skipped": ("strategy=fedlp_homo", "local.skip_backward=true"),
    "deltas, int8, feedback": ("upload=int8", "upload.values=deltas", "upload.error_feedback=true"),
    "balanced classes": ("task=classification", "task.class_weights=balanced"),
    "batches of one": ("local.batch_size=1",),
}

LORA = (
    *("model=llama_tiny", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=48", "adapter=lora"),
    *("dataset=topics", "dataset.sequence_length=16", "dataset.max_train_examples=128", "dataset.max_test_examples=8"),
    *("num_clients=8", "clients_per_round=8", "num_rounds=2", "local.batch_size=8", "local.lr=0.1", "adapter.rank=4"),
    *("simulation.workers=2", "strategy=fedavg"),
)
ADAPTED = (
    ("adapter.dropout=0.25", "local.momentum=0.9"),
    ("adapter.freeze_a=true", "local.max_grad_norm=0.05"),
    ("strategy=fedlp_homo", "local.skip_backward=true", *UNEQUAL[:2]),
    ("upload=float32", "upload.values=deltas", "local.epochs=2"),  # rounding to few bits may flip a level
    ("strategy=heterofl",),
)


def assert_alike(one: Finished, other: Finished) -> None:
    """Compare models and records up to the rounding of float32 over some steps.

    Adam divides by the gradient's size: it moves an entry whose gradient is nothing but rounding by up to ``lr``.
    """
    is_adam = one.config.local.optimizer == "adam"
    for name, tensor in one.tensors.items():
        difference, scale = (other.tensors[name] - tensor).abs(), max(float(tensor.abs().max()), 1e-3)
        assert float(difference.quantile(0.99 if is_adam else 1.0)) <= 1e-5 * scale, name
        assert float(difference.max()) <= one.config.num_rounds * one.config.local.lr, name
    for line, same in zip(one.untimed, other.untimed, strict=True):
        assert line["cohort"] == same["cohort"]
        assert line["failures"] == same["failures"] == []
        assert (line["bytes_up"], line["bytes_down"], line["macs"]) == (
            same["bytes_up"],
            same["bytes_down"],
            same["macs"],
        )
        assert same["metrics"]["train_loss"] == pytest.approx(line["metrics"]["train_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_agree(strategy: str, once: Once) -> None:
    case = (*TINY, *UNEQUAL, *STRATEGIES[strategy], "local.epochs=2")
    assert_alike(once(*case), once(*case, BATCHED))


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_options_agree(option: str, once: Once) -> None:
    case = (*TINY, *UNEQUAL, *OPTIONS[option])
    assert_alike(once(*case), once(*case, BATCHED))


@pytest.mark.slow
@pytest.mark.parametrize("options", ADAPTED, ids=str)
def test_adapters_agree(options: tuple[str, ...], once: Once) -> None:
    assert_alike(once(*LORA, *options), once(*LORA, *options, BATCHED))


def test_clients_share_a_pass_of_the_base_that_each_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second round clients read the base from files of their own."""
    stacks: list[int] = []
    outputs = stacked_pass.adapted_outputs

    def spy(model: object, adapters: object, info: object, trained: object, still: object, raw: Tensor) -> Tensor:
        stacks.append(len(raw))
        return outputs(model, adapters, info, trained, still, raw)  # type: ignore[arg-type]

    monkeypatch.setattr(stacked_pass, "adapted_outputs", spy)
    run(tmp_path, *LORA, "simulation.batched=auto", "simulation.workers=0", "partition.name=iid")
    training = stacks[2:]  # without the trials of the server and of the clients' side
    assert len(training) == 2 * 4 * 2
    assert set(training) == {2}


def test_an_encoded_base_is_not_shared_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, *LORA, BATCHED, "simulation.workers=0", "adapter.base=encoded", "download=block8", "num_rounds=1")
    assert [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()] == [
        "clients train one by one, although simulation.batched=true: with adapter.base=encoded each client widens the "
        "base by itself"
    ]


def test_workers_change_no_bit(tmp_path: Path) -> None:
    case = (*TINY, *UNEQUAL, "strategy=fedlp_hetero", BATCHED)
    runs = [run(tmp_path / n, *case, f"simulation.workers={n}") for n in ("1", "2", "3")]
    assert len({done.model for done in runs}) == 1
    assert all(done.untimed == runs[0].untimed for done in runs)


def test_resumed_run_has_the_same_bytes(tmp_path: Path) -> None:
    case = (*TINY, *UNEQUAL, BATCHED)
    whole = run(tmp_path / "whole", *case, "num_rounds=3")
    run(tmp_path / "half", *case, "num_rounds=2")
    resumed = run(tmp_path / "half", *case, "num_rounds=3", f"resume={tmp_path / 'half'}")
    assert resumed.model == whole.model


def test_convolutions_train_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = ("model=fedlp_cnn", *TINY[2:], "num_rounds=1")
    alone = run(tmp_path / "alone", *case)
    with caplog.at_level(logging.WARNING):
        batched = run(tmp_path / "batched", *case, BATCHED)
    assert batched.model == alone.model
    (line,) = [record.message for record in caplog.records if "one by one" in record.message]
    assert line.startswith("clients train one by one, although simulation.batched=true: its convolutions")


def instructions(federation: Federation, client_ids: list[int]) -> list[TrainInstruction]:
    params = federation.initial_params()
    found = []
    for client_id in client_ids:
        assigned = federation.policy.assign(1, client_id, {}, params)
        found.append(TrainInstruction(1, client_id, assigned.submodel, assigned.uploads, params=params))
    return found


def test_a_round_is_trained_and_sent_in_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[tuple[str, int]] = []
    send = LocalGrid._send

    def spy(grid: LocalGrid, worker: object, numbered: list[tuple[int, Message]], *rest: object) -> None:
        found = [(x.metadata.message_type, count_clients(x.content)) for _, x in numbered]
        kinds.extend(one for one in found if one[0].startswith("train"))
        send(grid, worker, numbered, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalGrid, "_send", spy)
    run(tmp_path, *TINY, "num_clients=12", "clients_per_round=12", "num_rounds=1", "strategy=fedavg", BATCHED)
    assert kinds == [("train.cohort", 3)] * 4


def test_a_stack_that_fails_is_asked_client_by_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = (*TINY, *UNEQUAL, "strategy=fedlp_hetero", BATCHED)
    whole = run(tmp_path / "whole", *case)

    def fail(runtime: ClientRuntime, instruction: TrainInstruction, client_ids: list[int]) -> None:
        raise DataError("no stacks today")

    monkeypatch.setattr(ClientRuntime, "train_stack", fail)
    alone = run(tmp_path / "alone", *case)
    assert_alike(whole, alone)


def test_clients_do_train_together_and_one_that_fails_is_alone_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def spy(model: object, trainees: list[object], *rest: object) -> object:
        sizes.append(len(trainees))
        return train_stacked(model, trainees, *rest)  # type: ignore[arg-type]

    train_stacked = cohort_training.train_stacked
    monkeypatch.setattr(cohort_training, "train_stacked", spy)
    federation = Federation(compose([*TINY, "strategy=fedavg", BATCHED]))
    runtime = federation.runtime(str(tmp_path))
    updates = list(runtime.train_cohort(instructions(federation, [0, 1, 99, 2])))
    assert [isinstance(update, ClientUpdate) for update in updates] == [True, True, False, True]
    assert "there is no client 99" in str(updates[2])
    assert sizes == [3]


def test_it_is_the_local_engines() -> None:
    with pytest.raises(ConfigError, match=r"simulation\.batched"):
        compose([*TINY[:-1], "simulation=flower", BATCHED])
    with pytest.raises(ConfigError, match="true, false or auto"):
        compose([*TINY, "simulation.batched=sometimes"])
