"""Input norms: sums of squares of the inputs of prunable layers' readers, on a client's own examples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fedlp.errors import CalibrationError
from fedlp.models.forward import forward_logits
from fedlp.pruning.tracing.units import input_columns
from fedlp.types import InputNorms


@torch.no_grad()
def measure_input_norms(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> dict[str, InputNorms]:
    """Return the sums of squares of each column of some modules' inputs, from one pass over the examples.

    Raises
    ------
    CalibrationError
        If an input is not finite; names the module.
    """
    model.eval()
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(paths, 0)
    with ExitStack() as stack:
        for path in paths:

            def note(module: nn.Module, inputs: Any, path: str = path) -> None:
                rows = input_columns(module, inputs[0].detach()).to(torch.float64)
                total = rows.square().sum(dim=0).cpu()
                totals[path] = totals[path] + total if path in totals else total
                counts[path] += len(rows)

            stack.callback(model.get_submodule(path).register_forward_pre_hook(note).remove)
        for batch in batches:
            forward_logits(model, batch)
    for path, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(f"inputs of {path} are not finite on the client's examples; check its data")
    return {path: InputNorms(totals[path], counts[path]) for path in paths}
