"""A cache that is bounded by bytes."""

from __future__ import annotations

import tracemalloc

import numpy as np

from fedlp.config import compose
from fedlp.federation.bounded_cache import BoundedCache
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model
from fedlp.types import Keep, SubModel


def test_the_least_recently_used_are_dropped() -> None:
    made: list[int] = []

    def make(size: int) -> int:
        made.append(size)
        return size

    cache = BoundedCache(make, lambda size: size, most_bytes=10)
    for size in (4, 5, 4, 3):  # 12 bytes: 5 goes
        assert cache(size) == size
    assert (len(cache), cache.num_bytes) == (2, 7)
    cache(4)
    cache(5)
    assert made == [4, 5, 3, 5]
    cache(50)
    assert (len(cache), cache.num_bytes) == (1, 50), "what was used last is there, whatever it takes"


def test_layouts_take_about_as_many_bytes_as_they_say() -> None:
    config = compose(("model=cifar_resnet",)).model
    submodels = SubModels(describe_model(config, (3, 32, 32), 10, "classification"))
    axes, rng = submodels.widths.axes, np.random.default_rng(0)
    halves = [
        SubModel(
            widths={a: Keep.from_indices(np.sort(rng.choice(s, s // 2, replace=False)), s) for a, s in axes.items()}
        )
        for _ in range(20)
    ]
    submodels.layout(halves[0]).signature()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    said = 0
    for half in halves[1:]:
        layout = submodels.layout(half)
        assert layout.signature()
        assert layout.num_params()
        assert layout.name_set
        said += layout.num_bytes
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.5 < taken / said < 1.5
