"""``fedlp-export``: sub-models of a run's clients as files that compute the same without fedlp."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlp import cli
from fedlp.apps import export as exporting
from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.errors import CheckpointError
from fedlp.federation.server.checkpoint import ServerState, load_checkpoint
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.models import forward_logits
from fedlp.models.language import import_transformers
from fedlp.pruning.io.classifier_files import load_classifier
from fedlp.pruning.tracing.widths import WidthSpec
from fedlp.types import Budget
from tests.integration.running import TINY, TINY_CNN, Call, Finished, assert_refused, run
from tests.integration.test_own_budgets import bringing

Once = Callable[..., Finished]

FLEET = ("fleet=tiers", "fleet.fractions=[1.0,0.3]", "fleet.limited=[params]")
OURS = (*TINY_CNN, "strategy=fedlp_plan", "pruner=magnitude", *FLEET)
HETEROFL = (*TINY_CNN, "strategy=heterofl", "strategy.widths=[1.0,0.5]", *FLEET)
HETERO = (*TINY_CNN, "strategy=fedlp_hetero", "strategy.depths=[1,2,5,5,5,3]")
LANGUAGE = (
    *("model=llama_tiny", "model.num_layers=1", "dataset=topics", "dataset.sequence_length=32", "num_rounds=1"),
    *("dataset.max_train_examples=24", "dataset.max_test_examples=8", "num_clients=2", "clients_per_round=2"),
    *("strategy=fedlp_plan", "pruner=magnitude", "simulation.workers=1", *FLEET, "fleet.fractions=[0.5]"),
)
ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(("fedlp", "torch", "transformers", "flwr")))  # importing one is an error
import numpy, onnxruntime
model, inputs, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
numpy.save(outputs, session.run(None, {session.get_inputs()[0].name: numpy.load(inputs)})[0])
"""


def export(call: Call, done: Finished, out: Path, *arguments: str) -> dict[str, Any]:
    code, _, errors = call(str(done.path), "--out", str(out), *arguments, main=cli.export_main)
    assert code == 0, errors
    found: dict[str, Any] = json.loads((out / "artefacts.json").read_text())
    return found


def run_elsewhere(model: Path, inputs: Tensor) -> Tensor:
    """Run an ONNX file in a process that has neither fedlp nor torch."""
    files = model.parent.parent / "inputs.npy", model.parent.parent / "outputs.npy"
    np.save(files[0], inputs.numpy())
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(model), *map(str, files)], check=True, timeout=60)
    return torch.from_numpy(np.load(files[1]))


def left_by(done: Finished) -> tuple[assembly.Federation, ServerState]:
    state = load_checkpoint(done.path / "checkpoint")
    assert state is not None
    return assembly.make_plan(to_yaml(done.config)), state


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", [OURS, HETEROFL, (*TINY, "strategy=fedavg")], ids=["fedlp", "heterofl", "fedavg"])
def test_files_compute_the_sub_model_of_their_clients(
    case: tuple[str, ...], once: Once, tmp_path: Path, call: Call
) -> None:
    done = once(*case)
    plan, state = left_by(done)
    assigned = [plan.policy.assign(state.server_round, client, state.memory).submodel for client in range(6)]
    chosen = [str(client) for client, submodel in enumerate(assigned) if submodel.widths or "strategy=fedavg" in case]
    index = export(call, done, tmp_path / "out", "--clients", *chosen)
    name = f"client-{chosen[0]}"
    assert index["clients"] == dict.fromkeys(chosen, name)
    (entry,) = index["artefacts"].values()
    folder = tmp_path / "out" / name
    axes = plan.submodels.widths if entry["batch_norms_measured"] else WidthSpec({}, {})
    model = load_classifier(plan.submodels.skeleton(), axes, folder)
    images = plan.submodels.spec.example_inputs(3)
    with torch.no_grad():
        expected = forward_logits(model, images)
    torch.testing.assert_close(run_elsewhere(folder / "model.onnx", images), expected, rtol=1e-4, atol=1e-4)
    assert entry["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert entry["bytes"] == {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("case", [HETEROFL, OURS], ids=["heterofl", "fedlp"])
def test_values_are_the_final_ones_and_batch_norms_the_only_difference(
    case: tuple[str, ...], once: Once, tmp_path: Path, call: Call
) -> None:
    done = once(*case)
    plan, state = left_by(done)
    plain = export(call, done, tmp_path / "plain", "--no-onnx", "--examples", "0")
    measured = export(call, done, tmp_path / "measured", "--no-onnx", "--examples", "40")
    assert list(plain["clients"]) == [str(client) for client in range(6)]
    assert len(plain["artefacts"]) == 2
    for client, folder in plain["clients"].items():
        submodel = plan.policy.assign(state.server_round, int(client), state.memory).submodel
        found = load_file(tmp_path / "plain" / folder / "model.safetensors")
        if not submodel.widths:  # the whole model is what the run has left and evaluated, whatever is measured
            for index, out in ((plain, "plain"), (measured, "measured")):
                assert index["artefacts"][folder]["metrics"]["loss"] == done.manifest["final_metrics"]["loss"]
                assert same(load_file(tmp_path / out / folder / "model.safetensors"), done.tensors)
            continue
        if case == HETEROFL:
            assert same(found, plan.submodels.layout(submodel).slice(state.params))
        else:
            axes = json.loads((tmp_path / "plain" / folder / "widths.json").read_text())["axes"]
            for axis, keep in submodel.widths.items():
                best = state.memory[f"score.{axis}"].argsort(descending=True, stable=True)[: keep.count].sort().values
                kept = [unit for run in axes[axis]["keep"] for unit in range(*run)]
                assert kept == best.tolist()
        again = load_file(tmp_path / "measured" / folder / "model.safetensors")
        changed = {name for name in found if not torch.equal(found[name], again[name])}
        assert changed == plan.submodels.statistics
        assert measured["artefacts"][folder]["batch_norms_measured"]


@pytest.mark.slow
def test_a_language_model_is_a_folder_of_transformers(once: Once, tmp_path: Path, call: Call) -> None:
    done = once(*LANGUAGE)
    index = export(call, done, tmp_path / "out")
    assert index["clients"] == {"0": "client-0", "1": "client-0"}
    assert index["artefacts"]["client-0"]["params"] <= 0.5 * left_by(done)[0].submodels.spec.num_params
    auto = import_transformers().AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "out" / "client-0", trust_remote_code=True)
    tokens = torch.arange(21).reshape(3, 7)
    with torch.no_grad():
        expected = forward_logits(model.eval(), tokens)
    found = run_elsewhere(tmp_path / "out" / "client-0" / "model.onnx", tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_budget_that_a_device_brought_counts(tmp_path: Path, call: Call) -> None:
    case = (*TINY, "num_clients=3", "clients_per_round=3", "num_rounds=1", "strategy=heterofl")
    done = run(tmp_path / "run", *case, "strategy.widths=[1.0,0.25]", app=bringing(tmp_path, "params: 60000"))
    index = export(call, done, tmp_path / "out", "--no-onnx", "--clients", "2", "1")
    assert index["artefacts"][index["clients"]["1"]]["params"] <= 60000
    directory = RunDirectory(done.path)
    assert directory.read_budgets() == {1: Budget(params=60000)}
    directory.add_budgets({2: Budget(macs=9)})
    assert directory.read_budgets() == {1: Budget(params=60000), 2: Budget(macs=9)}
    (done.path / "budgets.json").write_text('{"1": {"colour": 3}}')
    with pytest.raises(CheckpointError, match=r"budgets\.json cannot be read"):
        directory.read_budgets()


# ---- depths
def test_an_early_exit_has_its_clients_own_head(once: Once, tmp_path: Path, call: Call) -> None:
    done = once(*HETERO)
    plan, state = left_by(done)
    heads = {int(path.name) for path in (done.path / "clients").iterdir()}
    index = export(call, done, tmp_path / "out", "--no-onnx")
    assert {int(client) for client in index["clients"]} == heads | {2, 3, 4}
    assert {int(client) for client in index["skipped"]} == {0, 1, 5} - heads
    client = min(heads)
    found = load_file(tmp_path / "out" / f"client-{client}" / "model.safetensors")
    shared = {name for name in found if name in state.params}
    assert same({name: found[name] for name in shared}, {name: state.params[name] for name in shared})
    head = load_file(sorted((done.path / "clients" / str(client)).iterdir())[-1])
    assert same({name: found[name] for name in found.keys() - shared}, head)
    assert plan.submodels.spec.depths[done.config.strategy.depths[client] - 1] == shared


def test_a_head_on_a_device_cannot_be_exported(once: Once, tmp_path: Path, call: Call) -> None:
    copy = tmp_path / "run"
    shutil.copytree(once(*HETERO).path, copy)
    shutil.rmtree(copy / "clients")
    found = call(str(copy), "--clients", "0", main=cli.export_main)
    assert_refused(found, r"client 0 \(depth 1 of 5\) ends in a head of its own, which is not in .*run/clients")
    code, printed, errors = call(str(copy), "--no-onnx", main=cli.export_main)
    assert code == 0
    assert errors.count("ends in a head of its own") == 3
    assert printed.count("client-") == 1


# ---- bad input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--clients", "6"), "--clients 6: the run has clients 0 to 5"),
        (("--clients", "one"), "--clients one: give client numbers, or all"),
        (("--examples", "-1"), "--examples -1"),
        (("--out", "."), r"\. is there already; choose another folder with --out"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, ...], words: str, once: Once, call: Call) -> None:
    assert_refused(call(str(once(*HETEROFL).path), *arguments, main=cli.export_main), words)


def test_what_is_no_run_or_has_no_model_is_one_line(tmp_path: Path, call: Call) -> None:
    assert_refused(call(str(tmp_path), main=cli.export_main), r"is not a run directory \(it has no config\.yaml\)")
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["strategy=heterofl"])))
    assert_refused(call(str(tmp_path), main=cli.export_main), "has no checkpoint yet")
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["federated=true", "sparsity=0.3", "model=fedlp_cnn"])))
    assert_refused(
        call(str(tmp_path), main=cli.export_main), "is a one-shot pruning, whose one model is in .*model already"
    )


def test_nothing_is_left_where_onnx_is_missing(
    once: Once, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = once(*HETEROFL)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = call(str(done.path), "--out", str(tmp_path / "out"), main=cli.export_main)
    assert_refused(result, r"ONNX needs onnx and onnxscript; run: pip install \"fedlp\[export\]\"")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_data_are_elsewhere_is_exported_without_metrics(
    once: Once, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise exporting.DataError("no such files")

    done = once(*HETEROFL)
    monkeypatch.setattr(assembly.Federation, "data", property(absent))
    code, printed, errors = call(str(done.path), "--out", "out", "--no-onnx", main=cli.export_main)
    assert (code, printed.count("not here")) == (0, 2)
    assert errors == "fedlp: no metrics, and batch norms stay the global model's: no such files\n"
