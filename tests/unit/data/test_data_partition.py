from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from numpy.typing import NDArray

from fedlp import registry
from fedlp.config import PartitionConfig
from fedlp.config.parts import read_part
from fedlp.data.examples import Examples
from fedlp.data.partition import partition_examples
from fedlp.data.partition_plot import plot_partition
from fedlp.data.partitioners.devices import device_owners
from fedlp.data.partitioners.dirichlet import dirichlet_owners
from fedlp.data.partitioners.natural import natural_owners
from fedlp.errors import ConfigError, DataError

METHODS = tuple(name for name in registry.names("partition") if name != "column")
RANDOM_METHODS = tuple(name for name in METHODS if name != "natural")


def partition(**options: object) -> PartitionConfig:
    return read_part(PartitionConfig, "partition", options)


def make_examples(count: int = 2000, num_classes: int = 10, num_groups: int | None = None) -> Examples:
    rng = np.random.default_rng(3)
    targets = rng.permutation(np.arange(count) % num_classes)
    groups = None if num_groups is None else rng.integers(0, num_groups, count)
    return Examples(torch.zeros(count, 1), torch.from_numpy(targets), groups)


def class_counts(parts: tuple[NDArray[np.int64], ...], examples: Examples, num_classes: int = 10) -> NDArray[np.int64]:
    targets = examples.targets.numpy()
    return np.stack([np.bincount(targets[part], minlength=num_classes) for part in parts])


def assert_is_partition(parts: tuple[NDArray[np.int64], ...], count: int, num_clients: int) -> None:
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


@pytest.mark.parametrize("name", METHODS)
def test_every_example_has_one_owner(name: str) -> None:
    examples = make_examples(num_groups=40)
    parts = partition_examples(partition(name=name), examples, 20, 0, np.arange(20) % 3)
    assert_is_partition(parts, len(examples), 20)
    assert min(map(len, parts)) >= 1


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(METHODS),
    num_clients=st.integers(1, 12),
    num_classes=st.integers(1, 5),
    shards=st.integers(1, 3),
    mixrate=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_every_partition_is_disjoint_and_complete(
    name: str, num_clients: int, num_classes: int, shards: int, mixrate: float, seed: int
) -> None:
    examples = make_examples(200, num_classes, num_groups=30)
    known = registry.options("partition", registry.lookup("partition", name))
    given = {"shards_per_client": shards, "mixrate": mixrate}
    config = partition(name=name, **{key: value for key, value in given.items() if key in known})
    try:
        parts = partition_examples(config, examples, num_clients, seed, np.arange(num_clients) % 4)
    except DataError:
        assert name == "mixed"
        assert round((1 - mixrate) * 200) > 200 - num_clients * shards
        return
    assert_is_partition(parts, 200, num_clients)


@pytest.mark.parametrize("name", RANDOM_METHODS)
def test_the_seed_alone_decides(name: str) -> None:
    examples, config = make_examples(), partition(name=name)
    first, again, other = (partition_examples(config, examples, 10, seed, np.arange(10) % 4) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_is_balanced_in_size_and_class() -> None:
    examples = make_examples(2003)
    counts = class_counts(partition_examples(partition(name="iid"), examples, 10, 0), examples)
    assert set(counts.sum(axis=1)) == {200, 201}
    assert abs(counts - 20).max() < 20


def test_dirichlet_is_more_skewed_for_smaller_alpha() -> None:
    examples = make_examples(5000)
    largest = []
    for alpha in (0.05, 0.5, 5.0, 500.0):
        config = partition(name="dirichlet", alpha=alpha)
        counts = class_counts(partition_examples(config, examples, 10, 0), examples)
        largest.append((counts.max(axis=1) / counts.sum(axis=1)).mean())
    assert largest == sorted(largest, reverse=True)
    assert largest[0] > 0.6
    assert largest[-1] < 0.13


def test_dirichlet_divides_as_flwr_datasets_does() -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    examples = make_examples(600)
    targets = examples.targets.numpy()
    theirs = DirichletPartitioner(7, "label", alpha=0.5, min_partition_size=1, seed=11)
    theirs.dataset = Dataset.from_dict({"label": targets})
    expected = [np.bincount(theirs.load_partition(client)["label"], minlength=10) for client in range(7)]
    owners = dirichlet_owners(targets, 7, 0.5, 1, np.random.default_rng(11))
    assert np.array_equal(class_counts(tuple(np.flatnonzero(owners == c) for c in range(7)), examples), expected)


def test_dirichlet_draws_again_until_every_client_has_enough() -> None:
    config = partition(name="dirichlet", alpha=0.3, min_examples=40)
    parts = partition_examples(config, make_examples(), 20, 0)
    assert min(map(len, parts)) >= 40


@pytest.mark.parametrize("shards_per_client", [1, 2, 3])
def test_shards_bound_the_classes_of_a_client(shards_per_client: int) -> None:
    examples = make_examples()
    config = partition(name="shards", shards_per_client=shards_per_client)
    counts = class_counts(partition_examples(config, examples, 30, 0), examples)
    assert abs(counts.sum(axis=1) - 2000 / 30).max() <= shards_per_client
    assert ((counts > 0).sum(axis=1) <= 2 * shards_per_client).all()  # a shard is smaller than a class


def test_two_shards_that_match_the_classes_give_two_classes_at_most() -> None:
    examples = make_examples()
    counts = class_counts(partition_examples(partition(name="shards"), examples, 50, 0), examples)
    assert ((counts > 0).sum(axis=1) <= 2).all()


@pytest.mark.parametrize("mixrate", [0.95, 0.6])
def test_two_classes_make_up_mixrate_of_a_mixed_client(mixrate: float) -> None:
    examples = make_examples(10_000)
    config = partition(name="mixed", mixrate=mixrate)
    counts = class_counts(partition_examples(config, examples, 50, 0), examples)
    assert abs(counts.sum(axis=1) - 200).max() <= 3
    share = np.sort(counts, axis=1)[:, -2:].sum(axis=1) / counts.sum(axis=1)
    assert share.mean() == pytest.approx(mixrate + (1 - mixrate) * 0.2, abs=0.05)  # a shard may straddle two classes


def test_mixed_without_shards_is_iid_and_without_a_random_part_is_shards() -> None:
    examples = make_examples()
    iid = class_counts(partition_examples(partition(name="mixed", mixrate=0), examples, 10, 0), examples)
    assert (iid > 0).all()
    pure = class_counts(partition_examples(partition(name="mixed", mixrate=1), examples, 50, 0), examples)
    assert ((pure > 0).sum(axis=1) <= 2).all()


@pytest.mark.parametrize("mixrate", [1.0, 0.8])
def test_each_kind_of_device_has_classes_of_its_own(mixrate: float) -> None:
    examples, kinds = make_examples(), np.random.default_rng(1).permutation(np.repeat([0, 1, 3], [20, 15, 15]))
    config = partition(name="devices", mixrate=mixrate)
    counts = class_counts(partition_examples(config, examples, 50, 0, kinds), examples)
    assert abs(counts.sum(axis=1) - 40).max() <= 2
    for kind, num_classes in ((0, 4), (1, 3), (3, 3)):
        own = counts[kinds == kind]
        assert np.sort(own.sum(axis=0))[-num_classes:].sum() == pytest.approx(
            own.sum() * (mixrate + (1 - mixrate) * num_classes / 10), rel=0.06
        )
        if mixrate == 1:
            assert np.ptp(own, axis=0).max() <= 1  # clients of a kind are alike


def test_classes_change_kinds_with_the_seed_and_no_kind_is_empty() -> None:
    targets, kinds = np.arange(100) % 10, np.array([0, 1, 1, 2])
    first, second = (device_owners(targets, kinds, 1.0, np.random.default_rng(seed)) for seed in (0, 1))
    assert set(targets[first == 0]) != set(targets[second == 0])
    assert sorted(np.bincount(first)) == [25, 25, 25, 25]


def test_kinds_of_devices_need_a_fleet() -> None:
    with pytest.raises(ConfigError, match=r"fleet=tiers or fleet=mixed"):
        partition_examples(partition(name="devices"), make_examples(50), 5, 0)


def test_natural_keeps_owners_whole_and_balances() -> None:
    examples = make_examples(num_groups=40)
    assert examples.groups is not None
    parts = partition_examples(partition(name="natural"), examples, 8, 0)
    owners = [set(examples.groups[part]) for part in parts]
    assert sum(map(len, owners)) == 40
    assert set.union(*owners) == set(range(40))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= np.bincount(examples.groups).max()


def test_natural_clients_are_the_owners_where_there_are_as_many() -> None:
    groups = np.array([7, 2, 2, 9, 7, 2])
    assert natural_owners(groups, 3).tolist() == [1, 0, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("config", "num_clients", "message"),
    [
        (partition(name="iid"), 51, "51 clients cannot share 50 examples"),
        (partition(name="iid", min_examples=6), 10, "client 0 5 examples, fewer than partition.min_examples=6"),
        (partition(name="dirichlet", alpha=0.01), 40, "raise partition.alpha"),
        (partition(name="shards", shards_per_client=6), 10, "more shards than the 50 examples"),
        (partition(name="mixed", mixrate=0.1), 5, "more shards than the 5 examples"),
        (partition(name="natural"), 5, "use another"),
    ],
)
def test_what_the_data_cannot_give_is_one_line(config: PartitionConfig, num_clients: int, message: str) -> None:
    with pytest.raises(DataError) as error:
        partition_examples(config, make_examples(50), num_clients, 0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_clients_than_owners() -> None:
    with pytest.raises(DataError, match="9 clients but 4 natural owners"):
        partition_examples(partition(name="natural"), make_examples(50, num_groups=4), 9, 0)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("dirichet", {}, "there is no partition dirichet; did you mean dirichlet"),
        ("iid", {"alpha": 1.0}, r"no option partition\.alpha with partition=iid; dirichlet read"),
        ("dirichlet", {"alpha": 0.0}, r"partition\.alpha"),
        ("dirichlet", {"alpha": float("nan")}, r"partition\.alpha"),
        ("dirichlet", {"alpha": float("inf")}, r"partition\.alpha"),
        ("mixed", {"mixrate": 1.1}, r"partition\.mixrate"),
        ("devices", {"mixrate": -0.1}, r"partition\.mixrate"),
        ("shards", {"shards_per_client": 0}, r"partition\.shards_per_client"),
        ("iid", {"min_examples": -1}, r"partition\.min_examples"),
    ],
)
def test_values_out_of_range(name: str, change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        partition(name=name, **change)


def test_no_clients() -> None:
    with pytest.raises(ConfigError, match="num_clients is 0"):
        partition_examples(partition(name="iid"), make_examples(50), 0, 0)


def test_clients_without_examples_are_possible() -> None:
    parts = partition_examples(partition(name="iid", min_examples=0), make_examples(5), 8, 0)
    assert_is_partition(parts, 5, 8)
    assert sorted(map(len, parts)) == [0, 0, 0, 1, 1, 1, 1, 1]
    parts = partition_examples(partition(name="dirichlet", alpha=0.01, min_examples=0), make_examples(200), 30, 0)
    assert_is_partition(parts, 200, 30)
    assert min(map(len, parts)) == 0


def test_each_value_of_a_column_is_a_client() -> None:
    examples = replace(make_examples(6), groups=np.array([7, 2, 2, 9, 7, 2]))
    parts = partition_examples(partition(name="column"), examples, 3, 0)
    assert [part.tolist() for part in parts] == [[1, 2, 5], [0, 4], [3]]
    with pytest.raises(ConfigError, match=r"has 3 values in the training part; set num_clients=3"):
        partition_examples(partition(name="column"), examples, 4, 0)
    with pytest.raises(DataError, match="needs a column of clients"):
        partition_examples(partition(name="column"), make_examples(6), 3, 0)


def test_values_have_no_classes_to_divide() -> None:
    examples = replace(make_examples(50), targets=torch.rand(50))
    for name in ("dirichlet", "shards", "mixed"):
        with pytest.raises(DataError, match=f"partition={name} divides classes"):
            partition_examples(partition(name=name), examples, 5, 0)
    assert_is_partition(partition_examples(partition(name="iid"), examples, 5, 0), 50, 5)


def halves(train: Examples, num_clients: int) -> list[NDArray[np.int64]]:
    """Give the first half to client 0, and nothing to the others but client 1's last example."""
    rest = [np.empty(0, dtype=np.int64) for _ in range(num_clients - 2)]
    return [np.arange(len(train) // 2)[::-1], np.array([len(train) - 1]), *rest]


def wrong(train: Examples, num_clients: int) -> NDArray[np.int64]:
    return np.full(len(train), num_clients)


def twice(train: Examples, num_clients: int) -> list[NDArray[np.int64]]:
    return [np.array([0])] * num_clients


def test_a_partitioner_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "their_partitions", sys.modules[__name__])
    examples = make_examples(10)
    parts = partition_examples(partition(name="their_partitions:halves", min_examples=0), examples, 3, 0)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 4], [9], []]
    with pytest.raises(DataError, match="names clients 3 to 3, of 3"):
        partition_examples(partition(name="their_partitions:wrong"), examples, 3, 0)
    with pytest.raises(DataError, match="at most once"):
        partition_examples(partition(name="their_partitions:twice"), examples, 3, 0)


@pytest.mark.parametrize(("num_classes", "num_clients"), [(10, 100), (60, 5)])
def test_plot_is_a_png(num_classes: int, num_clients: int, tmp_path: Path) -> None:
    examples = make_examples(2000, num_classes)
    parts = partition_examples(partition(name="dirichlet", alpha=0.5), examples, num_clients, 0)
    path = plot_partition(parts, examples.targets, tmp_path / "new" / "parts.png")
    assert path == tmp_path / "new" / "parts.png"
    assert imread(path).shape[0] >= 600
