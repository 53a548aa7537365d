"""torchvision and transformers import in a fresh process, whatever build of torch is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedlp.models import torchvision_compat
from fedlp.models.torchvision_compat import ensure_operators, import_torchvision


def test_returns_the_module_and_is_idempotent() -> None:
    ensure_operators()
    first = import_torchvision()
    ensure_operators()
    assert import_torchvision() is first
    assert first.__name__ == "torchvision"
    assert hasattr(torch.ops.torchvision, "nms")


@pytest.mark.slow
def test_fresh_process_imports_both_without_a_warning() -> None:
    script = (
        "from fedlp.models.torchvision_compat import ensure_operators, import_torchvision; ensure_operators(); "
        "from transformers import LlamaForCausalLM; import_torchvision().models.resnet18"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_what_keeps_transformers_from_importing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_compat, "_declared", [])
    assert torchvision_compat.import_note() is None
    monkeypatch.setattr(torchvision_compat, "_declared", ["nms"])
    note = torchvision_compat.import_note()
    assert note is not None
    assert "Could not import module 'LlamaConfig'" in note
    assert "pip uninstall torchvision" in note
    assert "\n" not in note


def test_a_classifier_is_described_without_torchs_compiler_which_torchvision_finds_once_it_asks() -> None:
    script = (
        "import sys; from fedlp.config import compose; from fedlp.models import describe_model; "
        "spec = describe_model(compose(['model=resnet18']).model, (3, 32, 32), 10, 'classification'); "
        "spec.build(0); assert 'torch._dynamo' not in sys.modules; "
        "from torchvision.ops import roi_align; "
        "assert sys.modules['torchvision.ops.roi_align'].is_compile_supported('meta') is False; "
        "import torch._dynamo; assert callable(torch._dynamo.disable)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
