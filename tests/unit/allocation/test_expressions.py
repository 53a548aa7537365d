"""Allocation functions: their text, their values, and what evolution makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlp.allocation.layer_metrics import KEYS, LayerStatistics
from fedlp.allocation.search.expressions import Expression, canonical, evaluate, is_degenerate, signature
from fedlp.allocation.search.tree_nodes import Node, Unary, children, format_node, height, parse_node
from fedlp.allocation.search.variation import MAX_DEPTH, Vocabulary, crossover, mutate, random_expression
from fedlp.errors import AllocationError

SEEDS = st.integers(0, 10**6)
VAR = "minmax(wanda,log,var)"


def make_statistics(seed: int = 0, count: int = 6) -> list[LayerStatistics]:
    rng = np.random.default_rng(seed)
    return [
        LayerStatistics(
            f"l{i}",
            {key: float(rng.lognormal()) for key in KEYS},
            i / (count - 1),
            1 / count + 0.01 * i,
            float(rng.random()),
            float(rng.random()),
        )
        for i in range(count)
    ]


def shape(text: str, statistics: list[LayerStatistics]) -> list[float]:
    return list(evaluate(Expression(parse_node(text)), statistics).values())


def naive(node: Node, statistics: list[LayerStatistics]) -> list[float]:
    """The tree's values by recursion on its text, layer by layer."""
    text = format_node(node)
    name, _, rest = text.partition("(")
    below = [naive(child, statistics) for child in children(node)]
    if name in ("minmax", "rank"):
        key = tuple(rest[:-1].split(","))
        column = [layer.table[key] for layer in statistics]  # type: ignore[index]
        low, high = min(column), max(column)
        if name == "minmax":
            return [(x - low) / (high - low) for x in column]
        return [sum(y < x for y in column) / (len(column) - 1) for x in column]
    if name == "sensitivity":
        logs = [math.log(layer.sensitivity) for layer in statistics]
        return [(x - min(logs)) / (max(logs) - min(logs)) for x in logs]
    if name == "curve":
        bent = [layer.curve for layer in statistics]
        return [(x - min(bent)) / (max(bent) - min(bent)) for x in bent]
    if name in ("depth", "share"):
        return [getattr(layer, name) for layer in statistics]
    if not below:
        return [float(text)] * len(statistics)
    steps = {
        "neg": lambda x: -x,
        "sq": lambda x: x * x,
        "sqrt": lambda x: math.copysign(math.sqrt(abs(x)), x),
        "log": lambda x: math.copysign(math.log10(1 + 9 * abs(x)), x),
        "tanh": math.tanh,
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        "max": max,
    }
    return [steps[name](*values) for values in zip(*below, strict=True)]


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_random_functions_evaluate_as_plain_recursion_does(seed: int) -> None:
    statistics = make_statistics(seed)
    expression = random_expression(np.random.default_rng(seed))
    wanted = np.array(naive(expression.root, statistics))
    assert np.isfinite(wanted).all()
    if is_degenerate(expression, statistics):
        assert np.ptp(wanted) <= 1e-8
        with pytest.raises(AllocationError, match="does not tell these 6 layers apart"):
            evaluate(expression, statistics)
    else:
        found = evaluate(expression, statistics)
        wanted = (wanted - wanted.min()) / np.ptp(wanted)
        np.testing.assert_allclose(list(found.values()), wanted, atol=1e-7)
        assert list(found) == [layer.name for layer in statistics]


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_variation_keeps_types_depth_and_canonical_form(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pair = [random_expression(rng), random_expression(rng)]
    for _ in range(6):
        pair = [mutate(pair[0], rng), crossover(pair[1], pair[0], rng)]
        for expression in pair:
            assert height(expression.root) <= MAX_DEPTH
            assert canonical(expression.root) == expression.root
            assert parse_node(str(expression)) == expression.root
            assert expression.amplitude > 0
            is_degenerate(expression, make_statistics(seed))
            stored = yaml.safe_load(yaml.safe_dump(expression.to_config()))
            assert Expression.from_config(stored) == expression


def test_the_same_seed_varies_in_the_same_way() -> None:
    found = [mutate(random_expression(rng := np.random.default_rng(5)), rng) for _ in range(2)]
    assert found[0] == found[1]


def test_a_vocabulary_is_what_all_layers_have() -> None:
    statistics = make_statistics()
    poor = LayerStatistics("poor", {key: 1.0 for key in KEYS if key[0] == "magnitude"}, 0.5, 0.1)
    words = Vocabulary.of([*statistics, poor])
    assert {key[0] for key in words.keys} == {"magnitude"}
    assert words.scalars == ("depth", "share")
    rng = np.random.default_rng(1)
    for _ in range(100):
        is_degenerate(mutate(random_expression(rng, words), rng, words), [*statistics, poor])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"neg(neg({VAR}))", VAR),
        ("id(depth)", "depth"),
        (f"add({VAR},depth)", f"add(depth,{VAR})"),
        ("sq(neg(depth))", "sq(depth)"),
        ("tanh(neg(depth))", "neg(tanh(depth))"),
        ("max(depth,depth)", "depth"),
        ("add(1.0,mul(2.0,3.0))", "7.0"),
        ("neg(sqrt(neg(log(neg(depth)))))", "neg(sqrt(log(depth)))"),
    ],
)
def test_canonical_forms(text: str, wanted: str) -> None:
    assert format_node(canonical(parse_node(text))) == wanted


def test_values_by_hand() -> None:
    statistics = make_statistics()
    np.testing.assert_allclose(shape("depth", statistics), [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(shape("log(depth)", statistics)[1], math.log10(2.8))
    np.testing.assert_allclose(shape(" neg( sq(depth) ) ", statistics)[::-1], shape("neg(sq(depth))", statistics)[::-1])
    assert shape("max(depth, 0.5)", statistics)[:3] == [0, 0, 0]
    ranked = shape("rank(wanda,log,var)", statistics)
    assert sorted(ranked) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert np.argsort(ranked).tolist() == np.argsort(shape(VAR, statistics)).tolist()
    assert Expression(parse_node("depth"), 0.4, 2.0).amplitude_at(0.5) == pytest.approx(0.1)


def test_what_has_no_shape_is_degenerate() -> None:
    statistics = make_statistics()
    for text in ("1.0", "mul(0.0,depth)", "add(depth,neg(depth))", "mul(1e300,mul(1e300,depth))", "max(2.0,depth)"):
        assert is_degenerate(Expression(parse_node(text)), statistics)
    assert is_degenerate(Expression(parse_node("depth")), statistics[:1])
    assert not is_degenerate(Expression(parse_node("share")), statistics)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "position 1: the end where one of minmax"),
        ("add(depth)", r"position 10: '\)' where ',' must be"),
        ("cube(depth)", "position 1: 'cube' where one of"),
        ("minmax(wanda,log,varr)", "position 18: 'varr' where one of mean"),
        ("minmax(wanda,log,logmean)", "position 18: 'logmean' where"),
        ("depth depth", "position 7: 'depth' where the end must be"),
        ("add(depth,1..2)", "position 11: '1..2' where a number"),
        ("add(depth,1e999)", "position 11: '1e999' where a finite number"),
        ("neg(" * 400, "1600 characters"),
    ],
)
def test_bad_text_is_told_by_position(text: str, message: str) -> None:
    with pytest.raises(AllocationError, match=message):
        parse_node(text)


def test_bad_configs_and_missing_statistics_are_told() -> None:
    with pytest.raises(AllocationError, match="needs power"):
        Expression.from_config({"function": "depth", "amplitude": 1})
    with pytest.raises(AllocationError, match="must be numbers"):
        Expression.from_config({"function": "depth", "amplitude": "wide", "power": 1})
    with pytest.raises(AllocationError, match="amplitude=-1"):
        Expression.from_config({"function": "depth", "amplitude": -1, "power": 1})
    bare = [LayerStatistics("l0", {}, 0.0, 0.5), LayerStatistics("l1", {}, 1.0, 0.5)]
    with pytest.raises(AllocationError, match=r"layer l0: it has no wanda\.log\.var"):
        shape(VAR, bare)
    with pytest.raises(AllocationError, match="layer l0: its sensitivity has not been measured"):
        shape("sensitivity", bare)


def test_signatures_recognise_the_same_sparsities() -> None:
    assert signature({"b": 0.1, "a": 0.3004}) == signature({"a": 0.3, "b": 0.1001}) == (0.3, 0.1)
    assert signature({"a": -0.0001}) == (0.0,)
    assert signature({"a": 0.3, "b": 0.1}) != signature({"a": 0.1, "b": 0.3})


def test_deep_trees_that_were_read_can_be_crossed_with() -> None:
    deep = parse_node("sq(sq(sq(sq(depth))))")
    assert isinstance(deep, Unary)
    rng = np.random.default_rng(0)
    for _ in range(20):
        crossover(Expression(deep), random_expression(rng), rng)
        crossover(random_expression(rng), Expression(deep), rng)
        mutate(Expression(deep), rng)
