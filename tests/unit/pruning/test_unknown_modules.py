"""Models of one's own with modules that no width rule covers: those stay whole, and the rest is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.forward import forward_logits
from fedlp.pruning.costs.activations import activation_footprint
from fedlp.pruning.costs.footprint import Footprint, macs_footprint
from fedlp.pruning.tracing import cut_check
from fedlp.pruning.tracing.units import find_layers, prunable_layers
from fedlp.pruning.tracing.widths import WidthSpec, cut_model, trace_widths
from fedlp.types import Keep

IMAGES = torch.zeros(1, 3, 8, 8)


class Body(nn.Module):
    """Three convolutions under a head of (batch, 12, 8, 8)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 16), (16, 12)))
        self.norm, self.head = nn.BatchNorm2d(16), head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.b(torch.relu(self.a(x)))))
        return self.head(torch.relu(self.c(x)))


class Cosine(nn.Module):
    """Prototypes: a free parameter in a module without children."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(10, 12)), nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x.mean((2, 3))), F.normalize(self.weight))


class CosineWithChild(Cosine):
    """The same beside a module that is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


class Scaled(nn.Module):
    """A learned scale of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.fc = nn.Parameter(torch.randn(12, 1, 1)), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x * self.gamma).mean((2, 3)))


class OneScale(Scaled):
    """A learned scale of everything, which takes no units."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(2.0))


class Attention(nn.Module):
    """A class token, attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.norm = nn.Parameter(torch.randn(1, 1, 12)), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.mlp, self.fc = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.size(0), -1, -1), tokens], 1)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed)[0]
        return self.fc((tokens + self.mlp(tokens))[:, 0])


class Squeeze(nn.Module):
    """Squeeze and excitation, whose gates get two more dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.fc = nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return self.fc((x * gates[:, :, None, None]).mean((2, 3)))


class Reshaped(nn.Module):
    """A size in the code."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes, self.hidden, self.fc = sizes, nn.Linear(192, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 2)
        sizes = self.sizes or (x.size(0), x.size(1) * 16)
        return self.fc(torch.relu(self.hidden(x.reshape(*sizes))))


class Branches(nn.Module):
    """Branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.fc = nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.fc(self.extra(x) if x.sum() > 0 else x)


class Recurrent(nn.Module):
    """A module that gives several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(12, 7, batch_first=True), nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x.flatten(2).transpose(1, 2))
        return self.fc(outputs[:, -1])


class OwnLinear(nn.Linear):
    """A layer of torch's with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight), self.bias)


class Optional(nn.Module):
    """A model whose forward pass has further parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body(OneScale())

    def forward(self, x: Tensor, features: bool = False, mask: Tensor | None = None) -> Tensor:
        found = self.body(x)
        if features:
            return x
        return found if mask is None else found * mask


def pooled(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *more)


AB = {"a": 8, "b": 16}
CASES = {
    "cosine": (lambda: Body(Cosine()), AB, "head, c stay whole: no width rule covers Cosine"),
    "cosine-with-child": (lambda: Body(CosineWithChild()), AB, "c stays whole: no width rule covers normalize in"),
    "scaled": (lambda: Body(Scaled()), AB, "c stays whole: no width rule covers the parameter head.gamma"),
    "one-scale": (lambda: Body(OneScale()), AB | {"c": 12}, ""),
    "attention": (lambda: Body(Attention()), AB | {"head.mlp.0": 24}, "no width rule covers flatten in Attention"),
    "squeeze": (lambda: Body(Squeeze()), AB | {"c": 12, "head.down": 4}, ""),
    "reshaped": (lambda: Body(Reshaped(-1, 192)), AB | {"head.hidden": 32}, "it asks for 192 entries; x.flatten(1)"),
    "reshaped-by-size": (lambda: Body(Reshaped()), AB | {"c": 12, "head.hidden": 32}, ""),
    "branches": (
        lambda: Body(Branches()),
        AB,
        "head, c stay whole: no width rule covers Branches: it cannot",
    ),
    "recurrent": (lambda: Body(Recurrent()), AB, "c stays whole: no width rule covers flatten in Recurrent"),
    "own-linear": (lambda: Body(pooled(OwnLinear(12, 10))), AB, "no width rule covers OwnLinear"),
    "weight-norm": (
        lambda: Body(pooled(nn.utils.parametrizations.weight_norm(nn.Linear(12, 10)))),
        AB,
        "head.2, c stay whole: no width rule covers ParametrizedLinear",
    ),
    "optional": (Optional, {"body.a": 8, "body.b": 16, "body.c": 12}, ""),
}


def silenced(model: nn.Module, spec: WidthSpec, widths: dict[str, Keep]) -> nn.Module:
    """Return a copy of a model in which the removed units' parameters are zero."""
    copied = cut_model(model, spec, {})
    tensors = dict(copied.named_parameters())
    for name, dims in spec.dims.items():
        for position, dim in enumerate(dims):
            if dim.axis in widths and name in tensors:
                kept = torch.from_numpy(dim.keep(widths[dim.axis]).indices())
                gone = torch.ones(tensors[name].shape[position], dtype=torch.bool)
                gone[kept] = False
                tensors[name].data.movedim(position, 0)[gone] = 0.0
    return copied


@pytest.mark.parametrize("case", CASES)
def test_the_rest_is_cut_and_computes_the_same(case: str) -> None:
    make, axes, reason = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    spec = trace_widths(model, IMAGES)
    assert dict(spec.axes) == axes
    assert reason in spec.whole_line()
    assert bool(spec.whole) == bool(reason)
    widths = {axis: Keep.window(1, max(1, 2 * size // 3), size) for axis, size in axes.items()}
    cut, images = cut_model(model, spec, widths), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(cut(images), silenced(model, spec, widths)(images))
    assert sum(p.numel() for p in cut.parameters()) == Footprint(model, spec).count(
        {axis: keep.count for axis, keep in widths.items()}
    )
    assert {layer.name for layer in find_layers(model, spec)} <= axes.keys()


class BranchesAtOnce(nn.Module):
    """A model whose own forward pass cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(192, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return self.last(x if x.sum() > 0 else -x)


def test_a_model_of_which_nothing_can_be_cut() -> None:
    model = BranchesAtOnce()
    spec = trace_widths(model, IMAGES)
    assert not spec.axes
    assert not prunable_layers(model, spec)
    assert spec.whole_line().startswith("BranchesAtOnce stays whole: it cannot be traced")
    with pytest.raises(ConfigError, match="BranchesAtOnce has no prunable units: BranchesAtOnce stays whole"):
        find_layers(model, spec)
    assert activation_footprint(model, spec, IMAGES).count({}) > 0
    assert macs_footprint(model, spec, IMAGES).count({}) == 192 * 8 + 80


class NeedsValues(nn.Module):
    """A module whose operators need values, though nothing of it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().abs().max().clamp(min=1.0) > 0)


def test_a_model_whose_operators_need_values_is_run_on_values() -> None:
    model = Body(nn.Sequential(NeedsValues(), pooled(nn.Linear(12, 10))))
    state = torch.get_rng_state()
    spec = trace_widths(model, IMAGES)
    assert dict(spec.axes) == AB
    assert "no width rule covers NeedsValues" in spec.whole_line()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.norm.running_mean.abs().sum() == 0


class TakesSixteen(nn.ReLU):
    """An activation that the rules know, with a number that they cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(self.check)

    @staticmethod
    def check(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[1] != 16:
            raise RuntimeError(f"16 channels wanted, not {inputs[0].shape[1]}")


class DropsThrough(nn.Identity):
    """An activation that the rules know, whose hook folds missing channels into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda _, __, output: output.reshape(-1, 12, 8, 8))


@pytest.mark.parametrize(
    ("layer", "broken", "line"),
    [("norm", "b", "fails: 16 channels wanted, not"), ("c", "c", "fails: ")],
)
def test_the_cut_model_is_checked_and_what_breaks_it_stays_whole(layer: str, broken: str, line: str) -> None:
    model = Body(pooled(nn.Linear(12, 10)))
    old = model.get_submodule(layer)
    setattr(model, layer, nn.Sequential(old, TakesSixteen() if layer == "norm" else DropsThrough()))
    spec = trace_widths(model, IMAGES)
    axis = {"b": "b", "c": "c.0"}[broken]
    assert axis not in spec.axes
    assert len(spec.axes) == 2
    assert line in spec.whole[axis]
    forward_logits(cut_model(model, spec, {name: Keep.first(3, size) for name, size in spec.axes.items()}), IMAGES)


class AuxiliaryHead(nn.Module):
    """A head that runs in training alone, on inputs of a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.main(x) + 0.1 * self.auxiliary(x) if self.training else self.main(x)


def test_the_cut_model_is_checked_in_training_mode_too() -> None:
    model = Body(AuxiliaryHead())
    spec = trace_widths(model, IMAGES)
    assert dict(spec.axes) == AB
    assert "fails" in spec.whole["c"]
    cut_model(model, spec, {name: Keep.first(3, size) for name, size in spec.axes.items()}).train()(
        torch.zeros(2, 3, 8, 8)
    )


def test_where_only_the_whole_cut_fails_nothing_is_cut() -> None:
    model = Body(pooled(nn.Linear(12, 10)))
    spec = trace_widths(model, IMAGES)

    def cut(*arguments: object) -> nn.Module:
        if len(arguments[2]) > 1:  # type: ignore[arg-type]
            raise RuntimeError("too narrow")
        return cut_model(*arguments)  # type: ignore[arg-type]

    found = cut_check.without_broken_axes(model, spec, IMAGES, cut)
    assert not found.axes
    assert found.whole_line() == "a, b, c stay whole: the model cut along them fails: too narrow"
