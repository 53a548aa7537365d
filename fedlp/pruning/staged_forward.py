"""Forward passes of calibration batches, stage by stage, with the inputs and outputs of chosen layers.

A language model's stages are its decoder blocks: each batch's hidden states wait before the current block, so that a
model of any depth is run once, block by block. Any other model is one stage, run as far as is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fedlp.pruning.tracing.decoder import is_language_model, path_of_blocks

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Seen(Exception):
    """Signal that all watched modules have run."""


class StagedRun:
    """Forward run of calibration batches, paused before one of the stages.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. It may change between calls.
    batches : sequence of Tensor
        Prepared inputs: (n, C, H, W) images, (n, features), or (n, L) token ids.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.current = 0
        if not is_language_model(model):
            self.stages, self.paths = [model], [""]
            self._states: list[Any] = list(batches)
            self._arguments: list[list[_Arguments]] = [[((), {})] * len(batches)]
            return
        path = path_of_blocks(model)
        self.stages = list(model.get_submodule(path).children())
        self.paths = [f"{path}.{index}." for index in range(len(self.stages))]
        self._states, self._arguments = _catch(model, self.stages, batches)

    def stage_of(self, module_path: str) -> int:
        """Return the number of the stage that holds a module."""
        return next(index for index, path in enumerate(self.paths) if module_path.startswith(path))

    def input(self, batch: int) -> Tensor:
        """Return the input of the current stage for one batch."""
        state: Tensor = self._states[batch]
        return state

    @torch.no_grad()
    def observe(self, batch: int, watched: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
        """Run the current stage until all watched modules have run; return the input and output of each."""
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[module] = inputs[0], output
            if len(seen) == len(watched):
                raise _Seen

        with _hooks(watched, look), suppress(_Seen):
            self._run(batch)
        return [seen[module] for module in watched]

    @torch.no_grad()
    def advance(self) -> None:
        """Run the current stage on every batch, and pause before the next one."""
        for batch in range(len(self._states)):
            self._states[batch] = self._run(batch)
        self.current += 1

    def _run(self, batch: int) -> Tensor:
        positional, named = self._arguments[self.current][batch]
        output = self.stages[self.current](self._states[batch], *positional, **named)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result


@contextmanager
def _hooks(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def _catch(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[_Arguments]]]:
    """Return the first block's input for every batch, and the other arguments of every block and batch.

    Only the first block computes anything: hidden states, which arguments do not depend on, pass through the others.
    """
    states: list[Tensor] = []
    arguments: list[list[_Arguments]] = [[] for _ in blocks]
    with ExitStack() as stack:
        stack.callback(_pass_through(blocks).close)
        for index, block in enumerate(blocks):

            def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                if index == 0:
                    states.append(args[0] if args else kwargs["hidden_states"])
                arguments[index].append((args[1:], {key: kwargs[key] for key in kwargs if key != "hidden_states"}))
                if index + 1 == len(blocks):
                    raise _Seen

            stack.callback(block.register_forward_pre_hook(catch, with_kwargs=True).remove)
        options = {"use_cache": False} if _takes(model, "use_cache") else {}
        for batch in batches:
            with suppress(_Seen):
                model(batch, **options)
    return states, arguments


def _takes(model: nn.Module, option: str) -> bool:
    """Return whether a model's forward pass has an option: that of encoders has no cache in older transformers."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(one.name == option or one.kind is one.VAR_KEYWORD for one in parameters)


def _pass_through(blocks: Sequence[nn.Module]) -> ExitStack:
    """Let all blocks but the first return their hidden states, and what else the first returns, until it is closed."""
    stack = ExitStack()
    last: list[Any] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        last[:] = [output]

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(last[0], Tensor) else (hidden, *last[0][1:])

    stack.callback(blocks[0].register_forward_hook(note).remove)
    for block in blocks[1:]:
        block.forward = forward
        stack.callback(block.__dict__.pop, "forward")
    return stack
