"""Where stacks pay, and how many clients share one."""

from __future__ import annotations

from torch import nn

from fedlp.models.adapters import LoraOptions, add_adapters
from fedlp.models.layers import freeze
from fedlp.training.stacked_rule import adapter_stack_size, pays, stack_size


def adapted(width: int) -> nn.Module:
    model = add_adapters(nn.Sequential(nn.Linear(width, width)), LoraOptions(rank=2, targets=("0",)))
    return freeze(model, frozenset({"0.weight", "0.bias"}))


def test_plain_models_pay_by_their_size_and_adapters_by_their_work() -> None:
    assert pays(nn.Linear(300, 400), places=1 << 20)
    assert not pays(nn.Linear(400, 400), places=1)
    assert pays(adapted(400), places=64)
    assert not pays(adapted(400), places=512)
    assert not pays(adapted(1200), places=256)


def test_a_stack_is_bounded_by_memory_and_leaves_work_for_all_workers() -> None:
    assert stack_size(num_bytes=1000, num_clients=1000) == 64
    assert stack_size(num_bytes=1000, num_clients=12) == 3
    assert stack_size(num_bytes=1 << 23, num_clients=1000) == 2
    assert stack_size(num_bytes=1 << 30, num_clients=1000) == 1


def test_a_stack_of_adapters_is_bounded_by_tokens_and_by_the_base() -> None:
    sizes = [adapter_stack_size(1000, 1000, places, base) for places, base in ((64, 0), (256, 0), (1, 1 << 26))]
    assert sizes == [32, 8, 4]
    assert adapter_stack_size(1000, 1000, 4096, 1 << 30) == 1
    assert adapter_stack_size(1000, 8, 64, 0) == 2
