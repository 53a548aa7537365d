"""Pruning whole models: what is cut computes what was fitted, and methods do what they say."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.config import ModelConfig
from fedlp.errors import AllocationError, CalibrationError, ConfigError
from fedlp.models import describe_model, forward_logits, state_tensors
from fedlp.models.language import import_transformers
from fedlp.models.torchvision_compat import import_torchvision
from fedlp.pruning.gradients import loss_gradients, output_fisher
from fedlp.pruning.kernels.hessian import Moments
from fedlp.pruning.kernels.sampled_rows import SampledRows
from fedlp.pruning.pruner import Calibration, Method, Pruner
from fedlp.pruning.scores.criterion import UnitScore, saliencies
from fedlp.pruning.scores.evidence import Evidence
from fedlp.pruning.scores.flap import Flap
from fedlp.pruning.scores.magnitude import Magnitude
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.random import Random
from fedlp.pruning.scores.slimgpt import SlimGPT
from fedlp.pruning.scores.taylor import Taylor
from fedlp.pruning.scores.view import LayerView, ReaderView
from fedlp.pruning.scores.wanda import Wanda
from fedlp.pruning.staged_forward import StagedRun
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import WidthSpec, trace_widths
from fedlp.types import PrunableLayer

METHODS = {
    "obs": Method(OBS()),
    "obs, corrected": Method(OBS(), correction=1.0, fisher=True, keeps_batch_norm=True),
    "slimgpt": Method(SlimGPT(), centred=False, damping=0.01),
    "magnitude": Method(Magnitude(), recovery="none"),
    "magnitude, refitted": Method(Magnitude()),
    "wanda": Method(Wanda(), recovery="none"),
    "flap": Method(Flap(), recovery="bias"),
    "taylor": Method(Taylor(), recovery="none"),
    "random": Method(Random(), recovery="none"),
}


def language_model(model_type: str = "llama") -> nn.Module:
    transformers = import_transformers()
    sizes = {"vocab_size": 30, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    if model_type == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 16}
    elif model_type == "opt":
        sizes |= {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 24}
        sizes |= {"word_embed_proj_dim": 16, "max_position_embeddings": 16}
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 24, "head_dim": 4}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.3)
    return model


def tokens(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randint(0, 30, (count, 8, 12), generator=torch.Generator().manual_seed(seed)))


def make_pruner(model: nn.Module, method: Method, batches: Sequence[Tensor] | None = None, seed: int = 0) -> Pruner:
    batches = tokens(3) if batches is None else batches
    spec = trace_widths(model, batches[0])
    labels = [forward_logits(model, batch).flatten(0, -2).argmax(dim=-1) for batch in batches]
    return Pruner(model, spec, find_layers(model, spec), Calibration(batches, labels, seed), method)


def half(pruner: Pruner) -> dict[str, int]:
    return {layer.name: math.ceil(layer.num_units / 2) for layer in pruner.layers}


def images(count: int) -> list[Tensor]:
    return list(torch.randn(count, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def classifier() -> nn.Module:
    spec = describe_model(ModelConfig(name="resnet20", source="cifar_resnet"), (3, 16, 16), 10, "classification")
    model = spec.build(0)
    with torch.no_grad():
        for batch in images(4):  # gives batch norms statistics of their own
            model(batch)
    return model.eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_language_models(method: str, model_type: str) -> None:
    model = language_model(model_type)
    before = copy.deepcopy(model.state_dict())
    pruner = make_pruner(model, METHODS[method])
    seen: list[str] = []
    pruned = pruner.prune(half(pruner), lambda report: seen.append(report.name))
    assert seen == [layer.name for layer in pruner.layers]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: keep.count for name, keep in pruned.widths.items()} == half(pruner)
    logits = forward_logits(pruned.model, tokens(1, seed=5)[0])
    assert torch.isfinite(logits).all()
    grown = sum(p.numel() for p in pruned.model.parameters())
    assert grown < sum(p.numel() for p in model.parameters())
    again = make_pruner(model, METHODS[method]).prune(half(pruner))
    assert torch.equal(forward_logits(again.model, tokens(1, seed=5)[0]), logits)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_residual_network(method: str) -> None:
    pruner = make_pruner(classifier(), METHODS[method], images(12))
    pruned = pruner.prune(half(pruner))
    assert pruned.model.get_submodule("layer2.0.conv1").out_channels == 16  # type: ignore[union-attr]
    assert torch.isfinite(pruned.model(images(1)[0])).all()
    assert pruner.num_added_params() == 0  # batch norms take what would go into biases


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "mobilenet_v2"])
def test_depthwise_networks_and_vision_transformers(name: str) -> None:
    torchvision = import_torchvision()
    if name == "vit":
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(16, 4, 2, 4, 24, 32, num_classes=10).eval()
    else:
        config = ModelConfig(name=name, source="torchvision")
        model = describe_model(config, (3, 16, 16), 10, "classification").build(0)
        with torch.no_grad():
            for batch in images(2):
                model(batch)
        model.eval()
    pruner = make_pruner(model, replace(METHODS["obs, corrected"], damping=0.01), images(6))
    widest = {layer.name: layer.num_units - (layer.num_units > 4) for layer in pruner.layers}
    pruned = pruner.prune(half(pruner) if name == "vit" else widest)
    assert all(pruned.widths[layer.name].count < layer.num_units for layer in pruner.layers if layer.num_units > 4)
    assert torch.isfinite(pruned.model(images(1)[0])).all()
    kinds = {layer.name.rpartition(".")[2] for layer in pruner.layers}
    assert name != "vit" or kinds == {"self_attention", "mlp"}


def divergence(pruned: nn.Module, dense: nn.Module, batches: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return sum(
            float(
                F.kl_div(
                    forward_logits(pruned, batch).log_softmax(-1),
                    forward_logits(dense, batch).log_softmax(-1),
                    log_target=True,
                    reduction="sum",
                )
            )
            for batch in batches
        )


def test_recovery_and_correction_help_where_they_should() -> None:
    model, batches = language_model(), tokens(8)

    def lost(method: Method) -> float:
        pruner = make_pruner(model, method, batches)
        return divergence(pruner.prune(half(pruner)).model, model, batches)

    none = lost(Method(Magnitude(), recovery="none"))
    refitted = lost(Method(Magnitude()))
    greedy = lost(Method(OBS()))
    corrected = lost(Method(OBS(), correction=1.0))
    assert corrected < greedy < none
    assert refitted < none


def test_units_that_no_one_reads_go_without_any_loss() -> None:
    model = language_model()
    for block in model.model.layers:  # type: ignore[union-attr, operator]
        with torch.no_grad():
            block.mlp.down_proj.weight[:, 3:9] = 0.0
    pruner = make_pruner(model, Method(OBS()))
    kept = {layer.name: layer.num_units - 6 * layer.name.endswith("mlp") for layer in pruner.layers}
    pruned = pruner.prune(kept)
    for name, keep in pruned.widths.items():
        if name.endswith("mlp"):
            assert keep.runs == ((0, 3), (9, 24))
    batch = tokens(1, seed=3)[0]
    torch.testing.assert_close(forward_logits(pruned.model, batch), forward_logits(model, batch), rtol=1e-3, atol=1e-3)


def test_nothing_removed_changes_nothing() -> None:
    model = language_model()
    pruner = make_pruner(model, Method(OBS(), correction=1.0))
    pruned = pruner.prune({layer.name: layer.num_units for layer in pruner.layers})
    batch = tokens(1, seed=3)[0]
    torch.testing.assert_close(forward_logits(pruned.model, batch), forward_logits(model, batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_a_staged_run_is_the_whole_model(model_type: str) -> None:
    model, batches = language_model(model_type), tokens(2)
    run = StagedRun(model, batches)
    hidden: dict[int, Tensor] = {}
    last = run.stages[-1]
    with torch.no_grad():
        for index, batch in enumerate(batches):
            hook = last.register_forward_hook(
                lambda _, __, output, index=index: hidden.update(
                    {index: output if isinstance(output, Tensor) else output[0]}
                )
            )
            model(batch)
            hook.remove()
    for _ in run.stages:
        run.advance()
    for index in range(len(batches)):
        torch.testing.assert_close(run.input(index), hidden[index])


def test_a_measured_curve_is_what_pruning_reports() -> None:
    pruner = make_pruner(language_model(), Method(OBS()))
    first = pruner.layers[0]
    found = pruner.removal_order(first, pruner.collector(None).collect(first), first.num_units - 1)
    kept = {layer.name: layer.num_units for layer in pruner.layers} | {first.name: first.num_units - 1}
    assert pruner.prune(kept).layers[0].loss == pytest.approx(found.losses[0])
    assert len(found.losses) == first.num_units - 1
    assert list(found.losses) == sorted(found.losses)


def view_weights(pruner: Pruner, name: str) -> LayerView:
    """Return what the pruner's score sees of a layer before any statistics are collected."""
    layer = next(layer for layer in pruner.layers if layer.name == name)
    return pruner.view(layer, pruner.collector(None).readers(layer))


def test_gradients_and_scores_are_those_of_a_loop() -> None:
    model, batches = language_model(), tokens(2)
    labels = [batch.flatten() for batch in batches]
    gradients = loss_gradients(model, batches, labels)
    spec = trace_widths(model, batches[0])
    layers, data, name = find_layers(model, spec), Calibration(batches, labels), "model.layers.1.mlp"
    magnitude = Magnitude()(view_weights(Pruner(model, spec, layers, data, Method(Magnitude())), name))
    taylor = Taylor()(view_weights(Pruner(model, spec, layers, data, Method(Taylor())), name))
    loss = sum(F.cross_entropy(forward_logits(model, b).flatten(0, 1), t) for b, t in zip(batches, labels, strict=True))
    (loss / 2).backward()  # type: ignore[union-attr]
    mlp = model.model.layers[1].mlp  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(gradients["model.layers.1.mlp.up_proj.weight"], mlp.up_proj.weight.grad)
    tensors = [(mlp.gate_proj.weight, 0), (mlp.up_proj.weight, 0), (mlp.down_proj.weight, 1)]
    assert len(magnitude) == len(taylor) == 24
    for unit in range(24):
        rows = [(w.detach().select(dim, unit).double(), w.grad.select(dim, unit).double()) for w, dim in tensors]
        expected = sum(float(w.square().sum()) for w, _ in rows)
        assert float(magnitude[unit]) == pytest.approx(expected, rel=1e-5)
        expected = sum(float((w * g).abs().sum()) for w, g in rows)
        assert float(taylor[unit]) == pytest.approx(expected, rel=1e-5)


def test_activation_scores_are_those_of_their_formulas() -> None:
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    weight = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanda = (weight.abs() * x.square().mean(dim=0).sqrt()).sum(dim=0).view(3, 2).sum(dim=1)
    flap = (weight.square() * x.var(dim=0, unbiased=False)).sum(dim=0).view(3, 2).sum(dim=1)
    moments = Moments.empty(6)
    moments.add(x)
    for statistics in (moments, SampledRows(x)):
        assert_sees(Wanda(), weight, statistics, wanda)
        assert_sees(Flap(), weight, statistics, flap)


def assert_sees(score: UnitScore, weight: Tensor, statistics: Moments | SampledRows, expected: Tensor) -> None:
    """Check a score of three units of two columns that one reader reads."""
    layer = PrunableLayer("a", 3, 2, 0, (), ("r",), 0.0)
    evidence = Evidence(nn.Module(), WidthSpec({}, {}), Calibration([], []), torch.Generator())
    reader = ReaderView("r", weight, 2, statistics, lambda: (weight, weight), None, score.needs)
    torch.testing.assert_close(saliencies(score, LayerView(layer, evidence, score.needs, (reader,))), expected)


def test_fisher_information_predicts_the_divergence_of_a_small_change() -> None:
    model, batches = language_model(), tokens(24)
    path = "model.layers.1.mlp.down_proj"
    fisher = output_fisher(model, [path], batches, torch.Generator().manual_seed(0), logits_only=False)[path]
    moments = Moments.empty(24)
    run = StagedRun(model, batches)
    run.advance()
    reader = model.get_submodule(path)
    for index in range(len(batches)):
        moments.add(run.observe(index, [reader])[0][0].flatten(0, 1))
    change = 0.02 * torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    expected = 0.25 * torch.trace(fisher @ change.double() @ moments.hessian(False) @ change.double().T)
    moved = copy.deepcopy(model)
    state_tensors(moved)[f"{path}.weight"].add_(change)
    actual = divergence(moved, model, batches) / sum(batch.numel() for batch in batches)
    assert actual == pytest.approx(float(expected), rel=0.5)  # tokens' errors are taken to be independent


# ---- bad input
def test_damping_that_is_asked_for_and_too_small_names_the_layer() -> None:
    pruner = make_pruner(language_model(), Method(OBS(), damping=0.0), [tokens(1)[0][:1]])
    with pytest.raises(CalibrationError, match=r"o_proj: .* has rank \d+, from 12 calibration .*pruner\.damping"):
        pruner.prune(half(pruner))


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model = language_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf  # type: ignore[union-attr, index, operator]
    pruner = make_pruner(model, Method(OBS()))
    with pytest.raises(CalibrationError, match=r"layer model\.layers\.1\.mlp: inputs of .* are not finite"):
        pruner.prune(half(pruner))


def test_counts_that_do_not_fit_are_refused() -> None:
    pruner = make_pruner(language_model(), Method(OBS()))
    with pytest.raises(AllocationError, match="cannot keep 0 of 2 units"):
        pruner.prune(dict.fromkeys(half(pruner), 0))


def test_a_model_without_prunable_units_says_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ConfigError, match="Sequential has no prunable units"):
        find_layers(model, trace_widths(model, torch.zeros(1, 3, 2, 2)))
