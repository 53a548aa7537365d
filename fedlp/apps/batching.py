"""Size of the batched cohorts of a run."""

from __future__ import annotations

import logging
import math

from fedlp.config import RunConfig
from fedlp.data.examples import DataInfo
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.training.stacked_adapters import find_adapters
from fedlp.training.stacked_pass import find_obstacle
from fedlp.training.stacked_rule import adapter_stack_size, pays, stack_size

log = logging.getLogger("fedlp")


def sends_stacks(config: RunConfig) -> bool:
    """Return whether updates of a batched cohort may travel as one stack: where each is the trained weights alone."""
    upload, plain = config.upload, config.privacy.name == "none"
    return plain and upload.values == "weights" and is_plain(upload.make()) and not upload.error_feedback


def cohort_size(config: RunConfig, submodels: SubModels, info: DataInfo) -> int:
    """Return the number of clients that a worker receives at once, 1 without batched cohorts; log an obstacle once."""
    batched = config.simulation.batched
    if not batched:
        return 1
    model = submodels.skeleton().to(config.device)
    places = config.local.batch_size * info.input_shape[0]
    if batched == "auto" and not pays(model, places):
        return 1
    obstacle = "secure aggregation masks client by client" if config.privacy.name == "secagg" else ""
    if config.adapter.base == "encoded":
        obstacle = obstacle or "with adapter.base=encoded each client widens the base by itself"
    if obstacle := obstacle or find_obstacle(model, info, config.local, frozenset(), pads=False):
        level = logging.INFO if batched == "auto" else logging.WARNING
        log.log(level, "clients train one by one, although simulation.batched=%s: %s", str(batched).lower(), obstacle)
        return 1
    frozen = submodels.spec.frozen if find_adapters(model) else frozenset[str]()
    sizes = {name: math.prod(x.shape) * x.dtype.itemsize for name, x in submodels.spec.tensors.items()}
    base_bytes = sum(sizes[name] for name in frozen)
    num_bytes, num_clients = sum(sizes.values()) - base_bytes, config.clients_per_round
    if frozen:
        return adapter_stack_size(num_bytes, num_clients, places, base_bytes)
    return stack_size(num_bytes, num_clients)
