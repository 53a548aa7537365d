"""Federated one-shot pruning is pruning on all clients' data in one place, and outlives bad clients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from fedlp import cli
from fedlp.apps import runs as assembly
from fedlp.config import to_yaml
from fedlp.errors import FedLPError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.client import PoolingClient
from fedlp.federation.oneshot.messages import Question, Request
from fedlp.federation.oneshot.model import ModelStates
from fedlp.federation.wire import messages
from fedlp.models import state_tensors
from fedlp.models.language import import_transformers
from fedlp.pruning.calibration import choose_half
from fedlp.pruning.gradients import fisher_sums, pool_fisher
from fedlp.pruning.layer_statistics import Collector, Collects
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.staged_forward import StagedRun
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import cut_model
from fedlp.training.calibration_data import make_method
from tests.integration.running import App, Call, Finished, assert_refused, run

ONESHOT = ("federated=true", "num_clients=3", "clients_per_round=3", "sparsity=0.4", "simulation.workers=2")
LLAMA = (
    *("model=llama_tiny", "model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2"),
    *("dataset=topics", "dataset.sequence_length=32", "dataset.max_train_examples=90", "dataset.max_test_examples=10"),
    *("partition=iid", "calibration.examples=8", "calibration.batch_size=4"),
)
CNN = (
    *("model=small_cnn", "dataset=digits", "dataset.max_train_examples=90", "dataset.max_test_examples=30"),
    *("partition=dirichlet", "partition.min_examples=9", "calibration.examples=20", "calibration.batch_size=8"),
)
SLIMGPT = ("pruner=slimgpt", "allocator=log_depth")
OBS = ("pruner=obs", "allocator=log_depth", "pruner.damping=1e-3")
CASES = {
    "slimgpt": (*LLAMA, *SLIMGPT),
    "obs": (*LLAMA, *OBS, "pruner.fisher=false"),
    "obs, fisher": (*LLAMA, *OBS),
    "obs, shrunk": (*LLAMA, "pruner=obs", "allocator=log_depth"),
    "wanda, diagonals only": (*LLAMA, "pruner=wanda", "allocator=uniform"),
    "cnn, slimgpt": (*CNN, *SLIMGPT),
    "cnn, obs": (*CNN, *OBS, "pruner.fisher=false"),
    "cnn, magnitude": (*CNN, "pruner=magnitude", "allocator=uniform"),
}
HONEST = assembly.client_app
Once = Callable[..., Finished]


def client_side(done: Finished) -> PoolingClient:
    return assembly.make_runtime(to_yaml(done.config), str(done.path / "clients")).pooling


def report(done: Finished) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((done.path / "prune.json").read_text())
    return found


class Central(Pruner):
    """A pruner whose Fisher information draws labels by client, as clients do, and whose halves are of clients."""

    def __init__(self, *arguments: Any) -> None:
        *arguments, self.shards = arguments
        super().__init__(*arguments)

    def output_fisher(self, paths: Sequence[str]) -> dict[str, Tensor]:
        is_language = is_language_model(self.model)
        parts = [(data.batches, data.seed) for data in self.shards]
        if self.method.shrinks and len(parts) == 1:
            parts = [(choose_half(batches, half), seed) for batches, seed in parts for half in (1, 2)]
        found = [
            fisher_sums(self.model, paths, batches, torch.Generator().manual_seed(seed), not is_language)
            for batches, seed in parts
        ]

        def total(path: str, chosen: Sequence[tuple[dict[str, Tensor], int]]) -> tuple[Tensor, int]:
            return torch.stack([sums[path] for sums, _ in chosen]).sum(dim=0), sum(count for _, count in chosen)

        if self.method.shrinks:
            return {path: pool_fisher([total(path, found[::2]), total(path, found[1::2])]) for path in paths}
        return {path: sums / count for path in paths for sums, count in [total(path, found)]}

    def collector(self, dense: nn.Module | None) -> Collects:
        found = super().collector(dense)
        if len(self.shards) > 1:
            assert isinstance(found, Collector)
            owners = [(number, batch) for number, data in enumerate(self.shards) for batch in data.batches]
            found._firsts = [torch.full((len(batch),), number % 2 == 0) for number, batch in owners]
        return found


def prune_centrally(done: Finished, clients: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
    """Return what pruning the union of the clients' calibration data in one place gives."""
    plan, side = assembly.make_plan(to_yaml(done.config)), client_side(done)
    batches = [batch for client in clients for batch in side.calibration(client).batches]
    model = plan.submodels.spec.build(done.config.seed).eval()
    layers = find_layers(model, plan.submodels.widths)
    data = Calibration(batches, [], 0)
    shards = [side.calibration(client) for client in clients]
    pruner = Central(model, plan.submodels.widths, layers, data, make_method(done.config.pruner), shards)
    return state_tensors(pruner.prune({layer["name"]: layer["kept_units"] for layer in report(done)["layers"]}).model)


def assert_close(done: Finished, expected: dict[str, Tensor], tolerance: float) -> None:
    """Check every tensor; rows of producers are not computed, so equal ones mean that the same units were kept."""
    assert done.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) if tensor.is_floating_point() else 1.0
        torch.testing.assert_close(
            done.tensors[name], tensor, rtol=tolerance, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "encoding", "tolerance"),
    [
        *((case, "float64", 1e-5) for case in CASES),
        *(("slimgpt", "float32", 1e-3), ("obs", "float32", 1e-3)),
        ("cnn, obs", "float32", 1e-2),  # 60 images for layers of more inputs: what little damping leaves is amplified
    ],
)
def test_pooled_pruning_is_central_pruning_of_the_union(case: str, encoding: str, tolerance: float, once: Once) -> None:
    done = once(*ONESHOT, *CASES[case], f"sums={encoding}")
    assert done.failures == []
    assert_close(done, prune_centrally(done), tolerance)


def test_a_single_client_is_asked_about_halves_of_its_examples(once: Once) -> None:
    alone = ("num_clients=1", "clients_per_round=1", "sums=float64")
    done = once(*ONESHOT, *CASES["obs, shrunk"], *alone)
    assert done.failures == []
    assert [client["num_examples"] for client in done.rounds[1]["clients"]] == [8]  # 4 and 4
    assert_close(done, prune_centrally(done, [0]), 1e-5)


def test_what_is_written(once: Once) -> None:
    done = once(*ONESHOT, *LLAMA, *SLIMGPT, "sums=float32")
    found, layers = report(done), report(done)["layers"]
    assert [line["server_round"] for line in done.rounds] == list(range(1, len(layers) + 1))
    assert all(line["cohort"] == [0, 1, 2] for line in done.rounds)
    for line, layer in zip(done.rounds, layers, strict=True):
        assert line["coverage"][layer["name"]] == layer["kept_units"] / layer["num_units"]
        assert line["bytes_up"] == layer["bytes_up"] == sum(client["bytes_up"] for client in line["clients"])
    assert done.rounds[0]["metrics"] == pytest.approx(found["metrics_before"])
    assert done.rounds[-1]["metrics"] == found["metrics_after"] == done.manifest["final_metrics"]
    assert found["params_after"] < found["params_before"]
    assert done.manifest["totals"]["bytes_up"] == found["bytes_up"] < 3 * found["bytes_of_one_model_upload"]
    expected = done.manifest["expected"]
    for way in ("up", "down"):
        assert done.manifest["totals"][f"params_{way}"] == pytest.approx(
            3 * len(layers) * expected[f"params_{way}_per_client"], rel=0.01
        )
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(done.path / "model", trust_remote_code=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == found["params_after"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    overrides = (*ONESHOT, *LLAMA, *OBS)
    runs = [run(tmp_path / n, *overrides, f"simulation.workers={n}") for n in ("1", "2")]
    assert runs[0].model == runs[1].model
    assert runs[0].untimed == runs[1].untimed


# ---- votes
def test_votes_keep_plain_weights_and_send_next_to_nothing(once: Once) -> None:
    done = once(*ONESHOT, *LLAMA, *SLIMGPT, "unit_selection=client")
    assert len(done.rounds) == 1
    assert done.manifest["totals"]["bytes_up"] < 3 * 300
    before = assembly.make_plan(to_yaml(done.config)).initial_params()
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        kept, columns = done.tensors[name], before[name]
        assert all(bool((columns == column[:, None]).all(dim=0).any()) for column in kept.T)


def test_the_vote_of_one_client_is_its_own_pruning(once: Once) -> None:
    done = once(*ONESHOT, *LLAMA, *SLIMGPT, "unit_selection=client", "num_clients=1", "clients_per_round=1")
    alone = prune_centrally(done, [0])
    name = "model.layers.1.mlp.up_proj.weight"  # computes units, so it is only cut
    assert torch.equal(done.tensors[name], alone[name])


# ---- bad clients
def app_with(fault: Callable[[Message, Message], Message], kind: str, client: int) -> App:
    def app(message: Message, context: Context) -> Message:
        honest = HONEST(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] == client:
            return fault(message, honest)
        return honest

    return app


def raises(request: Message, honest: Message) -> Message:
    raise RuntimeError("the disk is full")


def claims_too_much(request: Message, honest: Message) -> Message:
    honest.content.config_records[wire.ANSWER]["num-examples"] = 10**6
    return honest


@pytest.mark.parametrize(("fault", "reason"), [(raises, "raised"), (claims_too_much, "rejected")])
def test_a_bad_client_is_named_and_the_others_go_on(
    fault: Callable[[Message, Message], Message], reason: str, tmp_path: Path
) -> None:
    done = run(tmp_path, *ONESHOT, *LLAMA, *SLIMGPT, "sums=float64", app=app_with(fault, wire.MOMENTS, 1))
    assert done.failures == [(number, 1, reason) for number in range(1, len(done.rounds) + 1)]
    assert_close(done, prune_centrally(done, [0, 2]), 1e-5)


def test_too_few_good_answers_end_the_run(tmp_path: Path) -> None:
    words = "query.moments of model.layers.0.self_attn: 2 of 3 clients gave a good answer, min_clients=3"
    with pytest.raises(FedLPError, match=words):
        run(tmp_path, *ONESHOT, *LLAMA, *SLIMGPT, "min_clients=3", app=app_with(raises, wire.MOMENTS, 1))


# ---- clients that forget
@pytest.mark.slow
def test_a_client_that_lost_its_files_and_its_process_is_sent_everything(tmp_path: Path) -> None:
    def forgets(message: Message, context: Context) -> Message:
        if message.metadata.message_type == wire.MOMENTS and context.node_config["partition-id"] == 1:
            cfg, out = str(context.run_config["cfg"]), Path(str(context.run_config["out"]))
            runtime = assembly.make_runtime(cfg, str(out / "clients"))
            runtime.__dict__.pop("pooling", None)  # a fresh process
            number = message.content.config_records[wire.QUESTION]["layer"]
            if number == 2 and not (out / "lost").exists():
                (out / "lost").touch()
                shutil.rmtree(out / "clients" / "1")
        return HONEST(message, context)

    overrides = (*ONESHOT, *LLAMA, *SLIMGPT, "sums=float64")
    whole, done = run(tmp_path / "whole", *overrides), run(tmp_path / "lost", *overrides, app=forgets)
    assert done.failures == []
    assert_close(done, whole.tensors, 1e-9)
    more = [line["bytes_down"] > other["bytes_down"] for line, other in zip(done.rounds, whole.rounds, strict=True)]
    assert more == [False, False, True, False]


class Halving:
    """A server that halves the weights of one layer after another, and asks a client about the next one."""

    def __init__(self, done: Finished, folder: Path) -> None:
        plan = assembly.make_plan(to_yaml(done.config))
        self.spec, self.folder = plan.submodels.widths, folder
        model = cut_model(plan.submodels.spec.build(done.config.seed), self.spec, {}).eval()
        self.states = ModelStates(model, find_layers(model, self.spec), {}, make_method(done.config.pruner))

    def halve(self, *layers: int) -> None:
        for number in layers:
            for tensor in self.states.tensors([number]).values():
                tensor.mul_(0.5)
            self.states.note(number)

    def ask(self, side: PoolingClient, layer: int, has: int) -> RecordDict:
        layers, axes = tuple(self.states.changed[has:]), tuple(self.spec.axes)
        base, tensors = self.states.names[has], self.states.tensors(layers)
        reference = torch.zeros(
            sum(self.states.model.get_submodule(path).in_features for path in self.states.layers[layer].readers)
        )
        request = Request(Question(wire.MOMENTS, layer, reference), base, self.states.name, layers, tensors)
        return side.answer(wire.MOMENTS, wire.encode_request(request, axes), 0, self.folder)


def fresh_process(done: Finished) -> PoolingClient:
    runtime = assembly.make_runtime(to_yaml(done.config), str(done.path / "clients"))
    assert runtime.settings.oneshot is not None
    return PoolingClient(runtime.settings.oneshot, runtime.info, runtime.submodels, runtime.shards.of)


def test_states_of_another_run_are_no_base(once: Once, tmp_path: Path) -> None:
    done = once(*ONESHOT, *LLAMA, *SLIMGPT, "sums=float32")
    server = Halving(done, tmp_path)
    server.halve(0, 1)
    shutil.copytree(done.path / "clients" / "0", tmp_path, dirs_exist_ok=True)  # as the run before left them
    assert wire.is_lack(server.ask(fresh_process(done), layer=2, has=1))
    assert not wire.is_lack(server.ask(fresh_process(done), layer=2, has=0))
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"layer-{i:06d}.safetensors" for i in (0, 1)]
    assert not wire.is_lack(server.ask(fresh_process(done), layer=2, has=2))


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_damaged_states_are_asked_for_again(
    once: Once, tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    done = once(*ONESHOT, *LLAMA, *SLIMGPT, "sums=float32")
    server = Halving(done, tmp_path)
    server.halve(0, 1)
    assert not wire.is_lack(server.ask(fresh_process(done), layer=2, has=0))
    path = tmp_path / "layer-000001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage is None else damage)
    assert wire.is_lack(server.ask(fresh_process(done), layer=2, has=2))
    assert (str(path) in caplog.text) == (damage is not None)


def test_a_process_that_is_asked_again_goes_on_where_it_was(
    once: Once, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = once(*ONESHOT, *LLAMA, *SLIMGPT, "sums=float32")
    server, same, steps = Halving(done, tmp_path), fresh_process(done), []
    advance = StagedRun.advance
    monkeypatch.setattr(StagedRun, "advance", lambda self: (steps.append(self.current), advance(self))[1])
    for layer in range(4):  # two blocks of two layers
        kept = server.ask(same, layer, has=max(0, layer - 1))
        fresh = server.ask(fresh_process(done), layer, has=layer)
        assert messages.count_bytes(kept) == messages.count_bytes(fresh)
        assert kept.array_records[wire.PARAMS]["float32"].data == fresh.array_records[wire.PARAMS]["float32"].data
        server.halve(layer)
    assert len(steps) == 1 + 2, "once by the process that goes on, once by each of the two that begin in block 1"


# ---- what cannot be
SMALL = ("federated=true", "model=fedlp_cnn", "dataset=digits", "sparsity=0.33")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("pruner=taylor", "allocator=uniform"), "score Taylor needs gradients, which clients do not send"),
        (
            ("allocator=dp",),
            "allocator needs error_curves, which the server lacks; take a rule .*: uniform, depth_line",
        ),
        (("allocator=uniform", "sparsity=0"), "sparsity=0.0 is not allowed"),
        (("allocator=uniform", "upload=int8"), "fedlp-prune federated=true does not read upload: drop upload=int8"),
        (("allocator=uniform", "fleet=tiers"), "all clients get one model: drop the fleet's budgets"),
    ],
)
def test_what_cannot_be_is_one_line(overrides: tuple[str, ...], words: str, call: Call) -> None:
    assert_refused(call(*SMALL, *overrides, main=cli.prune_main), words)


def test_a_finished_run_is_neither_resumed_nor_overwritten(once: Once, call: Call) -> None:
    done = once(*ONESHOT, *LLAMA, *SLIMGPT, "sums=float32")
    lines = (done.path / "rounds.jsonl").read_bytes()
    assert_refused(call(f"resume={done.path}", main=cli.main), "is a one-shot pruning, which cannot be resumed")
    again = call(*ONESHOT, *LLAMA, *SLIMGPT, f"hydra.run.dir={done.path}", main=cli.prune_main)
    assert_refused(again, "already holds a pruned model")
    assert (done.path / "rounds.jsonl").read_bytes() == lines
    code, _, errors = call(*ONESHOT, *LLAMA, *SLIMGPT, "dry_run=true", main=cli.prune_main)
    assert (code, errors) == (0, "")
