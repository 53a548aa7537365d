"""Questions and sums go there and back; whatever no honest client could send is refused, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.oneshot import messages as wire
from fedlp.federation.oneshot import outliers
from fedlp.federation.oneshot.messages import Part, Question, Request
from fedlp.federation.oneshot.outliers import drop_outliers
from fedlp.federation.oneshot.server import most_votes
from fedlp.federation.wire import messages
from fedlp.pruning.kernels.hessian import Moments
from fedlp.types import Keep

PARTS = [
    Part("total", (5,)),
    Part("gram", (5, 5), symmetric=True),
    Part("cross", (3, 5)),
    Part("var", (2,), False, True),
]
AXES = {"hidden": 4, "a": 6, "b": 3}
Fault = Callable[[RecordDict], None]


def sums() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(20, 5, dtype=torch.float64)
    x[:, 2] = 0.0  # a unit that is never active
    return {"total": x.sum(0), "gram": x.T @ x, "cross": torch.randn(3, 5), "var": torch.tensor([0.0, 2.0])}


def decode(content: RecordDict, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
    return wire.decode_sums(content, PARTS, layer=2, most=9, dtype=dtype, who="client 4")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 1e-6)])
def test_sums_go_there_and_back_and_only_half_of_what_is_symmetric_travels(
    dtype: torch.dtype, tolerance: float
) -> None:
    sent = sums()
    content = wire.encode_sums(sent, PARTS, 2, 7, dtype)
    got, count = decode(content, dtype)
    gram = wire.unpack_symmetric(got["gram"], 5)
    assert count == 7
    assert all(value.dtype == torch.float64 for value in got.values())
    for name, value in {**got, "gram": gram}.items():
        expected = sent[name].tril() if name == "gram" else sent[name].to(torch.float64)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
    numbers = 5 + 15 + 15 + 2
    assert 0 <= messages.count_bytes(content) - numbers * dtype.itemsize <= 250


@pytest.mark.parametrize(("origin", "error"), [(100.0, 1e-4), (99.9, 1e-2)])
def test_measured_from_near_the_mean_float32_holds_what_varies(origin: float, error: float) -> None:
    torch.manual_seed(0)
    x = 100 + 0.01 * torch.randn(300, 8, dtype=torch.float64)
    by, parts = torch.full((8,), origin, dtype=torch.float64), [Part("total", (8,)), Part("gram", (8, 8), True)]

    def sent(origin: Tensor) -> Tensor:
        moments = Moments.empty(8)
        moments.add(x - origin)
        content = wire.encode_sums({"total": moments.total, "gram": moments.gram}, parts, 2, 7, torch.float32)
        got, _ = wire.decode_sums(content, parts, 2, 9, torch.float32, "client 4")
        return Moments(300, got["total"], wire.unpack_symmetric(got["gram"], 8)).shifted(-origin).hessian(True)

    expected = 2 * x.T.cov(correction=0)
    assert (sent(by) - expected).norm() < error * expected.norm()
    assert (sent(torch.zeros(8)) - expected).norm() > expected.norm(), "measured from 0, nothing is left"


def test_a_request_goes_there_and_back() -> None:
    changed = {"w": torch.randn(2, 3), "b": torch.randn(2)}
    signature = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in changed.items()]
    asked = Request(Question(wire.VOTE, 3, None, {"a": 4, "b": 1}), b"before", b"after", (1, 2), changed)
    got = wire.decode_request(wire.encode_request(asked, tuple(AXES)), wire.VOTE, tuple(AXES), lambda layers: signature)
    assert (got.question, got.base, got.state, got.layers) == (asked.question, b"before", b"after", (1, 2))
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in changed.items())
    measured = Request(Question(wire.MOMENTS, 1, torch.arange(3.0)), b"x", b"x")
    back = wire.decode_request(wire.encode_request(measured, tuple(AXES)), wire.MOMENTS, tuple(AXES), lambda layers: [])
    assert back.question.reference is not None
    assert back.question.reference.tolist() == [0.0, 1.0, 2.0]
    bare = wire.encode_request(Request(Question(wire.MOMENTS, 1), b"x", b"x"), tuple(AXES))
    assert wire.PARAMS not in bare
    assert wire.decode_request(bare, wire.MOMENTS, tuple(AXES), lambda layers: signature).layers == ()


def test_a_question_about_half_of_the_examples_goes_there_and_back() -> None:
    def there_and_back(half: int) -> Question:
        asked = wire.encode_request(Request(Question(wire.FISHER, half=half), b"x", b"x"), tuple(AXES))
        return wire.decode_request(asked, wire.FISHER, tuple(AXES), lambda layers: []).question

    assert [there_and_back(half).half for half in (0, 1, 2)] == [0, 1, 2]
    with pytest.raises(ProtocolError, match="there is no half 3"):
        there_and_back(3)


def put(name: str, value: object, index: tuple[int, ...] = (0,)) -> Fault:
    def fault(content: RecordDict) -> None:
        bad = sums()
        bad[name][index] = value  # type: ignore[assignment]
        content[wire.PARAMS] = wire.encode_sums(bad, PARTS, 2, 7, torch.float32)[wire.PARAMS]

    return fault


def answer(**values: int | str | bytes) -> Fault:
    def fault(content: RecordDict) -> None:
        for key, value in values.items():
            content.config_records[wire.ANSWER][key.replace("_", "-")] = value

    return fault


def misshapen(content: RecordDict) -> None:
    content[wire.PARAMS] = messages.encode_params({"all": torch.zeros(36)})


def missing(content: RecordDict) -> None:
    del content[wire.PARAMS]


def no_arrays(content: RecordDict) -> None:
    content[wire.PARAMS] = ConfigRecord({"a": 1})


def another_dtype(content: RecordDict) -> None:
    content[wire.PARAMS] = wire.encode_sums(sums(), PARTS, 2, 7, torch.float64)[wire.PARAMS]


def garbled(content: RecordDict) -> None:
    content[wire.PARAMS] = ArrayRecord({})


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (put("total", float("nan")), "tensor total holds NaN"),
        (put("gram", float("inf"), (3, 3)), "tensor gram holds NaN or infinite"),
        (put("gram", -1.0, (3, 3)), "gram have a negative diagonal entry"),
        (put("gram", 1e6, (3, 1)), "gram have an entry that no data could give"),
        (put("gram", 1e-3, (4, 2)), "gram have an entry that no data could give"),
        (put("var", -0.5), "var has a negative entry"),
        (answer(layer=1), "the answer is about layer 1, not 2"),
        (answer(num_examples=-3), r"num-examples is -3, not a count in \[1, 9\]"),
        (answer(num_examples=0), "num-examples is 0"),
        (answer(num_examples=10), "num-examples is 10"),
        (answer(num_examples="7"), "num-examples is '7', not an integer"),
        (misshapen, "that are not the"),
        (missing, "record or key 'params' is missing"),
        (no_arrays, "holds no arrays"),
        (another_dtype, r"arrays \['float64'\] came"),
        (garbled, r"arrays \[\] came"),
    ],
)
def test_what_no_honest_client_sends_is_refused(fault: Fault, words: str) -> None:
    content = wire.encode_sums(sums(), PARTS, 2, 7, torch.float32)
    fault(content)
    with pytest.raises(ProtocolError, match=f"^client 4: .*{words}"):
        decode(content)


def indefinite() -> Tensor:
    """Return a matrix whose every entry is in bounds, but which is not positive semi-definite."""
    gram = torch.full((5, 5), -0.9)
    return gram.fill_diagonal_(1.0)


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        ({"gram": indefinite(), "total": torch.zeros(5)}, "are not positive semi-definite"),
        ({"total": 30 * sums()["total"]}, "are too small for the sum of the inputs"),
        ({"gram": torch.eye(5), "total": torch.full((5,), 4.0)}, "are not positive semi-definite"),  # 5 x 16 / 21 > 1
    ],
)
def test_moments_that_no_data_could_give_are_refused(spoilt: dict[str, Tensor], words: str) -> None:
    parts = [Part("total", (5,)), Part("gram", (5, 5), symmetric=True, total="total", vectors=3)]
    honest, bad = (wire.encode_sums(sent, parts, 2, 7, torch.float32) for sent in (sums(), {**sums(), **spoilt}))
    wire.decode_sums(honest, parts, 2, 9, torch.float32, "client 4")
    with pytest.raises(ProtocolError, match=f"client 4: .*{words}"):
        wire.decode_sums(bad, parts, 2, 9, torch.float32, "client 4")


@pytest.mark.parametrize("tokens", [3, 40, 400])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_moments_of_any_data_pass_after_rounding(tokens: int, mean: float, scale: float) -> None:
    torch.manual_seed(0)
    x = scale * (mean + torch.randn(tokens, 60, dtype=torch.float64))
    parts = [
        Part("total", (60,)),
        Part("gram", (60, 60), symmetric=True, total="total", vectors=tokens),
        Part("squares", (60,), nonnegative=True, total="total", vectors=tokens),
    ]
    sent = {"total": x.sum(0), "gram": x.T @ x, "squares": x.square().sum(0)}
    wire.decode_sums(wire.encode_sums(sent, parts, 2, 1, torch.float32), parts, 2, 1, torch.float32, "client 4")


# ---- outliers
def kept(sizes: list[float], parts: list[Part] | None = None, kind: str = wire.MOMENTS) -> list[int]:
    """Return which clients' answers are used, from the factors that their sums are multiplied by."""
    rejected: list[int] = []
    packed = {**sums(), "gram": sums()["gram"][torch.ones(5, 5, dtype=torch.bool).tril()]}
    answers = [(number, {name: value * size for name, value in packed.items()}, 7) for number, size in enumerate(sizes)]
    used = list(drop_outliers(iter(answers), kind, parts or PARTS, lambda client_id, _: rejected.append(client_id)))
    assert len(used) + len(rejected) == len(sizes)
    return [number for number in range(len(sizes)) if number not in rejected]


def test_sums_out_of_proportion_are_left_out() -> None:
    assert kept([1.0, 2.0, 0.5, 99.0]) == [0, 1, 2, 3]
    assert kept([150.0, 1.0, 2.0, 0.5]) == [1, 2, 3]
    assert kept([1e12, 1.0, 0.5]) == [1, 2]
    assert kept([1e3, 1.0, 2.0, 0.5], kind=wire.FISHER) == [0, 1, 2, 3], "gradients vanish where a model is right"
    assert kept([1e7, 1.0, 2.0, 0.5], kind=wire.FISHER) == [1, 2, 3]
    assert kept([0.0, 0.0, 0.0, 5.0]) == [0, 1, 2, 3], "the median tells nothing"
    assert kept([1.0, 1e12]) == [0, 1], "of two, nobody knows which is wrong"


def test_answers_are_held_back_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "HELD_BYTES", 1)
    held: list[int] = []

    def answers() -> Iterator[tuple[int, dict[str, Tensor], int]]:
        for number in range(50):
            held.append(number)
            yield number, {"total": torch.ones(5)}, 7

    used = drop_outliers(answers(), wire.MOMENTS, PARTS[:1], lambda *_: None)
    for number, _ in enumerate(used):
        assert len(held) - number <= 4


def test_votes_are_checked_and_counted() -> None:
    kept = {"a": 2, "b": 3}
    votes = []
    for units in ([0, 5], [1, 5], [1, 3]):
        index = torch.tensor(units).numpy()
        sent = {"a": Keep.from_indices(index, 6), "b": Keep.full(3)}
        votes.append(wire.decode_vote(wire.encode_vote(sent, tuple(AXES), 3), kept, AXES, 9, "client 4")[0])
        assert votes[-1] == sent
    ballots = [wire.ballots(vote) for vote in votes]

    def most(*some: int) -> Keep:
        total = {name: sum((ballots[i][name] for i in some), torch.zeros(size)) for name, size in (("a", 6), ("b", 3))}
        wire.check_ballots(total, kept, len(some), "the sum")
        return most_votes(total, kept)["a"]

    assert most(0, 1, 2) == Keep.from_indices(torch.tensor([1, 5]).numpy(), 6)
    assert most(0, 2) == Keep.first(2, 6), "equal votes: the lower index stays"
    with pytest.raises(ProtocolError, match="the vote keeps 2 units of a, not 1"):
        wire.decode_vote(wire.encode_vote(votes[0], tuple(AXES), 3), {"a": 1, "b": 3}, AXES, 9, "client 4")
    with pytest.raises(ProtocolError, match="the vote keeps 0 units of b, not 3"):
        wire.decode_vote(wire.encode_vote({"a": votes[0]["a"]}, tuple(AXES), 3), kept, AXES, 9, "client 4")


@pytest.mark.parametrize("votes", [[3.0, 1, 0], [2, 2, -1], [2, 2, 1], [2, 1, 0]])
def test_sums_that_are_no_votes_are_refused(votes: list[float]) -> None:
    """Of two clients, two units each."""
    with pytest.raises(ProtocolError, match="the votes on a are not those of 2 clients for 2 units"):
        wire.check_ballots({"a": torch.tensor(votes)}, {"a": 2}, 2, "the sum of 2 clients")


def test_a_lacking_client_says_so() -> None:
    assert wire.is_lack(wire.encode_lack())
    assert not wire.is_lack(wire.encode_sums(sums(), PARTS, 2, 7, torch.float32))
    assert not wire.is_lack(RecordDict())
