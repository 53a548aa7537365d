"""A pruning that was killed goes on at the layer where it was, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedlp.apps.prune_state import PruneState, fingerprint
from fedlp.errors import CheckpointError, ConfigError
from fedlp.models.spec import state_tensors
from fedlp.pruning.pruner import Calibration, LayerReport, Method, Pruner
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.random import Random
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import trace_widths
from tests.unit.pruning.test_pruner import classifier, half, images, language_model, tokens

METHODS = {
    "obs": Method(OBS(), correction=1.0, fisher=True, keeps_batch_norm=True),
    "random": Method(Random(), recovery="none"),
}


class _Killed(Exception):
    pass


def prune(
    model: nn.Module, batches: list[Tensor], method: Method, store: PruneState | None, layers: int = 99
) -> Tensor:
    """Return all weights of the pruned model, killed after some layers."""
    spec = trace_widths(model, batches[0])
    pruner = Pruner(model, spec, find_layers(model, spec), Calibration(batches, [], 0), method, store=store)
    seen: list[LayerReport] = []

    def look(report: LayerReport) -> None:
        seen.append(report)
        if len(seen) == layers:
            raise _Killed

    return torch.cat([t.double().flatten() for t in state_tensors(pruner.prune(half(pruner), look).model).values()])


def language() -> tuple[nn.Module, list[Tensor]]:
    return language_model(), tokens(3)


def pictures() -> tuple[nn.Module, list[Tensor]]:
    return classifier(), images(12)


@pytest.mark.parametrize(
    ("make", "method", "layers"),
    [
        (language, "obs", 3),
        (language, "random", 3),
        pytest.param(language, "obs", 4, marks=pytest.mark.slow),
        pytest.param(pictures, "obs", 4, marks=pytest.mark.slow),
    ],
)
def test_a_killed_pruning_goes_on_to_the_same_bytes(
    make: Callable[[], tuple[nn.Module, list[Tensor]]], method: str, layers: int, tmp_path: Path
) -> None:
    expected = prune(*make(), METHODS[method], None)
    with pytest.raises(_Killed):
        prune(*make(), METHODS[method], PruneState(tmp_path, "x"), layers)
    again = PruneState(tmp_path, "x")
    assert again.load("model.layers.0.self_attn" if make is language else "layer1.0.conv1") is not None
    assert torch.equal(prune(*make(), METHODS[method], again), expected)


def test_damaged_parts_are_computed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = prune(*language(), METHODS["obs"], None)
    with pytest.raises(_Killed):
        prune(*language(), METHODS["obs"], PruneState(tmp_path, "x"), 3)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(prune(*language(), METHODS["obs"], PruneState(tmp_path, "x")), expected)
    assert "is damaged" in caplog.text


def test_the_state_of_another_pruning_is_refused(tmp_path: Path) -> None:
    model = language_model()
    first = fingerprint("a: 1", model)
    PruneState(tmp_path, first).keep({"a": 1})
    assert PruneState(tmp_path, first).kept == {"a": 1}
    next(iter(state_tensors(model).values())).view(-1)[0] += 1.0
    for other in (fingerprint("a: 2", language_model()), fingerprint("a: 1", model)):
        with pytest.raises(ConfigError, match="unfinished pruning of another config or model"):
            PruneState(tmp_path, other)


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"format": 1, "fingerprint": "x", "kept": [1], "parts": {}})])
def test_an_unreadable_list_of_parts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        PruneState(tmp_path, "x")


def test_a_finished_pruning_leaves_nothing(tmp_path: Path) -> None:
    state = PruneState(tmp_path / "state", "x")
    state.save("a", {"t": torch.ones(2)})
    state.clear()
    assert not (tmp_path / "state").exists()
