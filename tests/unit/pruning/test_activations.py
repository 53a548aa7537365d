"""What the whole model's footprint says of a cut model is what that cut model keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlp.config import compose
from fedlp.data.datasets import describe_dataset
from fedlp.models import describe_model
from fedlp.pruning.costs.activations import activation_footprint
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import cut_model, trace_widths
from fedlp.types import Keep


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (["model=fedlp_mlp"], 1e-12),
        (["model=fedlp_cnn", "dataset=cifar10"], 1e-12),
        (["model=cifar_resnet", "dataset=cifar10"], 1e-12),
        (["model=llama_tiny", "dataset=topics"], 0.04),  # rotary tables are constant, but counted with their heads
    ],
    ids=["mlp", "cnn", "resnet", "llama"],
)
def test_a_cut_model_keeps_what_the_whole_models_footprint_says(overrides: list[str], tolerance: float) -> None:
    config = compose(overrides)
    info = describe_dataset(config.dataset)
    spec = describe_model(config.model, info.input_shape, info.num_classes, info.task)
    model, inputs = spec.build(0), spec.example_inputs(1)
    widths = trace_widths(model, inputs)
    layers = find_layers(model, widths, info.task != "language")
    kept = {layer.name: max(1, layer.num_units // 3) for layer in layers}
    cut = cut_model(model, widths, {name: Keep.first(count, widths.axes[name]) for name, count in kept.items()})
    own = activation_footprint(cut, trace_widths(cut, inputs), inputs).count({})
    whole = activation_footprint(model, widths, inputs)
    assert whole.count(kept) == pytest.approx(own, rel=tolerance)
    assert own < 0.9 * whole.count({})
    terms = whole.terms({layer.name for layer in layers})
    rebuilt = sum(share * (kept[key[0]] if key else 1) for key, share in terms.items())
    assert rebuilt == pytest.approx(whole.count(kept))


def test_a_small_model_keeps_what_can_be_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    footprint = activation_footprint(model, trace_widths(model, torch.zeros(1, 6)), torch.zeros(1, 6))
    assert footprint.count({}) == 4 * (6 + 5 + 3)  # inputs, the ReLU's output, log-probabilities
