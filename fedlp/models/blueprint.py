"""Blueprint of a family's models: how they are built; and the protocol of a model's task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import nn

from fedlp.errors import ConfigError
from fedlp.registry import lookup


class ModelTask(Protocol):
    """Protocol of a model's task.

    Attributes
    ----------
    reads_tokens : bool
        Whether inputs are int64 token ids; else they are floats.
    exact_outputs : bool
        Whether a model must have just as many outputs as the data set asks for; else it may have more.
    auto_model : str
        Class of transformers that loads such a model; empty if none does.
    """

    @property
    def reads_tokens(self) -> bool:
        """Whether inputs are int64 token ids."""

    @property
    def exact_outputs(self) -> bool:
        """Whether the number of outputs must be met exactly."""

    @property
    def auto_model(self) -> str:
        """Class of transformers that loads such a model."""


def find_task(task: ModelTask | str) -> ModelTask:
    """Return a task given as an object or by name."""
    return cast(ModelTask, lookup("task", task)()) if isinstance(task, str) else task


class Blueprint(ABC):
    """Construction of a family's models. Parameters are drawn from torch's generator, seeded by the caller."""

    name: str
    num_depths: int = 1
    is_language: ClassVar[bool | None] = False  # whether it models tokens; None if data of either kind may fit

    def check_inputs(self) -> None:  # noqa: B027 # most families have nothing to check
        """Raise ConfigError if the model cannot take inputs of the data's shape; called before a build."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the global architecture with fresh parameters."""

    def build_initial(self) -> nn.Module:
        """Return the initial model: fresh, unless the family loads pretrained weights."""
        return self.build()

    @property
    def is_pretrained(self) -> bool:
        """Whether :meth:`build_initial` loads pretrained weights; that of a module in memory is not known: no."""
        return bool(getattr(self, "path", None) or getattr(self, "pretrained", False))

    def build_prefix(self, depth: int) -> nn.Module:
        """Return the prefix of a depth below ``num_depths``, under the global names, with a ``personal_head``."""
        raise ConfigError(f"model {self.name} has no depth prefixes; choose another model or depth {self.num_depths}")

    def frozen(self, parameters: Sequence[str]) -> frozenset[str]:
        """Return the given parameters that the family itself freezes."""
        return frozenset()

    def has_prefixes(self, model: nn.Module) -> bool:
        """Return whether depths below ``num_depths`` can be built; ``model`` is the global one, without values."""
        return self.num_depths > 1

    def stored_dtype(self) -> torch.dtype:
        """Return the floating-point format of stored weights of :meth:`build_initial`; models are built in float32."""
        return torch.float32


@dataclass(frozen=True)
class ModuleBlueprint(Blueprint):
    """Blueprint of a user's own module.

    Attributes
    ----------
    make : callable
        Returns a module with fresh parameters. Where the module has an integer ``num_depths`` and a method
        ``prefix(depth) -> nn.Module``, depth prefixes follow.
    initial : callable or None
        Returns the initial module; a fresh one if None.
    """

    name: str
    make: Callable[[], nn.Module]
    num_depths: int = 1
    initial: Callable[[], nn.Module] | None = None
    is_language: ClassVar[bool | None] = None

    def build(self) -> nn.Module:
        """Return a module with fresh parameters."""
        return self.make()

    def build_initial(self) -> nn.Module:
        """Return the initial module."""
        return self.make() if self.initial is None else self.initial()

    def build_prefix(self, depth: int) -> nn.Module:
        """Return the result of the module's own ``prefix``."""
        found: nn.Module = self.make().prefix(depth)  # type: ignore[operator]
        return found
