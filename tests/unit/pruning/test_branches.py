"""Models without some residual branches: they compute what the whole model does with all units of these silenced."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlp.allocation.evidence import Evidence
from fedlp.config import ModelConfig
from fedlp.errors import AllocationError, ConfigError
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model, ensure_operators, forward_logits, state_tensors
from fedlp.models.cost import count_macs
from fedlp.models.language import import_transformers
from fedlp.pruning.costs.activations import activation_footprint
from fedlp.pruning.costs.footprint import Footprint, macs_footprint
from fedlp.pruning.io.model_files import load_classifier, save_classifier, save_language_model
from fedlp.pruning.precomputed_models import PrecomputedModel
from fedlp.pruning.pruner import Calibration, Method, Pruner
from fedlp.pruning.scores.magnitude import Magnitude
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.slimgpt import SlimGPT
from fedlp.pruning.tracing.units import find_layers, weight_matrix, write_weight
from fedlp.pruning.tracing.widths import WidthSpec, cut_in_place, cut_model, trace_widths
from fedlp.registry import lookup
from fedlp.types import Keep, SubModel

SIZES = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
LANGUAGE_MODELS = {
    "llama": LLAMA | {"intermediate_size": 12},
    "qwen3": LLAMA | {"intermediate_size": 12},
    "gpt2": {"n_embd": 16, "n_inner": 12, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
}
CLASSIFIERS = {
    "resnet20": ModelConfig(name="resnet20", source="cifar_resnet"),
    "resnet18": ModelConfig(name="resnet18", source="torchvision"),
    "mobilenet_v2": ModelConfig(name="mobilenet_v2", source="torchvision"),
}
ENCODERS = ("vit", "bert")
MODELS = [*LANGUAGE_MODELS, *CLASSIFIERS, *ENCODERS]
GONE = {  # the first attention, a whole block
    "llama": ("model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.1.mlp"),
    "qwen3": ("model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.1.mlp"),
    "gpt2": ("transformer.h.0.attn", "transformer.h.1.attn", "transformer.h.1.mlp"),
    "opt": ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.self_attn", "model.decoder.layers.1.mlp"),
    "resnet20": ("layer1.1.conv1", "layer2.0.conv1"),
    "resnet18": ("layer1.1.conv1", "layer2.0.conv1"),
    "mobilenet_v2": ("features.3.conv.0.0",),
    "vit": tuple(f"encoder.layers.encoder_layer_{part}" for part in ("0.self_attention", "1.self_attention", "1.mlp")),
    "bert": tuple(f"bert.encoder.layer.{part}" for part in ("0.attention.self", "1.attention.self", "1.mlp")),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name in CLASSIFIERS:
        spec = describe_model(CLASSIFIERS[name], (3, 16, 16), 10, "classification")
        model, inputs = spec.build(0), spec.example_inputs(4)
        for _ in range(3):
            model(inputs)  # gives batch norms statistics of their own
        return model.eval(), inputs
    if name in ENCODERS:
        return encoder(name)
    transformers = import_transformers()
    config = transformers.AutoConfig.for_model(name, **SIZES, **LANGUAGE_MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model, torch.arange(24).reshape(2, 12)


def encoder(name: str) -> tuple[nn.Module, Tensor]:
    """Return a small vision transformer of torchvision, or BERT with a head, and inputs."""
    model: nn.Module
    if name == "vit":
        ensure_operators()
        from torchvision.models.vision_transformer import VisionTransformer

        model = VisionTransformer(16, 4, 3, 4, 16, 12, num_classes=10)
        inputs = torch.randn(2, 3, 16, 16)
    else:
        transformers = import_transformers()
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 12}
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=10, **sizes)
        model, inputs = transformers.BertForSequenceClassification(config), torch.arange(24).reshape(2, 12)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model.eval(), inputs


def without(spec: WidthSpec, axes: Collection[str]) -> dict[str, Keep]:
    """Return the widths of a model without some branches, and of half of another."""
    other = next(axis for axis in spec.branches if axis not in axes)
    half = Keep.first(spec.axes[other] // 2, spec.axes[other])
    return {**{axis: Keep(spec.axes[axis], ()) for axis in axes}, other: half}


@torch.no_grad()
def silence(model: nn.Module, spec: WidthSpec, widths: dict[str, Keep]) -> nn.Module:
    """Return the model with zeros for the columns that read removed units."""
    silent = cut_model(model, spec, {})
    for layer in find_layers(silent, spec):
        if layer.name in widths:
            reader = silent.get_submodule(layer.readers[0])
            matrix = weight_matrix(reader).clone()
            kept = torch.from_numpy(widths[layer.name].repeat(layer.unit_size).indices())
            gone = torch.ones(matrix.shape[1], dtype=torch.bool)
            gone[kept] = False
            matrix[:, gone] = 0
            write_weight(reader, matrix, None)
    return silent.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_branches_computes_what_the_silenced_one_does(name: str) -> None:
    model, inputs = build(name)
    spec = trace_widths(model, inputs, depth=True)
    widths = without(spec, GONE[name])
    with torch.no_grad():
        expected = forward_logits(silence(model, spec, widths), inputs)
        for cut in (cut_model(model, spec, widths), cut_in_place(cut_model(model, spec, {}), spec, widths)):
            torch.testing.assert_close(forward_logits(cut.eval(), inputs), expected, rtol=1e-4, atol=1e-5)
            assert not any(
                f".{axis}." in f".{path}."
                for axis in GONE[name]
                for path, _ in cut.named_parameters()
                if "bias" not in path
            )
            assert all(tensor.numel() for tensor in state_tensors(cut).values())
        assert not torch.equal(expected, forward_logits(model, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_costs_of_models_without_branches_are_exact(name: str) -> None:
    model, inputs = build(name)
    spec = trace_widths(model, inputs, depth=True)
    widths = without(spec, GONE[name])
    kept = {axis: keep.count for axis, keep in widths.items()}
    cut = cut_model(model, spec, widths)
    assert Footprint(model, spec).count(kept) == sum(p.numel() for p in cut.parameters())
    macs = macs_footprint(model, spec, inputs)
    assert macs.count(kept) == pytest.approx(count_macs(cut, inputs).forward, rel=1e-12)
    activations = activation_footprint(model, spec, inputs)
    own = activation_footprint(cut, WidthSpec({}, {}), inputs).count({})
    assert own * 0.97 <= activations.count(kept) <= own * 1.08  # the dropout of an absent output is counted
    for footprint in (macs, activations):
        terms = footprint.terms(set(spec.axes))
        units = {**spec.axes, **kept}
        units |= {f"presence of {axis}": min(count, 1) for axis, count in units.items()}
        total = sum(share * torch.tensor([units[axis] for axis in key]).prod().item() for key, share in terms.items())
        assert total == pytest.approx(footprint.count(kept))


@pytest.mark.parametrize("name", MODELS)
def test_a_sub_model_has_no_tensors_of_absent_branches(name: str) -> None:
    model, inputs = build(name)
    spec = trace_widths(model, inputs, depth=True)
    widths = without(spec, GONE[name])
    names = [x for x in state_tensors(model) if x not in spec.absent(widths)]
    assert names == list(state_tensors(cut_model(model, spec, widths)))


def test_models_have_branches_only_when_asked() -> None:
    model, inputs = build("llama")
    spec = trace_widths(model, inputs)
    assert not spec.branches
    assert {layer.least for layer in find_layers(model, spec)} == {1}
    with pytest.raises(ConfigError, match=r"model.layers.0.mlp would keep none of its 12 units"):
        cut_model(model, spec, {"model.layers.0.mlp": Keep(12, ())})
    assert {layer.least for layer in find_layers(model, trace_widths(model, inputs, depth=True))} == {0}


def test_a_bottleneck_is_no_branch() -> None:
    spec = describe_model(ModelConfig(name="resnet50", source="torchvision"), (3, 16, 16), 10, "classification")
    assert not trace_widths(spec.build(0), spec.example_inputs(1), depth=True).branches


@pytest.mark.parametrize(
    "method",
    [Method(OBS()), Method(SlimGPT(), centred=False, damping=0.01), Method(Magnitude(), recovery="bias")],
    ids=["obs", "slimgpt", "bias"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet20"])
def test_a_pruned_model_without_branches_is_the_uncut_one(name: str, method: Method) -> None:
    model, inputs = build(name)
    spec = trace_widths(model, inputs, depth=True)
    batches = [inputs, inputs.flip(0)]
    labels = [forward_logits(model, batch).flatten(0, -2).argmax(dim=-1) for batch in batches]
    layers = find_layers(model, spec)
    uncut: list[nn.Module] = []

    class Kept(Pruner):
        def finish(self, widths: object) -> nn.Module:
            uncut.append(cut_model(self.model, self.spec, {}))
            return super().finish(widths)  # type: ignore[arg-type]

    pruner = Kept(model, spec, layers, Calibration(batches, labels, 0), replace(method, keeps_batch_norm=True))
    kept = {x.name: 0 if x.name in GONE[name] else -(-x.num_units // 2) for x in layers}
    pruned = pruner.prune(kept)
    with torch.no_grad():
        expected = forward_logits(uncut[0].eval(), inputs)
        torch.testing.assert_close(forward_logits(pruned.model, inputs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_transformers_loads_a_model_without_branches_and_generates(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    spec = trace_widths(model, inputs, depth=True)
    cut = cut_model(model, spec, without(spec, GONE[name])).eval()
    save_language_model(cut, tmp_path / "model", None)
    auto = import_transformers().AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(inputs).logits, forward_logits(cut, inputs))
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        cached = again.generate(inputs, use_cache=True, **options)
        assert torch.equal(cached, again.generate(inputs, use_cache=False, **options))
    axes = trace_widths(again, inputs, depth=True)
    assert set(axes.branches) == set(spec.branches) - set(GONE[name])
    smaller = cut_model(again, axes, {axis: Keep.first(1, axes.axes[axis]) for axis in axes.branches})
    assert forward_logits(smaller, inputs).shape == (2, 12, 50)


def test_transformers_loads_an_encoder_without_branches(tmp_path: Path) -> None:
    model, inputs = build("bert")
    spec = trace_widths(model, inputs, depth=True)
    cut = cut_model(model, spec, without(spec, GONE["bert"])).eval()
    save_language_model(cut, tmp_path / "model", None)
    auto = import_transformers().AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(inputs).logits, forward_logits(cut, inputs))
    assert set(trace_widths(again, inputs, depth=True).branches) == set(spec.branches) - set(GONE["bert"])


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_a_classifier_without_branches_is_loaded_again(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    spec = trace_widths(model, inputs, depth=True)
    widths = without(spec, GONE[name])
    cut = cut_model(model, spec, widths).eval()
    save_classifier(cut, spec, widths, tmp_path)
    again = load_classifier(model, spec, tmp_path)
    torch.testing.assert_close(again(inputs), cut(inputs))


def test_layouts_of_sub_models_leave_absent_branches_out() -> None:
    config = ModelConfig(name="llama", source="llama")
    submodels = SubModels(describe_model(config, (16,), 50, "causal_lm"), depth=True)
    axis = "model.layers.0.mlp"
    layout = submodels.layout(SubModel(widths={axis: Keep(submodels.widths.axes[axis], ())}))
    absent = set(submodels.names) - set(layout.names)
    assert absent == {f"{axis}.{name}_proj.weight" for name in ("gate", "up", "down")} | {
        "model.layers.0.post_attention_layernorm.weight"
    }
    assert not layout.is_whole


def test_curves_end_with_the_whole_branch() -> None:
    model, inputs = build("llama")
    spec = trace_widths(model, inputs, depth=True)
    labels = [forward_logits(model, inputs).flatten(0, -2).argmax(dim=-1)]
    pruner = Pruner(model, spec, find_layers(model, spec), Calibration([inputs], labels, 0), Method(OBS(), damping=0.1))
    precomputed = PrecomputedModel(pruner, [inputs])
    measured = precomputed.divergence_curves()
    for layer in pruner.layers:
        assert len(precomputed.losses[layer.name]) == len(measured[layer.name]) == layer.num_units
        assert measured[layer.name] == sorted(measured[layer.name])
    units = {layer.name: layer.num_units for layer in pruner.layers}
    gone = pruner.layers[0].name
    assert precomputed.divergence({**units, gone: 0}) > precomputed.divergence({**units, gone: 1}) > 0


@pytest.mark.parametrize("rule", ["dp", "uniform", "flap"])
def test_rules_go_below_one_unit_of_each_layer(rule: str) -> None:
    model, inputs = build("llama")
    spec = trace_widths(model, inputs, depth=True)
    layers, count = find_layers(model, spec), Footprint(model, spec).count
    one, none = count({x.name: 1 for x in layers}), count({x.name: 0 for x in layers})
    curves = {x.name: [(k + 1) ** 2 * (1 + i) for k in range(x.num_units)] for i, x in enumerate(layers)}
    scores = {name: np.diff(curve, prepend=0) for name, curve in curves.items()}
    evidence = Evidence(layers, 0.9, error_curves=lambda: curves, unit_scores=lambda: scores)
    limit = 0.5 * (one + none)
    kept = lookup("allocator", rule)()(layers, evidence, count, limit)
    assert none <= count(kept) <= limit
    assert min(kept.values()) == 0
    with pytest.raises(AllocationError, match="out of reach"):
        lookup("allocator", rule)()([replace(x, least=1) for x in layers], evidence, count, limit)
