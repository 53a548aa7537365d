"""``fedlp.prune``: one-shot pruning of a module on data in memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fedlp.apps.prune import Subject, allocate, draw_calibration
from fedlp.config import compose_prune
from fedlp.data.conversion import as_examples, describe_examples
from fedlp.data.examples import FederatedData
from fedlp.errors import ConfigError
from fedlp.models.blueprint import ModuleBlueprint
from fedlp.models.spec import describe_blueprint
from fedlp.pruning.pruner import Pruned, Pruner
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import trace_widths
from fedlp.report.reproduce import spell
from fedlp.training.calibration_data import make_method
from fedlp.training.threads import one_thread


def prune(
    model: nn.Module,
    data: Any,
    *,
    sparsity: float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    score: str = "obs",
    allocator: str = "dp",
    examples: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Pruned:
    """Prune a trained module in one shot; the module itself is not modified.

    Parameters
    ----------
    model : nn.Module
        A trained classifier or causal language model.
    data : data
        Calibration examples: a torch Dataset, a Hugging Face dataset or arrays ``(x, y)``.
    sparsity, target_params, target_macs : float
        One of them: the fraction removed of the prunable parameters, in (0, 1); parameters, or MACs per example, that
        may stay.
    score, allocator : str
        Names of the saliency of units and of the allocation rule.
    examples : int, optional
        Number of calibration examples drawn; at most 256 if absent.
    **options
        Further options, as ``pruner={"damping": 0.01}``.

    Returns
    -------
    Pruned
        ``model``, a smaller dense module; ``widths``, the units that stay; ``layers``, a report per layer.

    Raises
    ------
    FedLPError
        If nothing can be pruned, the target is out of reach, or the data are too few.

    Examples
    --------
    >>> import torch, fedlp
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    >>> x, y = torch.randn(300, 8), torch.randint(3, (300,))
    >>> pruned = fedlp.prune(net, (x, y), sparsity=0.5, allocator="uniform", pruner={"damping": 0.01})
    >>> pruned.layers[0].kept_units
    16
    """
    targets = {"sparsity": sparsity, "target_params": target_params, "target_macs": target_macs}
    read = as_examples(data, what="data")
    chosen = {name: value for name, value in targets.items() if value is not None}
    overrides = [f"{name}={spell(value)}" for name, value in chosen.items()]
    overrides += [f"pruner={score}", f"allocator={allocator}", f"seed={seed}"]
    overrides += [f"calibration.examples={min(256, len(read)) if examples is None else examples}"]
    for group, values in options.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{group}={values!r}: give a mapping of options, such as pruner={{'damping': 0.01}}")
        overrides += [f"{group}.{name}={spell(value)}" for name, value in values.items()]
    config = compose_prune(overrides)
    info = describe_examples("object", read, None)
    blueprint = ModuleBlueprint(type(model).__name__, lambda: copy.deepcopy(model))
    spec = describe_blueprint(blueprint, info.task, info.input_shape, info.num_classes, ())
    with one_thread():
        dense = copy.deepcopy(model).eval()
        widths = trace_widths(dense, spec.example_inputs(1), config.pruner.depth)
        layers = find_layers(dense, widths, config.pruner.shared and not spec.reads_tokens)
        subject = Subject(spec, dense, info, FederatedData(info, read, read), widths, layers)
        calibration = draw_calibration(config, subject)
        pruner = Pruner(dense, widths, layers, calibration, make_method(config.pruner))
        return pruner.prune(allocate(config, subject, calibration, pruner))
