"""Costs of sub-models: measured MACs, and a policy's expected parameters and bytes per client and round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlp.federation.client.ordered_dropout import nested_counts
from fedlp.federation.strategies.policy import Case
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.encodings import Encoding
from fedlp.models.cost import Macs, count_macs
from fedlp.models.forward import is_small
from fedlp.models.unallocated import without_parameters
from fedlp.pruning.tracing.widths import cut_model
from fedlp.types import Assignment, ClientUpdate, Keep, SubModel


class Costs:
    """Costs of all sub-models of one global model; MACs are counted once per shape, by torch's FlopCounter."""

    def __init__(self, submodels: SubModels) -> None:
        self._submodels = submodels
        self._count = lru_cache(maxsize=1024)(self._count_shape)
        spec = submodels.spec  # a small model is counted by passes on values, which take less time
        self._is_large = submodels.is_language and not is_small(spec.num_params, spec.example_inputs(1))

    def macs(self, submodel: SubModel) -> Macs:
        """Return forward and training MACs per example; the mean over nested widths if steps draw from them."""
        axes = self._submodels.widths.axes if submodel.widths or submodel.nested_levels else {}
        counts = {a: submodel.widths[a].count if a in submodel.widths else size for a, size in axes.items()}
        if not submodel.nested_levels:
            return self._count(submodel.depth, tuple(counts.items()))
        found = []
        for level in submodel.nested_levels:
            nested = nested_counts(counts, axes, level)
            found.append(self._count(submodel.depth, tuple(nested.items())))
        return Macs(sum(m.forward for m in found) / len(found), sum(m.training for m in found) / len(found))

    def model(self, submodel: SubModel) -> nn.Module:
        """Return a model of a sub-model's shape, with arbitrary values; parameters of a large one take no memory."""
        counts = tuple((axis, keep.count) for axis, keep in submodel.widths.items())
        return self._build(submodel.depth, counts)

    def _count_shape(self, depth: int | None, counts: tuple[tuple[str, int], ...]) -> Macs:
        return count_macs(self._build(depth, counts), self._submodels.spec.example_inputs(1))

    def _build(self, depth: int | None, counts: tuple[tuple[str, int], ...]) -> nn.Module:
        if depth is not None:
            with without_parameters() if self._is_large else nullcontext():
                return self._submodels.spec.build_depth(depth, seed=0, client_id=0)
        model = self._submodels.shapes() if self._is_large else self._submodels.skeleton()
        axes = self._submodels.widths.axes if counts else {}
        if any(count < axes[axis] for axis, count in counts):
            widths = {axis: Keep.first(count, axes[axis]) for axis, count in counts}
            return cut_model(model, self._submodels.widths, widths)
        return model


class Downlink(Protocol):
    """Protocol of the encoding of a sub-model's values for a client."""

    def encode(self, layout: SubModelLayout, values: Mapping[str, Tensor]) -> messages.Sent:
        """Return the encoded values."""


def expected_costs(
    cases: Sequence[Case],
    submodels: SubModels,
    costs: Costs,
    params: Mapping[str, Tensor],
    encoding: Encoding,
    coded: bool,
    downlink: Downlink | None = None,
) -> dict[str, float]:
    """Return the expected cost of one client in one round.

    Parameters
    ----------
    cases : sequence of Case
        The policy's distribution.
    params : mapping
        Global model, from which real messages are encoded to count their bytes: for coded uploads, an
        estimate, since differences have other codes than weights.
    encoding, coded : Encoding, bool
        Encoding of uploads, and whether bytes travel as Huffman codes.
    downlink : Downlink, optional
        Encoding of values for clients, frozen ones included, as in a client's first round; as they are if absent.

    Returns
    -------
    dict
        ``params_down_per_client``, ``params_up_per_client`` (trainable numbers; for FedLP their sum is M(1 + p)),
        ``bytes_down_per_client``, ``bytes_up_per_client`` (buffers and record keys included), ``macs_per_example``
        (forward) and ``training_macs_per_example``.
    """
    keys = ("params_down", "params_up", "bytes_down", "bytes_up")
    total = {f"{key}_per_client": 0.0 for key in keys} | {"macs_per_example": 0.0, "training_macs_per_example": 0.0}
    for case in cases:
        rate, weight = case.layer_preserving_rate, case.probability
        layout = submodels.layout(case.submodel)
        sliced = layout.slice(params)
        record = messages.Sent(messages.encode_params(sliced)) if downlink is None else downlink.encode(layout, sliced)
        instruction = Assignment(1, 0, case.submodel, layout.name_set)
        sent = submodels.layout(case.sent or case.submodel)
        returned = {name: part for name, part in sent.slice(params).items() if name not in submodels.spec.frozen}
        rng = torch.Generator().manual_seed(0)
        encoded = encoding.encode(returned, rng)
        update = ClientUpdate(1, 0, 1, {"train-loss": 0.0}, params=encoded)
        content = messages.encode_update(update, submodels, coded)
        up = messages.count_bytes(content)
        payload = sum(len(array.data) for array in content.array_records[messages.PARAMS].values())
        macs = costs.macs(case.submodel)
        total["params_down_per_client"] += weight * layout.num_params()
        total["params_up_per_client"] += weight * rate * sent.num_params()
        total["bytes_down_per_client"] += weight * messages.count_bytes(
            messages.encode_instruction(instruction, record, submodels)
        )
        total["bytes_up_per_client"] += weight * (up - payload + rate * payload)
        total["macs_per_example"] += weight * macs.forward
        total["training_macs_per_example"] += weight * macs.training
    return total
