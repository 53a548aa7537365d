"""How the training examples are spread over clients.

Each method is a pure function that names the owner of every example, so no example can be lost or given twice.

flwr-datasets has some of these methods too, but its partitioners could not serve here: with 50,000 examples and 100
clients its Dirichlet one takes 1.6 s and warns when it draws again, its shard one drops the remainder, warns and takes
1.2 s, its IID one takes no seed, and importing it takes 2 s. A test holds our Dirichlet split to theirs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import ConfigError, DataError
from fedlp.rng import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor

    from fedlp.config import PartitionConfig
    from fedlp.data.examples import Examples

Owners = NDArray[np.int64]
METHODS: Final = ("iid", "dirichlet", "shards", "mixed", "devices", "natural")
_MAX_DRAWS: Final = 1000


def partition_examples(
    config: PartitionConfig,
    examples: Examples,
    num_clients: int,
    seed: int,
    kinds: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], ...]:
    """Return each client's examples: sorted indices, disjoint, together all of them.

    Parameters
    ----------
    kinds : (num_clients,) int64, optional
        Which kind of device each client is; only ``devices`` needs it.

    Raises
    ------
    ConfigError
        If the method is unknown, a value is out of range, or ``devices`` has no kinds.
    DataError
        If there are too few examples or natural owners, or a client would get fewer than ``min_examples``.
    """
    _check(config, num_clients)
    count = len(examples)
    if num_clients > count:
        raise DataError(f"{num_clients} clients cannot share {count} examples; lower num_clients or use more data")
    rng = generator(seed, Stream.PARTITION)
    targets = examples.targets.numpy()
    if config.name == "iid":
        owners = iid_owners(count, num_clients, rng)
    elif config.name == "dirichlet":
        owners = dirichlet_owners(targets, num_clients, config.alpha, config.min_examples, rng)
    elif config.name == "shards":
        owners = shard_owners(targets, num_clients, config.shards_per_client, rng)
    elif config.name == "mixed":
        owners = mixed_owners(targets, num_clients, config.mixrate, config.shards_per_client, rng)
    elif config.name == "devices":
        if kinds is None:
            raise ConfigError("partition=devices needs clients of different kinds; say fleet=tiers or fleet=mixed")
        owners = device_owners(targets, kinds, config.mixrate, rng)
    elif examples.groups is not None:
        owners = natural_owners(examples.groups, num_clients)
    else:
        raise DataError("partition=natural needs a data set whose examples have owners (topics, text, hf); use another")
    sizes = np.bincount(owners, minlength=num_clients)
    if sizes.min() < config.min_examples:
        raise DataError(
            f"partition={config.name} gives client {sizes.argmin()} {sizes.min()} examples, fewer than "
            f"partition.min_examples={config.min_examples}; lower that or num_clients"
        )
    return tuple(np.split(np.argsort(owners, kind="stable"), np.cumsum(sizes)[:-1]))


def iid_owners(count: int, num_clients: int, rng: np.random.Generator) -> Owners:
    """Deal ``count`` examples at random; sizes differ by at most one."""
    return rng.permutation(count) % num_clients


def dirichlet_owners(
    targets: NDArray[np.int64], num_clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> Owners:
    """Divide each class among the clients in proportions drawn from a symmetric Dirichlet(alpha).

    The split of Yurochkin et al. 2019 (arXiv 1905.12022) and of FedLP's D-niid: sizes are unequal. All proportions are
    drawn again, at most 1000 times, until every client has ``min_examples``.

    Raises
    ------
    DataError
        If no draw gives every client ``min_examples``.
    """
    totals = np.unique(targets, return_counts=True)[1]
    for _ in range(_MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(totals))
        borders = (np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
        borders[:, -1] = totals
        sizes = np.diff(borders, axis=1, prepend=0)
        if sizes.sum(axis=0).min() >= min_examples:
            break
    else:
        raise DataError(
            f"partition=dirichlet: in {_MAX_DRAWS} draws with alpha={alpha} some of {num_clients} clients always had "
            f"fewer than {min_examples} examples; raise partition.alpha, or lower partition.min_examples or num_clients"
        )
    owners: Owners = np.empty(len(targets), dtype=np.int64)
    owners[_sorted_by_label(targets, rng)] = np.repeat(np.tile(np.arange(num_clients), len(totals)), sizes.ravel())
    return owners


def shard_owners(
    targets: NDArray[np.int64], num_clients: int, shards_per_client: int, rng: np.random.Generator
) -> Owners:
    """Cut the label-sorted examples into shards, sizes differing by at most one, and deal them at random.

    The pathological split of McMahan et al. 2017 (arXiv 1602.05629): few classes a client.

    Raises
    ------
    DataError
        If there are fewer examples than shards.
    """
    num_shards = num_clients * shards_per_client
    if len(targets) < num_shards:
        raise DataError(
            f"{num_clients} clients x partition.shards_per_client={shards_per_client} is more shards than the "
            f"{len(targets)} examples to be cut; lower one of them"
        )
    owner_of_shard = rng.permutation(num_shards) % num_clients
    owners: Owners = np.empty(len(targets), dtype=np.int64)
    owners[_sorted_by_label(targets, rng)] = owner_of_shard[np.arange(len(targets)) * num_shards // len(targets)]
    return owners


def mixed_owners(
    targets: NDArray[np.int64], num_clients: int, mixrate: float, shards_per_client: int, rng: np.random.Generator
) -> Owners:
    """FedLP's M-niid: a fraction ``mixrate`` of the examples in label-sorted shards, the rest dealt at random.

    With two shards a client and ``mixrate`` 0.95, two classes make up about 95 % of a client.

    Deviations
    ----------
    FedLP's code takes the random examples from the front of the data set and cuts the shards from all of it, so that
    about 5 % of the examples are given twice and as many to nobody. Here the random part is a random subset, the shards
    are cut from what is left, and each example has exactly one owner.

    Raises
    ------
    DataError
        If there are fewer examples left than shards.
    """
    owners, rest = _deal_some(len(targets), num_clients, 1 - mixrate, rng)
    if len(rest):
        owners[rest] = shard_owners(targets[rest], num_clients, shards_per_client, rng)
    return owners


def device_owners(
    targets: NDArray[np.int64], kinds: NDArray[np.int64], mixrate: float, rng: np.random.Generator
) -> Owners:
    """Give each kind of device classes of its own: what narrow clients have seen, others may never see.

    A fraction ``mixrate`` of the examples, sorted by class (classes in random order), is cut into one piece for each
    kind, in proportion to its clients, among whom each class of it is dealt evenly; all other examples are dealt at
    random to all. All clients get equally many, but for rounding.

    Parameters
    ----------
    kinds : (num_clients,) int64
        Which kind of device each client is.
    """
    owners, rest = _deal_some(len(targets), len(kinds), 1 - mixrate, rng)
    _, classes = np.unique(targets, return_inverse=True)
    rank = rng.permutation(classes.max() + 1)[classes]
    by_class = rest[_sorted_by_label(rank[rest], rng)]
    members, counts = np.argsort(kinds, kind="stable"), np.unique(kinds, return_counts=True)[1]
    last = np.cumsum(counts)
    pieces = np.split(by_class, last[:-1] * len(rest) // len(kinds))
    for piece, clients in zip(pieces, np.split(members, last[:-1]), strict=True):
        owners[piece] = clients[np.arange(len(piece)) % len(clients)]
    return owners


def natural_owners(groups: NDArray[np.int64], num_clients: int) -> Owners:
    """Give each natural owner's examples to one client, whole; takes no random numbers.

    Owners are merged, the largest first to the client with the fewest examples so far, where there are more of them
    than clients. Clients are numbered in the order of their first owner: without merging, client ``i`` is owner ``i``.

    Raises
    ------
    DataError
        If there are more clients than owners.
    """
    names, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if num_clients > len(names):
        raise DataError(f"{num_clients} clients but {len(names)} natural owners of examples; lower num_clients")
    clients: Owners = np.empty(len(names), dtype=np.int64)
    load = [(0, client) for client in range(num_clients)]
    for owner in np.argsort(-sizes, kind="stable"):
        total, client = load[0]
        heapq.heapreplace(load, (total + int(sizes[owner]), client))
        clients[owner] = client
    first = np.unique(clients, return_index=True)[1]
    return np.argsort(np.argsort(first))[clients][group]


def plot_partition(
    parts: Sequence[NDArray[np.int64]], targets: NDArray[np.int64] | Tensor, path: Path | str, title: str = ""
) -> Path:
    """Draw how many examples of each class every client has, write it as PNG and return the file's path.

    Stacked bars for up to 20 classes, a heat map (classes by clients) for more. Missing folders are made.

    Parameters
    ----------
    parts : sequence of (n_k,) int64
        Indices of each client's examples, as :func:`partition_examples` returns them.
    targets : (n,) int64
        Class of every example.
    path : Path or str
        The file to write.
    title : str
        Heads the figure; the numbers of examples and clients where empty.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names, classes = np.unique(np.asarray(targets), return_inverse=True)
    counts = np.stack([np.bincount(classes[part], minlength=len(names)) for part in parts])
    size = (min(5 + 0.1 * len(parts), 16), 4 if len(names) <= 20 else 7)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if len(names) <= 20:
        colors = colormaps["tab10" if len(names) <= 10 else "tab20"]
        bottoms = np.cumsum(counts, axis=1) - counts
        for index, name in enumerate(names):
            axes.bar(np.arange(len(parts)), counts[:, index], 0.9, bottoms[:, index], color=colors(index), label=name)
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.set_ylabel("examples")
        axes.margins(x=0.01)
    else:
        image = axes.imshow(np.ma.masked_equal(counts.T, 0), aspect="auto", norm="log", origin="lower")
        figure.colorbar(image, ax=axes, label="examples")
        axes.set_ylabel("class")
    axes.set_xlabel("client")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title or f"{len(classes)} examples over {len(parts)} clients")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target


def _deal_some(count: int, num_clients: int, share: float, rng: np.random.Generator) -> tuple[Owners, Owners]:
    """Deal a share of the examples at random; return the owners, of the others yet unset, and the others' indices."""
    dealt, rest = np.split(rng.permutation(count), [round(share * count)])
    owners: Owners = np.empty(count, dtype=np.int64)
    owners[dealt] = np.arange(len(dealt)) % num_clients
    return owners, rest


def _sorted_by_label(targets: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return indices that sort by label, in random order within a label."""
    order = rng.permutation(len(targets))
    return order[np.argsort(targets[order], kind="stable")]


def _check(config: PartitionConfig, num_clients: int) -> None:
    if config.name not in METHODS:
        raise ConfigError(f"partition.name is {config.name!r}; choose one of {', '.join(METHODS)}")
    for name, value in (
        ("num_clients", num_clients),
        ("partition.min_examples", config.min_examples),
        ("partition.shards_per_client", config.shards_per_client),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not 0 < config.alpha < math.inf:
        raise ConfigError(f"partition.alpha is {config.alpha}; it must be positive and finite")
    if not 0 <= config.mixrate <= 1:
        raise ConfigError(f"partition.mixrate is {config.mixrate}; it must be in [0, 1]")
