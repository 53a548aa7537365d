"""State to resume from, and its check against the model."""

from __future__ import annotations

from fedlp.config import RunConfig
from fedlp.errors import CheckpointError, ConfigError
from fedlp.federation.server.checkpoint import ServerState
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.federation.submodels import SubModels


def load_state(directory: RunDirectory, config: RunConfig) -> ServerState | None:
    """Return the state to resume from, None for a new run; ConfigError if it lies beyond the run's end."""
    state = directory.resume() if config.resume else None
    if state is not None and state.server_round > config.num_rounds:
        raise ConfigError(
            f"num_rounds={config.num_rounds}, but the run in {directory.path} has done {state.server_round}; give a "
            "larger number"
        )
    return state


def check_fits(state: ServerState, submodels: SubModels) -> None:
    """Raise CheckpointError if a checkpoint does not fit this model."""
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.params.items()}
    for name, info in submodels.spec.tensors.items():
        if found.get(name) != (info.shape, info.dtype):
            raise CheckpointError(
                f"the checkpoint of round {state.server_round} does not fit the model of config.yaml (tensor {name}); "
                f"restore the config.yaml that the run began with"
            )
