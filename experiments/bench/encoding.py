"""What it costs to make messages of a model, and to read them: ``python experiments/bench/encoding.py [--quick]``.

A resnet18 of 11.2 million numbers (44.7 MB), one thread; milliseconds there, back, and together. Each pass runs all in
turn: once with the C library's memory settings as they are, once with freed memory kept, as fedlp's local engine does.

* ``fedlp, tensors``: pack_tensors, unpack_tensors. ``fedlp, update``: the same with all records and all checks.
* ``fedlp, to another process``: an update through the engine's shared memory, copied out of it.
* ``fedlp, same model again``: an instruction through shared memory that holds the model already, as for all clients
  of a round but the first of each slot.
* ``Flower``: ArrayRecord from and to a state dict. ``Flower, to another process``: pickled too, as for Ray.
* ``npy``: one file image per tensor. ``safetensors``, ``torch.save``: one image.
"""

from __future__ import annotations

import io
import mmap
import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
from flwr.app import ArrayRecord, RecordDict
from timing import paired_ratio, parse_args, print_table, write_report
from torch import Tensor

from fedlp.config import compose
from fedlp.federation.flower_compat import make_array
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire import messages
from fedlp.federation.wire.packing import pack_tensors, unpack_tensors
from fedlp.models import describe_model, state_tensors
from fedlp.simulation.transport import Area, copy_array, decode_frame, encode_frame
from fedlp.simulation.worker import keep_freed_memory
from fedlp.types import ClientProfile, ClientUpdate, SubModel, TrainInstruction

State = dict[str, Tensor]
Method = tuple[Callable[[], Any], Callable[[Any], Any]]
BASE = "fedlp, update"


def fedlp_methods(submodels: SubModels, state: State) -> dict[str, Method]:
    """Return how fedlp makes and reads messages."""
    layout, profile = submodels.layout(SubModel()), ClientProfile(0, 10)
    update = ClientUpdate(1, 0, 10, state, {"train-loss": 1.0})
    instruction = TrainInstruction(1, 0, {}, SubModel(), layout.name_set)
    model = messages.encode_params(state)
    capacity = 2 * sum(tensor.nbytes for tensor in state.values())
    up, down = (Area(memoryview(mmap.mmap(-1, capacity))) for _ in range(2))

    def decode_update(content: RecordDict) -> ClientUpdate:
        return messages.decode_update(content, instruction, profile, submodels)

    def read_update(frame: bytes) -> ClientUpdate:
        content = decode_frame(frame, up, copy_array)[1]
        assert content is not None
        return decode_update(content)

    def read_instruction(frame: bytes) -> TrainInstruction:
        content = decode_frame(frame, down, make_array)[1]
        assert content is not None
        return messages.decode_instruction(content, submodels)

    return {
        BASE: (lambda: messages.encode_update(update, submodels), decode_update),
        "fedlp, tensors": (
            lambda: pack_tensors(state),
            lambda packed: unpack_tensors({name: image for name, (_, image) in packed.items()}, layout.signature()),
        ),
        "fedlp, to another process": (
            lambda: encode_frame({}, messages.encode_update(update, submodels), up),
            read_update,
        ),
        "fedlp, same model again": (
            lambda: encode_frame({}, messages.encode_instruction(instruction, model, submodels), down),
            read_instruction,
        ),
    }


def peer_methods(state: State) -> dict[str, Method]:
    """Return how others make and read messages."""
    return {
        "Flower": (lambda: ArrayRecord(state), lambda record: record.to_torch_state_dict()),
        "Flower, to another process": (
            lambda: pickle.dumps(RecordDict({"arrays": ArrayRecord(state)}), protocol=5),
            lambda data: pickle.loads(data)["arrays"].to_torch_state_dict(),
        ),
        "npy": (
            lambda: {name: to_npy(tensor) for name, tensor in state.items()},
            lambda images: {name: torch.from_numpy(np.load(io.BytesIO(image))) for name, image in images.items()},
        ),
        "safetensors": (lambda: safetensors.torch.save(state), safetensors.torch.load),
        "torch.save": (lambda: to_torch(state), lambda data: torch.load(io.BytesIO(data), weights_only=True)),
    }


def to_npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return buffer.getvalue()


def to_torch(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def check(methods: dict[str, Method], state: State) -> None:
    """Raise RuntimeError unless every method gives back the state, bit by bit."""
    for name, (encode, decode) in methods.items():
        found = decode(encode())
        tensors = getattr(found, "params", found)
        if any(not torch.equal(tensors[key], tensor) for key, tensor in state.items()):
            raise RuntimeError(f"{name} does not give back what it was given")


def measure(title: str, methods: dict[str, Method], repeats: int) -> dict[str, Any]:
    """Time every method in turn, ``repeats`` times; print and return milliseconds and ratios."""
    there: dict[str, list[float]] = {name: [] for name in methods}
    back: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, (encode, decode) in methods.items():
            started = time.perf_counter()
            image = encode()
            made = time.perf_counter()
            tensors = decode(image)
            there[name].append(1e3 * (made - started))
            back[name].append(1e3 * (time.perf_counter() - made))
            del image, tensors
    both = {name: [a + b for a, b in zip(there[name], back[name], strict=True)] for name in methods}
    ratios = {name: paired_ratio(both[name], both[BASE]) for name in methods}
    rows = [
        (name, *(f"{statistics.median(times[name]):.2f}" for times in (there, back, both)), f"{ratio['median']:.2f}")
        for name, ratio in ratios.items()
    ]
    print_table(title, ("ms", "there", "back", "both", f"over {BASE}"), rows)
    return {"there_ms": there, "back_ms": back, "ratio_over_fedlp_update": ratios}


def main() -> None:
    args = parse_args(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    config = compose(["model=resnet18", "dataset=cifar10"])
    submodels = SubModels(describe_model(config.model, (3, 32, 32), 10, "classification"))
    state = state_tensors(submodels.spec.build(0))
    methods = fedlp_methods(submodels, state) | peer_methods(state)
    check(methods, state)
    repeats = 3 if args.quick else 25
    results = {"as_is": measure("memory settings as they are", methods, repeats)}
    keep_freed_memory()
    results["kept"] = measure("freed memory kept", methods, repeats)
    results["bytes"] = {"state": sum(tensor.nbytes for tensor in state.values())}
    write_report(args.json, args.quick, results)


if __name__ == "__main__":
    main()
