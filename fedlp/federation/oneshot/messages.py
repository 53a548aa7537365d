"""Records of federated one-shot pruning: the only file with their keys, and the only decoder of their input.

Down: ``question`` (request, base and target state of the model; plans to judge), ``params`` (changes in between) and
``reference`` (origin of inputs). Up: ``answer`` (number of examples) and ``params`` (sums over these), or
the client's units, or that it lacks the base state. Of symmetric sums the lower triangle is sent, row by row.

Longer than other files: the only one that knows these keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedlp.errors import ProtocolError
from fedlp.federation.oneshot.moment_check import check_diagonal, check_gram
from fedlp.federation.wire.index_sets import decode_counts, decode_widths, encode_counts, encode_widths
from fedlp.federation.wire.messages import encode_params
from fedlp.federation.wire.packing import Signature, unpack_tensors
from fedlp.federation.wire.ranges import LARGEST_MOMENT, check_count, check_values
from fedlp.federation.wire.record_access import read_bytes, read_config, read_integer, read_tensors, say_why
from fedlp.types import Keep

QUESTION, ANSWER, PARAMS, REFERENCE = "question", "answer", "params", "reference"
MOMENTS, FISHER, NORMS, VOTE = "query.moments", "query.fisher", "query.norms", "query.vote"
JUDGE = "query.judge"
KINDS = (MOMENTS, FISHER, NORMS, VOTE, JUDGE)
MODEL = "query.model"  # no question: the model that questions are about, where it is not the initial one


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of sums over examples.

    Attributes
    ----------
    symmetric : bool
        Whether it is symmetric and positive semi-definite, (n, n).
    nonnegative : bool
        Whether it has no negative entry.
    total : str
        Part with the sum of the vectors behind these second moments or squares; empty if none.
    vectors : int
        Vectors per example; 0 if unknown.
    most : float
        Largest entry per example; infinite if only that of all sums holds.
    """

    name: str
    shape: tuple[int, ...]
    symmetric: bool = False
    nonnegative: bool = False
    total: str = ""
    vectors: int = 0
    most: float = math.inf

    @property
    def num_sent(self) -> int:
        """Count of encoded numbers."""
        return self.shape[0] * (self.shape[0] + 1) // 2 if self.symmetric else math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Question:
    """Question to every client.

    Attributes
    ----------
    kind : str
        One of ``KINDS``, the type of the message.
    layer : int
        The layer's number, for moments.
    reference : (n,) or None
        Origin of the inputs of the layer's readers, concatenated, for moments; float32.
    kept : mapping from layer name to int
        Number of kept units, for a vote.
    half : int
        0 for all examples of a client, 1 for every other one, 2 for the rest.
    plans : bytes
        Level of each layer's width of each plan to judge, a byte each, plan by plan.
    share : int
        Examples on which plans are judged, one of :class:`~fedlp.federation.oneshot.settings.Share`.
    passes : int
        Forward passes of an example; not sent.
    """

    kind: str
    layer: int = 0
    reference: Tensor | None = None
    kept: Mapping[str, int] = field(default_factory=dict)
    half: int = 0
    plans: bytes = b""
    share: int = 0
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Request:
    """Question about a model in one state, with the changes from another.

    Attributes
    ----------
    base, state : bytes
        Digests of the state that the client must have and of the requested state.
    layers : tuple of int
        Changed layers, in order.
    tensors : mapping
        Their new tensors.
    """

    question: Question
    base: bytes
    state: bytes
    layers: tuple[int, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


# ---- requests
def encode_request(request: Request, axes: Sequence[str], params: ArrayRecord | None = None) -> RecordDict:
    """Return the records of a request; ``params`` are its encoded tensors, which several clients may share."""
    record = ConfigRecord({"layer": request.question.layer, "base": request.base, "state": request.state})
    content = RecordDict({QUESTION: record})
    if request.question.kept:
        record["kept"] = encode_counts(request.question.kept, axes)
    if request.question.half:
        record["half"] = request.question.half
    if request.question.plans:
        record["plans"], record["share"] = request.question.plans, request.question.share
    if request.question.reference is not None:
        content[REFERENCE] = encode_params({REFERENCE: request.question.reference})
    if request.layers:
        record["layers"] = list(request.layers)
        content[PARAMS] = encode_params(request.tensors) if params is None else params
    return content


def decode_request(
    content: RecordDict, kind: str, axes: Sequence[str], signature: Callable[[Sequence[int]], Signature]
) -> Request:
    """Return a request; ``signature`` gives the tensors sent for each layer.

    Raises
    ------
    ProtocolError
        If a record is missing or malformed.
    """
    try:
        record = read_config(content, QUESTION)
        numbers = record.get("layers", [])
        layers = tuple(int(number) for number in numbers)  # type: ignore[union-attr]
        kept = decode_counts(read_bytes(record, "kept"), axes) if "kept" in record else {}
        half = read_integer(record, "half") if "half" in record else 0
        if half not in (0, 1, 2):
            raise ValueError(f"there is no half {half}")
        judged = (read_bytes(record, "plans"), read_integer(record, "share")) if "plans" in record else (b"", 0)
        question = Question(kind, read_integer(record, "layer"), _reference(content), kept, half, *judged)
        tensors = read_tensors(content, PARAMS, signature(layers)) if layers else {}
        return Request(question, read_bytes(record, "base"), read_bytes(record, "state"), layers, tensors)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ProtocolError(f"the server's question cannot be read: {say_why(error)}") from error


def base_of(content: RecordDict) -> bytes:
    """Return the digest of the state that a request starts from; ProtocolError if there is none."""
    try:
        return read_bytes(read_config(content, QUESTION), "base")
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"the server's question cannot be read: {say_why(error)}") from error


def _reference(content: RecordDict) -> Tensor | None:
    if REFERENCE not in content:
        return None
    arrays = content[REFERENCE]
    if not isinstance(arrays, ArrayRecord):
        raise ValueError(f"record {REFERENCE} holds no arrays")
    signature = [(REFERENCE, arrays["float32"].shape, torch.float32)]
    return unpack_tensors({name: array.data for name, array in arrays.items()}, signature)[REFERENCE]


# ---- sums
def encode_sums(
    sums: Mapping[str, Tensor], parts: Sequence[Part], layer: int, num_examples: int, dtype: torch.dtype
) -> RecordDict:
    """Return the records of a client's sums; of a symmetric one only the lower triangle is read."""
    answer = ConfigRecord({"layer": layer, "num-examples": num_examples})
    return RecordDict({ANSWER: answer, PARAMS: encode_params(pack_sums(sums, parts, dtype))})


def pack_sums(sums: Mapping[str, Tensor], parts: Sequence[Part], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return sums as they are sent: of symmetric ones the lower triangle."""
    packed = {}
    for part in parts:
        value = sums[part.name].to(dtype)
        packed[part.name] = value[_lower(len(value))] if part.symmetric else value
    return packed


def decode_sums(
    content: RecordDict, parts: Sequence[Part], layer: int, most: int, dtype: torch.dtype, who: str
) -> tuple[dict[str, Tensor], int]:
    """Return a client's sums, float64, symmetric ones as their lower triangle; and their number of examples.

    Raises
    ------
    ProtocolError
        Another layer; an example count outside [1, ``most``]; a missing or misshapen tensor; an entry that is not
        finite or beyond ``LARGEST_MOMENT``; a negative entry where there can be none; second moments that no data
        could give. (Their diagonal may have zeros: a unit may never be active.)
    """
    num_examples = _count(content, layer, most, who)
    try:
        signature = [(part.name, (part.num_sent,) if part.symmetric else part.shape, dtype) for part in parts]
        sums = {name: value.to(torch.float64) for name, value in read_tensors(content, PARAMS, signature).items()}
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: {say_why(error)}") from error
    check_sums(sums, parts, num_examples, who)
    return sums, num_examples


def check_sums(sums: Mapping[str, Tensor], parts: Sequence[Part], num_examples: int, who: str) -> None:
    """Raise ProtocolError where packed sums cannot be those of any data; see :func:`decode_sums`."""
    check_values(sums, who, LARGEST_MOMENT)
    for part in parts:
        total, vectors = sums.get(part.total), part.vectors * num_examples
        if part.symmetric:
            check_gram(sums[part.name], part.shape[0], total, vectors, part.name, who)
        elif part.nonnegative and total is not None:
            check_diagonal(sums[part.name], total, vectors, part.name, who)
        elif part.nonnegative and bool((sums[part.name] < 0).any()):
            raise ProtocolError(f"{who}: {part.name} has a negative entry")
        if bool((sums[part.name] > part.most * num_examples).any()):
            raise ProtocolError(f"{who}: {part.name} has an entry beyond {part.most:g} per example")


def unpack_symmetric(packed: Tensor, size: int) -> Tensor:
    """Return the (size, size) matrix of a packed lower triangle, zero above the diagonal."""
    matrix = packed.new_zeros(size, size)
    matrix[_lower(size)] = packed
    return matrix


def _lower(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril_()


# ---- votes
def encode_vote(widths: Mapping[str, Keep], axes: Sequence[str], num_examples: int) -> RecordDict:
    """Return the records of a client's vote: the units to keep."""
    record = ConfigRecord({"layer": 0, "num-examples": num_examples, "widths": encode_widths(widths, axes)})
    return RecordDict({ANSWER: record})


def decode_vote(
    content: RecordDict, kept: Mapping[str, int], axes: Mapping[str, int], most: int, who: str
) -> tuple[dict[str, Keep], int]:
    """Return a client's vote, and its examples; ProtocolError unless it has ``kept`` units of each layer."""
    num_examples = _count(content, 0, most, who)
    try:
        widths = decode_widths(read_bytes(read_config(content, ANSWER), "widths"), axes)
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: the vote cannot be read: {say_why(error)}") from error
    counts = {name: keep.count for name, keep in widths.items()}
    if counts != dict(kept):
        wrong = next((name for name in kept if counts.get(name) != kept[name]), next(iter(counts), "none"))
        raise ProtocolError(f"{who}: the vote keeps {counts.get(wrong, 0)} units of {wrong}, not {kept.get(wrong, 0)}")
    return widths, num_examples


def vote_parts(kept: Mapping[str, int], axes: Mapping[str, int]) -> list[Part]:
    """Return the parts of votes as sums: of each layer, how many clients keep each unit."""
    return [Part(name, (axes[name],), nonnegative=True) for name in sorted(kept)]


def ballots(vote: Mapping[str, Keep]) -> dict[str, Tensor]:
    """Return a client's vote as sums: 1 for each unit that it keeps, else 0; float64."""
    found = {}
    for name, keep in vote.items():
        found[name] = torch.zeros(keep.size, dtype=torch.float64)
        found[name][torch.from_numpy(keep.indices())] = 1.0
    return found


def check_ballots(sums: Mapping[str, Tensor], kept: Mapping[str, int], voters: int, who: str) -> None:
    """Raise ProtocolError where sums cannot be the votes of that many clients."""
    for name, votes in sums.items():
        if not bool(((votes >= 0) & (votes <= voters)).all()) or float(votes.sum()) != voters * kept[name]:
            raise ProtocolError(f"{who}: the votes on {name} are not those of {voters} clients for {kept[name]} units")


# ---- lacking states
def encode_lack() -> RecordDict:
    """Return the records of a client that lacks the base state of the request."""
    return RecordDict({ANSWER: ConfigRecord({"lacks": True})})


def is_lack(content: RecordDict) -> bool:
    """Return whether a client reports that it lacks the base state of the request."""
    record = content.get(ANSWER)
    return isinstance(record, ConfigRecord) and record.get("lacks") is True


def encode_taken() -> RecordDict:
    """Return the records of a client that has taken on the server's model."""
    return RecordDict({ANSWER: ConfigRecord({"taken": True})})


def is_taken(content: RecordDict) -> bool:
    """Return whether a client says that it has taken on the server's model."""
    record = content.get(ANSWER)
    return isinstance(record, ConfigRecord) and record.get("taken") is True


# ---- helpers
def _count(content: RecordDict, layer: int, most: int, who: str) -> int:
    try:
        record = read_config(content, ANSWER)
        found, num_examples = read_integer(record, "layer"), read_integer(record, "num-examples")
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: the answer cannot be read: {say_why(error)}") from error
    if found != layer:
        raise ProtocolError(f"{who}: the answer is about layer {found}, not {layer}")
    return check_count(num_examples, most, who)
