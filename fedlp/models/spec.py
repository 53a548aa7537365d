"""Specification of a model: tensors, layers, prefixes, and its construction from a seed.

A :class:`ModelSpec` says which tensors the global model has, which layers and depth prefixes they form, and builds the
model and its prefixes from a seed. A family of models (``cnn``, ``vision``, ``language``) supplies only a
:class:`Blueprint`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedlp.errors import ConfigError
from fedlp.models.blueprint import Blueprint, ModelTask, find_task
from fedlp.models.forward import first_line, is_small, run_and_note, shapes_only, short_example
from fedlp.models.layer_order import Layer, order_layers
from fedlp.models.layers import find_frozen, freeze, owner_of
from fedlp.models.threads import one_thread
from fedlp.rng import Stream, generator, torch_seed


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape, type and role of one tensor; buffers and frozen parameters are not trainable."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class ModelSpec:
    """Global model: its tensors, layers, prefixes and construction.

    Attributes
    ----------
    task : ModelTask
        Task of the model.
    input_shape : tuple of int
        One example: (C, H, W), (features,) or (tokens,).
    num_classes : int
        Outputs required by the data set: classes, values, or the vocabulary of a language model.
    vocabulary : int
        Number of tokens of the data; 0 where inputs are no tokens.
    tensors : mapping from name to TensorInfo
        Every persistent tensor in ``state_dict`` order; of tied tensors only the first name.
    layers : tuple of Layer
        One per module that owns tensors directly, together holding every tensor once; as modules are registered.
    sequence : tuple of Layer
        Layers in order of first use in a forward pass, up to the first that is used again later, as
        tied embeddings are.
    num_params : int
        Trainable numbers.
    depths : tuple of frozenset of str
        FedLP-Hetero: names of the shared tensors of depth 1, 2, ...; the last one is everything.
    frozen : frozenset of str
        Names of frozen parameters; :meth:`build` and :meth:`build_depth` freeze them.
    """

    task: ModelTask
    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary: int
    tensors: Mapping[str, TensorInfo]
    layers: tuple[Layer, ...]
    sequence: tuple[Layer, ...]
    num_params: int
    depths: tuple[frozenset[str], ...]
    blueprint: Blueprint
    frozen: frozenset[str] = frozenset()

    @property
    def reads_tokens(self) -> bool:
        """Whether inputs are int64 token ids; else they are floats."""
        return self.task.reads_tokens

    def build(self, seed: int) -> nn.Module:
        """Return the initial model, on the CPU; equal for equal seeds on every engine.

        torch's global generators are not advanced. Pretrained weights are loaded if the config names them.
        """
        with _seeded(torch_seed(seed, Stream.MODEL)):
            return freeze(self.blueprint.build_initial(), self.frozen)

    def build_depth(self, depth: int, seed: int, client_id: int) -> nn.Module:
        """Return the sub-model of a depth, in 1..len(depths), for one client.

        Shared tensors have global names and shapes; the server supplies their values. Below full depth the
        personal head's tensors start with ``personal_head``, a name that the global model does not have; they depend
        on seed and client only. At full depth this is the global architecture, without pretrained weights.
        """
        if not 1 <= depth <= len(self.depths):
            raise ConfigError(f"model {self.blueprint.name} has depths 1 to {len(self.depths)}, not {depth}")
        with _seeded(torch_seed(seed, Stream.PERSONAL_HEAD, client_id)):
            is_whole = depth == len(self.depths)
            return freeze(self.blueprint.build() if is_whole else self.blueprint.build_prefix(depth), self.frozen)

    def example_inputs(self, batch: int) -> Tensor:
        """Return ``batch`` fixed examples of the input shape: normal floats, or int64 tokens."""
        rng = generator(0, Stream.DATA)
        if self.reads_tokens:
            return torch.from_numpy(rng.integers(0, self.vocabulary, (batch, *self.input_shape)))
        return torch.from_numpy(rng.standard_normal((batch, *self.input_shape), dtype=np.float32))


def describe_blueprint(
    blueprint: Blueprint,
    task: ModelTask | str,
    input_shape: tuple[int, ...],
    num_classes: int,
    frozen: Sequence[str] = (),
    vocabulary: int | None = None,
) -> ModelSpec:
    """Return the spec of a blueprint, without allocation or computation.

    Parameters
    ----------
    task : ModelTask or str
        Task of the model, or its name.
    frozen : sequence of str
        Names or shell patterns of layers that are not trained.
    vocabulary : int or None
        Number of tokens, where inputs are tokens and ``num_classes`` is not their number.

    Raises
    ------
    ConfigError
        If the model cannot take inputs of this shape, has a wrong number of outputs or no layer of a
        name that is to be frozen.
    """
    task = find_task(task)
    blueprint.check_inputs()
    try:
        model = _build_shapes(blueprint.build)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise _shape_error(blueprint, input_shape, error) from error
    used = _check_forward(model, blueprint, task, input_shape, num_classes)
    parameters = [name for name, tensor in named_tensors(model).items() if isinstance(tensor, nn.Parameter)]
    still = find_frozen(blueprint.name, parameters, frozen) | blueprint.frozen(parameters)
    tensors = {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in named_tensors(freeze(model, still)).items()
    }
    layers = _group_layers(tensors)
    depths = range(1, blueprint.num_depths if blueprint.has_prefixes(model) else 1)
    prefixes = [named_tensors(_build_shapes(partial(blueprint.build_prefix, depth))) for depth in depths]
    shared = tuple(frozenset(prefix) & frozenset(tensors) for prefix in prefixes)
    return ModelSpec(
        task=task,
        input_shape=input_shape,
        num_classes=num_classes,
        vocabulary=(vocabulary or num_classes) if task.reads_tokens else 0,
        tensors=tensors,
        layers=layers,
        sequence=order_layers(layers, used, _tied_names(model)),
        num_params=sum(torch.Size(info.shape).numel() for info in tensors.values() if info.trainable),
        depths=(*shared, frozenset(tensors)),
        blueprint=blueprint,
        frozen=still,
    )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's own persistent tensors (parameters as such), in ``state_dict`` order, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def leading_layers(spec: ModelSpec, uploads: Collection[str]) -> tuple[str, ...]:
    """Return the tensors of all layers used in a forward pass before the first layer with a tensor in ``uploads``.

    With these frozen, the backward pass ends where the first layer begins that is uploaded in part. A layer that is
    used again later, as tied embeddings are, is not among them, nor is any after it.
    """
    uploaded = frozenset(uploads)
    leading = itertools.takewhile(lambda layer: uploaded.isdisjoint(layer.tensors), spec.sequence)
    return tuple(name for layer in leading for name in layer.tensors)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's live tensors, keyed like ``ModelSpec.tensors``.

    They share the model's memory and are detached: writing to them changes the model, without autograd.
    """
    return {name: tensor.detach() for name, tensor in named_tensors(model).items()}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator within a context; device generators are not touched, since models are built on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class _Unfilled(TorchFunctionMode):
    """Tensors without memory are not filled with draws: torch would import its compiler for that."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _build_shapes(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a model for its shapes: without memory, unless its constructor reads tensor values."""
    with _seeded(0):
        try:
            with torch.device("meta"), _Unfilled():
                return build()
        except NotImplementedError:  # what reading a meta tensor raises
            return build()


def _check_forward(
    model: nn.Module, blueprint: Blueprint, task: ModelTask, input_shape: tuple[int, ...], num_classes: int
) -> list[str]:
    """Return the paths of the called modules of a forward pass, in order.

    The pass runs on shapes, that of a small classifier on a fresh model; with value-dependent operators (e.g. mixture
    of experts), on a fresh model and one short example instead.
    """
    inputs = torch.empty((2, *input_shape), dtype=torch.int64 if task.reads_tokens else torch.float32, device="meta")
    try:
        if not task.reads_tokens and is_small(sum(x.numel() for x in model.parameters()), inputs):
            width, called = _run_fresh(blueprint, torch.zeros(inputs.shape))
        else:
            with torch.no_grad(), shapes_only(model.eval(), inputs) as (shapes, example):
                width, called = run_and_note(shapes, example)
    except Exception:  # whatever operators raise that find no values
        try:
            width, called = _run_fresh(blueprint, short_example(input_shape, task.reads_tokens))
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise _shape_error(blueprint, input_shape, error) from error
    if width < num_classes or (task.exact_outputs and width != num_classes):
        raise ConfigError(f"model {blueprint.name} has {width} outputs, but the data set has {num_classes} classes")
    return called


def _run_fresh(blueprint: Blueprint, inputs: Tensor) -> tuple[int, list[str]]:
    """Return the number of outputs of a fresh model, and the paths of the called modules."""
    with _seeded(0), torch.no_grad(), one_thread():
        return run_and_note(blueprint.build().eval(), inputs)


def _tied_names(model: nn.Module) -> frozenset[str]:
    """Return the names of tensors with several names."""
    names = {id(tensor): name for name, tensor in named_tensors(model).items()}
    return frozenset(names[id(t)] for name, t in model.state_dict(keep_vars=True).items() if names[id(t)] != name)


def _shape_error(blueprint: Blueprint, input_shape: tuple[int, ...], error: Exception) -> ConfigError:
    return ConfigError(f"model {blueprint.name} cannot take inputs of shape {input_shape}: {first_line(error)}")


def _group_layers(tensors: Mapping[str, TensorInfo]) -> tuple[Layer, ...]:
    owners: dict[str, list[str]] = {}
    for name in tensors:
        owners.setdefault(owner_of(name), []).append(name)
    return tuple(
        Layer(
            name=owner,
            tensors=tuple(names),
            num_params=sum(torch.Size(tensors[name].shape).numel() for name in names if tensors[name].trainable),
        )
        for owner, names in owners.items()
    )
