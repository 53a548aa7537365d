"""Messages of evaluations to Flower records and back: test sets, clients' own examples, batch norm statistics.

Decoders check all numbers and raise :class:`ProtocolError` naming the client and the fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlp.errors import ProtocolError, printable
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.downloads import Download
from fedlp.federation.wire.messages import (
    INSTRUCTION,
    METRICS,
    PARAMS,
    Sent,
    encode_params,
    read_submodel,
    read_values,
    write_submodel,
)
from fedlp.federation.wire.ranges import (
    LARGEST_METRIC,
    LARGEST_MOMENT,
    MOST_EXAMPLES,
    MOST_METRICS,
    MOST_STEPS,
    check_count,
    check_values,
    read_number,
    show,
)
from fedlp.federation.wire.record_access import read_config, read_integer, read_metrics, read_tensors, say_why
from fedlp.types import ClientProfile, EvaluationRequest, SubModel

RANGE = "range"
_SUMS = ("loss", "count")
_LONGEST_SUM = 10**6  # such as one number per class


# ---- evaluation on a test set
def encode_range(params: ArrayRecord, start: int, stop: int, submodel: SubModel, submodels: SubModels) -> RecordDict:
    """Return the records that request the metrics of a sub-model on test examples ``start`` to ``stop``."""
    record = ConfigRecord({"start": start, "stop": stop})
    write_submodel(record, submodel, submodels)
    return RecordDict({PARAMS: params, RANGE: record})


def decode_range(content: RecordDict, submodels: SubModels) -> tuple[SubModel, dict[str, Tensor], int, int]:
    """Return a sub-model, its tensors, and the range of test examples to evaluate."""
    record = read_config(content, RANGE)
    submodel = read_submodel(record, submodels)
    params = read_tensors(content, PARAMS, submodels.layout(submodel).signature())
    return submodel, params, read_integer(record, "start"), read_integer(record, "stop")


def encode_sums(sums: Mapping[str, float | list[float]]) -> RecordDict:
    """Return the records of additive evaluation sums."""
    return RecordDict({METRICS: MetricRecord(dict(sums))})


def decode_sums(content: RecordDict) -> dict[str, float | list[float]]:
    """Return additive evaluation sums, numbers and lists; ProtocolError for an invalid one. A loss may be NaN."""
    sums: dict[str, float | list[float]] = {}
    try:
        record = read_metrics(content, METRICS)
        if len(record) > MOST_METRICS:
            raise ValueError(f"{len(record)} sums came, more than {MOST_METRICS}")
        for key in (*_SUMS, *(key for key in record if key not in _SUMS)):
            value = record[key]
            is_list = isinstance(value, list) and len(value) <= _LONGEST_SUM and key not in _SUMS
            if not (isinstance(value, float) or is_list):
                raise ValueError(f"{printable(key, 40)} is {show(value)}, not a float or a list of floats")
            sums[key] = [float(item) for item in value] if isinstance(value, list) else float(value)
        if not 0 <= (count := record["count"]) <= MOST_STEPS:  # type: ignore[operator]
            raise ValueError(f"they are of {show(count)} predictions")
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"evaluation sums cannot be read: {say_why(error)}") from error
    return sums


# ---- evaluation on clients
def encode_evaluation_request(request: EvaluationRequest, sent: Sent, submodels: SubModels) -> RecordDict:
    """Return the records that request metrics on a client's own test examples."""
    record = ConfigRecord({"server-round": request.server_round, "client-id": request.client_id})
    write_submodel(record, request.submodel, submodels)
    if request.measures_statistics:
        record["measures-statistics"] = True
    return sent.with_record(record)


def decode_evaluation_request(
    content: RecordDict, submodels: SubModels, download: Download | None = None, stays_encoded: bool = False
) -> EvaluationRequest:
    """Return the request of a message; ProtocolError if malformed; options as of ``decode_instruction``."""
    try:
        record = read_config(content, INSTRUCTION)
        submodel = read_submodel(record, submodels)
        params, frozen = read_values(content, submodels.layout(submodel), download, stays_encoded)
        return EvaluationRequest(
            server_round=read_integer(record, "server-round"),
            client_id=read_integer(record, "client-id"),
            submodel=submodel,
            params=params,
            frozen=frozen,
            measures_statistics=bool(record.get("measures-statistics", False)),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"the server's request to evaluate cannot be read: {say_why(error)}") from error


def encode_client_sums(sums: Mapping[str, float | list[float]], num_examples: int) -> RecordDict:
    """Return the records of a client's evaluation sums, and their number of examples."""
    return RecordDict({METRICS: MetricRecord({"num-examples": num_examples, **sums})})


def decode_client_sums(
    content: RecordDict,
    lengths: Mapping[str, int],
    who: str,
    most_examples: int = MOST_EXAMPLES,
    most_predictions: float = math.inf,
) -> tuple[dict[str, float | list[float]], int]:
    """Return a client's evaluation sums, and their number of examples.

    Parameters
    ----------
    lengths : mapping from name to int
        Length of each sum of the task; 0 for a scalar.
    most_examples : int
        Test examples of the client, as its profile says.
    most_predictions : float
        Most predictions of an example.

    Raises
    ------
    ProtocolError
        If the sums are not the task's, or a number is not finite or out of range.
    """
    try:
        record = read_metrics(content, METRICS)
        num_examples = check_count(record["num-examples"], most_examples, who)
        if wrong := sorted({*record} ^ {*lengths, "num-examples"}):
            raise ValueError(f"{printable(wrong[0], 40)} is {'unexpected' if wrong[0] in record else 'missing'}")
        sums = {name: _read_sum(name, record[name], length) for name, length in lengths.items()}
        most = min(MOST_STEPS, num_examples * most_predictions)
        if not isinstance(count := sums["count"], float) or not 1 <= count <= most:
            raise ValueError(f"they are of {show(record['count'])} predictions")
        for name, value in sums.items():
            if name.endswith(".count") and isinstance(value, float) and value < 0:
                raise ValueError(f"{name} is {show(value)}, a negative count")
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: its evaluation sums cannot be read: {say_why(error)}") from error
    return sums, num_examples


def _read_sum(name: str, value: object, length: int) -> float | list[float]:
    """Return one sum, whose numbers are finite and in range."""
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) != bool(length) or len(items) != max(length, 1):
        raise ValueError(f"{name} is {show(value)}, not {length or 'one'} numbers")
    numbers = [read_number(item, -LARGEST_METRIC, LARGEST_METRIC) for item in items]
    if None in numbers:
        raise ValueError(f"{name} holds {show(items[numbers.index(None)])}, not a finite number in range")
    found = [number for number in numbers if number is not None]
    return found if length else found[0]


# ---- statistics of batch norms
def encode_submodel(sent: Sent, submodel: SubModel, submodels: SubModels) -> RecordDict:
    """Return the records of a sub-model alone."""
    record = ConfigRecord()
    write_submodel(record, submodel, submodels)
    return sent.with_record(record or None)


def decode_submodel(
    content: RecordDict, submodels: SubModels, download: Download | None = None
) -> tuple[SubModel, dict[str, Tensor]]:
    """Return a sub-model and its tensors; ``download`` as of :func:`~fedlp.federation.wire.messages.read_values`."""
    submodel = read_submodel(read_config(content, INSTRUCTION), submodels) if INSTRUCTION in content else SubModel()
    return submodel, read_values(content, submodels.layout(submodel), download)[0]


def encode_statistics(params: Mapping[str, Tensor], num_examples: int) -> RecordDict:
    """Return the records of a client's measured batch norm statistics."""
    return RecordDict({PARAMS: encode_params(params), METRICS: MetricRecord({"num-examples": num_examples})})


def decode_statistics(
    content: RecordDict, profile: ClientProfile, submodel: SubModel, submodels: SubModels
) -> tuple[dict[str, Tensor], int]:
    """Return a client's statistics and their number of examples; ProtocolError if they are impossible."""
    who = f"client {profile.client_id}"
    names = frozenset(name for name in submodels.statistics if submodels.spec.tensors[name].dtype.is_floating_point)
    try:
        num_examples = check_count(read_metrics(content, METRICS)["num-examples"], profile.num_examples, who)
        params = read_tensors(content, PARAMS, submodels.layout(submodel).signature(names))
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"{who}: its statistics cannot be read: {say_why(error)}") from error
    variances = {name: tensor for name, tensor in params.items() if name.endswith("running_var")}
    check_values({name: tensor for name, tensor in params.items() if name not in variances}, who)
    check_values(variances, who, LARGEST_MOMENT)
    for name, tensor in variances.items():
        if bool((tensor < 0).any()):
            raise ProtocolError(f"{who}: {name} holds negative variances")
    return params, num_examples
