"""The aggregation kernel against its peers: ``python experiments/bench/aggregation.py [--quick] [--json FILE]``.

A resnet18 of 11.2 million float32 numbers, one thread; milliseconds per update, every pass runs all methods in turn.

* ``fedlp``: CoverageAverage on decoded updates. ``fedlp+decode``: from the bytes of messages.
* ``flower``: what Flower's FedAvg runs, which decodes its arrays and sums float32. ``flower loop``: only its sum.
* ``naive``: a float64 sum per tensor, with a tensor of weights beside it where slices are cut.
* ``numpy``: a stack per tensor and numpy.average.
* ``masks``: float masks of the tensors' own sizes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from timing import MemoryPeak, alternate, paired_ratio, parse_args, print_table, write_report
from torch import Tensor

from fedlp.federation.aggregation.coverage_average import WeightedUpdate, coverage_average
from fedlp.federation.wire.packing import pack_tensors, unpack_tensors
from fedlp.types import Keep

Params = dict[str, Tensor]
Keeps = dict[str, tuple[Keep, ...]]

LEVELS = (1.0, 0.5, 0.25, 0.125, 0.0625)
DISTINCT = 10  # updates in memory; more clients are these over again


# ------------------------------------------------------------------------------------------------------------ the work
def resnet18_shapes() -> dict[str, tuple[int, ...]]:
    """Return the state of torchvision's resnet18 with ten classes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, out: int, inner: int, kernel: int) -> None:
        shapes[f"{conv}.weight"] = (out, inner, kernel, kernel)
        shapes.update({f"{norm}.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    add("conv1", "bn1", 64, 3, 7)
    inner = 64
    for stage, out in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            add(f"{name}.conv1", f"{name}.bn1", out, inner, 3)
            add(f"{name}.conv2", f"{name}.bn2", out, out, 3)
            if inner != out:
                add(f"{name}.downsample.0", f"{name}.downsample.1", out, inner, 1)
            inner = out
    return shapes | {"fc.weight": (10, 512), "fc.bias": (10,)}


def make_update(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Params:
    """Return random tensors, those of a dtype in one buffer, as a message is decoded to."""
    generator = torch.Generator().manual_seed(seed)
    integers = [name for name in shapes if name.endswith("num_batches_tracked")]
    floats = [name for name in shapes if name not in integers]
    sizes = [math.prod(shapes[name]) for name in floats]
    buffers = dict(zip(floats, torch.split(torch.randn(sum(sizes), generator=generator), sizes), strict=True))
    buffers |= dict(zip(integers, torch.full((len(integers),), 10).unbind(), strict=True))
    return {name: buffers[name].view(shape) for name, shape in shapes.items()}


def is_cut(name: str, axis: int) -> bool:
    """Whether a width slice cuts an axis: all but the colours, the classes and the kernels."""
    return axis < 2 and (name, axis) not in {("conv1.weight", 1), ("fc.weight", 0), ("fc.bias", 0)}


def make_keeps(shapes: Mapping[str, tuple[int, ...]], level: float, rng: np.random.Generator | None) -> Keeps:
    """Return a width slice: the first units, or random ones."""

    def choose(size: int) -> Keep:
        count = round(size * level)
        if rng is None:
            return Keep.first(count, size)
        return Keep.from_indices(np.sort(rng.choice(size, count, replace=False)), size)

    return {
        name: tuple(choose(size) if is_cut(name, axis) else Keep.full(size) for axis, size in enumerate(shape))
        for name, shape in shapes.items()
        if shape
    }


def make_updates(case: str, shapes: Mapping[str, tuple[int, ...]]) -> list[WeightedUpdate]:
    """Return the distinct updates of a case."""
    rng = np.random.default_rng(0)
    updates: list[WeightedUpdate] = []
    for k in range(DISTINCT):
        keeps: Keeps = {}
        kept = dict(shapes)
        if case == "layers":
            layers = sorted({name.rpartition(".")[0] for name in shapes})
            returned = {layer for layer in layers if rng.random() < 0.5}
            kept = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] in returned}
        elif case in ("widths", "scattered"):
            keeps = make_keeps(shapes, LEVELS[k % len(LEVELS)], rng if case == "scattered" else None)
            kept = {name: tuple(keep.count for keep in keeps.get(name, ())) for name in shapes}
        updates.append((make_update(kept, seed=k + 1), keeps, float(100 + k)))
    return updates


# ----------------------------------------------------------------------------------------------------------- the peers
def run_fedlp(params: Params, updates: Sequence[WeightedUpdate]) -> object:
    return coverage_average(params, updates)


def run_naive(params: Params, updates: Sequence[WeightedUpdate]) -> object:
    """Sum in float64, with the weights behind every entry where something may be missing of a tensor."""
    cut = {name for _, keeps, _ in updates for name in keeps}
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in params.items()}
    weights = {
        name: torch.zeros(tensor.shape if name in cut else (), dtype=torch.float64) for name, tensor in params.items()
    }
    for values, keeps, weight in updates:
        for name, tensor in values.items():
            where = index_of(keeps[name]) if name in keeps else None
            if where is None:
                sums[name].add_(tensor.double(), alpha=weight)
                weights[name].add_(weight)
            elif isinstance(where[0], slice):
                sums[name][where].add_(tensor.double(), alpha=weight)
                weights[name][where].add_(weight)
            else:
                sums[name][where] += weight * tensor.double()
                weights[name][where] += weight
    return finish_naive(params, sums, weights)


def finish_naive(params: Params, sums: Params, weights: Params) -> Params:
    found = {}
    for name, old in params.items():
        average = sums[name].div_(weights[name])
        if not bool((weights[name] > 0).all()):
            average = torch.where(weights[name] > 0, average, old.double())
        found[name] = average.to(old.dtype)
    return found


def run_masks(params: Params, updates: Sequence[WeightedUpdate]) -> object:
    """Bring every update to full size, with a float mask beside it, and sum both."""
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in params.items()}
    weights = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in params.items()}
    for values, keeps, weight in updates:
        for name, tensor in values.items():
            full, mask = torch.zeros(params[name].shape), torch.zeros(params[name].shape)
            where = index_of(keeps[name]) if name in keeps else ...
            full[where], mask[where] = tensor.float(), 1.0
            sums[name].add_(full.double(), alpha=weight)
            weights[name].add_(mask, alpha=weight)
    return finish_naive(params, sums, weights)


def index_of(keeps: tuple[Keep, ...]) -> tuple[slice | Tensor, ...]:
    """Return the index of a choice: slices where all axes are one run, else open index grids."""
    if all(len(keep.runs) == 1 for keep in keeps):
        return tuple(slice(*keep.runs[0]) for keep in keeps)
    return tuple(torch.from_numpy(index) for index in np.ix_(*(keep.indices() for keep in keeps)))


def run_numpy(params: Params, updates: Sequence[WeightedUpdate]) -> object:
    weights = [weight for _, _, weight in updates]
    return {
        name: np.average(np.stack([values[name].numpy() for values, _, _ in updates]), axis=0, weights=weights)
        for name in params
    }


def run_flower_loop(updates: Sequence[tuple[Mapping[str, Any], float]]) -> object:
    """Sum as aggregate_arrayrecords does, on arrays that are decoded already."""
    total = sum(weight for _, weight in updates)
    found: dict[str, Any] = {}
    for arrays, weight in updates:
        for name, array in arrays.items():
            if name in found:
                found[name] += array * (weight / total)
            else:
                found[name] = array * (weight / total)
    return found


def make_methods(
    case: str, params: Params, distinct: Sequence[WeightedUpdate], count: int
) -> dict[str, Callable[[], object]]:
    """Return the methods that can do a case, each as a call for a round of ``count`` clients."""
    updates = [distinct[k % len(distinct)] for k in range(count)]
    methods: dict[str, Callable[[], object]] = {
        "fedlp": lambda: run_fedlp(params, updates),
        "naive": lambda: run_naive(params, updates),
    }
    if case in ("widths", "scattered") and count <= DISTINCT:
        methods["masks"] = lambda: run_masks(params, updates)
    if case == "dense":
        packed = [{key: image for key, (_, image) in pack_tensors(values).items()} for values, _, _ in distinct]
        signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in params.items()]
        records = [make_record(values, weight) for values, _, weight in distinct]
        arrays = [({name: tensor.numpy() for name, tensor in values.items()}, weight) for values, _, weight in distinct]
        methods["fedlp+decode"] = lambda: run_fedlp(
            params, [(unpack_tensors(packed[k % DISTINCT], signature), {}, updates[k][2]) for k in range(count)]
        )
        methods["flower"] = lambda: aggregate_arrayrecords(
            [records[k % DISTINCT] for k in range(count)], "num-examples"
        )
        methods["flower loop"] = lambda: run_flower_loop([arrays[k % DISTINCT] for k in range(count)])
        if count <= DISTINCT:
            methods["numpy"] = lambda: run_numpy(params, updates)
    return methods


def make_record(values: Mapping[str, Tensor], weight: float) -> RecordDict:
    metrics = MetricRecord({"num-examples": int(weight)})
    return RecordDict({"arrays": ArrayRecord(dict(values)), "metrics": metrics})


# --------------------------------------------------------------------------------------------------------- the numbers
def measure_times(case: str, count: int, repeats: int) -> dict[str, Any]:
    """Return the milliseconds per update of every method, and fedlp's share of each other's."""
    shapes = resnet18_shapes() if case != "linear" else {"weight": (10, 784), "bias": (10,)}
    params = make_update(shapes, seed=0)
    distinct = make_updates("dense" if case == "linear" else case, shapes)
    seconds = alternate(make_methods("dense" if case == "linear" else case, params, distinct, count), repeats)
    sent = sum(tensor.numel() for values, _, _ in distinct for tensor in values.values())
    return {
        "case": case,
        "clients": count,
        "sent_fraction": sent / DISTINCT / sum(tensor.numel() for tensor in params.values()),
        "ms_per_update": {
            name: {"median": 1e3 * float(np.median(times)) / count, "all": [1e3 * time / count for time in times]}
            for name, times in seconds.items()
        },
        "fedlp_over": {name: paired_ratio(seconds["fedlp"], times) for name, times in seconds.items()},
    }


def measure_memory(method: str, count: int) -> int:
    """Return by how many bytes a process grows, at most, over a round of dense updates that arrive one by one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grow, (method, count))


def _grow(method: str, count: int) -> int:
    torch.set_num_threads(1)
    shapes = resnet18_shapes()
    params = make_update(shapes, seed=0)
    with MemoryPeak(os.getpid()) as before:
        time.sleep(0.2)
    with MemoryPeak(os.getpid()) as during:
        stream: Iterator[WeightedUpdate] = ((make_update(shapes, seed=k + 1), {}, 100.0) for k in range(count))
        if method == "fedlp":
            coverage_average(params, stream)
        elif method == "flower":
            aggregate_arrayrecords([make_record(values, weight) for values, _, weight in stream], "num-examples")
        else:
            run_numpy(params, list(stream))
    return during.bytes - before.bytes


def main() -> None:
    args = parse_args(__doc__ or "")
    torch.set_num_threads(1)
    cases = [("dense", 10), ("dense", 100), ("layers", 10), ("layers", 100), ("widths", 10), ("widths", 100)]
    cases += [("scattered", 10), ("linear", 1000)]
    if args.quick:
        cases = [("layers", 10), ("linear", 1000)]
    results = []
    for case, count in cases:
        found = measure_times(case, count, repeats=3 if args.quick else 7 if count <= DISTINCT else 3)
        results.append(found)
        print_table(
            f"{case}, {count} clients, {found['sent_fraction']:.0%} of the numbers sent",
            ["method", "ms per update", "fedlp / method"],
            [
                (name, f"{times['median']:.3g}", f"{found['fedlp_over'][name]['median']:.2f}")
                for name, times in found["ms_per_update"].items()
            ],
        )
    memory: list[dict[str, Any]] = []
    for count in (10,) if args.quick else (10, 40):
        memory += [
            {"clients": count, "method": m, "bytes": measure_memory(m, count)} for m in ("fedlp", "flower", "numpy")
        ]
    rows = [(f"{row['method']}, {row['clients']} clients", f"{row['bytes'] / 1e6:.0f}") for row in memory]
    print_table("growth of a process, dense updates one by one", ["method", "MB"], rows)
    write_report(args.json, args.quick, {"times": results, "memory": memory})


if __name__ == "__main__":
    main()
