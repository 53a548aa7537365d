"""DSA's chains mean what the authors' code means: all of them, against a plain twin in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from fedlp.allocation.dsa_chains import (
    PUBLISHED,
    Chain,
    chain_scores,
    chain_shape,
    cross_chains,
    mutate_chain,
    parse_chain,
)
from fedlp.allocation.dsa_chains import random_chain as draw_chain
from fedlp.allocation.dsa_operations import DEFORMS, MATRIX_ONLY, POSTS, STICKS
from fedlp.errors import AllocationError

Op = Callable[[Tensor], Tensor]


def filled(x: Tensor, mask: Tensor) -> Tensor:
    x = x.clone()
    x[mask] = 1
    return x


def standardised(x: Tensor) -> Tensor:
    return ((x - x.mean()) / x.std()).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def entropy(x: Tensor) -> Tensor:
    valid = x[~x.isnan() & (x >= 0)]
    return Categorical(probs=valid / valid.sum()).entropy() if len(valid) else torch.tensor(math.nan)


def refuse(x: Tensor) -> Tensor:
    raise ValueError(f"{x.ndim} dimensions")


STICK: dict[str, Op] = {
    "NO_OP": lambda x: x,
    "ABS": torch.abs,
    "LOG": lambda x: (filled(x, x <= 0) + 1e-6).log(),
    "ABSLOG": lambda x: filled(x, x == 0).abs().log(),
    "POW": lambda x: x**2,
    "EXP": torch.exp,
    "NORMALIZE": standardised,
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "MMS": lambda x: (x - x.min()) / (x.max() - x.min() + 1e-9),
}
DEFORM: dict[str, Op] = {
    "NO_OP": lambda x: x,
    "GRAM": refuse,
    "CORREF": refuse,
    "DIAGONAL": torch.diagonal,
    "FROBENIUS_NORM": torch.linalg.vector_norm,
    "L1_NORM": lambda x: x.abs().sum() / x.numel(),
    "DETERMINANT": torch.linalg.det,
    "RANK": torch.linalg.matrix_rank,
    "GEOMETRIC_MEAN": lambda x: x.prod() ** (1 / x.numel()),
    "MEAN": torch.mean,
    "VAR": torch.var,
    "STD": torch.std,
    "SLOGDET": lambda x: torch.linalg.slogdet(x)[1],
    "ENTROPY": entropy,
}
POST: dict[str, Op] = {
    "NO_OP": lambda x: x,
    "LOG": torch.log,
    **{name: getattr(torch, name.lower()) for name in POSTS if name not in ("NO_OP", "LOG", "SOFTPLUS")},
    "SOFTPLUS": torch.nn.functional.softplus,
}


def twin(chain: Chain, elements: np.ndarray) -> float | None:
    """What the authors' code makes of one layer; None where it raises."""
    x = torch.tensor(elements)
    try:
        for op in [*(STICK[name] for name in chain.stick), DEFORM[chain.deform], *(POST[name] for name in chain.post)]:
            x = op(x)
    except (ValueError, RuntimeError, IndexError):
        return None
    value = float(x.mean())
    return 0.0 if math.isnan(value) else -1.0 if math.isinf(value) else value


def every_chain() -> Iterator[Chain]:
    """Yield all chains of up to one operation per stage, and pairs in one stage beside fixed others."""
    for stick in [(), *((name,) for name in STICK)]:
        for deform, post in product(DEFORM, POST):
            yield Chain(stick, deform, (post,), 8)
    for pair in product(STICK, repeat=2):
        yield from (Chain(pair, deform, ("NO_OP",)) for deform in ("VAR", "ENTROPY", "NO_OP", "GEOMETRIC_MEAN"))
    for pair in product(POST, repeat=2):
        yield from (Chain(("ABSLOG",), deform, pair, 7) for deform in ("VAR", "MEAN", "NO_OP"))


def make_elements(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {f"l{i}": rng.lognormal(-0.5, 0.3 + 0.5 * i, 40 + 10 * i) for i in range(4)}
    found["l0"][:3] = 0.0
    return found


@cache
def all_twins(chain: Chain) -> dict[str, float | None]:
    """Return the twin's scores, without layers in which a change in the twelfth digit of the elements changes them."""
    found = {}
    for name, array in make_elements().items():
        score = twin(chain, array)
        noise = np.random.default_rng(1).normal(0, 1e-12, (2, len(array)))
        moved = [twin(chain, array * (1 + row)) for row in noise]
        if score is None or all(other is not None and same(other, score) for other in moved):
            found[name] = score
    return found


def same(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-8)


@pytest.mark.slow
def test_every_chain_parses_and_means_what_the_code_means() -> None:
    elements = make_elements()
    refused, compared = 0, 0
    for chain in every_chain():
        assert parse_chain(str(chain)) == chain
        wanted = all_twins(chain)
        if None in wanted.values():
            refused += 1
            with pytest.raises(AllocationError, match=rf"{chain.deform}"):
                chain_scores(chain, elements, literal=True)
            continue
        found = chain_scores(chain, elements, literal=True)
        for name, value in wanted.items():
            assert value is not None
            compared += 1
            assert same(found[name], value), f"{chain} {name}: {found[name]}, not {value}"
    assert refused >= 6 * 11 * 13
    assert compared > 0.9 * len(elements) * (len(list(every_chain())) - refused)


def test_repaired_chains_differ_only_where_the_code_gives_no_number() -> None:
    elements = make_elements()
    for chain in every_chain():
        wanted = all_twins(chain)
        if None in wanted.values() or len(wanted) < len(elements):
            continue
        try:
            found = chain_scores(chain, elements)
        except AllocationError:
            assert {0.0, -1.0} & set(wanted.values()), str(chain)
            continue
        assert all(math.isfinite(score) for score in found.values())
        if not {"ASIN", "ACOS"} & set(chain.post) and chain.deform != "GEOMETRIC_MEAN":
            assert all(value is not None and same(found[name], value) for name, value in wanted.items()), str(chain)


def test_the_tables_are_the_published_ones() -> None:
    assert (len(STICKS), len(DEFORMS), len(POSTS)) == (10, 14, 13)
    assert set(STICKS) == set(STICK)
    assert set(DEFORMS) == set(DEFORM)
    assert set(POSTS) == set(POST)


def test_the_published_best_function_stays_in_its_domain_and_keeps_the_order_of_its_variances() -> None:
    """Log standard deviations from 1 to 2: variances above tan 1, where the code gives 0 for all layers."""
    rng = np.random.default_rng(2)
    elements = {f"l{i}": rng.lognormal(0, 1.4 + 0.3 * i, 400) for i in range(5)}
    chain = parse_chain(PUBLISHED)
    assert set(chain_scores(chain, elements, literal=True).values()) == {0.0}
    found = chain_shape(chain, elements)
    variances = [np.log(array).var() for array in elements.values()]
    assert np.argsort(list(found.values())).tolist() == np.argsort(variances).tolist()
    assert min(found.values()) == 0
    assert max(found.values()) == 1


def test_the_published_best_function_is_untouched_inside_its_domain() -> None:
    rng = np.random.default_rng(3)
    elements = {f"l{i}": rng.lognormal(0, 0.3 + 0.2 * i, 200) for i in range(4)}
    found = chain_scores(parse_chain(PUBLISHED), elements)
    for name, array in elements.items():
        assert found[name] == pytest.approx(math.asin(math.atan(np.log(array).var(ddof=1))))
    assert found == pytest.approx(chain_scores(parse_chain(PUBLISHED), elements, literal=True))


def test_geometric_means_of_many_elements_do_not_underflow() -> None:
    elements = {"a": np.full(5000, 1e-3, dtype=np.float32), "b": np.full(5000, 1e-2, dtype=np.float32)}
    chain = parse_chain("W:()-(GEOMETRIC_MEAN)-(NO_OP)-(9)")
    assert set(chain_scores(chain, elements, literal=True).values()) == {0.0}
    assert chain_scores(chain, elements) == pytest.approx({"a": 1e-3, "b": 1e-2}, rel=1e-6)
    assert chain_scores(chain, {"a": [-4.0, -9.0]}) == pytest.approx({"a": 6.0})


def test_elements_stay_as_they_were() -> None:
    elements = make_elements()
    before = {name: array.copy() for name, array in elements.items()}
    chain_scores(parse_chain("W:(LOG,ABSLOG)-(STD)-(ABS)-(7)"), elements)
    assert all((elements[name] == before[name]).all() for name in elements)


@pytest.mark.parametrize("op", MATRIX_ONLY)
def test_reductions_of_matrices_parse_and_say_why_they_fail(op: str) -> None:
    chain = parse_chain(f"W:(ABS)-({op})-(SIN)-(7)")
    with pytest.raises(AllocationError, match=f"{op} takes a matrix"):
        chain_scores(chain, make_elements())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W:(ABS,SQRT)-(VAR)-(SIN)-(7)", "position 8: 'SQRT' is no STICK"),
        ("W:(GRAM)-(VAR)-(SIN)-(7)", "position 4: 'GRAM' is no STICK"),
        ("W:(ABS)-(MEDIAN)-(SIN)-(7)", "position 10: 'MEDIAN' is no DEFORM"),
        ("W:(ABS)-(VAR)-(SIN,SOFTMAX)-(7)", "position 20: 'SOFTMAX' is no POST"),
        ("W:(ABS)-(VAR,STD)-(SIN)-(7)", "2 DEFORM operations"),
        ("W:(ABS)-()-(SIN)", "0 DEFORM operations"),
        ("W:(ABS)-(VAR)-(SIN)-(x)", "LAMBDA must be a whole number"),
        ("ABS-VAR-SIN", "must be of the form"),
        ("W:(ABS)-(VAR)", "must be of the form"),
    ],
)
def test_bad_chains_fail_at_parsing(text: str, message: str) -> None:
    with pytest.raises(AllocationError, match=message):
        parse_chain(text)


def test_what_gives_no_number_names_operation_and_layer() -> None:
    with pytest.raises(AllocationError, match="LOG gives layer a a score of nan"):
        chain_scores(parse_chain("W:()-(MEAN)-(LOG)-(7)"), {"a": [-1.0, -2.0]})
    with pytest.raises(AllocationError, match="does not tell these 2 layers apart"):
        chain_shape(parse_chain("W:(NORMALIZE)-(VAR)-(ABS)-(7)"), {"a": [1.0, 2.0, 4.0], "b": [1.0, 5.0, 7.0]})
    with pytest.raises(AllocationError, match="layer a: its elements must be finite"):
        chain_scores(parse_chain(PUBLISHED), {"a": [1.0, math.nan]})
    with pytest.raises(AllocationError, match="no layers"):
        chain_scores(parse_chain(PUBLISHED), {})


def test_drawn_chains_are_of_the_published_space() -> None:
    rng = np.random.default_rng(0)
    one, other = draw_chain(rng), draw_chain(rng)
    for _ in range(200):
        one, other = mutate_chain(one, rng), cross_chains(one, other, rng)
        for chain in (one, other):
            assert parse_chain(str(chain)) == chain
            assert len(chain.stick) <= 2
            assert 1 <= len(chain.post) <= 2
