"""Pruned classifiers come back from their files; damaged files are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedlp.config import ModelConfig
from fedlp.errors import CheckpointError
from fedlp.models import describe_model
from fedlp.models.torchvision_compat import import_torchvision
from fedlp.pruning.io.model_files import load_classifier, round_weights, save_classifier
from fedlp.pruning.tracing.widths import WidthSpec, cut_model, trace_widths
from fedlp.types import Keep


def fedlp_cnn() -> tuple[nn.Module, WidthSpec, Tensor]:
    spec = describe_model(ModelConfig(name="fedlp_cnn", source="fedlp_cnn"), (1, 8, 8), 10, "classification")
    model, inputs = spec.build(0).eval(), spec.example_inputs(3)
    return model, trace_widths(model, inputs), inputs


def resnet18() -> tuple[nn.Module, WidthSpec, Tensor]:
    config = ModelConfig(name="resnet18", source="torchvision")
    spec = describe_model(config, (3, 16, 16), 10, "classification")
    model, inputs = spec.build(0).eval(), spec.example_inputs(3)
    return model, trace_widths(model, inputs), inputs


def vision_transformer() -> tuple[nn.Module, WidthSpec, Tensor]:
    torch.manual_seed(0)
    model = import_torchvision().models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=32, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)
    inputs = torch.randn(3, 3, 16, 16)
    return model.eval(), trace_widths(model, inputs), inputs


CLASSIFIERS = {build.__name__: build for build in (fedlp_cnn, resnet18, vision_transformer)}


def halves(spec: WidthSpec) -> dict[str, Keep]:
    return {axis: Keep.from_indices(np.arange(0, size, 2), size) for axis, size in spec.axes.items()}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_comes_back(name: str, tmp_path: Path) -> None:
    model, spec, inputs = CLASSIFIERS[name]()
    widths = dict(list(halves(spec).items())[1:])
    cut = cut_model(model, spec, widths)
    save_classifier(cut, spec, widths, tmp_path)
    again = load_classifier(CLASSIFIERS[name]()[0], spec, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(inputs), cut(inputs))
    axes = json.loads((tmp_path / "widths.json").read_text())["axes"]
    assert {axis: entry["size"] for axis, entry in axes.items()} == spec.axes
    first = next(iter(spec.axes))
    assert axes[first]["keep"] == [[0, spec.axes[first]]]


def test_classifier_with_biases_that_pruning_added_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 6, 2, bias=False), nn.Flatten(), nn.Linear(6, 3, False)
    )
    inputs = torch.randn(2, 1, 4, 4)
    spec = trace_widths(model, inputs)
    cut = cut_model(model, spec, halves(spec))
    cut[2].bias, cut[4].bias = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    save_classifier(cut, spec, halves(spec), tmp_path)
    with torch.no_grad():
        assert torch.equal(load_classifier(model, spec, tmp_path)(inputs), cut(inputs))
    assert model[2].bias is None


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def rewrite_tensors(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    save_file(dict(change(load_file(path))), path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no widths": (lambda f: (f / "widths.json").unlink(), "widths.json cannot be read.*No such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "no JSON": (lambda f: (f / "widths.json").write_text("{"), "widths.json cannot be read"),
    "a list": (lambda f: (f / "widths.json").write_text("[]"), "widths.json cannot be read"),
    "no axes": (lambda f: rewrite(f / "widths.json", lambda _: {"axes": {}}), "axis conv1 has no units there, 32 in"),
    "a strange axis": (
        lambda f: rewrite(f / "widths.json", lambda d: {"axes": d["axes"] | {"x": {"size": 3, "keep": [[0, 3]]}}}),
        "axis x has 3 units there, no in the model",
    ),
    "fractions": (
        lambda f: rewrite(
            f / "widths.json", lambda d: {"axes": d["axes"] | {"conv1": {"size": 32, "keep": [[0.5, 3]]}}}
        ),
        "whole numbers",
    ),
    "runs outside": (
        lambda f: rewrite(
            f / "widths.json", lambda d: {"axes": d["axes"] | {"conv1": {"size": 32, "keep": [[0, 33]]}}}
        ),
        "not sorted, disjoint and within",
    ),
    "nothing kept": (
        lambda f: rewrite(f / "widths.json", lambda d: {"axes": d["axes"] | {"conv1": {"size": 32, "keep": []}}}),
        "keeps no unit of axis conv1",
    ),
    "other widths": (
        lambda f: rewrite(f / "widths.json", lambda d: {"axes": d["axes"] | {"fc1": {"size": 128, "keep": [[0, 3]]}}}),
        r"fc1.weight is \(64, 64\) of float32 there, \(3, 64\)",
    ),
    "damaged weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x09" * 64),
        "model.safetensors cannot be read",
    ),
    "a tensor less": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: {k: v for k, v in t.items() if k != "fc1.bias"}),
        "model.safetensors has no tensor fc1.bias",
    ),
    "a tensor more": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: t | {"fc9.bias": torch.ones(1)}),
        "the model has no tensor fc9.bias",
    ),
    "half precision": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: {k: v.half() for k, v in t.items()}),
        "of float16 there",
    ),
}


def test_a_classifier_is_written_in_half_precision(tmp_path: Path) -> None:
    model, spec, inputs = fedlp_cnn()
    cut = cut_model(model, spec, halves(spec)).eval()
    round_weights(cut, torch.float16)
    save_classifier(cut, spec, halves(spec), tmp_path, torch.float16)
    assert load_file(tmp_path / "model.safetensors")["conv1.weight"].dtype == torch.float16
    assert torch.equal(load_classifier(model, spec, tmp_path)(inputs), cut(inputs))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_classifier_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    model, spec, _ = fedlp_cnn()
    save_classifier(cut_model(model, spec, halves(spec)), spec, halves(spec), tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_classifier(model, spec, tmp_path)
    assert "\n" not in str(caught.value)
