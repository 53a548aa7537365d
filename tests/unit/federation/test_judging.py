"""Plans go there and back; judgements that no honest client could send are refused, by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flwr.app import RecordDict

from fedlp.errors import DataError, ProtocolError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot.messages import Question, Request
from fedlp.federation.oneshot.outliers import drop_outliers
from fedlp.federation.oneshot.plans import RefitStates, decode_plans, encode_plans, judgement_parts
from fedlp.federation.oneshot.settings import OneShotSettings, Share
from fedlp.pruning.reader_layers import Method
from fedlp.types import PrunableLayer

LAYERS = [PrunableLayer(name, units, 1, units, (), (), 0.0) for name, units in (("a", 4), ("b", 1000))]
PARTS = judgement_parts(3, 7)


def test_a_plan_is_a_byte_per_layer() -> None:
    plans = [{"a": 4, "b": 1000}, {"a": 1, "b": 500}, {"a": 2, "b": 1}]
    data = encode_plans(plans, LAYERS)
    assert len(data) == 6
    found = decode_plans(data, LAYERS)
    assert found == [{"a": 4, "b": 992}, {"a": 1, "b": 496}, {"a": 2, "b": 1}]
    assert encode_plans(found, LAYERS) == data
    for wrong in (b"", data[:-1]):
        with pytest.raises(ValueError, match="are no plans of 2 layers"):
            decode_plans(wrong, LAYERS)


def test_a_question_names_what_a_client_must_hold() -> None:
    refits = {"a.order": torch.arange(4, dtype=torch.int32), "r.factor": torch.randn(6)}
    states = RefitStates(b"dense", LAYERS, refits)
    question = Question(wire.JUDGE, plans=encode_plans([{"a": 4, "b": 9}], LAYERS), share=Share.PART)
    signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in refits.items()]
    for has, layers in ((0, (0,)), (1, ())):
        sent = Request(question, states.names[has], states.name, layers, states.tensors(layers))
        got = wire.decode_request(wire.encode_request(sent, ()), wire.JUDGE, (), lambda _: signature)
        assert (got.base, got.state, got.layers) == (b"dense", states.name, layers)
        assert (got.question.plans, got.question.share) == (question.plans, Share.PART)
        assert got.tensors.keys() == (refits.keys() if layers else set())
    assert RefitStates(b"other", LAYERS, refits).name != states.name


def judgement(values: list[float], count: int = 5, dtype: torch.dtype = torch.float32) -> RecordDict:
    parts = judgement_parts(len(values), 7)
    return wire.encode_sums({"divergence": torch.tensor(values, dtype=torch.float64)}, parts, 0, count, dtype)


def read(content: RecordDict) -> list[float]:
    found, count = wire.decode_sums(content, PARTS, 0, 9, torch.float32, "client 4")
    assert count == 5
    return found["divergence"].tolist()


def test_a_judgement_goes_there_and_back() -> None:
    assert read(judgement([0.0, 1.5, 3.5e5])) == [0.0, 1.5, 3.5e5]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: judgement([1.0, float("nan"), 1.0]), "holds NaN or infinite values"),
        (lambda: judgement([1.0, float("inf"), 1.0]), "holds NaN or infinite values"),
        (lambda: judgement([1.0, -1e-3, 1.0]), "divergence has a negative entry"),
        (lambda: judgement([1.0, 3.6e5, 1.0]), "divergence has an entry beyond 70000 per example"),
        (lambda: judgement([1.0, 1.0, 1.0], count=-5), r"num-examples is -5, not a count in \[1, 9\]"),
        (lambda: judgement([1.0, 1.0, 1.0], count=10**6), "num-examples is 1000000"),
        (lambda: judgement([1.0, 1.0]), "bytes that are not the .* of 3 values"),
        (lambda: judgement([1.0] * 4), "bytes that are not the .* of 3 values"),
        (lambda: judgement([1.0] * 3, dtype=torch.float64), "float64.* came"),
        (wire.encode_taken, "cannot be read"),
    ],
)
def test_what_no_client_could_send_is_refused_by_name(make: Callable[[], RecordDict], words: str) -> None:
    with pytest.raises(ProtocolError, match=f"^client 4: .*{words}"):
        read(make())


def test_a_judgement_out_of_proportion_is_left_out() -> None:
    answers = [(n, {"divergence": torch.tensor([1.0, 2.0, 3.0]) * scale}, 5) for n, scale in enumerate((1, 50, 9e4, 2))]
    named: list[int] = []
    kept = list(drop_outliers(answers, wire.JUDGE, PARTS, lambda client_id, _: named.append(client_id)))
    assert named == [2]
    assert [float(sums["divergence"][0]) for sums, _ in kept] == [1.0, 50.0, 2.0]


@pytest.mark.parametrize(
    ("num_examples", "parts"),
    [(100, (32, 4, 8)), (44, (32, 4, 8)), (22, (16, 2, 4)), (4, (2, 1, 1)), (3, (1, 1, 1))],
)
def test_a_client_with_few_examples_divides_them(num_examples: int, parts: tuple[int, int, int]) -> None:
    assert OneShotSettings(Method(), examples=32, fitness_examples=4, held_out_examples=8).divide(num_examples) == parts


@pytest.mark.parametrize("wanted", [(2, 1, 97), (2, 97, 1), (1, 1, 1000)])
def test_every_share_has_an_example(wanted: tuple[int, int, int]) -> None:
    settings = OneShotSettings(Method(), examples=wanted[0], fitness_examples=wanted[1], held_out_examples=wanted[2])
    for count in range(3, sum(wanted) + 2):
        found = settings.divide(count)
        assert min(found) >= 1
        assert sum(found) == min(count, sum(wanted))
    with pytest.raises(DataError, match="a search needs 3 whole examples of a client; this one has 2"):
        settings.divide(2)
