"""Layers with encoded weights: values and gradients of widened ones, tied weights, what stays wide."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlp.federation.wire import encoded_tensors
from fedlp.federation.wire.digests import digest_tensors
from fedlp.federation.wire.encoded_tensors import EncodedTensors
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.bfloat16 import BFloat16
from fedlp.federation.wire.encodings.blockwise import Block4, Block8, NormalFloat4
from fedlp.federation.wire.encodings.quantised import Int2, Int4, Int8
from fedlp.models import state_tensors
from fedlp.models.adapters import LoraOptions, add_adapters
from fedlp.models.encoded_base import EncodedLinear, encodable, encode_base, encoded_linear, hold_base

CPU = torch.device("cpu")
ENCODINGS = [NormalFloat4(16), Block4(16), Block8(16), Int8(), Int4(), Int2(), BFloat16()]


class Tied(nn.Module):
    """Embedding, a convolution over tokens, and an output layer that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.mixing, self.output = nn.Conv1d(32, 32, 1), nn.Linear(32, 40, bias=False)
        self.output.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens) to (batch, tokens, 40)."""
        found = self.inner(self.table(tokens)).transpose(1, 2)
        return self.output(torch.relu(self.mixing(found)).transpose(1, 2))  # type: ignore[no-any-return]


def encoded(encoding: Encoding, tensors: dict[str, torch.Tensor]) -> EncodedTensors:
    signature = tuple((name, tuple(x.shape), x.dtype) for name, x in tensors.items())
    return EncodedTensors(encoding, encoding.encode(tensors, torch.Generator().manual_seed(0)), signature)


@pytest.mark.parametrize("columns", [32, 33])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda x: type(x).__name__)
def test_rows_are_those_of_the_whole(encoding: Encoding, columns: int) -> None:
    tensors = {"x": torch.randn(24, columns), "bias": torch.randn(5)}
    found = encoded(encoding, tensors)
    whole = dict(found.decode())
    weight = found.weight("x", CPU)
    index = torch.tensor([[3, 3], [0, 23]])
    assert torch.equal(weight.take(index), whole["x"][index])
    assert torch.equal(weight.rows(5, 9), whole["x"][5:9])
    assert torch.equal(whole["bias"], tensors["bias"])
    assert found.digest() == digest_tensors(whole)
    found.check("the server's message")


@pytest.mark.parametrize("entries", [1 << 20, 100], ids=["whole", "in parts"])
def test_a_model_gives_the_values_and_gradients_of_widened_weights(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_tensors, "_WIDENED", entries)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = add_adapters(Tied(), LoraOptions(rank=2, targets=("inner",)))
        made.append(model.requires_grad_(False))
        made[-1].inner.lora_a.requires_grad_(True)
        made[-1].inner.lora_b.requires_grad_(True)
        torch.nn.init.normal_(made[-1].inner.lora_b)
    wide, narrow = made
    frozen = frozenset(name for name in state_tensors(wide) if "lora_" not in name)
    names = encodable(narrow, frozen)
    assert names == {"table.weight", "inner.weight"}
    base = encoded(NormalFloat4(16), {name: x for name, x in state_tensors(wide).items() if name in frozen})
    for name, tensor in base.decode():
        state_tensors(wide)[name].copy_(tensor)
    encode_base(narrow, names)
    assert hold_base(narrow, lambda name: base.weight(name, CPU)) == names
    assert narrow.output.weight is narrow.table.weight
    for name, tensor in base.decode(left=names):
        state_tensors(narrow)[name].copy_(tensor)
    tokens = torch.arange(30).view(2, 15)

    def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.equal(found, wanted) if entries > 1000 else torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)

    for model in made:
        model(tokens).square().mean().backward()
    assert same(narrow(tokens), wide(tokens))
    assert same(narrow.inner.lora_a.grad, wide.inner.lora_a.grad)
    assert same(narrow.inner.lora_b.grad, wide.inner.lora_b.grad)


def test_backward_keeps_no_wide_weight() -> None:
    weight = encoded(NormalFloat4(16), {"x": torch.randn(24, 32)}).weight("x", CPU)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        encoded_linear(torch.randn(3, 32, requires_grad=True), weight, None)
    assert saved == []


def test_a_weight_shared_with_another_kind_of_layer_stays_wide() -> None:
    model = Tied()
    model.scaled = type("Scaled", (nn.Embedding,), {})(40, 32)
    model.scaled.weight = model.table.weight
    names = encodable(model, frozenset(state_tensors(model)))
    assert names == {"inner.weight"}
    assert isinstance(encode_base(model, names).inner, EncodedLinear)
