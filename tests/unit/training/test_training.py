"""Local loops: every example once an epoch, sums that add up, losses that count what they should."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedlp.config import LocalConfig
from fedlp.data.datasets import IGNORE_INDEX, DataInfo, Examples
from fedlp.errors import ConfigError
from fedlp.training.batches import augment_images, draw_batches, prepare_inputs
from fedlp.training.evaluation import evaluate_sums, metrics_from_sums
from fedlp.training.loop import check_loss, train_locally
from fedlp.training.optimizers import make_optimizer

IMAGES = DataInfo("toy", "classification", (3, 6, 6), 4, None, None, (0.2, 0.4, 0.6), (0.1, 0.2, 0.3))
TEXT = DataInfo("toy", "language", (5,), 11, None, None, (), ())


def images(count: int) -> Examples:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, 6, 6), dtype=np.uint8))
    return Examples(pixels, torch.from_numpy(rng.integers(0, 4, count)), None)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.5, 0.1)])
def test_sgd_is_torchs_bit_for_bit(momentum: float, weight_decay: float) -> None:
    ours, theirs = classifier(), classifier()
    ours[0].bias.requires_grad_(False)
    theirs[0].bias.requires_grad_(False)
    config = LocalConfig(optimizer="sgd", lr=0.1, momentum=momentum, weight_decay=weight_decay)
    optimizer = make_optimizer(list(ours.parameters()), config)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(4):
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            inputs = torch.linspace(-1, 1, 2 * 3 * 36).view(2, 3, 6, 6)
            model(inputs).square().sum().backward()
            stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(("count", "batch", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 8, [3]), (1, 4, [1])])
def test_every_example_is_seen_once_an_epoch_and_none_is_alone(count: int, batch: int, sizes: list[int]) -> None:
    config = LocalConfig(optimizer="sgd", epochs=2, batch_size=batch)
    batches = list(draw_batches(count, config, np.random.default_rng(0)))
    assert [len(index) for index in batches] == sizes * 2
    for epoch in (batches[: len(sizes)], batches[len(sizes) :]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(count))


def test_batches_of_one_stay_batches_of_one() -> None:
    config = LocalConfig(optimizer="sgd", epochs=1, batch_size=1)
    assert [len(index) for index in draw_batches(3, config, np.random.default_rng(0))] == [1, 1, 1]


def test_images_are_normalised_per_channel() -> None:
    batch = images(7).inputs
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGES.mean, IMAGES.std))
    expected = (batch.double() / 255 - mean) / std
    found = prepare_inputs(batch, IMAGES, torch.device("cpu"))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_a_function_of_its_arguments_and_learns(optimizer: str) -> None:
    config = LocalConfig(optimizer=optimizer, epochs=30, batch_size=8, lr=0.01, max_grad_norm=5.0)
    results = []
    for noise in (1, 2):
        model = classifier()
        torch.manual_seed(noise)  # what torch's generator held before does not matter
        results.append((train_locally(model, images(20), IMAGES, config, np.random.default_rng(5)), model))
    (first, one), (second, two) = results
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert first.num_processed == 600
    assert first.train_loss < 0.7


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_adjusted_losses_weigh_classes_by_their_shares_and_leave_absent_ones_alone(strength: float) -> None:
    model, examples = classifier(), images(9)
    examples = Examples(examples.inputs, torch.tensor([0, 0, 0, 0, 2, 2, 3, 3, 3]), None)
    logits = copy.deepcopy(model)(prepare_inputs(examples.inputs, IMAGES, torch.device("cpu"))).detach().double()
    odds = torch.tensor([4 / 9, 0.0, 2 / 9, 3 / 9]).double() ** strength * logits.exp()
    expected = -(odds.gather(1, examples.targets[:, None]).squeeze(1) / odds.sum(dim=1)).log().mean()
    before = copy.deepcopy(model[4])
    config = LocalConfig(optimizer="sgd", batch_size=9, lr=0.1, logit_adjustment=strength)
    found = train_locally(model, examples, IMAGES, config, np.random.default_rng(0))
    assert found.train_loss == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(model[4].weight[1], before.weight[1])
    assert torch.equal(model[4].bias[1], before.bias[1])
    assert not torch.equal(model[4].weight[0], before.weight[0])


def test_only_classifiers_have_a_loss_to_adjust() -> None:
    check_loss(LocalConfig(logit_adjustment=1.0), IMAGES)
    check_loss(LocalConfig(), TEXT)
    with pytest.raises(ConfigError, match="logit_adjustment is for classifiers, but toy has no class for an example"):
        check_loss(LocalConfig(logit_adjustment=1.0), TEXT)


def test_sums_do_not_depend_on_how_the_examples_are_divided() -> None:
    model, examples = classifier(), images(50)
    whole = evaluate_sums(model, examples, IMAGES, 8)
    parts = [evaluate_sums(model, examples, IMAGES, 8, start, min(start + 16, 50)) for start in range(0, 50, 16)]
    assert whole["count"] == 50
    for key in ("accuracy.correct", "count"):
        assert whole[key] == sum(part[key] for part in parts)
    assert whole["loss"] == pytest.approx(sum(part["loss"] for part in parts), rel=1e-12)


class Bigram(nn.Module):
    """Predicts the next token from the current one: log-probabilities in a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(11, 11))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


def test_text_is_scored_on_next_tokens_and_padding_does_not_count() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])
    model = Bigram()
    sums = evaluate_sums(model, Examples(tokens, torch.tensor([0, 1]), None), TEXT, 2)
    logs = model.table.detach().log_softmax(dim=1)
    pairs = [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (7, 8), (8, 9)]
    assert sums["count"] == len(pairs)
    assert sums["loss"] == pytest.approx(-sum(float(logs[a, b]) for a, b in pairs), rel=1e-5)
    metrics = metrics_from_sums(sums, "language")
    assert metrics["perplexity"] == pytest.approx(math.exp(sums["loss"] / 7))


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert metrics_from_sums({"loss": 1e6, "count": 1.0}, "language")["perplexity"] == math.inf


def test_augmented_images_are_windows_of_the_padded_ones() -> None:
    batch = images(40).inputs
    rng = np.random.default_rng(0)
    cropped = augment_images(batch, rng, padding=2, flip=False)
    padded = nn.functional.pad(batch, (2, 2, 2, 2))
    windows = [padded[:, :, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    for i, image in enumerate(cropped):
        assert any(torch.equal(image, window[i]) for window in windows)
    flipped = augment_images(batch, np.random.default_rng(0), padding=0, flip=True)
    same = [torch.equal(a, b) for a, b in zip(flipped, batch, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, batch, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 5 < sum(mirrored) < 35


FREEZING = [
    LocalConfig(optimizer="sgd", epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.1, max_grad_norm=1.0),
    LocalConfig(optimizer="adam", epochs=2, batch_size=8, lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("config", FREEZING, ids=["sgd", "adam"])
def test_frozen_parameters_do_not_move_and_no_gradient_is_computed_for_them(config: LocalConfig) -> None:
    plain, model, untouched = classifier(), classifier(), classifier()
    reached: list[bool] = []
    model[1].register_full_backward_hook(lambda *_: reached.append(True))
    train_locally(plain, images(20), IMAGES, config, np.random.default_rng(5))
    frozen = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "elsewhere.weight")
    model[0].weight.grad = torch.ones_like(model[0].weight)  # left over; it must not move anything
    train_locally(model, images(20), IMAGES, config, np.random.default_rng(5), frozen=frozen)
    assert not reached
    before, after = untouched.state_dict(), model.state_dict()
    for name in frozen[:4]:
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["4.weight"], after["4.weight"])
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])  # frozen or not, statistics follow
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = classifier()
    train_locally(again, images(20), IMAGES, config, np.random.default_rng(5), frozen=())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_is_not_frozen_is_trained_as_if_it_were_alone() -> None:
    config, rng = LocalConfig(optimizer="sgd", batch_size=20, lr=0.1), np.random.default_rng
    plain, model = classifier(), classifier()
    train_locally(plain, images(20), IMAGES, config, rng(5))
    train_locally(model, images(20), IMAGES, config, rng(5), frozen={"0.weight"})
    for name, tensor in plain.state_dict().items():  # one step: the others' gradients are the same
        assert torch.equal(tensor, model.state_dict()[name]) == (name != "0.weight")


@pytest.mark.parametrize("config", FREEZING, ids=["sgd", "adam"])
def test_a_wholly_frozen_model_only_reports_its_loss(config: LocalConfig) -> None:
    model, untouched = classifier(), classifier()
    names = [name for name, _ in model.named_parameters()]
    result = train_locally(model, images(20), IMAGES, config, np.random.default_rng(5), frozen=names)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))
    assert result.num_processed == 40
    assert 1 < result.train_loss < 2


def test_freezing_ends_with_an_error_too_and_what_needed_no_gradient_before_needs_none_after() -> None:
    model = classifier()
    model[0].bias.requires_grad_(False)
    wrong = Examples(images(20).inputs[:, :2], images(20).targets, None)
    config = LocalConfig(optimizer="sgd", batch_size=8)
    with pytest.raises(RuntimeError):
        train_locally(model, wrong, IMAGES, config, np.random.default_rng(5), frozen={"0.weight", "0.bias"})
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["0.bias"]


def test_a_tied_parameter_is_frozen_by_any_of_its_names() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 108), nn.Linear(108, 108), nn.Linear(108, 4))
    model[2].weight = model[1].weight
    before = model[1].weight.detach().clone()
    config = LocalConfig(optimizer="sgd", batch_size=8, lr=0.1)
    train_locally(model, images(8), IMAGES, config, np.random.default_rng(5), frozen={"2.weight"})
    assert torch.equal(before, model[1].weight)
