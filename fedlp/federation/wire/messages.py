"""Instructions, updates and profiles to Flower records and back; record keys that other messages share.

Down: ``params`` (arrays), ``instruction`` (round, client, sub-model, uploads), and ``frozen`` (arrays) where frozen
tensors are encoded; ``params`` are as :class:`~fedlp.federation.wire.downloads.Download` has it. Up: ``params``,
``update``, ``metrics``, and ``scores`` on request, unless a client has too few examples for them. Only the kept slices
of the requested tensors are sent; index sets are runs or bitmaps, whichever is shorter. Decoders check everything
against the assignment and raise :class:`ProtocolError` naming the client and the fault.

Longer than other files: an update is checked against its instruction, and shares its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlp.allocation.budget.costs import given_limits
from fedlp.errors import ProtocolError, printable
from fedlp.federation.flower_compat import make_array, make_record
from fedlp.federation.submodels import SubModelLayout, SubModels
from fedlp.federation.wire.digests import digest_tensors
from fedlp.federation.wire.downloads import SERVER, Download
from fedlp.federation.wire.encoded_tensors import EncodedTensors
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.federation.wire.index_sets import (
    decode_counts,
    decode_names,
    decode_widths,
    encode_counts,
    encode_names,
    encode_widths,
)
from fedlp.federation.wire.packing import Signature, pack_tensors
from fedlp.federation.wire.ranges import (
    LARGEST_COST,
    LARGEST_METRIC,
    MOST_EXAMPLES,
    MOST_METRICS,
    check_count,
    check_values,
    read_number,
    show,
)
from fedlp.federation.wire.record_access import (
    read_bytes,
    read_config,
    read_integer,
    read_limit,
    read_metrics,
    read_tensors,
    say_why,
)
from fedlp.types import (
    Assignment,
    Budget,
    ClientProfile,
    ClientUpdate,
    InputNorms,
    Keep,
    SubModel,
    TrainInstruction,
)

PARAMS, FROZEN, INSTRUCTION = "params", "frozen", "instruction"
UPDATE, METRICS, PROFILE = "update", "metrics", "profile"
SCORES, INPUT_NORMS = "scores", "input-norms"
_EVIDENCE = {"unit_scores": "scored", "input_norms": "normed"}
CAPABILITIES = "query.capabilities"
TRAIN = "train"
EVALUATE = "evaluate.central"
EVALUATE_CLIENT = "evaluate.client"
STATISTICS = "query.statistics"
_BUDGET = {item.name: f"budget-{item.name.replace('_', '-')}" for item in fields(Budget)}


class Sent(NamedTuple):
    """Encoded values of one sub-model, which several clients may share.

    Attributes
    ----------
    params : ArrayRecord
        Its tensors, without frozen ones where they are in ``frozen`` or held.
    frozen : ArrayRecord or None
        Frozen tensors in the encoding of downloads; None where ``params`` has them as they are.
    digest : bytes
        Digest of the decoded frozen tensors that ``frozen`` holds.
    """

    params: ArrayRecord
    frozen: ArrayRecord | None = None
    digest: bytes = b""

    def with_record(self, record: ConfigRecord | None) -> RecordDict:
        """Return the records of a message: the values, and what they are for."""
        records: dict[str, ArrayRecord | ConfigRecord] = {PARAMS: self.params}
        if self.frozen is not None:
            records[FROZEN] = self.frozen
        if record is not None:
            records[INSTRUCTION] = record
        return make_record(RecordDict, records)


# ---- instructions
def encode_instruction(
    instruction: Assignment, params: ArrayRecord | Sent, submodels: SubModels, held: bytes = b""
) -> RecordDict:
    """Return the records of one instruction; ``params`` are its encoded tensors, which several clients may share.

    Parameters
    ----------
    held : bytes
        Digest of the frozen tensors, if ``params`` leaves them out because the client holds them.
    """
    sent = params if isinstance(params, Sent) else Sent(params)
    record = make_record(
        ConfigRecord,
        {
            "server-round": instruction.server_round,
            "client-id": instruction.client_id,
            "uploads": encode_names(instruction.uploads, submodels.names),
        },
    )
    write_submodel(record, instruction.submodel, submodels)
    if instruction.kept:
        record["kept"] = encode_counts(instruction.kept, tuple(submodels.widths.axes))
    if instruction.least:
        record["least"] = encode_counts(instruction.least, tuple(submodels.widths.axes))
    if instruction.returned:
        record["returned"] = encode_widths(instruction.returned, tuple(submodels.widths.axes))
    for name in sorted(instruction.evidence):
        record[_EVIDENCE[name]] = True
    if held:
        record["held"] = held
    if sent.digest:
        record["digest"] = sent.digest
    return sent.with_record(record)


def write_submodel(record: ConfigRecord, submodel: SubModel, submodels: SubModels) -> None:
    """Write a sub-model into a record; nothing for the whole model."""
    if submodel.depth is not None:
        record["depth"] = submodel.depth
    if submodel.widths:
        record["widths"] = encode_widths(submodel.widths, tuple(submodels.widths.axes))
    if submodel.nested_levels:
        record["nested-levels"] = list(submodel.nested_levels)


def read_submodel(record: ConfigRecord, submodels: SubModels) -> SubModel:
    """Return the sub-model of a record; ValueError if malformed."""
    levels = record.get("nested-levels", [])
    return SubModel(
        depth=read_integer(record, "depth") if "depth" in record else None,
        widths=decode_widths(read_bytes(record, "widths"), submodels.widths.axes) if "widths" in record else {},
        nested_levels=tuple(float(level) for level in levels),  # type: ignore[union-attr]
    )


Known = dict[tuple[object, ...], dict[str, Tensor]]
"""Tensors of earlier messages by the identity of their bytes, valid while those messages are."""


def decode_instruction(
    content: RecordDict,
    submodels: SubModels,
    known: Known | None = None,
    download: Download | None = None,
    stays_encoded: bool = False,
) -> TrainInstruction:
    """Return the instruction of a message, its tensors as read-only views into the message.

    Parameters
    ----------
    known : dict, optional
        Tensors of other messages, which messages of the same bytes share; filled here.
    download : Download, optional
        Encoding of downloads; all tensors as they are if absent.
    stays_encoded : bool
        Whether ``params`` leaves out frozen tensors that came encoded; they are checked all the same.

    Raises
    ------
    ProtocolError
        Where a record is missing or malformed, or frozen tensors are not those of their digest.
    """
    try:
        record = read_config(content, INSTRUCTION)
        client_id = read_integer(record, "client-id")
        returned = {}
        if "returned" in record:
            returned = decode_widths(read_bytes(record, "returned"), submodels.widths.axes)
        submodel = read_submodel(record, submodels)
        layout = submodels.layout(submodel)
        held = read_bytes(record, "held") if "held" in record else b""
        written = download or Download()
        sent = _read_frozen(content, layout, written)
        frozen = _check_frozen(sent, stays_encoded)
        encoded: Mapping[str, Tensor] = {}
        if sent is not None:
            encoded = sent.encoded
            if (digest_tensors(frozen) if frozen else sent.digest()) != read_bytes(record, "digest"):
                raise ProtocolError("the server's instruction: its frozen tensors are not those of their digest")
        names = layout.name_set - submodels.spec.frozen if held or encoded else None
        params = _read_shared(content, layout, names, {} if known is None else known, written)
        return TrainInstruction(
            server_round=read_integer(record, "server-round"),
            client_id=client_id,
            params={**params, **frozen} if frozen else params,
            held=held,
            frozen=encoded,
            submodel=submodel,
            uploads=decode_names(read_bytes(record, "uploads"), submodels.names),
            kept=decode_counts(read_bytes(record, "kept"), tuple(submodels.widths.axes)) if "kept" in record else {},
            returned=returned,
            evidence=frozenset(name for name, key in _EVIDENCE.items() if record.get(key, False)),
            least=decode_counts(read_bytes(record, "least"), tuple(submodels.widths.axes)) if "least" in record else {},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"the server's instruction cannot be read: {say_why(error)}") from error


def _read_frozen(content: RecordDict, layout: SubModelLayout, download: Download) -> EncodedTensors | None:
    """Return a message's encoded frozen tensors; None where they came as they are."""
    if FROZEN not in content:
        return None
    return download.read(content, FROZEN, frozen_signature(layout))


def _check_frozen(sent: EncodedTensors | None, stays_encoded: bool) -> dict[str, Tensor]:
    """Return the values of encoded tensors, unless they stay so; ProtocolError for values out of range."""
    if sent is None:
        return {}
    if stays_encoded:
        sent.check(SERVER)
        return {}
    found = dict(sent.decode())
    check_values(found, SERVER)
    return found


def frozen_signature(layout: SubModelLayout) -> Signature:
    """Return name, shape and dtype of the frozen tensors of a sub-model."""
    return layout.signature(layout.name_set & layout.spec.frozen)


def read_values(
    content: RecordDict, layout: SubModelLayout, download: Download | None, stays_encoded: bool = False
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Return the tensors of a sub-model, and encoded frozen ones that are to stay so, which the former lack."""
    written = download or Download()
    sent = _read_frozen(content, layout, written)
    names = layout.name_set if sent is None else layout.name_set - layout.spec.frozen
    params = written.read_trained(content, PARAMS, layout.signature(names)) | _check_frozen(sent, stays_encoded)
    return params, sent.encoded if sent is not None and stays_encoded else {}


def _read_shared(
    content: RecordDict, layout: SubModelLayout, names: frozenset[str] | None, known: Known, download: Download
) -> dict[str, Tensor]:
    arrays = content[PARAMS]
    data = [id(array.data) for array in arrays.values()] if isinstance(arrays, ArrayRecord) else []
    key = id(layout), names, *data
    if key not in known:
        known[key] = download.read_trained(content, PARAMS, layout.signature(names))
    return known[key]


# ---- updates
def encode_update(update: ClientUpdate, submodels: SubModels, coded: bool = False) -> RecordDict:
    """Return the records of one client's update; its tensors are already encoded; see :func:`encode_params`."""
    record = make_record(
        ConfigRecord,
        {
            "server-round": update.server_round,
            "client-id": update.client_id,
            "uploads": encode_names(submodels.name_set.intersection(update.params), submodels.names),
        },
    )
    if update.widths:
        record["widths"] = encode_widths(update.widths, tuple(submodels.widths.axes))
    content = make_record(
        RecordDict,
        {
            PARAMS: encode_params(update.params, coded),
            UPDATE: record,
            METRICS: make_record(MetricRecord, {"num-examples": update.num_examples, **update.metrics}),
        },
    )
    if update.scores:
        scored = [layer.name for layer in submodels.layers if layer.name in update.scores]  # not absent branches
        flat = torch.cat([update.scores[name].flatten() for name in scored])
        content[SCORES] = encode_params({SCORES: flat.to(torch.bfloat16)})
    if update.input_norms:
        norms = [update.input_norms[path] for path in submodels.reader_columns if path in update.input_norms]
        means = torch.cat([(item.total / item.count).to(torch.float32) for item in norms])
        counts = torch.tensor([item.count for item in norms], dtype=torch.int64)
        content[INPUT_NORMS] = encode_params({"means": means, "counts": counts})
    return content


def decode_update(
    content: RecordDict,
    assigned: Assignment,
    profile: ClientProfile,
    submodels: SubModels,
    encoding: Encoding | None = None,
    coded: bool = False,
) -> ClientUpdate:
    """Return a client's update, checked against its assignment; tensors may be read-only views into the message.

    Raises
    ------
    ProtocolError
        Another round, client, upload set or number of units; a missing or misshapen tensor; a value that is not finite
        or out of the ranges of :mod:`~fedlp.federation.wire.ranges`; an example count outside [1, the profile's]; a
        score that is negative or not finite. Names the client and the tensor, axis or metric.
    """
    who = f"client {assigned.client_id}, round {assigned.server_round}"

    def asks(evidence: str, record: str) -> bool:
        return evidence in assigned.evidence and record in content  # a client with too few examples sends none

    try:
        record, metrics = read_config(content, UPDATE), read_metrics(content, METRICS)
        server_round, client_id = read_integer(record, "server-round"), read_integer(record, "client-id")
        uploads = decode_names(read_bytes(record, "uploads"), submodels.names)
        sent = decode_widths(read_bytes(record, "widths"), submodels.widths.axes) if "widths" in record else {}
        num_examples = check_count(metrics["num-examples"], profile.num_examples, who)
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"{who}: the update cannot be read: {say_why(error)}") from error
    if server_round != assigned.server_round:
        raise ProtocolError(f"{who}: the update is of round {server_round}")
    if client_id != assigned.client_id:
        raise ProtocolError(f"{who}: the update says it is of client {client_id}")
    if uploads != assigned.uploads:
        wrong = sorted(uploads ^ assigned.uploads)
        raise ProtocolError(f"{who}: the update holds other tensors than were asked for, first of them {wrong[0]}")
    widths = _check_widths(sent, assigned, who)
    signature = submodels.layout(SubModel(assigned.submodel.depth, widths)).signature(assigned.uploads)
    try:
        written = encoding or Float32()
        encoded = read_tensors(content, PARAMS, written.signature(signature), coded)
        check_values(encoded, who)
        params = written.decode(encoded, signature, who)
        if not is_plain(written):
            check_values(params, who)
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: {say_why(error)}") from error
    return ClientUpdate(
        server_round=server_round,
        client_id=client_id,
        num_examples=num_examples,
        params=params,
        metrics=_decode_metrics(metrics, who),
        widths=widths,
        scores=_decode_scores(content, assigned, submodels, who) if asks("unit_scores", SCORES) else {},
        input_norms=_decode_norms(content, assigned, submodels, who) if asks("input_norms", INPUT_NORMS) else {},
    )


def _decode_metrics(record: MetricRecord, who: str) -> dict[str, float]:
    """Return the metrics of an update, all in range, without its number of examples."""
    if len(record) > 1 + MOST_METRICS:
        raise ProtocolError(f"{who}: {len(record)} metrics came, more than {MOST_METRICS}")
    metrics = {}
    for key, value in record.items():
        number = read_number(value, -LARGEST_METRIC, LARGEST_METRIC)
        if number is None:
            raise ProtocolError(f"{who}: metric {printable(key, 40)} is {show(value)}, not a finite number in range")
        metrics[key] = number
    metrics.pop("num-examples")
    if not 0 <= (macs := metrics.get("pruning-macs", 0.0)) <= LARGEST_COST:
        raise ProtocolError(f"{who}: it says that choosing units took {macs} MACs")
    return metrics


def _check_widths(sent: Mapping[str, Keep], assigned: Assignment, who: str) -> dict[str, Keep]:
    """Return the units that a client returns, after a check of its selection."""
    held = assigned.submodel.widths
    if wrong := sorted(sent.keys() ^ assigned.kept.keys()):
        was = "without being asked" if wrong[0] in sent else "not, as it was asked to"
        raise ProtocolError(f"{who}: the update chooses units of {wrong[0]} {was}")
    for axis, keep in sent.items():
        outer = held.get(axis, Keep.full(keep.size))
        least = assigned.least.get(axis)
        is_least = least is not None and keep == Keep.first(least, keep.size)
        if keep.count != assigned.kept[axis] and not is_least:
            raise ProtocolError(f"{who}: {keep.count} units of {axis} came, {assigned.kept[axis]} were asked for")
        try:
            keep.within(outer)
        except ValueError as error:
            raise ProtocolError(f"{who}: units of {axis} came that it does not hold: {error}") from error
    return {**held, **assigned.returned, **sent}


def _decode_scores(content: RecordDict, assigned: Assignment, submodels: SubModels, who: str) -> dict[str, Tensor]:
    """Return the scores of the units that a client holds, by axis, float64."""
    held = assigned.submodel.widths
    sizes = [held[x.name].count if x.name in held else x.num_units for x in submodels.layers]
    try:
        flat = read_tensors(content, SCORES, [(SCORES, (sum(sizes),), torch.bfloat16)])[SCORES].to(torch.float64)
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: its scores cannot be read: {say_why(error)}") from error
    found = dict(zip((layer.name for layer in submodels.layers), torch.split(flat, sizes), strict=True))
    for axis, scores in found.items():
        if not bool(((scores >= 0) & (scores <= LARGEST_METRIC)).all()):
            raise ProtocolError(f"{who}: a score of {axis} is not a finite number of at least 0")
    return found


def _decode_norms(content: RecordDict, assigned: Assignment, submodels: SubModels, who: str) -> dict[str, InputNorms]:
    """Return the input norms of the columns that a client holds, by module path."""
    held, by_path = assigned.submodel.widths, dict[str, int]()
    for layer in submodels.layers:
        if count := held[layer.name].count if layer.name in held else layer.num_units:
            by_path |= {path: submodels.reader_columns[path] // layer.num_units * count for path in layer.readers}
    paths, sizes = list(by_path), list(by_path.values())
    signature = [("means", (sum(sizes),), torch.float32), ("counts", (len(paths),), torch.int64)]
    try:
        found = read_tensors(content, INPUT_NORMS, signature)
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: its input norms cannot be read: {say_why(error)}") from error
    means, counts = found["means"].to(torch.float64), found["counts"]
    if not bool((means >= 0).all() & torch.isfinite(means).all()):
        raise ProtocolError(f"{who}: an input norm is not a finite number of at least 0")
    if not bool((counts >= 1).all() & (counts <= _MOST_VECTORS).all()):
        raise ProtocolError(f"{who}: a count of input vectors is outside [1, {_MOST_VECTORS:,}]")
    parts = zip(paths, torch.split(means, sizes), counts.tolist(), strict=True)
    return {path: InputNorms(mean * count, count) for path, mean, count in parts}


_MOST_VECTORS = 10**12  # of one client and round


# ---- profiles
def encode_profile(profile: ClientProfile) -> RecordDict:
    """Return the records of a client's profile."""
    record = ConfigRecord({"client-id": profile.client_id, "num-examples": profile.num_examples})
    if profile.num_test is not None:
        record["num-test"] = profile.num_test
    for name, limit in given_limits(profile.budget):
        record[_BUDGET[name]] = float(limit)
    return RecordDict({PROFILE: record})


def decode_profile(content: RecordDict) -> ClientProfile:
    """Return a client's profile; ProtocolError if malformed."""
    try:
        record = read_config(content, PROFILE)
        limits = {name: read_limit(record, key) for name, key in _BUDGET.items() if key in record}
        budget = Budget(**limits) if limits else None
        num_test = read_integer(record, "num-test") if "num-test" in record else None
        profile = ClientProfile(
            read_integer(record, "client-id"), read_integer(record, "num-examples"), budget, num_test
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"a client's profile cannot be read: {say_why(error)}") from error
    if profile.client_id < 0:
        raise ProtocolError(f"a client's profile is out of range: client-id is {profile.client_id}")
    for count in filter(None, (profile.num_examples, profile.num_test)):  # a client may have none
        check_count(count, MOST_EXAMPLES, f"the profile of client {profile.client_id}")
    return profile


# ---- bytes
def count_bytes(content: RecordDict) -> int:
    """Return the bytes of all records of a message, keys included, by Flower's count where it has one.

    Flower's own count raises for an empty string or list, which any client can send.
    """
    total = 0
    for key, record in content.items():
        total += len(key)
        if isinstance(record, ArrayRecord):
            total += sum(len(name) + len(array.data) for name, array in record.items())
        else:
            for name, value in record.items():
                total += len(name) + (8 if type(value) in (int, float) else _count_value(value))
    return total


def _count_value(value: object) -> int:
    if isinstance(value, list):  # of one type: Flower sees to that
        if not value:
            return 0
        return sum(map(len, value)) if isinstance(value[0], str | bytes) else len(value) * _count_value(value[0])
    return len(value) if isinstance(value, str | bytes) else 1 if isinstance(value, bool) else 8


# ---- params
def encode_params(params: Mapping[str, Tensor], coded: bool = False) -> ArrayRecord:
    """Return tensors as one array per dtype, concatenated in order; if ``coded``, single bytes are Huffman coded."""
    packed = pack_tensors(params, coded)
    arrays = {name: make_array(name, (count,), "numpy.ndarray", image) for name, (count, image) in packed.items()}
    return make_record(ArrayRecord, arrays)


def view_model(params: ArrayRecord, submodels: SubModels) -> dict[str, Tensor]:
    """Return the whole model's tensors, read-only views into the record; ProtocolError if it lacks them."""
    content = make_record(RecordDict, {PARAMS: params})
    try:
        return read_tensors(content, PARAMS, submodels.layout(SubModel()).signature())
    except ValueError as error:
        raise ProtocolError(f"the initial model does not fit: {error}") from error
