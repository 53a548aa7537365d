"""Layers in the order in which a forward pass uses them, and the leading ones that nobody asks for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fedlp.config import ModelConfig
from fedlp.models import ModelSpec, describe_model, forward_logits, leading_layers
from fedlp.models.blueprint import Blueprint
from fedlp.models.language import import_transformers
from fedlp.models.layer_order import Layer, order_layers
from fedlp.models.spec import describe_blueprint

CLASSIFIERS = ["fedlp_cnn", "small_cnn", "fedlp_mlp", "resnet18", "mobilenet_v2"]


def classifier(name: str) -> ModelSpec:
    source = "torchvision" if name in ("resnet18", "mobilenet_v2") else name
    options = {"variant": "deep"} if name == "fedlp_mlp" else {}
    config = ModelConfig(name=name, source=source, options=options)
    return describe_model(config, (3, 32, 32), 10, "classification")


@dataclass(frozen=True)
class Llama(Blueprint):
    tied: bool
    name: str = "llama"

    def build(self) -> nn.Module:
        transformers = import_transformers()
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            use_cache=False,
        )
        config.tie_word_embeddings = self.tied
        return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def llama(tied: bool) -> ModelSpec:
    return describe_blueprint(Llama(tied), "language", (8,), 40)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_register_their_layers_in_the_order_of_use(name: str) -> None:
    spec = classifier(name)
    assert spec.sequence == spec.layers
    for place, layer in enumerate(spec.layers):
        before = tuple(name for other in spec.layers[:place] for name in other.tensors)
        assert leading_layers(spec, layer.tensors[-1:]) == before
    assert leading_layers(spec, ()) == tuple(spec.tensors)


def test_the_norms_of_a_language_model_come_before_what_they_feed() -> None:
    spec = llama(tied=False)
    assert {layer.name for layer in spec.sequence} == {layer.name for layer in spec.layers}
    names = [layer.name.removeprefix("model.layers.0.") for layer in spec.sequence]
    assert names[0] == "model.embed_tokens"
    assert names[1:3] == ["input_layernorm", "self_attn.q_proj"]
    assert names[6:8] == ["post_attention_layernorm", "mlp.gate_proj"]
    assert names[-2:] == ["model.norm", "lm_head"]
    norm = "model.layers.1.input_layernorm.weight"
    before = {name for name in spec.tensors if name.startswith(("model.embed_tokens", "model.layers.0"))}
    assert set(leading_layers(spec, {norm})) == before


def test_tied_embeddings_lead_nothing() -> None:
    spec = llama(tied=True)
    assert spec.sequence == ()
    assert leading_layers(spec, {"model.norm.weight"}) == ()


@pytest.mark.parametrize("make", [*(lambda n=n: classifier(n) for n in CLASSIFIERS), lambda: llama(tied=False)])
def test_the_backward_pass_ends_where_the_first_layer_begins_that_is_asked_for(make) -> None:
    spec = make()
    asked = spec.sequence[len(spec.sequence) // 2]
    leading = set(leading_layers(spec, asked.tensors))
    model = spec.build(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in leading)
    inputs: list[bool] = []
    model.get_submodule(asked.name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    forward_logits(model, spec.example_inputs(2)).sum().backward()
    assert inputs == [False]
    assert all((p.grad is None) == (name in leading) for name, p in model.named_parameters())


def test_layers_used_twice_end_the_sequence_and_those_not_called_take_the_place_of_who_reads_them() -> None:
    a, b, c, root = (Layer(n, (f"{n}.weight".removeprefix("(root)."),), 1) for n in ("m.a", "m.b", "c", "(root)"))
    layers = (c, b, a, root)
    assert order_layers(layers, ("", "m", "m.a", "c"), ()) == (root, b, a, c)
    assert order_layers(layers, ("", "m", "m.a", "c", "m.a"), ()) == (root, b)
    assert order_layers(layers, ("", "m", "c"), {"c.weight"}) == (root, b, a)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.again, self.first = nn.Linear(9, 3), nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.flatten(x, 1))
        return self.last(self.again(self.again(x)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RecurrentBlueprint(Blueprint):
    name: str = "recurrent"

    def build(self) -> nn.Module:
        return Recurrent()


def test_a_module_called_twice_leads_nothing_after_it() -> None:
    spec = describe_blueprint(RecurrentBlueprint(), "classification", (9,), 3)
    assert [layer.name for layer in spec.sequence] == ["first"]
    assert leading_layers(spec, {"last.bias"}) == ("first.weight", "first.bias")
