"""The numbers that a rehearsal prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedlp.apps.deployment.demo import Traffic, model_difference, traffic_table


def test_framing_is_in_percent_of_what_is_recorded() -> None:
    part = Traffic("client 1", recorded_up=200, recorded_down=0, wire_up=250, wire_down=40)
    assert part.overhead("up") == pytest.approx(25)
    assert part.overhead("down") is None
    *_, line = traffic_table([part]).splitlines()
    assert line.split() == ["client", "1", "200", "0", "250", "40", "+25.0%", "-"]


def test_models_are_compared_by_their_largest_difference(tmp_path: Path) -> None:
    models = {
        "a": {"w": torch.tensor([1.0, 2.0])},
        "b": {"w": torch.tensor([1.0, 2.5])},
        "c": {"w": torch.tensor([1, 2])},
        "d": {"v": torch.tensor([1.0, 2.0])},
        "e": {"w": torch.tensor([1.0])},
        "f": {"w": torch.tensor([1.0, float("nan")])},
    }
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    differences = {name: model_difference(tmp_path / "a", tmp_path / name) for name in models}
    assert differences == {"a": 0.0, "b": 0.5, **dict.fromkeys("cdef", float("inf"))}


def test_zeros_of_other_signs_are_a_difference(tmp_path: Path) -> None:
    for name, zero in (("a", 0.0), ("b", -0.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([zero])}, tmp_path / name / "model.safetensors")
    assert model_difference(tmp_path / "a", tmp_path / "b") > 0
