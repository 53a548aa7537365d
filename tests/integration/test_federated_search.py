"""``fedlp-search federated=true`` finds what a search on all data in one place finds, and outlives bad clients."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Array, Context, Message
from torch import Tensor

from fedlp import cli
from fedlp.apps import runs as assembly
from fedlp.apps.model_allocator import Allocator
from fedlp.apps.search_fitness import Fitness
from fedlp.apps.search_modes import Modes
from fedlp.config import FederatedSearchConfig, compose_federated_search, to_yaml
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.settings import Share
from fedlp.models.language import import_transformers
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.pruner import Calibration
from fedlp.pruning.tracing.units import find_layers
from tests.integration.running import TINY_CNN, App, Call, Finished, assert_refused, serve
from tests.integration.test_pooled_pruning import Central

SMALL = (
    *("dataset=topics", "dataset.sequence_length=32", "dataset.max_train_examples=90", "dataset.max_test_examples=10"),
    *("num_clients=3", "clients_per_round=3", "simulation.workers=2", "calibration.examples=8", "search.batch_size=2"),
    *("search.fitness_examples=8", "search.held_out_examples=4", "search.evaluations=6", "search.population=3"),
    *("search.ratios=[0.3,0.5]", "sums=float64"),
)
HONEST = assembly.client_app


@dataclass(frozen=True)
class Searched:
    """The files of a search."""

    path: Path
    config: FederatedSearchConfig

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "search.json").read_text())
        return found

    @property
    def untimed(self) -> dict[str, Any]:
        return {key: value for key, value in self.report.items() if not key.endswith("_s")}

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "rounds.jsonl").read_text().splitlines()]

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [failure for line in self.lines for failure in line["failures"]]


@pytest.fixture(scope="session")
def sharp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model whose predictions differ."""
    folder = tmp_path_factory.mktemp("model")
    transformers = import_transformers()
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, initializer_range=0.15)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def arguments(model: Path, *more: str) -> tuple[str, ...]:
    return ("federated=true", "model=hf", f"model.path={model}", *SMALL, *more)


def search(out: Path, model: Path, *more: str, app: App | None = None) -> Searched:
    config = compose_federated_search(arguments(model, *more))
    serve(config, out, app)
    return Searched(out, config)


@pytest.fixture(scope="session")
def done(sharp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return search(tmp_path_factory.mktemp("search") / "run", sharp_model)


class Twin(Allocator):
    """The allocator of a central search, whose sensitivities are measured on all examples for statistics."""

    statistics: list[Tensor]

    def measure(self, plans: Sequence[Any]) -> Sequence[float]:
        self.precomputed.on(self.statistics)
        return super().measure(plans)


def search_centrally(done: Searched, file: Path, clients: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Return the report of a search on the union of the clients' data in one place."""
    plan = assembly.make_plan(to_yaml(done.config))
    side = assembly.make_runtime(to_yaml(done.config), str(done.path / "clients")).pooling
    shares = {share: [side._examples.batches(client, share) for client in clients] for share in Share}
    union = {share: [batch for batches in found for batch in batches] for share, found in shares.items()}
    rest = [
        batch
        for part, all_ in zip(shares[Share.PART], shares[Share.FITNESS], strict=True)
        for batch in all_[len(part) :]
    ]
    model, widths = plan.submodels.spec.build(done.config.seed).eval(), plan.submodels.widths
    data = Calibration(union[Share.STATISTICS], [], 0)
    method = side._settings.method
    pruner = Central(model, widths, find_layers(model, widths), data, method, [side.calibration(c) for c in clients])
    allocator = Twin(pruner, Footprint(model, widths).count)
    allocator.statistics = union[Share.STATISTICS]
    modes = Modes(done.config.search, done.config.seed, allocator)
    part = union[Share.PART]
    fitness = Fitness(allocator.precomputed.on([*part, *rest]), modes.rules["uniform"], len(part), file, 1)
    report = modes.run(fitness)
    precomputed = allocator.precomputed.on(union[Share.HELD_OUT])
    report["held_out"] = {n: [precomputed.divergence(p) for p in plans] for n, plans in modes.finalists(report).items()}
    return report


@pytest.mark.parametrize(
    "more", [(), pytest.param(("pruner.damping=0.01", "search.space=chains"), marks=pytest.mark.slow)]
)
def test_the_function_is_that_of_a_search_on_all_data_in_one_place(
    more: tuple[str, ...], done: Searched, sharp_model: Path, tmp_path: Path
) -> None:
    ours = search(tmp_path / "run", sharp_model, *more) if more else done
    central, report = search_centrally(ours, tmp_path / "search.jsonl"), ours.report
    assert ours.failures == []
    assert report["hand_rules"] == pytest.approx(central["hand_rules"], rel=1e-3)
    for mode, found in central["modes"].items():
        assert report["modes"][mode]["text"] == found["text"]
        assert report["modes"][mode]["plans"] == found["plans"]
        best = [[inf if x is None else x for x in one["best_so_far"]] for one in (report["modes"][mode], found)]
        assert best[0] == pytest.approx(best[1], rel=1e-3)  # null: no candidate has been good
    for name, values in central["held_out"].items():
        assert [report["held_out"][name][f"{ratio:g}"] for ratio in report["ratios"]] == pytest.approx(values, rel=1e-3)


def test_what_is_written_and_what_travels(done: Searched) -> None:
    report, lines = done.report, done.lines
    layers, generations = 4, 3 * 2
    assert [line["server_round"] for line in lines] == list(range(1, layers + 1 + generations + 1 + 1))
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["config"]["num_rounds"] == len(lines)
    assert not (done.path / "model.safetensors").exists()
    for way in ("up", "down"):
        assert (
            report[f"bytes_{way}"] == sum(line[f"bytes_{way}"] for line in lines) == manifest["totals"][f"bytes_{way}"]
        )
        expected = 3 * len(lines) * manifest["expected"][f"params_{way}_per_client"]
        assert manifest["totals"][f"params_{way}"] == pytest.approx(expected, rel=0.05)
    of_candidates = lines[layers + 1 : -1]
    assert all(line["bytes_down"] < 3 * 1000 for line in of_candidates), "plans alone travel"
    assert lines[-1]["metrics"]["divergence"] == report["held_out"][report["winner"]]["mean"]
    found = [*report["hand_rules"].values(), *(mode["fitness"] for mode in report["modes"].values())]
    assert lines[-2]["metrics"]["divergence"] == min(found)
    assert yaml.safe_load((done.path / "winner.yaml").read_text())
    assert (done.path / "search.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_stopped_search_goes_on_to_the_same_report(done: Searched, sharp_model: Path, tmp_path: Path) -> None:
    lines = (done.path / "search.jsonl").read_text().splitlines()
    (tmp_path / "search.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n" + lines[-1][:9])
    shutil.copy(done.path / "config.yaml", tmp_path)
    again = search(tmp_path, sharp_model, "simulation.workers=1")
    counts = {"bytes_up", "bytes_down"}
    assert {**again.untimed, **dict.fromkeys(counts)} == {**done.untimed, **dict.fromkeys(counts)}
    assert again.report["bytes_up"] < done.report["bytes_up"]
    assert (tmp_path / "search.jsonl").read_text().splitlines() == lines


def test_a_folder_with_another_search_is_refused(done: Searched, sharp_model: Path, tmp_path: Path, call: Call) -> None:
    again = arguments(sharp_model, f"hydra.run.dir={done.path}")
    assert_refused(call(*again, main=cli.search_main), "already holds a finished search")
    assert_refused(call(f"resume={done.path}"), "is a search: go on with its own command")
    (tmp_path / "search.jsonl").write_text("")
    shutil.copy(done.path / "config.yaml", tmp_path)
    other = call(*arguments(sharp_model, "seed=5", f"hydra.run.dir={tmp_path}"), main=cli.search_main)
    assert_refused(other, "holds a search of another config")


@pytest.mark.slow
def test_the_command_says_what_was_found(sharp_model: Path, tmp_path: Path, call: Call) -> None:
    few = ("search.evaluations=2", "search.population=2", "search.modes=[random]", f"hydra.run.dir={tmp_path / 'run'}")
    code, printed, errors = call(*arguments(sharp_model, *few), main=cli.search_main)
    assert code == 0, errors
    assert "3 of 3 clients" in printed.splitlines()[1]
    assert "of uniform's divergence on held-out data of clients" in printed
    assert f"wins  -> {tmp_path / 'run' / 'winner.yaml'}" in printed
    assert "round 7/7" in errors
    code, printed, errors = call(*arguments(sharp_model, "dry_run=true"), main=cli.search_main)
    assert (code, errors) == (0, "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves files of its processes open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_on_ray_the_same_is_found(done: Searched, sharp_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    found = search(tmp_path / "ray", sharp_model, "simulation=ray")
    assert found.failures == []
    assert found.untimed == done.untimed
    assert (found.path / "winner.yaml").read_bytes() == (done.path / "winner.yaml").read_bytes()
    gc.collect()  # while their warnings are ignored


@pytest.mark.slow
def test_secure_sums_find_the_same(sharp_model: Path, tmp_path: Path) -> None:
    few = ("search.evaluations=4", "search.modes=[evolution]", "pruner.damping=0.01")
    plain, secure = (
        search(tmp_path / name, sharp_model, *few, f"privacy={name}").report for name in ("none", "secagg")
    )
    assert secure["failures"] == 0
    assert secure["hand_rules"] == pytest.approx(plain["hand_rules"], rel=1e-4)
    assert secure["modes"]["evolution"]["text"] == plain["modes"]["evolution"]["text"]


# ---- bad clients
def app_with(fault: Callable[[Message, Message], Message], client: int) -> App:
    def app(message: Message, context: Context) -> Message:
        honest = HONEST(message, context)
        if message.metadata.message_type == wire.JUDGE and context.node_config["partition-id"] == client:
            return fault(message, honest)
        return honest

    return app


def raises(request: Message, honest: Message) -> Message:
    raise RuntimeError("the disk is full")


def says(value: float) -> Callable[[Message, Message], Message]:
    def fault(request: Message, honest: Message) -> Message:
        arrays = honest.content.array_records[wire.PARAMS]
        array = arrays["float64"]
        values = torch.frombuffer(bytearray(array.data[128:]), dtype=torch.float64)
        values[-1] = value
        arrays["float64"] = Array(array.dtype, array.shape, array.stype, array.data[:128] + values.numpy().tobytes())
        return honest

    return fault


def claims(count: int) -> Callable[[Message, Message], Message]:
    def fault(request: Message, honest: Message) -> Message:
        honest.content.config_records[wire.ANSWER]["num-examples"] = count
        return honest

    return fault


@pytest.mark.parametrize(
    ("fault", "reason", "words"),
    [
        pytest.param(raises, "raised", "the disk is full", marks=pytest.mark.slow),
        (says(float("nan")), "rejected", "holds NaN or infinite values"),
        pytest.param(says(1e12), "rejected", "an entry beyond", marks=pytest.mark.slow),
        pytest.param(says(-1.0), "rejected", "a negative entry", marks=pytest.mark.slow),
        pytest.param(claims(-3), "rejected", "num-examples is -3", marks=pytest.mark.slow),
    ],
)
def test_a_bad_client_is_named_and_the_search_goes_on(
    fault: Callable[[Message, Message], Message], reason: str, words: str, sharp_model: Path, tmp_path: Path
) -> None:
    few = ("search.evaluations=3", "search.modes=[evolution]")
    found = search(tmp_path / "run", sharp_model, *few, app=app_with(fault, 1))
    assert {(failure["client_id"], failure["reason"]) for failure in found.failures} == {(1, reason)}
    assert all(words in failure["message"] for failure in found.failures)
    assert found.report["failures"] == len(found.failures) == 1 + 1 + 2 + 1  # sensitivities, rules, halves, check


@pytest.mark.slow
def test_a_client_that_lost_its_files_and_its_process_is_sent_refits_again(sharp_model: Path, tmp_path: Path) -> None:
    def forgets(message: Message, context: Context) -> Message:
        if message.metadata.message_type == wire.JUDGE and context.node_config["partition-id"] == 1:
            cfg, out = str(context.run_config["cfg"]), Path(str(context.run_config["out"]))
            runtime = assembly.make_runtime(cfg, str(out / "clients"))
            runtime.__dict__.pop("pooling", None)  # a fresh process
            folder = out / "clients" / "1"
            if (folder / "refits.safetensors").is_file() and not (out / "lost").exists():
                (out / "lost").touch()
                shutil.rmtree(folder)
        return HONEST(message, context)

    few = ("search.evaluations=3", "search.modes=[evolution]")
    whole, lost = (search(tmp_path / n, sharp_model, *few, app=app) for n, app in (("a", None), ("b", forgets)))
    assert lost.failures == []
    counts = {"bytes_up", "bytes_down"}
    assert {**lost.untimed, **dict.fromkeys(counts)} == {**whole.untimed, **dict.fromkeys(counts)}
    assert lost.report["bytes_down"] > whole.report["bytes_down"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("pruner=wanda",), "pruner=wanda is not allowed: it must be one of obs"),
        (("pruner.fisher=true",), "pruner=obs does not read pruner.fisher here"),
        (("search.workers=3",), "does not read search.workers here"),
        (("allocator=dp",), "fedlp-search federated=true does not read allocator: drop allocator=dp"),
        (("search.modes=[luck]",), "search.modes=luck is not allowed"),
        (("privacy=secagg",), "opens sums of privacy.min_group=3 answers or more, of two halves of the clients"),
        (("privacy=local_dp",), "which privacy=secagg alone protects"),
        (("fleet=tiers",), "fedlp-search federated=true: all clients get one model"),
        (("min_clients=4",), r"min_clients=4 is not allowed"),
    ],
)
def test_what_cannot_be_is_one_line(more: tuple[str, ...], words: str, sharp_model: Path, call: Call) -> None:
    assert_refused(call(*arguments(sharp_model, *more), main=cli.search_main), words)


@pytest.mark.slow
def test_the_model_of_a_run_is_sent_once(once: Callable[..., Finished], tmp_path: Path, call: Call) -> None:
    trained = once(*TINY_CNN)
    options = [word for word in SMALL if not word.startswith(("dataset", "num_clients"))]
    given = ("federated=true", f"run={trained.path}", *options, "search.evaluations=4", "search.modes=[evolution]")
    code, _, errors = call(*given, f"hydra.run.dir={tmp_path / 'run'}", main=cli.search_main)
    assert code == 0, errors
    found = Searched(tmp_path / "run", compose_federated_search(arguments(tmp_path)))
    assert found.failures == []
    assert found.lines[0]["bytes_down"] > 3 * len(trained.model) * 0.9
    assert all(line["bytes_down"] < 3 * 3000 for line in found.lines[-3:]), "two generations and the check"
    rules = found.report["hand_rules"]
    assert rules["uniform"] == pytest.approx(1.0), rules
    assert all(value > 0 for value in rules.values()), rules
    assert_refused(call(*given, "model=small_cnn", main=cli.search_main), "brings its own model, .*: drop model")
    assert_refused(call("federated=true", "run=nowhere", main=cli.search_main), "run=nowhere: that is not a run")


def test_a_model_without_trained_weights_is_refused(call: Call) -> None:
    untrained = call("federated=true", "model=small_cnn", "dataset=digits", main=cli.search_main)
    assert_refused(untrained, "model small_cnn has no trained weights; give model=hf model.path=DIR")
