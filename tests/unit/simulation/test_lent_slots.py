"""Slots of shared memory whose replies are read where they lie."""

from __future__ import annotations

import mmap

import numpy as np
import torch

from fedlp.simulation.transport import Area
from fedlp.simulation.worker_process import Worker


def make_worker(num_slots: int) -> Worker:
    def area() -> Area:
        return Area(memoryview(mmap.mmap(-1, 4096)))

    return Worker(None, None, [(area(), area()) for _ in range(num_slots)])  # type: ignore[arg-type]


def test_a_slot_is_free_once_nothing_refers_to_its_reply() -> None:
    worker = make_worker(3)
    wrap = worker.lend(0, 2)
    assert wrap is not None
    worker.slots[0][1].write([b"1234", b"5678"])
    first, second = (wrap("uint8", (4,), "numpy.ndarray", view) for view in worker.slots[0][1].read([4, 4]))
    assert worker.free_slot() == 1
    tensor = torch.from_numpy(np.frombuffer(second.data, np.uint8).reshape(2, 2)[:, 1:].copy())
    kept = torch.from_numpy(np.frombuffer(first.data, np.uint8).reshape(2, 2)[1:])
    assert bytes(second.data) == b"5678"
    del first, second
    assert worker.free_slot() == 1, "a tensor of its memory is in use"
    assert kept.tolist() == [[ord("3"), ord("4")]]
    del kept
    assert worker.free_slot() == 0
    assert tensor.tolist() == [[ord("6")], [ord("8")]], "a copy keeps no slot"


def test_slots_are_left_for_tasks() -> None:
    worker = make_worker(3)
    wrap = worker.lend(0, 2)
    assert wrap is not None
    held = wrap("uint8", (4,), "numpy.ndarray", worker.slots[0][1].read([4])[0])
    assert worker.lend(1, 2) is None
    assert worker.lend(1, 1) is not None
    del held
    assert worker.lend(1, 2) is not None
