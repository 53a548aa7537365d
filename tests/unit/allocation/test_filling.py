"""Layers grow in the order that is given, as long as they fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

from fedlp.allocation.budget.filling import Kept, fill_units


def test_a_layer_that_does_not_fit_is_not_tried_again_and_full_ones_end_it() -> None:
    asked: list[Kept] = []

    def fits(kept: Kept) -> bool:
        asked.append(dict(kept))
        return kept["a"] + 5 * kept["b"] <= 12

    kept = {"a": 1, "b": 1, "c": 3}
    fill_units(kept, cycle("cba"), lambda name, count: int(count < {"a": 9, "b": 9, "c": 3}[name]), fits)
    assert kept == {"a": 2, "b": 2, "c": 3}
    assert asked == [
        {"a": 1, "b": 2, "c": 3},
        {"a": 2, "b": 2, "c": 3},
        {"a": 2, "b": 3, "c": 3},
        {"a": 3, "b": 2, "c": 3},
    ]


def test_the_order_may_follow_what_has_grown() -> None:
    kept = {"a": 0, "b": 0}

    def fewest() -> Iterator[str]:
        while True:
            yield min(kept, key=lambda name: (kept[name], name))

    fill_units(kept, fewest(), lambda _, count: 2 if count < 4 else 0, lambda kept: sum(kept.values()) <= 6)
    assert kept == {"a": 4, "b": 2}


def test_nothing_that_can_grow_asks_for_no_order() -> None:
    kept = {"a": 1}
    fill_units(kept, cycle([]), lambda *_: 0, lambda _: True)
    assert kept == {"a": 1}
