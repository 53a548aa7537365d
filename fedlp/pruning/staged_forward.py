"""Forward passes of calibration batches, stage by stage, with the inputs and outputs of chosen layers.

A language model's stages are its decoder blocks: each batch's hidden states wait before the current block, so that a
model of any depth is run once, block by block. Within a block, batches can wait before a layer whose weights are about
to change. Any other model is one stage, run as far as is needed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlp.pruning.paused_calls import PausedCall
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
    pauses : bool
        Whether batches of a language model wait within a block, each in a thread, so that no part of it runs twice.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], pauses: bool = False) -> None:
        self.current = 0
        self._pauses = pauses and is_language_model(model)
        self._calls: dict[int, PausedCall] = {}
        self._waits: dict[int, Callable[[], None]] = {}
        self._outputs: dict[int, dict[nn.Module, Tensor]] = {}
        weakref.finalize(self, _close, self._calls)
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

    def enter(
        self, batch: int, wanted: Sequence[nn.Module], passed: Sequence[nn.Module] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the current stage until the last of some modules is about to run.

        Parameters
        ----------
        wanted : sequence of nn.Module
            Modules whose inputs are returned. The last of them may change before the stage goes on.
        passed : sequence of nn.Module
            Modules before them, whose outputs are returned.
        """
        call = self._calls.get(batch)
        if call is not None and not call.is_done:
            found = self._go_on(batch, call, wanted, passed)
            if len(found) == len(wanted):
                return [found[module] for module in wanted], [self._outputs[batch][module] for module in passed]
        self._outputs[batch] = {}
        self._calls[batch] = PausedCall(partial(self._start, batch))
        found = self._go_on(batch, self._calls[batch], wanted, passed)
        if not self._pauses:
            self._calls.pop(batch).close()
        return [found[module] for module in wanted], [self._outputs[batch][module] for module in passed]

    def _start(self, batch: int, wait: Callable[[], None]) -> Tensor:
        self._waits[batch] = wait
        return self._run(batch)

    def _go_on(
        self, batch: int, call: PausedCall, wanted: Sequence[nn.Module], passed: Sequence[nn.Module]
    ) -> dict[nn.Module, Tensor]:
        """Resume a call until the wanted modules have been entered or it ends; return their inputs."""
        found: dict[nn.Module, Tensor] = {}

        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[module] = inputs[0]
            if len(found) == len(wanted):
                self._waits[batch]()

        def note(module: nn.Module, _: Any, output: Tensor) -> None:
            self._outputs[batch][module] = output

        with ExitStack() as stack:
            for module in wanted:
                stack.callback(module.register_forward_pre_hook(look).remove)
            for module in passed:
                stack.callback(module.register_forward_hook(note).remove)
            call.resume()
        return found

    @torch.no_grad()
    def advance(self) -> None:
        """Run the current stage on every batch, and pause before the next one."""
        for batch in range(len(self._states)):
            self._states[batch] = self._finish(batch)
        self.current += 1

    def outputs(self, batch: int, watched: Sequence[nn.Module]) -> list[Tensor]:
        """Run the current stage of a batch to its end, once; return the outputs of some modules in it.

        The batch's input of the stage stays as it was until :meth:`advance`, which then computes nothing.
        """
        if batch not in self._calls:
            self._outputs[batch] = {}
            self._calls[batch] = PausedCall(lambda _: self._run(batch))
            self._go_on(batch, self._calls[batch], [], watched)
        return [self._outputs[batch][module] for module in watched]

    def close(self) -> None:
        """Give up batches that wait within a stage."""
        _close(self._calls)

    def _finish(self, batch: int) -> Tensor:
        call = self._calls.pop(batch, None)
        self._outputs.pop(batch, None)
        if call is None:
            return self._run(batch)
        if not call.is_done:
            call.resume()
        return cast(Tensor, call.result)

    def _run(self, batch: int) -> Tensor:
        positional, named = self._arguments[self.current][batch]
        output = self.stages[self.current](self._states[batch], *positional, **named)
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result


def _close(calls: dict[int, PausedCall]) -> None:
    while calls:
        calls.popitem()[1].close()


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
