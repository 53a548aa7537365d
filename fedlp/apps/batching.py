"""Size of the batched cohorts of a run."""

from __future__ import annotations

import logging
import math

from fedlp.config import RunConfig
from fedlp.data.examples import DataInfo
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.training.stacked_pass import find_obstacle
from fedlp.training.stacked_rule import pays, stack_size

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
    if batched == "auto" and not pays(model):
        return 1
    obstacle = "secure aggregation masks client by client" if config.privacy.name == "secagg" else ""
    if obstacle := obstacle or find_obstacle(model, info, config.local, frozenset(), pads=False):
        level = logging.INFO if batched == "auto" else logging.WARNING
        log.log(level, "clients train one by one, although simulation.batched=%s: %s", str(batched).lower(), obstacle)
        return 1
    num_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in submodels.spec.tensors.values())
    return stack_size(num_bytes, config.clients_per_round)
