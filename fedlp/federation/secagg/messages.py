"""Messages of the phases of secure aggregation to Flower records and back.

=======  =======================  =========================================================================
phase    down                     up
=======  =======================  =========================================================================
keys     round, client            two public keys
shares   the group and its keys   a sealed pair of shares for each other client, and digests of all shares
train    the instruction, the     the masked update
         shares, who dealt them
unmask   whose updates came       a share of the own mask's seed of each client whose update came, and of
                                  the mask key of each other one
=======  =======================  =========================================================================

Clients of a group are sorted by id. Bytes are concatenations of one item per client, so their lengths are known.
Decoders raise :class:`ProtocolError` naming the client. In an evaluation on clients a request to evaluate takes the
place of the instruction. Longer than other files: all messages have one door.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedlp.errors import ProtocolError
from fedlp.federation.secagg.keys import DIGEST_BYTES, KEY_BYTES, SEALED_BYTES, Words
from fedlp.federation.secagg.shamir import SHARE_BYTES
from fedlp.federation.wire.messages import PARAMS, encode_params
from fedlp.federation.wire.record_access import read_bytes, read_config, read_integer, read_tensors, say_why

KEYS, SHARES, UNMASK = "query.secagg_keys", "query.secagg_shares", "query.secagg_unmask"
KINDS = (KEYS, SHARES, UNMASK)
SECAGG = "secagg"
NO_SHARE = b"\xff" * SHARE_BYTES  # no element of the field


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """Public keys of a client for one round, 32 bytes each.

    Attributes
    ----------
    sealing : bytes
        For the shares that others send it.
    masking : bytes
        For the masks that it has in common with others.
    """

    sealing: bytes
    masking: bytes


@dataclass(frozen=True, slots=True)
class Dealing:
    """Shares of a client's two secrets, as they leave it.

    Attributes
    ----------
    sealed : tuple of bytes
        One for each other client of the group.
    seed_digests, key_digests : tuple of bytes
        Of the shares of the seed of its own mask, and of its mask key: one for each client, itself included.
    seed_digest : bytes
        Of the seed itself; a mask key has its public key.
    """

    sealed: tuple[bytes, ...]
    seed_digests: tuple[bytes, ...]
    key_digests: tuple[bytes, ...]
    seed_digest: bytes


@dataclass(frozen=True, slots=True)
class Received:
    """Shares that a client receives.

    Attributes
    ----------
    dealers : tuple of int
        Clients whose masks the update must have, itself included; sorted.
    sealed, seed_digests, key_digests : tuple of bytes
        One of each other dealer.
    most_examples : int
        Most examples of a dealer.
    """

    dealers: tuple[int, ...]
    sealed: tuple[bytes, ...]
    seed_digests: tuple[bytes, ...]
    key_digests: tuple[bytes, ...]
    most_examples: int


def split(joined: bytes, size: int) -> tuple[bytes, ...]:
    """Return the items, of ``size`` bytes each, of a concatenation."""
    return tuple(joined[start : start + size] for start in range(0, len(joined), size))


# ---- requests
def _request(server_round: int, client_id: int) -> ConfigRecord:
    return ConfigRecord({"server-round": server_round, "client-id": client_id})


def encode_keys_request(server_round: int, client_id: int) -> RecordDict:
    """Return the request for a client's public keys."""
    return RecordDict({SECAGG: _request(server_round, client_id)})


def encode_shares_request(
    server_round: int, client_id: int, group: Sequence[int], keys: Sequence[PublicKeys]
) -> RecordDict:
    """Return the request for shares: the group's ids, sorted, and their keys."""
    record = _request(server_round, client_id)
    record["group"] = list(group)
    record["sealing-keys"] = b"".join(key.sealing for key in keys)
    record["masking-keys"] = b"".join(key.masking for key in keys)
    return RecordDict({SECAGG: record})


def encode_received(server_round: int, client_id: int, received: Received) -> ConfigRecord:
    """Return the record that an instruction to train has beside its own."""
    record = _request(server_round, client_id)
    record["dealers"] = list(received.dealers)
    record["sealed"] = b"".join(received.sealed)
    record["seed-digests"] = b"".join(received.seed_digests)
    record["key-digests"] = b"".join(received.key_digests)
    record["most-examples"] = received.most_examples
    return record


def encode_unmask_request(
    server_round: int, client_id: int, survivors: Sequence[int], dropped: Sequence[int]
) -> RecordDict:
    """Return the request for the shares that open a sum."""
    record = _request(server_round, client_id)
    record["survivors"] = list(survivors)
    if dropped:
        record["dropped"] = list(dropped)
    return RecordDict({SECAGG: record})


def read_request(content: RecordDict, client_id: int) -> tuple[int, ConfigRecord]:
    """Return the round and the record of a request; ProtocolError where it is of another client."""
    try:
        record = read_config(content, SECAGG)
        if (addressee := read_integer(record, "client-id")) != client_id:
            raise ValueError(f"it is for client {addressee}")
        return read_integer(record, "server-round"), record
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"the server's request to client {client_id} cannot be read: {say_why(error)}") from error


def read_ids(record: ConfigRecord, key: str) -> tuple[int, ...]:
    """Return client ids, sorted and different."""
    value = record.get(key, [])
    found = [x for x in value if isinstance(x, int) and not isinstance(x, bool)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(found) < len(value) or found != sorted({*found}):
        raise ProtocolError(f"the server's {key} are no client ids, sorted and different")
    return tuple(found)


def read_items(record: ConfigRecord, key: str, size: int, count: int) -> tuple[bytes, ...]:
    """Return ``count`` items of ``size`` bytes."""
    joined = read_bytes(record, key)
    if len(joined) != size * count:
        raise ValueError(f"{key} are {len(joined)} bytes, not {count} times {size}")
    return split(joined, size)


# ---- replies
def encode_keys(server_round: int, client_id: int, keys: PublicKeys) -> RecordDict:
    """Return a client's public keys."""
    record = _request(server_round, client_id)
    record["sealing-key"], record["masking-key"] = keys.sealing, keys.masking
    return RecordDict({SECAGG: record})


def decode_keys(content: RecordDict, server_round: int, client_id: int) -> PublicKeys:
    """Return a client's public keys; ProtocolError where they are none."""
    who = f"client {client_id}, round {server_round}"
    try:
        record = _read_reply(content, server_round, client_id)
        (sealing,) = read_items(record, "sealing-key", KEY_BYTES, 1)
        (masking,) = read_items(record, "masking-key", KEY_BYTES, 1)
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: its keys cannot be read: {say_why(error)}") from error
    return PublicKeys(sealing, masking)


def encode_dealing(server_round: int, client_id: int, dealing: Dealing) -> RecordDict:
    """Return a client's shares."""
    record = _request(server_round, client_id)
    record["sealed"] = b"".join(dealing.sealed)
    record["seed-digests"] = b"".join(dealing.seed_digests)
    record["key-digests"] = b"".join(dealing.key_digests)
    record["seed-digest"] = dealing.seed_digest
    return RecordDict({SECAGG: record})


def decode_dealing(content: RecordDict, server_round: int, client_id: int, group: int) -> Dealing:
    """Return the shares of a client in a group of so many; ProtocolError where they are not that many."""
    who = f"client {client_id}, round {server_round}"
    try:
        record = _read_reply(content, server_round, client_id)
        return Dealing(
            read_items(record, "sealed", SEALED_BYTES, group - 1),
            read_items(record, "seed-digests", DIGEST_BYTES, group),
            read_items(record, "key-digests", DIGEST_BYTES, group),
            read_items(record, "seed-digest", DIGEST_BYTES, 1)[0],
        )
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: its shares cannot be read: {say_why(error)}") from error


def encode_masked(server_round: int, client_id: int, values: Words, sums: Words) -> RecordDict:
    """Return a masked update."""
    params = encode_params({"values": _tensor(values), "sums": _tensor(sums)})
    return RecordDict({PARAMS: params, SECAGG: _request(server_round, client_id)})


def decode_masked(
    content: RecordDict, server_round: int, client_id: int, bits: int, num_values: int, num_sums: int
) -> tuple[Words, NDArray[np.uint64]]:
    """Return a masked update, read-only views into the message.

    Raises
    ------
    ProtocolError
        For anything but exactly the integers that were asked for; other records are not read.
    """
    who = f"client {client_id}, round {server_round}"
    try:
        _read_reply(content, server_round, client_id)
        if extra := sorted({*content} - {PARAMS, SECAGG}):
            raise ValueError(f"{len(extra)} records came that nobody asked for")
        kind = torch.int64 if bits == 64 else torch.int32
        signature = [("values", (num_values,), kind), ("sums", (num_sums,), torch.int64)]
        found = read_tensors(content, PARAMS, signature)
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: its masked update cannot be read: {say_why(error)}") from error
    values = found["values"].numpy()
    words: Words = values.view(np.uint64) if bits == 64 else values.view(np.uint32)
    return words, found["sums"].numpy().view(np.uint64)


def _tensor(words: Words) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int64 if words.itemsize == 8 else np.int32))


def encode_opening(
    server_round: int, client_id: int, seed_shares: Sequence[bytes], key_shares: Sequence[bytes]
) -> RecordDict:
    """Return the shares that a client gives; ``NO_SHARE`` where it has none."""
    record = _request(server_round, client_id)
    record["seed-shares"], record["key-shares"] = b"".join(seed_shares), b"".join(key_shares)
    return RecordDict({SECAGG: record})


def decode_opening(
    content: RecordDict, server_round: int, client_id: int, num_survivors: int, num_dropped: int
) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Return the shares of survivors' seeds and of the others' keys; ProtocolError where they are not that many."""
    who = f"client {client_id}, round {server_round}"
    try:
        record = _read_reply(content, server_round, client_id)
        seeds = read_items(record, "seed-shares", SHARE_BYTES, num_survivors)
        return seeds, read_items(record, "key-shares", SHARE_BYTES, num_dropped)
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"{who}: the shares that it gives cannot be read: {say_why(error)}") from error


def _read_reply(content: RecordDict, server_round: int, client_id: int) -> ConfigRecord:
    """Return the record of a reply, which must be of this round and client."""
    record = read_config(content, SECAGG)
    for key, expected in (("server-round", server_round), ("client-id", client_id)):
        if (found := read_integer(record, key)) != expected:
            raise ValueError(f"{key} is {found}, not {expected}")
    return record
