"""Every model: its numbers, its prefixes, its errors, and that equal seeds build equal models."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.config import ModelConfig
from fedlp.config.parts import read_part
from fedlp.errors import ConfigError
from fedlp.models import ModelSpec, describe_model, forward, forward_logits, state_tensors
from fedlp.models.blueprint import find_task
from fedlp.models.cost import Macs, count_macs
from fedlp.models.language import import_transformers, load_hf
from fedlp.models.torchvision_compat import import_torchvision

CIFAR, DIGITS = (3, 32, 32), (1, 8, 8)
LANGUAGE = find_task("language")


def classifier(source: str, shape: tuple[int, ...] = DIGITS, **fields: object) -> ModelSpec:
    config = read_part(ModelConfig, "model", {"name": source, "source": source, **fields})
    return describe_model(config, shape, 10, "classification")


def language(vocabulary: int = 40, length: int = 12, **fields: object) -> ModelSpec:
    sizes = {"hidden_size": 16, "intermediate_size": 20} if fields.get("source", "llama") == "llama" else {}
    config = read_part(ModelConfig, "model", {"name": "llama_tiny", "source": "llama", **sizes, **fields})
    return describe_model(config, (length,), vocabulary, "language")


def count(spec: ModelSpec, names: frozenset[str]) -> int:
    return sum(torch.Size(spec.tensors[n].shape).numel() for n in names if spec.tensors[n].trainable)


def make(name: str) -> ModelSpec:
    if name == "llama_tiny":
        return language()
    source, _, variant = name.partition(":")
    if source == "torchvision":
        return classifier(source, name=variant)
    return classifier(source, **({"variant": variant} if variant else {}))


ALL = [
    *("fedlp_cnn", "fedlp_mlp", "fedlp_mlp:deep", "fedlp_mlp:linear", "small_cnn", "llama_tiny"),
    *("torchvision:resnet18", "torchvision:vgg11_bn", "torchvision:mobilenet_v2"),
]


@pytest.mark.parametrize("name", ALL)
def test_spec_build_and_prefixes_agree(name: str) -> None:
    spec = make(name)
    inputs = spec.example_inputs(3)
    model = spec.build(1).eval()
    state = state_tensors(model)
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == {
        n: (info.shape, info.dtype) for n, info in spec.tensors.items()
    }
    assert [n for layer in spec.layers for n in layer.tensors] == sorted(
        state, key=lambda n: [n in layer.tensors for layer in spec.layers].index(True)
    )
    assert sum(layer.num_params for layer in spec.layers) == spec.num_params
    assert spec.num_params == sum(p.numel() for p in model.parameters())
    assert spec.depths[-1] == frozenset(spec.tensors)
    previous: frozenset[str] = frozenset()
    for depth, shared in enumerate(spec.depths, start=1):
        prefix = spec.build_depth(depth, seed=1, client_id=4).eval()
        own = state_tensors(prefix)
        assert previous < shared
        assert shared == own.keys() & spec.tensors.keys()
        assert all(own[n].shape == spec.tensors[n].shape for n in shared)
        assert all(n.startswith("personal_head.") for n in own.keys() - shared)
        assert (depth == len(spec.depths)) == (own.keys() == shared)
        assert forward_logits(prefix, inputs).shape == forward_logits(model, inputs).shape
        previous = shared


@pytest.mark.parametrize("name", ALL)
def test_building_is_a_function_of_the_seed(name: str) -> None:
    spec = make(name)
    before = torch.random.get_rng_state()
    first = state_tensors(spec.build(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, other = state_tensors(spec.build(1)), state_tensors(spec.build(2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_frozen_layers_need_no_gradient_and_do_not_count_as_trained() -> None:
    whole, spec = classifier("fedlp_cnn"), classifier("fedlp_cnn", frozen=["fc?", "conv1"])
    still = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "conv1.weight", "conv1.bias"}
    assert spec.frozen == still
    assert spec.num_params == whole.num_params - count(whole, spec.frozen)
    for model in (spec.build(0), spec.build_depth(2, 0, 0)):
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == still & dict(
            model.named_parameters()
        ).keys()
    mine, theirs = state_tensors(spec.build(0)), state_tensors(whole.build(0))
    assert all(torch.equal(mine[name], theirs[name]) for name in spec.tensors)


@pytest.mark.parametrize(
    ("frozen", "message"), [(["head"], "no layer .* is called head; it has fc1, fc2"), (["*"], "nothing")]
)
def test_layers_that_cannot_be_frozen(frozen: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.frozen.*{message}"):
        classifier("fedlp_mlp", frozen=frozen)


def test_personal_heads_differ_between_clients_and_seeds_only() -> None:
    spec = classifier("fedlp_cnn")
    head = "personal_head.0.weight"
    heads = [
        state_tensors(spec.build_depth(2, seed, client))[head] for seed, client in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[3])


def test_fedlp_cnn_has_the_published_numbers() -> None:
    spec = classifier("fedlp_cnn", CIFAR)
    assert spec.num_params == 551_466
    assert len(spec.tensors) == 46
    assert sum(torch.Size(info.shape).numel() for info in spec.tensors.values()) == 552_368
    assert [count(spec, names) for names in spec.depths] == [10_272, 28_896, 65_952, 140_064, 551_466]
    local, macs = [], []
    for depth in range(1, 6):
        model = spec.build_depth(depth, 0, 0)
        local.append(sum(p.numel() for p in model.parameters()))
        macs.append(round(count_macs(model, spec.example_inputs(1)).forward / 1e6, 2))
    assert local == [1_060_266, 554_602, 591_658, 403_626, 551_466]
    assert macs == [11.63, 15.89, 25.40, 29.89, 39.36]


def test_fedlp_cnn_is_conv_relu_norm_without_activation_between_the_linear_layers() -> None:
    spec = classifier("fedlp_cnn")
    model = spec.build(0).train()
    x = spec.example_inputs(4)
    actual = model(x)
    for index in range(1, 7):
        conv = model.get_submodule(f"conv{index}")
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, padding=1))
        x = F.batch_norm(x, None, None, training=True)
        if index % 2 == 0:
            x = F.max_pool2d(x, 2)
    expected = F.linear(F.linear(x.flatten(1), model.fc1.weight, model.fc1.bias), model.fc2.weight, model.fc2.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_deep_mlp_prefix_computes_what_the_global_model_does() -> None:
    spec = classifier("fedlp_mlp", (1, 28, 28), variant="deep")
    assert [info.shape for n, info in spec.tensors.items() if n.endswith("weight")] == [
        *((512, 784), (128, 512), (128, 128), (64, 128), (32, 64), (10, 32))
    ]
    model, prefix = spec.build(0), spec.build_depth(4, 0, 0)
    prefix.load_state_dict({n: t for n, t in model.state_dict().items() if n in spec.depths[3]}, strict=False)
    hidden: list[torch.Tensor] = []
    model.fc5.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    prefix.personal_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    model(spec.example_inputs(2)), prefix(spec.example_inputs(2))
    assert torch.equal(hidden[0], hidden[1])
    assert classifier("fedlp_mlp", (1, 28, 28)).num_params == 784 * 500 + 500 + 500 * 10 + 10


def test_small_cnn_equals_its_textbook_order() -> None:
    spec = classifier("small_cnn", CIFAR)
    assert spec.num_params == 1_626_442
    model = spec.build(0).eval()
    x = spec.example_inputs(2)
    plain = nn.Sequential(
        *(model.conv1, nn.ReLU(), model.conv2, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), model.fc1, nn.ReLU(), model.fc2),
    )
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "num_params"), [("resnet18", 11_173_962), ("vgg11_bn", 9_231_114), ("mobilenet_v2", 2_236_682)]
)
def test_torchvision_keeps_resolution_on_small_images(name: str, num_params: int) -> None:
    spec = classifier("torchvision", CIFAR, name=name)
    assert spec.num_params == num_params
    model, maps = spec.blueprint.build().eval(), []
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
    last.register_forward_hook(lambda *args: maps.append(args[-1].shape[-1]))
    model(spec.example_inputs(1))
    assert maps == [{"resnet18": 4, "vgg11_bn": 2, "mobilenet_v2": 4}[name]]


def test_large_images_keep_torchvisions_form() -> None:
    spec = classifier("torchvision", (3, 64, 64), name="resnet18")
    assert spec.tensors["conv1.weight"].shape == (64, 3, 7, 7)


def test_group_norm_replaces_every_batch_norm() -> None:
    spec = classifier("torchvision", name="resnet18", norm="group")
    norms = [m for m in spec.blueprint.build().modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert len(norms) == 20
    assert all(isinstance(m, nn.GroupNorm) and m.num_groups <= 32 for m in norms)
    assert all(info.trainable for info in spec.tensors.values())


def test_pretrained_weights_fill_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    other = import_torchvision().models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr("fedlp.models.vision._download_weights", lambda name: other)
    spec = classifier("torchvision", name="resnet18", pretrained=True)
    model = spec.build(0)
    assert torch.equal(model.layer4[1].conv2.weight, other["layer4.1.conv2.weight"])
    assert model.fc.out_features == 10
    plain = spec.build_depth(4, 0, 0)
    assert not torch.equal(plain.layer4[1].conv2.weight, other["layer4.1.conv2.weight"])


def test_pretrained_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    import_torchvision()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ConfigError, match="pretrained=false") as caught:
        classifier("torchvision", name="resnet18", pretrained=True).build(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "shape", "task", "message"),
    [
        ({"source": "fedlp_cnn"}, (3, 7, 7), "classification", "at least 8 pixels"),
        ({"source": "fedlp_cnn"}, (20,), "classification", "images"),
        ({"source": "fedlp_cnn"}, (20,), "language", "is a classifier"),
        ({"source": "fedlp_mlp", "variant": "wide"}, DIGITS, "classification", "plain, deep"),
        ({"source": "torchvision", "name": "resnet19"}, DIGITS, "classification", "resnet18"),
        ({"source": "torchvision", "name": "resnet18", "norm": "layer"}, DIGITS, "classification", "norm"),
        ({"source": "torchvision", "name": "alexnet"}, CIFAR, "classification", "cannot take inputs"),
        ({"source": "torchvision", "name": "vit_b_16"}, (3, 30, 30), "classification", "cannot take inputs"),
        ({"source": "llama"}, DIGITS, "classification", "is a language model"),
        ({"source": "llama", "num_heads": 3}, (12,), "language", "num_heads"),
        ({"source": "hf"}, (12,), "language", "model.path"),
        ({"source": "hf", "path": "./absent"}, (12,), "language", "not a folder"),
        ({"source": "nonsense"}, DIGITS, "classification", "no model nonsense; .*fedlp_cnn"),
    ],
)
def test_mismatches_are_one_line(
    fields: dict, shape: tuple[int, ...], task: str, message: str, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        describe_model(read_part(ModelConfig, "model", {"name": "m", **fields}), shape, 10, task)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_depths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 1"):
        classifier("small_cnn").build_depth(2, 0, 0)


def test_macs_of_training_and_of_frozen_layers() -> None:
    spec = classifier("fedlp_mlp")
    model = spec.build(0)
    macs = count_macs(model, spec.example_inputs(5))
    assert macs.forward == 64 * 500 + 500 * 10
    assert macs.training == macs.forward + (64 * 500) + 2 * (500 * 10)  # the first layer needs no input gradient
    model.fc1.requires_grad_(False)
    assert count_macs(model, spec.example_inputs(1)).training == macs.forward + 500 * 10
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert count_macs(model, spec.example_inputs(1)).training == macs.forward


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gradients_of_a_convolution_cost_as_much_as_the_convolution(groups: int) -> None:
    inputs = torch.zeros(3, 8, 10, 10)
    layers = [
        nn.Conv2d(8, 16, 3, stride=2, dilation=2, groups=groups),  # to 3 x 3
        nn.ConvTranspose2d(16, 8, 3, stride=2, groups=groups, bias=False),
    ]
    first, second = 9 * (8 * 16 // groups) * 3 * 3, 9 * (8 * 16 // groups) * 3 * 3
    macs = count_macs(nn.Sequential(*layers), inputs)
    assert macs.forward == first + second
    assert macs.training == macs.forward + first + 2 * second  # the inputs need no gradient


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        *(("fedlp_mlp", {}), ("fedlp_mlp", {"variant": "deep"}), ("fedlp_cnn", {}), ("small_cnn", {})),
        *(("cifar_resnet", {"name": "resnet20"}), ("torchvision", {"name": "resnet18", "norm": "group"})),
        ("torchvision", {"name": "mobilenet_v2"}),
    ],
)
def test_small_models_run_on_values_and_are_described_as_on_shapes(
    source: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe() -> tuple[Macs, ModelSpec]:
        spec = classifier(source, CIFAR, **fields)
        return count_macs(spec.build(0), spec.example_inputs(1)), spec

    macs, spec = describe()
    monkeypatch.setattr(forward, "_MOST_PARAMS", 0)
    on_shapes, same = describe()
    assert macs == on_shapes
    assert (spec.sequence, spec.tensors) == (same.sequence, same.tensors)


def test_macs_of_attention_and_norms() -> None:
    spec = language(length=8, num_layers=1, num_heads=2, num_kv_heads=1)
    projections = 8 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 20 + 16 * 40)
    attention = 2 * 2 * 8 * 8 * 8
    rotary = 8 * 4 / 2  # positions times frequencies, once for a batch of two: a product in older transformers
    assert count_macs(spec.build(0), spec.example_inputs(1)).forward - projections - attention in (0, rotary)
    norm = nn.Sequential(nn.GroupNorm(2, 8), nn.BatchNorm2d(8))
    assert count_macs(norm, torch.zeros(1, 8, 3, 3)).forward == 2 * 4 * 8 * 9


@pytest.mark.parametrize("needs_values", [False, True])
def test_macs_of_fused_attention_are_counted_on_shapes_and_on_values(needs_values: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 48)

        def forward(self, inputs: Tensor) -> Tensor:
            queries, keys, values = self.project(inputs).view(*inputs.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            outputs = F.scaled_dot_product_attention(queries, keys, values, is_causal=True).flatten(1)
            return outputs if not needs_values or float(outputs.detach().sum()) < 1e9 else 2 * outputs

    found, projection, attention = count_macs(Attention(), torch.zeros(1, 8, 16)), 8 * 16 * 48, 2 * 2 * 8 * 8 * 8
    assert found == Macs(projection + attention, 2 * projection + 3 * attention)  # inputs need no gradient


def test_llama_tiny_is_tied_and_counts_tied_tensors_once() -> None:
    spec = language()
    model = spec.build(0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in spec.tensors
    assert len(spec.depths) == 4
    assert all("personal_head.1.weight" in state_tensors(spec.build_depth(d, 0, 0)) for d in (1, 2, 3))


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_prefixes_of_other_decoder_styles(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    extra = {"opt": {"ffn_dim": 20, "word_embed_proj_dim": 16}, "qwen2": {"num_key_value_heads": 1}}.get(family, {})
    transformers = import_transformers()
    config = transformers.AutoConfig.for_model(family, **sizes, **extra, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    spec = language(name="hf", source="hf", path=str(tmp_path), pretrained=True)
    built = spec.build(5).eval()
    assert all(torch.equal(t, state_tensors(whole)[n]) for n, t in state_tensors(built).items())
    prefix = spec.build_depth(1, 0, client_id=3).eval()
    assert forward_logits(prefix, spec.example_inputs(2)).shape == (2, 12, 40)
    assert spec.depths[0] == {n for n in spec.tensors if ".1." not in n and ".norm." not in n} - {
        *("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"),
        *("model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"),
    }


def test_hf_checks_vocabulary_length_and_kind(tmp_path: Path) -> None:
    transformers = import_transformers()
    path = str(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_hf((10,), 10, 10, LANGUAGE, path)
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not a causal language model"):
        load_hf((10,), 10, 10, LANGUAGE, path)
    transformers.LlamaConfig(vocab_size=30, max_position_embeddings=20).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="30 tokens"):
        load_hf((10,), 31, 31, LANGUAGE, path)
    with pytest.raises(ConfigError, match="at most"):
        load_hf((21,), 30, 30, LANGUAGE, path)
    with pytest.raises(ConfigError, match="safetensors") as caught:
        load_hf((20,), 30, 30, LANGUAGE, path, pretrained=True).build_initial()
    assert "\n" not in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "num_params", "num_depths"), [("stories260K", 260_032, 5), ("lm-3.3m", 3_345_600, 6)]
)
def test_real_language_models_predict_their_text(
    shared: Path, folder: str, num_params: int, num_depths: int, capfd: pytest.CaptureFixture
) -> None:
    path = shared / "models" / folder
    spec = language(512, 128, name="hf", source="hf", path=str(path), pretrained=True)
    assert (spec.num_params, len(spec.depths)) == (num_params, num_depths)
    model = spec.build(0).eval()
    text = (shared / "text" / "tinystories.txt").read_text()[:600]
    tokens = import_transformers().AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, :128]
    with torch.no_grad():
        logits = forward_logits(model, tokens)
    assert F.cross_entropy(logits[0, :-1], tokens[0, 1:]) < 2.5
    assert capfd.readouterr().err == ""
