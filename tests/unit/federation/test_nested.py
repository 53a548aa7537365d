"""Ordered dropout trains exactly the leading units of a client's model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlp.config import LocalConfig, ModelConfig
from fedlp.data.datasets import DataInfo, Examples
from fedlp.federation.client.ordered_dropout import NestedWidth, nested_counts
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model, forward_logits, state_tensors
from fedlp.models.language import import_transformers
from fedlp.pruning.tracing.widths import cut_model, trace_widths
from fedlp.training.loop import train_locally
from fedlp.types import Keep

INFO = DataInfo("toy", "classification", (1, 8, 8), 10, None, None, (0.5,), (0.25,))
EXAMPLES = Examples(
    torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)),
    torch.arange(40) % 10,
    None,
)


@pytest.fixture
def submodels() -> SubModels:
    return SubModels(describe_model(ModelConfig(name="fedlp_cnn", source="fedlp_cnn"), (1, 8, 8), 10, "classification"))


def nested(submodels: SubModels, model: torch.nn.Module, level: float) -> NestedWidth:
    axes = submodels.widths.axes
    return NestedWidth(model, submodels.widths, axes, nested_counts(axes, axes, level))


def test_counts_are_relative_to_the_global_model_and_never_more_than_the_client_has() -> None:
    assert nested_counts({"a": 8, "b": 3}, {"a": 16, "b": 10}, 0.25) == {"a": 4, "b": 3}
    assert nested_counts({"a": 8}, {"a": 16}, 0.01) == {"a": 1}


def test_the_whole_width_trains_bit_by_bit_as_the_model_itself_does(submodels: SubModels) -> None:
    plain, wrapped = submodels.spec.build(1), submodels.spec.build(1)
    config = LocalConfig(optimizer="sgd", epochs=2, batch_size=8, lr=0.05, momentum=0.9)
    train_locally(plain, EXAMPLES, INFO, config, np.random.default_rng(3))
    # Drawing one of one nested width takes nothing from the stream, so both see the same batches.
    train_locally(wrapped, EXAMPLES, INFO, config, np.random.default_rng(3), [nested(submodels, wrapped, 1.0)])
    trained = state_tensors(wrapped)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in state_tensors(plain).items())


def test_units_outside_the_width_do_not_move_and_those_inside_learn(submodels: SubModels) -> None:
    model = submodels.spec.build(1)
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    config = LocalConfig(optimizer="sgd", epochs=20, batch_size=20, lr=0.05)
    half = nested(submodels, model, 0.5)
    first = train_locally(
        model, EXAMPLES, INFO, LocalConfig(optimizer="sgd", lr=0.05), np.random.default_rng(0), [half]
    )
    last = train_locally(model, EXAMPLES, INFO, config, np.random.default_rng(0), [half])
    assert last.train_loss < 0.5 * first.train_loss
    after = state_tensors(model)
    assert not torch.equal(after["conv2.weight"][:16, :16], before["conv2.weight"][:16, :16])
    assert torch.equal(after["conv2.weight"][16:], before["conv2.weight"][16:])
    assert torch.equal(after["conv2.weight"][:, 16:], before["conv2.weight"][:, 16:])
    assert torch.equal(after["bn2.running_mean"][16:], before["bn2.running_mean"][16:])
    assert not torch.equal(after["bn2.running_mean"][:16], before["bn2.running_mean"][:16])


def test_fused_queries_keys_and_values_lose_units_in_every_copy() -> None:
    transformers = import_transformers()
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=12, n_layer=1, n_head=4, n_positions=8, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    spec = trace_widths(model, torch.arange(6)[None])
    kept = {axis: size if axis == "hidden" else size // 2 for axis, size in spec.axes.items()}
    half = NestedWidth(model, spec, spec.axes, kept)
    small = half.pull()
    cut = cut_model(model, spec, {axis: Keep.first(kept[axis], size) for axis, size in spec.axes.items()})
    for name, tensor in state_tensors(cut).items():
        assert torch.equal(state_tensors(small)[name], tensor), name

    (forward_logits(small.train(), torch.arange(6)[None]) ** 2).sum().backward()
    half.push()
    fused = model.transformer.h[0].attn.c_attn.weight.grad.view(12, 3, 4, 3)  # copies, heads, head_dim
    assert (fused[:, :, :2] != 0).any(dim=-1).all()
    assert not fused[:, :, 2:].any()
