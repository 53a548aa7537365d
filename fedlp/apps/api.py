"""Public functions: ``fedlp.simulate``, ``fedlp.run`` and ``fedlp.prune``."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlp import registry
from fedlp.apps.federate import Federation
from fedlp.apps.pruning_api import prune
from fedlp.apps.result import Result
from fedlp.apps.runs import federation_of
from fedlp.config import DatasetConfig, RunConfig, compose, to_plain
from fedlp.config.reading import part_groups
from fedlp.data.conversion import as_examples, describe_examples
from fedlp.data.examples import Examples, FederatedData
from fedlp.errors import ConfigError
from fedlp.models.blueprint import Blueprint, ModuleBlueprint
from fedlp.progress import Progress
from fedlp.report import run_label
from fedlp.report.reproduce import spell
from fedlp.rng import Stream, generator
from fedlp.simulation.starting import refuse_unguarded

__all__ = ["Result", "prune", "run", "simulate"]

_TEST_FRACTION = 0.1


def simulate(
    model: nn.Module | Callable[..., nn.Module] | str,
    train: Any,
    test: Any = None,
    *,
    clients: int | None = None,
    strategy: Any = "fedlp_plan",
    rounds: int = 20,
    clients_per_round: int | None = None,
    fleet: Any = None,
    partition: Any = "iid",
    task: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Result:
    """Train a user's model on a user's data, partitioned among simulated clients, in worker processes.

    Parameters
    ----------
    model : nn.Module, callable or str
        A module with the initial values; a class or function that makes one (parameters named
        ``num_classes``, ``input_shape``, ``in_channels`` or ``in_features`` are supplied); or the name of a model.
    train : data or list of data
        A torch Dataset of (input, target) pairs, a Hugging Face dataset or arrays ``(x, y)``; a list of these gives
        each client its own.
    test : data, optional
        Test examples of the server; a tenth of ``train``, drawn by the seed, if absent.
    clients : int, optional
        Number of clients, 100 if absent; the length of a list.
    strategy : str, mapping or part
        A name, a mapping of ``name`` and options, or an object such as ``FedLPPlan(sparsity=0.3)``.
    fleet : str, mapping or part, optional
        The same, of the clients' budgets; no limits if absent.
    partition : str, mapping or part
        The same, of the division of the data among clients.
    rounds : int
        Rounds, >= 1.
    clients_per_round : int, optional
        Clients sampled per round; a tenth of all, at least 2, if absent.
    task : str, optional
        Task of the data; found from the targets if absent.
    out : path, optional
        Run directory; a new one under ``runs`` if absent.
    progress : bool, optional
        Whether finished rounds are shown; in notebooks only if absent.
    **options
        Further groups and options of the config: ``local={"lr": 0.1}``, ``upload="int8"``, ``eval_every=5``.

    Returns
    -------
    Result
        Metrics by round, the trained model, a table, a plot.

    Raises
    ------
    FedLPError
        For unknown or invalid options, and unreadable data.

    Examples
    --------
    >>> import torch, fedlp
    >>> x, y = torch.randn(300, 8), torch.randint(3, (300,))
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> result = fedlp.simulate(net, (x, y), clients=5, rounds=2, strategy="fedavg")
    >>> sorted(result.metrics)
    ['accuracy', 'loss', 'train_loss']
    """
    refuse_unguarded()
    data, parts = _read_data(train, test, task, seed)
    count = clients or (len(parts) if parts is not None else 100)
    if parts is not None and count != len(parts):
        raise ConfigError(f"clients={clients}, but train is a list of {len(parts)} clients' data; leave clients out")
    chosen: dict[str, Any] = {
        "seed": seed,
        "num_rounds": rounds,
        "num_clients": count,
        "clients_per_round": clients_per_round or min(count, max(2, math.ceil(count / 10))),
        "strategy": strategy,
        "partition": partition,
        **({} if fleet is None else {"fleet": fleet}),
        **options,
    }
    blueprint = _blueprint(model) if isinstance(model, nn.Module) else None
    chosen["model"] = "object" if blueprint is not None else model
    config = compose(list(_overrides(chosen)))
    _refuse_flower(config, "simulate")
    config = replace(config, dataset=DatasetConfig(name=data.info.name))
    return _run(Federation(config, blueprint=blueprint, data=data, parts=parts), out, progress)


def run(
    config: RunConfig | Sequence[str] = (), *, out: str | Path | None = None, progress: bool | None = None
) -> Result:
    """Run a config as the command ``fedlp`` does, on the local or the Ray engine.

    Parameters
    ----------
    config : RunConfig or sequence of str
        A config, or overrides as on the command line.
    out : path, optional
        Run directory; a new one under ``runs`` if absent.
    progress : bool, optional
        Whether finished rounds are shown; in notebooks only if absent.

    Raises
    ------
    ConfigError
        As on the command line, and for what only the command does: dry and resumed runs, Flower's runtime, ``hydra.*``.

    Examples
    --------
    >>> import fedlp
    >>> result = fedlp.run(["strategy=fedavg", "model=linear", "num_rounds=2"])
    >>> len(result.rounds)
    2
    """
    refuse_unguarded()
    composed = config if isinstance(config, RunConfig) else _compose(config)
    _refuse_flower(composed, "run")
    if composed.dry_run or composed.resume is not None:
        asked = "dry_run=true" if composed.dry_run else f"resume={composed.resume}"
        raise ConfigError(f"fedlp.run starts a run; use the command fedlp {asked}")
    return _run(federation_of(composed), out, progress)


def _compose(overrides: Sequence[str]) -> RunConfig:
    """Return the config of overrides; ConfigError for those of Hydra itself, which only the command reads."""
    if hydra := [word for word in overrides if word.lstrip("+~").startswith("hydra")]:
        raise ConfigError(f"fedlp.run does not read {hydra[0]}: drop it; the run directory is out=FOLDER")
    return compose(list(overrides))


def _refuse_flower(config: RunConfig, function: str) -> None:
    if config.simulation.engine == "flower":
        raise ConfigError(
            f"fedlp.{function} runs the server in this process: set simulation=local or ray, or use the command "
            "fedlp simulation=flower"
        )


def _run(federation: Federation, out: str | Path | None, progress: bool | None) -> Result:
    folder = Path(out) if out is not None else Path(datetime.now().strftime("runs/%Y-%m-%d/%H-%M-%S.%f"))
    in_notebook = "ipykernel" in sys.modules
    label, stream = run_label(to_plain(federation.config)), sys.stdout if in_notebook else None
    line = Progress(federation.config.num_rounds, label, stream=stream, bar=in_notebook)
    shown = progress if progress is not None else in_notebook
    try:
        manifest = federation.run_locally(folder, [lambda record, _: line.show(asdict(record))] if shown else [])
    finally:
        line.close()
    return Result(folder.absolute(), manifest, federation.submodels.skeleton)


def _blueprint(module: nn.Module) -> Blueprint:
    """Return the blueprint of a module with initial values."""
    depths = getattr(module, "num_depths", 1)
    name = type(module).__name__
    return ModuleBlueprint(name, partial(copy.deepcopy, module), depths if isinstance(depths, int) else 1)


# ---- data
def _read_data(
    train: Any, test: Any, task: str | None, seed: int
) -> tuple[FederatedData, list[NDArray[np.int64]] | None]:
    """Return the data, and each client's indices if data are given by client."""
    shards = [as_examples(part, what=f"train[{i}]") for i, part in enumerate(train)] if _is_list(train) else None
    whole = as_examples(train) if shards is None else _concatenate(shards)
    parts = None if shards is None else _split([len(shard) for shard in shards])
    if test is None:
        order = generator(seed, Stream.DATA).permutation(len(whole))
        held_out = np.sort(order[: max(1, round(_TEST_FRACTION * len(whole)))])
        left = np.setdiff1d(np.arange(len(whole)), held_out)
        tested, whole = whole.select(held_out), whole.select(left)
        if parts is not None:
            parts = [np.searchsorted(left, np.intersect1d(part, left)) for part in parts]
    else:
        tested = as_examples(test, what="test")
    return FederatedData(describe_examples("object", whole, tested, task), whole, tested), parts


def _is_list(train: Any) -> bool:
    """Return whether ``train`` is a list of data sets; a list of (input, target) pairs is one data set."""
    if not isinstance(train, list) or not train:
        return False
    first = train[0]
    if isinstance(first, tuple) and len(first) == 2:
        return getattr(first[1], "ndim", 0) > 0 or isinstance(first[1], list)
    return True


def _concatenate(shards: Sequence[Examples]) -> Examples:
    owners = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
    inputs = torch.cat([shard.inputs for shard in shards])
    return Examples(inputs, torch.cat([shard.targets for shard in shards]), owners)


def _split(sizes: Sequence[int]) -> list[NDArray[np.int64]]:
    ends = np.cumsum([0, *sizes])
    return [np.arange(start, stop) for start, stop in itertools.pairwise(ends.tolist())]


# ---- options
def _overrides(chosen: Mapping[str, Any]) -> Iterable[str]:
    """Yield overrides for groups and options given as Python values."""
    groups = part_groups(RunConfig)
    nested = {f.name for f in fields(RunConfig) if is_dataclass(f.default_factory)}
    for group, value in chosen.items():
        if group == "callbacks":
            yield f"callbacks={spell([_callback(one) for one in value])}"
        elif group not in nested or value is None:
            yield f"{group}={spell(value)}"
        else:
            yield from _group_overrides(group, groups[group].kind if group in groups else None, value)


def _group_overrides(group: str, kind: str | None, value: Any) -> Iterable[str]:
    """Yield the choice of a group and its options."""
    name, options = _choice(kind, group, value)
    if name is not None:
        yield f"{group}={name}"
    for option, setting in options.items():
        yield f"{group}.{option}={spell(setting)}"


def _callback(value: Any) -> Any:
    """Return a callback in the form of the config: a name, or a mapping of name and options."""
    if isinstance(value, str | Mapping):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        own = registry.options("callback", type(value))
        return {"name": registry.name_of("callback", type(value)), **{name: getattr(value, name) for name in own}}
    if not callable(value):
        raise ConfigError(f"a callback is a {type(value).__name__}; give a function, an object or a name")
    return registry.name_of("callback", value)


def _choice(kind: str | None, group: str, value: Any) -> tuple[str | None, Mapping[str, Any]]:
    """Return the name of a group's choice, and its options."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping):
        options = dict(value)
        return options.pop("name", None), options
    if kind is None:
        raise ConfigError(f"{group} is a {type(value).__name__}; give a name, or a mapping of options")
    if is_dataclass(value) and not isinstance(value, type):
        return registry.name_of(kind, type(value)), asdict(value)
    if not callable(value):
        raise ConfigError(f"{group} is a {type(value).__name__}; give a name, a mapping, a class or a function")
    return registry.name_of(kind, value), {}
