"""Newton steps against a naive twin, and that they stop where they do not help."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.pruning.gradients import output_fisher
from fedlp.pruning.kernels import newton
from fedlp.pruning.kernels.newton import mean_loss, newton_steps
from fedlp.pruning.pruner import Calibration

CLASSES, FEATURES = 3, 5


def classifier(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES, bias=bias)).eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten())
    return nn.Sequential(body, nn.Linear(16, CLASSES)).eval()


def data(model: nn.Module, shape: tuple[int, ...], num_batches: int = 8, temperature: float = 0.1) -> Calibration:
    """Labels that another model of the same kind gives."""
    generator = torch.Generator().manual_seed(1)
    teacher = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    batches = [torch.randn(32, *shape, generator=generator) for _ in range(num_batches)]
    with torch.no_grad():
        named = dict(zip([name for name, _ in model.named_parameters()], teacher, strict=True))
        logits = [torch.func.functional_call(model, named, batch) / temperature for batch in batches]
    return Calibration(batches, [values.argmax(dim=1) for values in logits])


def naive_direction(model: nn.Module, module: nn.Linear, inputs: Tensor, labels: Tensor, fisher: Tensor) -> Tensor:
    """One linear layer's step by the whole Kronecker matrix, (out, in + 1), the bias last."""
    read: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, __: read.append(args[0].detach().double()))
    loss = F.cross_entropy(model(inputs), labels)
    handle.remove()
    weight, bias = torch.autograd.grad(loss, [module.weight, module.bias])
    gradient = torch.cat([weight, bias[:, None]], dim=1).double()
    x = torch.cat([read[0], torch.ones(len(inputs), 1)], dim=1)

    def damped(matrix: Tensor) -> Tensor:
        return matrix + 0.01 * matrix.trace() / len(matrix) * torch.eye(len(matrix))

    curvature = torch.kron(damped(fisher), damped(x.T @ x / len(x)))
    return torch.linalg.solve(curvature, gradient.flatten()).view_as(gradient)


def test_the_direction_solves_the_kronecker_system() -> None:
    model = classifier()
    shard = data(model, (FEATURES,), num_batches=1)
    fisher = output_fisher(model, ["0"], shard.batches, torch.Generator().manual_seed(0), False)["0"]
    (weight, bias) = newton._directions(model, ["0"], shard, torch.Generator().manual_seed(0))["0"]
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    assert bias is not None
    naive = naive_direction(model, layer, shard.batches[0], shard.labels[0], fisher)
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), naive, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "shape", "paths"),
    [
        (classifier(), (FEATURES,), ["0", "2"]),
        (classifier(bias=False), (FEATURES,), ["2"]),
        (convolutional(), (2, 4, 4), ["0.0", "1"]),
    ],
)
def test_steps_lower_the_held_out_loss(model: nn.Module, shape: tuple[int, ...], paths: list[str]) -> None:
    shard = data(model, shape)
    others = {name: p.clone() for name, p in model.named_parameters() if not name.startswith(tuple(paths))}
    told: list[float] = []
    losses = newton_steps(model, paths, shard, 4, lambda _, loss: told.append(loss))
    held = Calibration(shard.batches[-1:], shard.labels[-1:])
    assert len(losses) > 1
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    assert told == losses[1:]
    assert mean_loss(model, held) == pytest.approx(losses[-1], rel=1e-6)
    for name, parameter in model.named_parameters():
        assert name not in others or torch.equal(parameter, others[name])


def test_what_does_not_help_held_out_data_is_not_done() -> None:
    model = classifier()
    shard = data(model, (FEATURES,))
    with torch.no_grad():
        right = model(shard.batches[-1]).argmax(dim=1)
        model[2].weight.mul_(20)  # certain, and right, on what is held out; wrong elsewhere
        model[2].bias.mul_(20)
    mixed = Calibration(shard.batches, [*[(model(b).argmax(dim=1) + 1) % CLASSES for b in shard.batches[:-1]], right])
    before = [parameter.clone() for parameter in model.parameters()]
    assert len(newton_steps(model, ["0", "2"], mixed, 3)) == 1
    assert all(torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))


def test_one_batch_is_too_few() -> None:
    model = classifier()
    with pytest.raises(CalibrationError, match="1 batch"):
        newton_steps(model, ["0"], data(model, (FEATURES,), num_batches=1), 1)
