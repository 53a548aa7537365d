"""What spawned workers are handed: a JSON header and arrays, refused in one line where they are not the parent's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedlp.errors import ConfigError, FedLPError
from fedlp.simulation.named import find_named, name_of
from fedlp.simulation.parcel import HandOver, Parcel, hand_over_of, make_app, open_parcel, read_header
from fedlp.simulation.shared_blocks import Block

ARRAYS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bytes": np.arange(5, dtype=np.uint8),
    "swapped": np.array([1, 2], dtype=">i8"),
    "strided": np.arange(10)[::2],
    "none": np.empty((0, 4)),
    "one": np.array(True),
}


@pytest.fixture
def parcel() -> Iterator[Parcel]:
    found = Parcel(HandOver("fedlp.rng:generator", {"text": "ä", "size": np.int64(3)}, ARRAYS))
    yield found
    found.remove()


def test_it_comes_as_it_was(parcel: Parcel) -> None:
    found = open_parcel(parcel.label)
    assert (found.maker, found.about) == ("fedlp.rng:generator", {"text": "ä", "size": 3})
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype.newbyteorder("=")
        assert not found.arrays[name].flags.owndata  # a view of the block


@pytest.mark.parametrize("place", [0, 20, 60])
def test_another_process_wrote_into_it(parcel: Parcel, place: int) -> None:
    memory = Block(name=parcel.label[0]).memory
    memory[place] ^= 1
    with pytest.raises(FedLPError, match="was changed by another process; start the run again"):
        open_parcel(parcel.label)


HEADER: dict[str, Any] = {"maker": "os:getpid", "about": None, "arrays": {"x": ["<f4", [2, 3], 64]}}


def with_array(*place: Any) -> dict[str, Any]:
    return HEADER | {"arrays": {"x": list(place)}}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        ([], "other fields"),
        (HEADER | {"more": 1}, "other fields"),
        (HEADER | {"maker": 1}, "another type"),
        (HEADER | {"about": "text"}, "another type"),
        (HEADER | {"arrays": []}, "another type"),
        (with_array("<f4", [1]), "not given as dtype, shape and offset"),
        (with_array("|O", [1], 0), "dtype '|O'"),
        (with_array("<f4,<f4", [1], 0), "dtype"),
        (with_array(4, [1], 0), "dtype"),
        (with_array("<f4", 1, 0), "shape or offset"),
        (with_array("<f4", [-1], 0), "shape or offset"),
        (with_array("<f4", [True], 0), "shape or offset"),
        (with_array("<f4", [1.0], 0), "shape or offset"),
        (with_array("<f4", [1], -64), "shape or offset"),
        (with_array("<f4", [1], 1), "does not lie in the block"),
        (with_array("<f4", [17], 64), "does not lie in the block"),
        (with_array("<f4", [2**40, 2**40], 0), "does not lie in the block"),
        (with_array("<f4", [1], 2**70), "does not lie in the block"),
    ],
)
def test_a_header_with_a_wrong_field(header: Any, said: str) -> None:
    image = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(
        FedLPError, match=r"^what this worker was handed cannot be read: .*; start the run again$"
    ) as no:
        read_header(image, memoryview(bytearray(128)))
    assert said in str(no.value)
    assert "\n" not in str(no.value)


def test_a_header_that_fits() -> None:
    found = read_header(json.dumps(HEADER).encode(), memoryview(bytearray(128)))
    assert found.arrays["x"].shape == (2, 3)
    assert make_app(found) == find_named("os:getpid")()


def test_values_without_such_a_form() -> None:
    with pytest.raises(FedLPError, match="cannot be given the array x of dtype object"):
        Parcel(HandOver("os:getpid", {}, {"x": np.array([None])}))
    with pytest.raises(FedLPError, match="cannot be given a set"):
        Parcel(HandOver("os:getpid", {"x": {1}}))


# ---- names
class Outer:
    class Inner:
        pass

    def method(self) -> None: ...


@dataclass(frozen=True)
class Part:
    size: int = 1


def test_names_lead_back() -> None:
    for target in (Outer.Inner, Outer.method, Part, name_of, json.dumps):
        name = name_of(target)
        assert name is not None
        assert find_named(name) is target


def test_what_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def local() -> None: ...

    nameless: list[object] = [local, lambda: None, Part(), 3, json]
    assert [name_of(target) for target in nameless] == [None] * 5
    renamed = type("Part", (), {"__module__": __name__, "__qualname__": "Part"})
    assert name_of(renamed) is None  # another class has the name
    with pytest.raises(ConfigError, match=r"cannot import .*local by name; define it at the top level"):
        hand_over_of(local)  # type: ignore[arg-type]


@pytest.mark.parametrize(("file", "is_imported"), [(None, False), ("<stdin>", False), (__file__, True)])
def test_names_of_the_main_script(file: str | None, is_imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    if file is not None:
        main.__file__ = file
    make: Callable[[], None] = type("make", (), {"__module__": "__main__", "__qualname__": "make"})
    main.make = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert name_of(make) == ("__main__:make" if is_imported else None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (7, "is no name"),
        ("os", "is no name"),
        ("os:<lambda>", "is no name"),
        ("../os:getpid", "is no name"),
        ("os:nothing", "finds no function or class os:nothing; define it at the top level"),
        ("os:sep", "finds no function or class"),
        ("no_such_module:make", "cannot import no_such_module:make: ModuleNotFoundError: No module named"),
    ],
)
def test_names_that_lead_nowhere(name: object, said: str) -> None:
    with pytest.raises(FedLPError, match=said) as found:
        find_named(name)
    assert "\n" not in str(found.value)
