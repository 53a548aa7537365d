"""ONNX files, run by onnxruntime, compute what torch does."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlp.config import ModelConfig
from fedlp.errors import ConfigError
from fedlp.models import describe_model, forward_logits
from fedlp.models.language import import_transformers
from fedlp.models.torchvision_compat import import_torchvision
from fedlp.pruning.io.model_files import export_onnx
from fedlp.pruning.tracing.widths import cut_model, trace_widths
from fedlp.types import Keep


def cut_unevenly(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Take a half, a third, a quarter ... of each axis in turn."""
    spec = trace_widths(model, inputs)
    widths = {
        axis: Keep.from_indices(np.flatnonzero(np.arange(size) % (index + 2)), size)
        for index, (axis, size) in enumerate(spec.axes.items())
    }
    return cut_model(model, spec, widths)


def run_onnx(path: Path, name: str, inputs: Tensor) -> Tensor:
    session = importlib.import_module("onnxruntime").InferenceSession(path)
    assert [entry.name for entry in session.get_inputs()] == [name]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    return torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


@pytest.mark.slow
def test_language_model_equals_torch_at_any_length(tmp_path: Path) -> None:
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config).eval()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    tokens = torch.arange(24).reshape(2, 12)
    model = cut_unevenly(whole, tokens)
    model.lm_head.train()
    path = tmp_path / "folder" / "model.onnx"
    export_onnx(model, tokens[:1], path)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    assert [name for name, module in model.named_modules() if module.training] == ["lm_head"]
    for batch in (tokens, torch.arange(15).reshape(3, 5), torch.arange(20).reshape(1, 20)):
        with torch.no_grad():
            expected = forward_logits(model, batch)
        torch.testing.assert_close(run_onnx(path, "input_ids", batch), expected, rtol=1e-4, atol=1e-4)


def fedlp_cnn() -> nn.Module:
    config = ModelConfig(name="fedlp_cnn", source="fedlp_cnn")
    return describe_model(config, (3, 16, 16), 10, "classification").build(0)


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = import_torchvision().models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=32, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("build", [fedlp_cnn, vision_transformer], ids=lambda build: build.__name__)
def test_classifier_equals_torch_at_any_batch(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 16, 16)
    model = cut_unevenly(build().eval(), images)
    export_onnx(model, images[:1], tmp_path / "model.onnx")
    for batch in (images, images[:1], images.repeat(3, 1, 1, 1)):
        with torch.no_grad():
            expected = model(batch)
        torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", "images", batch), expected, rtol=1e-4, atol=1e-4)


def test_missing_packages_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'^ONNX needs onnx and onnxscript; run: pip install "fedlp\[export\]"$'):
        export_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "model.onnx")


class NoCounterpart(nn.Module):
    """Branches on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    """Takes two examples only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3)


@pytest.mark.parametrize(
    ("model", "reason"), [(NoCounterpart(), "data-dependent"), (FixedBatch(), "size is fixed to 2")]
)
def test_inexpressible_model_is_one_line(
    model: nn.Module, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=f"^{type(model).__name__} cannot be written as ONNX: .*{reason}") as caught:
        export_onnx(model, torch.zeros(1, 3), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert "def forward" not in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unwritable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written to .*: Is a directory"):
        export_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path)
