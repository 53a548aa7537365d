"""Cut models compute what the whole model computes with the removed units silenced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.config import ModelConfig
from fedlp.errors import ConfigError
from fedlp.models import ModelSpec, describe_model, forward_logits, state_tensors
from fedlp.models.blueprint import Blueprint
from fedlp.models.language import import_transformers
from fedlp.models.spec import describe_blueprint
from fedlp.models.torchvision_compat import import_torchvision
from fedlp.pruning.tracing.widths import Dim, WidthSpec, cut_model, slice_tensor, tensor_keeps, trace_widths
from fedlp.rng import Stream, generator
from fedlp.types import Keep

CLASSIFIERS = {
    "fedlp_cnn": ModelConfig(name="fedlp_cnn", source="fedlp_cnn"),
    "fedlp_mlp": ModelConfig(name="fedlp_mlp", source="fedlp_mlp", options={"variant": "deep"}),
    "small_cnn": ModelConfig(name="small_cnn", source="small_cnn"),
    "resnet18": ModelConfig(name="resnet18", source="torchvision"),
    "resnet18-group": ModelConfig(name="resnet18", source="torchvision", options={"norm": "group"}),
    "vgg11_bn": ModelConfig(name="vgg11_bn", source="torchvision"),
    "mobilenet_v2": ModelConfig(name="mobilenet_v2", source="torchvision"),
    "mobilenet_v2-group": ModelConfig(name="mobilenet_v2", source="torchvision", options={"norm": "group"}),
    "mobilenet_v3_small": ModelConfig(name="mobilenet_v3_small", source="torchvision"),  # squeeze and excitation
    "regnet_y_400mf": ModelConfig(name="regnet_y_400mf", source="torchvision"),  # grouped convolutions
}
LLAMA_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
}
GPT2_SIZES = {"n_embd": 24, "n_inner": 20, "n_layer": 2, "n_head": 4, "n_positions": 16}
OPT_SIZES = {
    "hidden_size": 24,
    "ffn_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": None,
}
LANGUAGE_MODELS = {
    "llama": LLAMA_SIZES,
    "mistral": LLAMA_SIZES | {"tie_word_embeddings": False},
    "qwen2": LLAMA_SIZES | {"tie_word_embeddings": False},
    "qwen3": LLAMA_SIZES | {"tie_word_embeddings": False},
    "gpt2": GPT2_SIZES,
    "opt": OPT_SIZES,
    "opt-projected": OPT_SIZES | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},  # as opt-350m
}
WITHOUT_HEAD_DIM = ("gpt2", "opt", "opt-projected")


def keep_first(size: int) -> Keep:
    return Keep.first(-(-size // 2), size)


def keep_window(size: int) -> Keep:
    return Keep.window(2 * size // 3, -(-size // 2), size)


def keep_random(size: int) -> Keep:
    chosen = generator(3, Stream.WIDTHS, size).choice(size, -(-size // 2), replace=False)
    return Keep.from_indices(np.sort(chosen), size)


CHOICES = {"first": keep_first, "window": keep_window, "random": keep_random}


def randomise_norms(model: nn.Module) -> None:
    """Give norms statistics and weights of their own: fresh ones are all alike."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)


class TinyViT(Blueprint):
    """torchvision's vision transformer, all of whose parameters differ."""

    name = "vit"

    def build(self) -> nn.Module:
        model: nn.Module = import_torchvision().models.VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=96, num_classes=10
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.3)
        return model


class TinySwin(Blueprint):
    """Windows that are shifted and padded, in two stages; all parameters differ."""

    def __init__(self, name: str) -> None:
        self.name = name

    def build(self) -> nn.Module:
        if self.name == "swin-transformers":
            transformers = import_transformers()
            sizes = {"image_size": 20, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
            options = transformers.SwinConfig(**sizes, window_size=3, mlp_ratio=6.0, num_labels=10)
            model: nn.Module = transformers.SwinForImageClassification(options)
        else:
            swin = import_torchvision().models.swin_transformer
            parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
            model = swin.SwinTransformer(
                *([2, 2], 16, [2, 2], [2, 4], [3, 3]), 6.0, num_classes=10, **(parts if "v2" in self.name else {})
            )
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.3)
        return model


TRANSFORMERS = {"vit": TinyViT()} | {name: TinySwin(name) for name in ("swin", "swin_v2", "swin-transformers")}
IMAGES = {"vit": 16, "swin": 20, "swin_v2": 20, "swin-transformers": 20}  # pixels a side


def removed_entries(dim: Dim, keep: Keep) -> Tensor:
    units = np.setdiff1d(np.arange(keep.size), keep.indices())
    entries = [
        (copy * keep.size + unit) * dim.entries + entry
        for copy in range(dim.copies)
        for unit in units
        for entry in range(dim.entries)
    ]
    return torch.tensor(entries, dtype=torch.int64)


@torch.no_grad()
def silence(model: nn.Module, spec: WidthSpec, widths: Mapping[str, Keep]) -> nn.Module:
    """Return the whole model in which nothing reads a removed unit: what multiplies it is zero everywhere."""
    masked = copy.deepcopy(model)
    transposed = {f"{name}.weight" for name, module in masked.named_modules() if type(module).__name__ == "Conv1D"}
    for name, tensor in state_tensors(masked).items():
        if tensor.ndim > 1:
            inputs = 0 if name in transposed else 1
            dim = spec.dims[name][inputs]
            if dim.axis in widths:
                tensor.index_fill_(inputs, removed_entries(dim, widths[dim.axis]), 0.0)
    return masked


@pytest.fixture(scope="module")
def classifiers() -> Callable[[str], tuple[ModelSpec, nn.Module, WidthSpec]]:
    built: dict[str, tuple[ModelSpec, nn.Module, WidthSpec]] = {}

    def get(name: str) -> tuple[ModelSpec, nn.Module, WidthSpec]:
        if name not in built:
            if name in TRANSFORMERS:
                spec = describe_blueprint(TRANSFORMERS[name], "classification", (3, IMAGES[name], IMAGES[name]), 10)
            else:
                spec = describe_model(CLASSIFIERS[name], (3, 16, 16), 10, "classification")
            model = spec.build(0).eval()
            randomise_norms(model)
            built[name] = spec, model, trace_widths(model, spec.example_inputs(1))
        return built[name]

    return get


def language_model(name: str) -> nn.Module:
    transformers = import_transformers()
    ids = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
    sizes = {"tie_word_embeddings": True, "use_cache": False} | ids | LANGUAGE_MODELS[name]
    config = transformers.AutoConfig.for_model(name.partition("-")[0], **sizes)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", [*CLASSIFIERS, *TRANSFORMERS])
def test_cut_classifier_equals_silenced_one(name: str, choice: str, classifiers: Callable) -> None:
    spec, model, axes = classifiers(name)
    widths = {axis: CHOICES[choice](size) for axis, size in axes.axes.items()}
    before = {key: tensor.clone() for key, tensor in state_tensors(model).items()}
    inputs = spec.example_inputs(2)

    cut = cut_model(model, axes, widths)
    with torch.no_grad():
        expected = forward_logits(silence(model, axes, widths), inputs)
        actual = forward_logits(cut, inputs)

    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_tensors(model).items())
    assert list(state_tensors(cut)) == list(before)
    density = 0.7 if name in TRANSFORMERS else 0.5  # their residual streams stay whole
    assert sum(p.numel() for p in cut.parameters()) < density * spec.num_params


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_cut_language_model_equals_silenced_one(name: str, choice: str) -> None:
    model = language_model(name)
    tokens = torch.arange(24).reshape(2, 12)
    axes = trace_widths(model, tokens)
    widths = {axis: CHOICES[choice](size) for axis, size in axes.axes.items() if axis != "hidden"}
    cut = cut_model(model, axes, widths)
    with torch.no_grad():
        expected = forward_logits(silence(model, axes, widths), tokens)
        torch.testing.assert_close(forward_logits(cut, tokens), expected, rtol=1e-4, atol=1e-4)
    assert list(state_tensors(cut)) == list(state_tensors(model))
    assert all(trace_widths(cut, tokens).axes[axis] == keep.count for axis, keep in widths.items())
    if name not in WITHOUT_HEAD_DIM:
        assert cut.config.num_key_value_heads == 2
        assert cut.config.num_attention_heads == 4


@pytest.mark.parametrize("choice", CHOICES)
def test_hidden_axis_equals_silenced_features_but_for_the_norms_mean(choice: str) -> None:
    model, tokens = language_model("qwen2"), torch.arange(24).reshape(2, 12)
    axes = trace_widths(model, tokens)
    keep = CHOICES[choice](axes.axes["hidden"])
    cut = cut_model(model, axes, {"hidden": keep})
    density = keep.count / keep.size
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in state_tensors(masked).items():
            for dim, (axis, *_) in enumerate(axes.dims[name]):
                if axis == "hidden":
                    removed = np.setdiff1d(np.arange(keep.size), keep.indices())
                    tensor.index_fill_(dim, torch.from_numpy(removed), 0.0)
            if "norm" in name:
                tensor.mul_(density**0.5)
        for module in masked.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= density
        torch.testing.assert_close(forward_logits(cut, tokens), forward_logits(masked, tokens), rtol=1e-4, atol=1e-4)


class KeptNorm(nn.Module):
    """A LayerNorm of some features only; the others come out as zeros."""

    def __init__(self, norm: nn.LayerNorm, keep: Keep) -> None:
        super().__init__()
        self.norm = norm
        self.kept = torch.from_numpy(keep.indices())

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight[self.kept], self.norm.bias[self.kept]
        normed = F.layer_norm(x[..., self.kept], (len(self.kept),), weight, bias, self.norm.eps)
        return torch.zeros_like(x).index_copy(-1, self.kept, normed)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", WITHOUT_HEAD_DIM)
def test_hidden_axis_equals_silenced_features_with_norms_of_the_kept_ones(name: str, choice: str) -> None:
    model, tokens = language_model(name), torch.arange(24).reshape(2, 12)
    axes = trace_widths(model, tokens)
    widths = {axis: CHOICES[choice](size) for axis, size in axes.axes.items()}
    masked = silence(model, axes, widths)
    for path, module in list(masked.named_modules()):
        if isinstance(module, nn.LayerNorm):
            masked.set_submodule(path, KeptNorm(module, widths["hidden"]))
    with torch.no_grad():
        actual = forward_logits(cut_model(model, axes, widths), tokens)
        torch.testing.assert_close(actual, forward_logits(masked, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("only", ["", ".mlp"])
@pytest.mark.parametrize("name", ["llama", *WITHOUT_HEAD_DIM])
def test_cut_language_model_config_describes_it(name: str, only: str) -> None:
    model, tokens = language_model(name), torch.arange(12).reshape(1, 12)
    axes = trace_widths(model, tokens)
    cut = cut_model(model, axes, {axis: keep_first(size) for axis, size in axes.axes.items() if axis.endswith(only)})
    again = type(cut)(cut.config).eval()
    again.load_state_dict(cut.state_dict())
    with torch.no_grad():
        assert torch.equal(forward_logits(again, tokens), forward_logits(cut, tokens))
    assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
    assert model.config.hidden_size == 24


@pytest.mark.parametrize("name", WITHOUT_HEAD_DIM)
@pytest.mark.parametrize("part", ["hidden", "attn", "0.mlp"])
def test_config_that_cannot_describe_the_cut_is_left_alone(name: str, part: str) -> None:
    model, tokens = language_model(name), torch.arange(12).reshape(1, 12)
    axes = trace_widths(model, tokens)
    widths = {axis: keep_first(size) for axis, size in axes.axes.items() if axis.endswith(part)}
    cut = cut_model(model, axes, widths)
    assert widths
    assert cut.config.to_dict() == model.config.to_dict()
    assert forward_logits(cut, tokens).shape == (1, 12, 50)


def test_sizes_that_gpt2_keeps_as_attributes_are_set() -> None:
    model, tokens = language_model("gpt2"), torch.arange(12).reshape(1, 12)
    axes = trace_widths(model, tokens)
    assert dict(axes.axes) == {
        "hidden": 24,
        "transformer.h.0.attn": 4,
        "transformer.h.0.mlp": 20,
        "transformer.h.1.attn": 4,
        "transformer.h.1.mlp": 20,
    }
    assert axes.dims["transformer.h.0.attn.c_attn.weight"] == (Dim("hidden", 1), Dim("transformer.h.0.attn", 6, 3))
    widths = {"hidden": keep_random(24), "transformer.h.1.attn": keep_random(4)}
    attention = cut_model(model, axes, widths).transformer.h[1].attn
    assert (attention.num_heads, attention.head_dim, attention.split_size, attention.embed_dim) == (2, 6, 12, 12)
    assert (attention.c_attn.nx, attention.c_attn.nf) == (12, 36)


def test_vision_transformers_get_attentions_that_call_their_output_layer(classifiers: Callable) -> None:
    spec, model, axes = classifiers("vit")
    assert axes.axes["encoder.layers.encoder_layer_1.self_attention"] == 4
    assert axes.axes["encoder.layers.encoder_layer_1.mlp"] == 96
    whole, inputs = cut_model(model, axes, {}), spec.example_inputs(2)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in whole.modules())
    assert list(whole.state_dict()) == list(model.state_dict())
    seen: list[Tensor] = []
    whole.encoder.layers[1].self_attention.out_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        torch.testing.assert_close(whole(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert [x.shape for x in seen] == [(2, 17, 24)]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_cut_vision_transformer_can_train_and_be_cut_again(name: str, classifiers: Callable) -> None:
    spec, model, axes = classifiers(name)
    cut = cut_model(model, axes, {axis: keep_random(size) for axis, size in axes.axes.items()}).train()
    forward_logits(cut, spec.example_inputs(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())
    assert all(module.training for module in cut.modules())
    again, inputs = trace_widths(cut.eval(), spec.example_inputs(1)), spec.example_inputs(2)
    assert {axis: -(-size // 2) for axis, size in axes.axes.items()} == dict(again.axes)
    widths = {axis: keep_first(size) for axis, size in again.axes.items()}
    with torch.no_grad():
        actual = forward_logits(cut_model(cut, again, widths), inputs)
        expected = forward_logits(silence(cut, again, widths), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_attention_in_windows_computes_what_torchvisions_does(classifiers: Callable) -> None:
    for name in ("swin", "swin_v2"):
        spec, model, axes = classifiers(name)
        assert axes.axes["features.3.1.attn"] == 4
        whole, inputs = cut_model(model, axes, {}), spec.example_inputs(2)
        assert list(whole.state_dict()) == list(model.state_dict())
        seen: list[Tensor] = []
        whole.features[3][1].attn.proj.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            torch.testing.assert_close(whole(inputs), model(inputs), rtol=1e-4, atol=1e-4)
        assert [x.shape for x in seen] == [(8, 9, 32)]


@pytest.mark.parametrize("indices", [[0], [0, 3], [1, 2], [0, 1, 3], [3], [0, 1, 2, 3]])
def test_stacked_copies_lose_the_same_units(indices: list[int]) -> None:
    spec = WidthSpec({"heads": 4}, {"fused": (Dim("heads", 5, 3), Dim(None, 1))})
    keep = Keep.from_indices(np.array(indices), 4)
    rows, columns = tensor_keeps(spec, "fused", (60, 7), {"heads": keep})
    expected = np.arange(60).reshape(3, 4, 5)[:, indices].ravel()
    assert rows == Keep.from_indices(expected, 60)
    assert columns.is_full


def test_cut_model_trains_and_its_attributes_agree(classifiers: Callable) -> None:
    spec, model, axes = classifiers("mobilenet_v2-group")
    cut = cut_model(model, axes, {axis: keep_random(size) for axis, size in axes.axes.items()}).train()
    cut(spec.example_inputs(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in cut.parameters())
    for module in cut.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels
            assert module.num_channels % module.num_groups == 0


def test_nothing_cut_is_an_equal_copy(classifiers: Callable) -> None:
    _, model, axes = classifiers("fedlp_cnn")
    copied = cut_model(model, axes, {})
    for (name, own), (_, other) in zip(state_tensors(model).items(), state_tensors(copied).items(), strict=True):
        assert torch.equal(own, other), name
        assert own.data_ptr() != other.data_ptr(), name


def test_axes_of_known_models(classifiers: Callable) -> None:
    _, _, cnn = classifiers("fedlp_cnn")
    sizes = {"conv1": 32, "conv2": 32, "conv3": 64, "conv4": 64, "conv5": 128, "conv6": 128, "fc1": 128}
    assert dict(cnn.axes) == sizes
    assert cnn.dims["fc1.weight"] == (Dim("fc1", 1), Dim("conv6", 4))
    assert cnn.dims["conv1.weight"] == (Dim("conv1", 1), Dim(None, 1), Dim(None, 1), Dim(None, 1))
    assert cnn.dims["fc2.bias"] == (Dim(None, 1),)
    _, _, resnet = classifiers("resnet18")
    assert resnet.dims["layer1.1.conv2.weight"][:2] == (Dim("conv1", 1), Dim("layer1.1.conv1", 1))
    assert resnet.dims["layer2.0.downsample.0.weight"][:2] == (Dim("layer2.0.conv2", 1), Dim("conv1", 1))
    _, _, grouped = classifiers("resnet18-group")
    assert grouped.axes["conv1"] == 16
    assert grouped.dims["bn1.weight"] == (Dim("conv1", 4),)


def test_depth_prefix_can_be_cut_too() -> None:
    spec = describe_model(CLASSIFIERS["fedlp_cnn"], (1, 8, 8), 10, "classification")
    prefix = spec.build_depth(2, 0, client_id=1).eval()
    axes = trace_widths(prefix, spec.example_inputs(1))
    assert list(axes.axes) == ["conv1", "conv2", "conv3", "personal_head.0"]
    assert cut_model(prefix, axes, {"conv3": Keep.first(3, 64)})(spec.example_inputs(2)).shape == (2, 10)


@pytest.mark.parametrize(("name", "node", "axes"), [("squeezenet1_1", "cat", 9), ("convnext_tiny", "LayerNorm2d", 18)])
def test_what_no_rule_covers_is_one_line_that_names_it_and_the_rest_is_cut(name: str, node: str, axes: int) -> None:
    spec = describe_model(ModelConfig(name=name, source="torchvision"), (3, 32, 32), 10, "classification")
    model = spec.blueprint.build().eval()
    found = trace_widths(model, spec.example_inputs(1))
    assert node in found.whole_line()
    assert "\n" not in found.whole_line()
    assert len(found.axes) == axes
    cut = cut_model(model, found, {axis: keep_first(size) for axis, size in found.axes.items()})
    assert cut(spec.example_inputs(2)).shape == (2, 10)


class Reused(nn.Module):
    """One layer used twice and a residual to its own input: all tied into one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.twice = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(self.twice(torch.relu(self.twice(x))) + x))


def test_reused_layers_and_residuals_are_one_axis() -> None:
    axes = trace_widths(Reused(), torch.zeros(1, 4))
    assert dict(axes.axes) == {"first": 6}
    assert axes.dims["twice.weight"] == (Dim("first", 1), Dim("first", 1))


class ResidualOnInput(nn.Module):
    """A residual to the model's inputs, which stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.back = nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.back(self.inner(x)))


def test_what_is_added_to_the_inputs_stays_whole() -> None:
    assert dict(trace_widths(ResidualOnInput(), torch.zeros(1, 4)).axes) == {"inner": 3}


class DataDependent(nn.Module):
    """Branches on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_untraceable_model_stays_whole() -> None:
    found = trace_widths(DataDependent(), torch.zeros(1, 4))
    assert not found.axes
    assert found.whole_line().startswith("DataDependent stays whole: it cannot be traced")


def test_bad_choices_are_refused(classifiers: Callable) -> None:
    _, model, axes = classifiers("fedlp_cnn")
    with pytest.raises(ConfigError, match="no width axis conv9"):
        cut_model(model, axes, {"conv9": Keep.full(3)})
    with pytest.raises(ConfigError, match="conv1 has 32 units"):
        cut_model(model, axes, {"conv1": Keep.first(3, 31)})
    with pytest.raises(ConfigError, match="none of its 32"):
        cut_model(model, axes, {"conv1": Keep(32, ())})


@pytest.mark.parametrize("choice", CHOICES)
def test_slice_tensor_equals_indexing(choice: str) -> None:
    tensor = torch.arange(20 * 6 * 40.0).reshape(20, 6, 40)
    keeps = (CHOICES[choice](20), Keep.full(6), CHOICES[choice](40))
    part = slice_tensor(tensor, keeps)
    assert torch.equal(part, tensor[np.ix_(*(keep.indices() for keep in keeps))])
    assert part.is_contiguous()
    part.zero_()
    assert tensor.count_nonzero() == tensor.numel() - 1
