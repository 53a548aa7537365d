"""What the polynomial says a cut model costs is what it costs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from fedlp.config import ModelConfig
from fedlp.models import describe_model
from fedlp.models.cost import count_macs
from fedlp.models.language import import_transformers
from fedlp.models.spec import describe_blueprint
from fedlp.pruning.costs.footprint import Footprint, macs_footprint
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import WidthSpec, cut_model, trace_widths
from fedlp.rng import Stream, generator
from fedlp.types import Keep
from tests.unit.pruning.test_groups import IMAGES, TRANSFORMERS

CLASSIFIERS = {
    "fedlp_cnn": ModelConfig(name="fedlp_cnn", source="fedlp_cnn"),
    "resnet20": ModelConfig(name="resnet20", source="cifar_resnet"),
    "resnet18": ModelConfig(name="resnet18", source="torchvision"),
    "mobilenet_v2": ModelConfig(name="mobilenet_v2", source="torchvision"),
}
LANGUAGE_MODELS = ("llama", "qwen2", "gpt2", "opt")


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name in TRANSFORMERS:
        spec = describe_blueprint(TRANSFORMERS[name], "classification", (3, IMAGES[name], IMAGES[name]), 10)
        return spec.build(0).eval(), spec.example_inputs(1)
    if name in CLASSIFIERS:
        spec = describe_model(CLASSIFIERS[name], (3, 16, 16), 10, "classification")
        return spec.build(0).eval(), spec.example_inputs(1)
    sizes = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    if name == "gpt2":
        sizes |= {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}
    else:
        sizes |= {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"ffn_dim": 20, "word_embed_proj_dim": 24} if name == "opt" else {"intermediate_size": 20}
        if name != "opt":
            sizes |= {"num_key_value_heads": 2}
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **sizes)).eval()
    return model, torch.arange(12)[None]


def draw_widths(model: nn.Module, spec: WidthSpec, seed: int) -> Mapping[str, Keep]:
    rng = generator(seed, Stream.WIDTHS)
    widths = {}
    for layer in find_layers(model, spec):
        count = int(rng.integers(1, layer.num_units + 1))
        widths[layer.name] = Keep.from_indices(np.sort(rng.permutation(layer.num_units)[:count]), layer.num_units)
    return widths


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSIFIERS, *LANGUAGE_MODELS, *TRANSFORMERS])
def test_parameters_and_macs_of_cut_models(name: str) -> None:
    model, inputs = build(name)
    spec = trace_widths(model, inputs)
    params, macs = Footprint(model, spec), macs_footprint(model, spec, inputs)
    assert params.count({}) == pytest.approx(sum(p.numel() for p in model.parameters()))
    assert macs.count({}) == pytest.approx(count_macs(model, inputs).forward)
    for seed in range(2):
        widths = draw_widths(model, spec, seed)
        kept = {axis: keep.count for axis, keep in widths.items()}
        cut = cut_model(model, spec, widths)
        assert params.count(kept) == pytest.approx(sum(p.numel() for p in cut.parameters()))
        assert macs.count(kept) == pytest.approx(count_macs(cut, inputs).forward)


def test_layers_of_a_residual_network_are_the_private_channels() -> None:
    model, inputs = build("resnet20")
    layers = find_layers(model, trace_widths(model, inputs))
    assert [layer.name for layer in layers] == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]
    assert layers[0].readers == ("layer1.0.conv2",)
    assert (layers[0].num_units, layers[0].unit_size, layers[0].num_params) == (16, 9, 2 * 16 * 16 * 9 + 32)
    assert [layer.depth for layer in layers] == pytest.approx([index / 8 for index in range(9)])


def test_shared_channels_are_offered_on_demand() -> None:
    model, inputs = build("resnet18")
    spec = trace_widths(model, inputs)
    private = {layer.name for layer in find_layers(model, spec)}
    shared = {layer.name: layer for layer in find_layers(model, spec, shared=True)}
    assert private < set(shared)
    assert all(len(layer.readers) > 1 for name, layer in shared.items() if name not in private)


def test_blocks_of_a_language_model_lie_at_one_depth_and_its_stream_is_left_alone() -> None:
    model, inputs = build("llama")
    layers = find_layers(model, trace_widths(model, inputs))
    assert [(layer.name, layer.depth) for layer in layers] == [
        ("model.layers.0.self_attn", 0.0),
        ("model.layers.0.mlp", 0.0),
        ("model.layers.1.self_attn", 1.0),
        ("model.layers.1.mlp", 1.0),
    ]
    assert layers[0].unit_size == 2 * 6  # two query heads read one KV head
