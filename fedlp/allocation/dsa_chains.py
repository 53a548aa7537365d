r"""DSA's chains (Li et al., NeurIPS 2024): ``W:(STICK..)-(DEFORM)-(POST..)-(LAMBDA)``.

All elements of a layer, as one vector, go through element-wise operations, one reduction and further operations to one
score f. With z the scores brought to [0, 1] over the layers (min-max), the sparsities are

.. math:: s_i = S + 2\Lambda (z_i - \bar z), \qquad \Lambda = 0.08,

so that a higher score means more sparse. The meaning of each operation is that of the authors' code
(github.com/lliai/DSA, ``lib/autolayer.py``), not of the paper's table: LOG and ABSLOG take elements that have no
logarithm as 1, variances are unbiased, ENTROPY leaves out negative elements, a final vector is
averaged. LAMBDA is unused there, and here. The code modifies its argument; this one does not.

Deviations
----------
* asin and acos: where an argument lies outside [-1, 1], the arguments of all layers are divided by the largest, which
  keeps their order. The function that the authors publish, asin(atan(Var log M)), leaves its domain where the
  variance exceeds tan 1 = 1.56; their code then takes the NaN as 0, and prunes such a layer least.
* GEOMETRIC_MEAN is computed with logarithms: the product of a layer's elements underflows.
* A score that is not finite is an error and names the operation; the code takes NaN as 0 and infinity as -1.

With ``literal=True`` all three are as in the code, in the elements' own precision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlp.allocation.dsa_operations import (
    DEFORMS,
    MATRIX_ONLY,
    POSTS,
    STICKS,
    Array,
    DomainError,
    Step,
    geometric_mean_by_logs,
)
from fedlp.allocation.layer_metrics import min_max
from fedlp.errors import AllocationError

PUBLISHED = "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)"  # LLaMA-1-7B, Wanda, 70 %
AMPLITUDE = 0.16  # 2 Λ
_FORM = re.compile(r"W:\(([^()]*)\)-\(([^()]*)\)-\(([^()]*)\)(?:-\(([^()]*)\))?")


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain; ``lamda`` is the unused LAMBDA of its text."""

    stick: tuple[str, ...]
    deform: str
    post: tuple[str, ...]
    lamda: int | None = None

    def __str__(self) -> str:
        tail = "" if self.lamda is None else f"-({self.lamda})"
        return f"W:({','.join(self.stick)})-({self.deform})-({','.join(self.post)}){tail}"


def parse_chain(text: str) -> Chain:
    """Return the chain of a text in the authors' form.

    Raises
    ------
    AllocationError
        If it is not of that form, or has an unknown operation; names the operation and its position.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise AllocationError(f"chain {text!r}: it must be of the form W:(STICK,..)-(DEFORM)-(POST,..)-(LAMBDA)")
    stages = [tuple(part.split(",")) if part else () for part in match.groups()[:3]]
    for stage, names, known, start in zip(
        ("STICK", "DEFORM", "POST"), stages, (STICKS, DEFORMS, POSTS), map(match.start, (1, 2, 3)), strict=True
    ):
        for place, name in enumerate(names):
            if name not in known:
                position = start + sum(len(earlier) + 1 for earlier in names[:place]) + 1
                raise AllocationError(
                    f"chain {text!r}, position {position}: {name!r} is no {stage} operation; there are "
                    f"{' '.join(known)}"
                )
    if len(stages[1]) != 1:
        raise AllocationError(f"chain {text!r}: it has {len(stages[1])} DEFORM operations, and must have one")
    if match[4] is not None and not match[4].isdecimal():
        raise AllocationError(f"chain {text!r}, position {match.start(4) + 1}: LAMBDA must be a whole number")
    return Chain(stages[0], stages[1][0], stages[2], None if match[4] is None else int(match[4]))


def chain_scores(chain: Chain, elements: Mapping[str, Array], literal: bool = False) -> dict[str, float]:
    """Return the score f of each layer; the higher, the more is removed.

    Parameters
    ----------
    elements : mapping from layer name to array
        Elements of any shape; the published chains read Wanda's, ``metrics.wanda_elements``.
    literal : bool
        Without this module's deviations from the authors' code.

    Raises
    ------
    AllocationError
        If an operation cannot take its input, or a score is not finite; names operation and layer.
    """
    if chain.deform in MATRIX_ONLY:
        raise AllocationError(
            f"{chain}: {chain.deform} takes a matrix, but a layer's elements come as one vector; choose another DEFORM"
        )
    if not elements:
        raise AllocationError(f"{chain}: there are no layers to score")
    names = list(elements)
    values = [_vector(name, array, literal) for name, array in elements.items()]
    blamed: dict[str, str] = {}
    with np.errstate(all="ignore"):
        for op, step in _steps(chain, literal):
            if op in ("ASIN", "ACOS") and not literal:
                values = _within_domain(values)
            values = [_taken(chain, name, step, value) for name, value in zip(names, values, strict=True)]
            for name, value in zip(names, values, strict=True):
                if not np.isfinite(value).all():
                    blamed.setdefault(name, op)
        scores = {name: float(np.mean(value)) for name, value in zip(names, values, strict=True)}
    for name, score in scores.items():
        if not np.isfinite(score):
            if not literal:
                raise AllocationError(f"{chain}: {blamed.get(name, 'the mean')} gives layer {name} a score of {score}")
            scores[name] = 0.0 if np.isnan(score) else -1.0
    return scores


def chain_shape(chain: Chain, elements: Mapping[str, Array], literal: bool = False) -> dict[str, float]:
    """Return the shape z of a chain, in [0, 1]; raise AllocationError also if all layers score the same."""
    scores = chain_scores(chain, elements, literal)
    if max(scores.values()) - min(scores.values()) <= 1e-12 * max(map(abs, scores.values())):
        raise AllocationError(f"{chain}: it does not tell these {len(scores)} layers apart; use another one")
    return dict(zip(scores, min_max(list(scores.values())).tolist(), strict=True))


def _vector(name: str, array: Array, literal: bool) -> Array:
    values = np.asarray(array).ravel()
    if not literal or values.dtype.kind != "f":
        values = values.astype(np.float64)
    if not values.size or not np.isfinite(values).all():
        raise AllocationError(f"layer {name}: its elements must be finite numbers, and at least one")
    return values


def _within_domain(values: Sequence[Array]) -> list[Array]:
    top = max(float(np.abs(value).max()) for value in values)
    return [value / top for value in values] if top > 1 else list(values)


def _steps(chain: Chain, literal: bool) -> list[tuple[str, Step]]:
    deform = DEFORMS[chain.deform] if literal or chain.deform != "GEOMETRIC_MEAN" else geometric_mean_by_logs
    sticks, posts = [(op, STICKS[op]) for op in chain.stick], [(op, POSTS[op]) for op in chain.post]
    return [*sticks, (chain.deform, deform), *posts]


def _taken(chain: Chain, name: str, step: Step, value: Array) -> Array:
    try:
        return step(value)
    except DomainError as error:
        raise AllocationError(f"{chain}: layer {name}: {error}") from error


# ------------------------------------------------------------------------------------------------------------ variation
def random_chain(rng: np.random.Generator) -> Chain:
    """Return a chain as the authors draw them: up to two STICK, one DEFORM, one or two POST operations."""
    stick, post = rng.integers(3), rng.integers(1, 3)
    return Chain(
        tuple(rng.choice(list(STICKS), stick).tolist()),
        str(rng.choice(list(DEFORMS))),
        tuple(rng.choice(list(POSTS), post).tolist()),
    )


def mutate_chain(chain: Chain, rng: np.random.Generator) -> Chain:
    """Return a chain with one of the three stages redrawn."""
    stage = rng.integers(3)
    return _spliced([random_chain(rng) if place == stage else chain for place in range(3)])


def cross_chains(one: Chain, other: Chain, rng: np.random.Generator) -> Chain:
    """Return a chain with each stage from either parent."""
    return _spliced([one if draw else other for draw in rng.integers(2, size=3)])


def _spliced(sources: Sequence[Chain]) -> Chain:
    return Chain(sources[0].stick, sources[1].deform, sources[2].post)
