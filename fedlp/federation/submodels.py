"""Layout of a sub-model: shared tensors, their slices and shapes.

Server and clients derive it from the same model, so messages do not contain it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.federation.bounded_cache import BoundedCache
from fedlp.federation.wire.packing import Signature
from fedlp.models.spec import ModelSpec
from fedlp.models.unallocated import without_parameters
from fedlp.pruning.tracing.units import prunable_layers, weight_matrix
from fedlp.pruning.tracing.widths import WidthSpec, slice_tensor, tensor_keeps, trace_widths
from fedlp.types import Keep, PrunableLayer, SubModel

_CACHE_BYTES = 1 << 28
_NAME_BYTES, _KEEP_BYTES, _RUN_BYTES = 400, 200, 96  # measured: what one of each takes in a layout and its key
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class SubModelLayout:
    """Shared tensors of one sub-model, in the global model's order.

    Attributes
    ----------
    names : tuple of str
        Tensors of messages; personal tensors and those of absent branches are excluded.
    keeps : mapping from tensor name to one Keep per dimension
        Kept indices of sliced tensors only.
    """

    names: tuple[str, ...]
    keeps: Mapping[str, tuple[Keep, ...]]
    spec: ModelSpec

    @property
    def is_whole(self) -> bool:
        """Whether the sub-model is the whole global model."""
        return not self.keeps and len(self.names) == len(self.spec.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the sub-model."""
        keeps = self.keeps.get(name)
        return self.spec.tensors[name].shape if keeps is None else tuple(keep.count for keep in keeps)

    @cached_property
    def name_set(self) -> frozenset[str]:
        """Set of the names."""
        return frozenset(self.names)

    @cached_property
    def _signature(self) -> Signature:
        return tuple((name, self.shape(name), self.spec.tensors[name].dtype) for name in self.names)

    @cached_property
    def _num_params(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape, _ in self._signature if self.spec.tensors[name].trainable}

    def signature(self, names: frozenset[str] | None = None) -> Signature:
        """Return name, shape and dtype of the shared tensors, in order; of ``names`` alone if given."""
        if names is None or names == self.name_set:
            return self._signature
        return tuple(entry for entry in self._signature if entry[0] in names)

    def slice(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sub-model's part of the global tensors; whole tensors are not copied."""
        return {
            name: slice_tensor(params[name], self.keeps[name]) if name in self.keeps else params[name]
            for name in self.names
        }

    def num_params(self, names: frozenset[str] | None = None) -> int:
        """Return the number of shared trainable entries (of the tensors in ``names``)."""
        return sum(count for name, count in self._num_params.items() if names is None or name in names)

    @property
    def num_bytes(self) -> int:
        """Approximate bytes of the layout in memory."""
        keeps = [keep for found in self.keeps.values() for keep in found]
        return len(self.names) * _NAME_BYTES + sum(_KEEP_BYTES + _RUN_BYTES * len(keep.runs) for keep in keeps)


class SubModels:
    """All sub-models of one global model; layouts are cached, up to 256 MiB.

    Parameters
    ----------
    depth : bool
        Whether a sub-model may lack residual branches.
    """

    def __init__(self, spec: ModelSpec, depth: bool = False) -> None:
        self.spec, self._depth = spec, depth
        self.names = tuple(spec.tensors)
        self.name_set = frozenset(self.names)
        self._uncut: dict[int | None, SubModelLayout] = {}  # by depth
        self._layout = BoundedCache(self._make_layout, lambda layout: layout.num_bytes, _CACHE_BYTES)

    @cached_property
    def widths(self) -> WidthSpec:
        """Width axes, found by tracing the model once."""
        return trace_widths(self._measured, self.spec.example_inputs(1), self._depth)

    @cached_property
    def layers(self) -> tuple[PrunableLayer, ...]:
        """Prunable layers, of a classifier also channels with several readers; may be empty."""
        return prunable_layers(self._measured, self.widths, shared=not self.spec.reads_tokens)

    def whole_parts(self) -> str:
        """Return in one line which parts of the model stay whole and why; empty where none does or nothing is cut."""
        return self.widths.whole_line() if "widths" in self.__dict__ else ""

    def refuse_narrow(self, asked: str) -> NoReturn:
        """Raise ConfigError: ``asked`` needs a width axis; the error names the reason that there is none."""
        why = self.whole_parts() or "no layer alone reads what another computes"
        raise ConfigError(f"{asked}, but nothing of model {self.spec.blueprint.name} can be cut: {why}")

    @cached_property
    def reader_columns(self) -> dict[str, int]:
        """Columns of the weight of each module that reads a prunable layer, in the order of the layers."""
        model = self._measured
        return {path: weight_matrix(model.get_submodule(path)).shape[1] for x in self.layers for path in x.readers}

    @property
    def _measured(self) -> nn.Module:
        """A model of the global architecture, of which only shapes are read; language models take no memory."""
        return self.shapes() if self.is_language else self.skeleton()

    @cached_property
    def statistics(self) -> frozenset[str]:
        """Names of the running statistics of batch norms."""
        return frozenset(name for name in self.names if name.rpartition(".")[2] in _STATISTICS)

    def skeleton(self) -> nn.Module:
        """Return a model of the global architecture with arbitrary values (pretrained weights are not loaded)."""
        return self.spec.build_depth(len(self.spec.depths), seed=0, client_id=0)

    @property
    def is_language(self) -> bool:
        """Whether the model is a language model of transformers, whose width axes follow from rules."""
        return self.spec.blueprint.is_language is True

    def shapes(self) -> nn.Module:
        """Return a language model of the global architecture whose parameters take no memory."""
        with without_parameters():
            return self.skeleton()

    def layout(self, submodel: SubModel) -> SubModelLayout:
        """Return the layout of a sub-model."""
        if submodel.widths:
            return self._layout(submodel.depth, tuple(sorted(submodel.widths.items())))
        found = self._uncut.get(submodel.depth)
        if found is None:
            found = self._uncut[submodel.depth] = self._make_layout(submodel.depth, ())
        return found

    def _make_layout(self, depth: int | None, widths: tuple[tuple[str, Keep], ...]) -> SubModelLayout:
        if depth is not None and not 1 <= depth <= len(self.spec.depths):
            raise ConfigError(f"depth {depth} does not exist: this model has depths 1 to {len(self.spec.depths)}")
        shared = frozenset(self.spec.tensors) if depth is None else self.spec.depths[depth - 1]
        names = tuple(name for name in self.spec.tensors if name in shared)
        keeps: dict[str, tuple[Keep, ...]] = {}
        if any(not keep.is_full for _, keep in widths):
            chosen = dict(widths)
            absent = self.widths.absent(chosen)
            names = tuple(name for name in names if name not in absent)
            for name in names:
                found = tensor_keeps(self.widths, name, self.spec.tensors[name].shape, chosen)
                if not all(keep.is_full for keep in found):
                    keeps[name] = found
        return SubModelLayout(names, keeps, self.spec)
