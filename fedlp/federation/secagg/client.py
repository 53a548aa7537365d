"""The client's side of secure aggregation: keys, shares, the masked update, and the shares that open a sum.

Each answer is given once a round, in this order, and the secrets that it needs last on disk. A client refuses requests
that would show its update: a second mask of one round, a group below ``min_group``, both secrets of one client, or its
keys under another name.
"""

from __future__ import annotations

import secrets as system
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedlp.errors import DataError, ProtocolError
from fedlp.federation.secagg import messages
from fedlp.federation.secagg.evaluation import EvaluationSums
from fedlp.federation.secagg.fixed_point import FixedPoint, flatten
from fedlp.federation.secagg.keys import (
    DIGEST_BYTES,
    KEY_BYTES,
    SEALED_BYTES,
    Words,
    add_mask,
    agree,
    commit,
    open_sealed,
    public_key,
    seal,
)
from fedlp.federation.secagg.messages import NO_SHARE, Dealing, PublicKeys
from fedlp.federation.secagg.secret_store import Secrets, SecretStore
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.secagg.shamir import SHARE_BYTES, split_secret
from fedlp.federation.secagg.sums import SumLayout
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.record_access import read_integer, say_why
from fedlp.pruning.tracing.widths import WidthSpec, slice_tensor, tensor_keeps
from fedlp.tasks import Sums
from fedlp.types import ClientUpdate, Keep, SubModel, TrainInstruction

SEED, KEY, WHOLE_SEED = "seed", "key", "whole seed"  # kinds of secrets, in digests


class SecAggClient:
    """Answers the messages of secure aggregation for one client.

    Parameters
    ----------
    folder : Path
        The client's own.
    sends_deltas : bool
        Whether updates are differences already, but for integers.
    """

    def __init__(self, settings: SecAggSettings, submodels: SubModels, folder: Path, sends_deltas: bool) -> None:
        self._settings, self._submodels, self._sends_deltas = settings, submodels, sends_deltas
        self._store = SecretStore(folder)

    def answer(self, kind: str, content: RecordDict, client_id: int) -> RecordDict:
        """Return the answer to a message of ``messages.KINDS``.

        Raises
        ------
        ProtocolError, DataError
            Where the request is malformed, out of order, or would show too much.
        """
        server_round, record = messages.read_request(content, client_id)
        try:
            if kind == messages.KEYS:
                return self._make_keys(server_round, client_id)
            if kind == messages.SHARES:
                return self._make_shares(server_round, client_id, record)
            return self._give_shares(server_round, client_id, record)
        except (KeyError, ValueError) as error:
            raise ProtocolError(f"the server's request cannot be read: {say_why(error)}") from error

    def forget(self) -> None:
        """Delete the secrets of a round that failed for this client."""
        self._store.delete()

    def _make_keys(self, server_round: int, client_id: int) -> RecordDict:
        """Return fresh public keys; the keys of an earlier round are forgotten."""
        sealing, masking, seed = (system.token_bytes(KEY_BYTES) for _ in range(3))
        made = Secrets(server_round, "keys", sealing, masking, seed)
        self._store.save(made)
        return messages.encode_keys(
            server_round, client_id, PublicKeys(public_key(made.sealing), public_key(made.masking))
        )

    def _make_shares(self, server_round: int, client_id: int, record: ConfigRecord) -> RecordDict:
        """Return shares of the client's two secrets, one pair sealed for each other client."""
        known = self._store.load(server_round, "keys")
        group = messages.read_ids(record, "group")
        if client_id not in group or len(group) < self._settings.min_group:
            raise ProtocolError(f"{len(group)} clients are no group of privacy.min_group={self._settings.min_group}")
        sealing = messages.read_items(record, "sealing-keys", KEY_BYTES, len(group))
        masking = messages.read_items(record, "masking-keys", KEY_BYTES, len(group))
        public = dict(zip(group, zip(sealing, masking, strict=True), strict=True))
        if public[client_id] != (public_key(known.sealing), public_key(known.masking)):
            raise ProtocolError("the server shows other clients other keys than this client's")
        if len({*sealing, *masking}) != 2 * len(group):
            raise ProtocolError("two clients of the group have the same key")
        threshold = self._settings.shares(len(group))
        seeds = split_secret(known.seed, threshold, len(group))
        keys = split_secret(known.masking, threshold, len(group))
        sealed = []
        for other, seed_share, key_share in zip(group, seeds, keys, strict=True):
            if other != client_id:
                key = agree(known.sealing, public[other][0], "shares", server_round, client_id, other)
                sealed.append(seal(key, seed_share + key_share, server_round, client_id, other))
        own = group.index(client_id)
        shares = {client_id: (seeds[own], keys[own])}
        self._store.save(replace(known, phase="shares", group=group, public=public, shares=shares))
        dealt = Dealing(
            tuple(sealed),
            tuple(commit(x, SEED, server_round, client_id, other) for other, x in zip(group, seeds, strict=True)),
            tuple(commit(x, KEY, server_round, client_id, other) for other, x in zip(group, keys, strict=True)),
            commit(known.seed, WHOLE_SEED, server_round, client_id, client_id),
        )
        return messages.encode_dealing(server_round, client_id, dealt)

    def begin_masking(self, content: RecordDict, client_id: int) -> tuple[Secrets, int]:
        """Return the client's secrets with the shares that it received, and the most examples of a client.

        They are marked as used on disk before there is an update: a second one would get the same mask.
        """
        server_round, record = messages.read_request(content, client_id)
        try:
            known = self._store.load(server_round, "shares")
            dealers = messages.read_ids(record, "dealers")
            if not {client_id} <= {*dealers} <= {*known.group} or len(dealers) < self._settings.least(len(known.group)):
                raise ValueError(f"{len(dealers)} dealers of a group of {len(known.group)} are too few, or others")
            others = [dealer for dealer in dealers if dealer != client_id]
            sealed = messages.read_items(record, "sealed", SEALED_BYTES, len(others))
            seed_digests = messages.read_items(record, "seed-digests", DIGEST_BYTES, len(others))
            key_digests = messages.read_items(record, "key-digests", DIGEST_BYTES, len(others))
            most = read_integer(record, "most-examples")
        except (KeyError, ValueError) as error:
            raise ProtocolError(f"the server's shares cannot be read: {say_why(error)}") from error
        shares = dict(known.shares)
        for dealer, item, seed_digest, key_digest in zip(others, sealed, seed_digests, key_digests, strict=True):
            key = agree(known.sealing, known.public[dealer][0], "shares", server_round, client_id, dealer)
            pair = open_sealed(key, item, server_round, dealer, client_id) or b""
            seed_share, key_share = pair[:SHARE_BYTES], pair[SHARE_BYTES:]
            # A share that is not the one committed to is no share: its dealer is found out when it is missed.
            is_seed = commit(seed_share, SEED, server_round, dealer, client_id) == seed_digest
            is_key = commit(key_share, KEY, server_round, dealer, client_id) == key_digest
            shares[dealer] = seed_share if is_seed else NO_SHARE, key_share if is_key else NO_SHARE
        used = replace(known, phase="train", dealers=dealers, shares=shares)
        self._store.save(replace(used, sealing=bytes(KEY_BYTES), seed=bytes(KEY_BYTES), masking=bytes(KEY_BYTES)))
        return used, most

    def mask(
        self, known: Secrets, most_examples: int, instruction: TrainInstruction, update: ClientUpdate
    ) -> RecordDict:
        """Return a client's masked update.

        Raises
        ------
        DataError
            If training gave a value that is not finite, or the server says that the client has more examples than all.
        """
        client_id, dealers, settings = instruction.client_id, known.dealers, self._settings
        if not 1 <= update.num_examples <= most_examples:
            raise DataError(f"client {client_id} has {update.num_examples} examples, not in [1, {most_examples}]")
        spec = self._submodels.spec
        trained = frozenset(name for name, info in spec.tensors.items() if info.trainable)
        layout = self._submodels.layout(
            SubModel(instruction.submodel.depth, {**instruction.submodel.widths, **instruction.returned})
        )
        flat = flatten(self._differences(instruction, update.params), layout.signature(instruction.uploads), trained)
        if not np.isfinite(flat).all():
            raise DataError(f"client {client_id}: training gave values that are not finite; lower local.lr")
        fixed = FixedPoint(settings.bits, settings.value_range, len(dealers))
        share = update.num_examples / most_examples if settings.by_examples else 1.0
        values = fixed.encode(flat, share)
        sums = SumLayout.of(instruction, self._submodels, len(dealers), most_examples)
        parts: tuple[Words, Words] = values, sums.encode(update, fixed.clips(flat))
        self._add_masks(parts, known, client_id)
        return messages.encode_masked(known.server_round, client_id, *parts)

    def mask_sums(self, known: Secrets, client_id: int, sums: Sums, num_examples: int) -> RecordDict:
        """Return a client's masked evaluation sums; DataError where one is not finite."""
        layout = EvaluationSums.of(sums, len(known.dealers))
        return self.mask_words(known, client_id, layout.encode(sums, num_examples))

    def mask_words(self, known: Secrets, client_id: int, words: NDArray[np.uint64]) -> RecordDict:
        """Return a client's masked 64-bit integers; modified."""
        empty = FixedPoint(self._settings.bits, 1.0, len(known.dealers)).encode(np.empty(0), 1.0)
        parts: tuple[Words, Words] = empty, words
        self._add_masks(parts, known, client_id)
        return messages.encode_masked(known.server_round, client_id, *parts)

    @staticmethod
    def _add_masks(parts: tuple[Words, Words], known: Secrets, client_id: int) -> None:
        """Mask vectors in place: by the client's own mask, and by one with each other dealer, of opposite signs."""
        add_mask(parts, known.seed, 1)
        for dealer in known.dealers:
            if dealer != client_id:
                key = agree(known.masking, known.public[dealer][1], "mask", known.server_round, client_id, dealer)
                add_mask(parts, key, 1 if client_id < dealer else -1)

    def _differences(self, instruction: TrainInstruction, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the differences, float64, of an update's tensors from the received ones."""
        held, whole = instruction.submodel.widths, self._submodels.widths if instruction.returned else WidthSpec({}, {})
        sizes = {axis: held[axis].count if axis in held else size for axis, size in whole.axes.items()}
        spec = WidthSpec(sizes, whole.dims)
        local = {axis: keep.within(held.get(axis, Keep.full(keep.size))) for axis, keep in instruction.returned.items()}
        found = {}
        for name, values in params.items():
            found[name] = values.detach().cpu().to(torch.float64, copy=True)
            if not (self._sends_deltas and values.is_floating_point()):
                received = instruction.params[name]
                found[name] -= slice_tensor(received, tensor_keeps(spec, name, received.shape, local)).to(torch.float64)
        return found

    def _give_shares(self, server_round: int, client_id: int, record: ConfigRecord) -> RecordDict:
        """Return the shares that open the sum of the survivors, and forget all secrets."""
        known = self._store.load(server_round, "train")
        survivors, dropped = messages.read_ids(record, "survivors"), messages.read_ids(record, "dropped")
        if {*survivors} | {*dropped} != {*known.dealers} or {*survivors} & {*dropped}:
            raise ProtocolError("the server asks for shares of other clients than dealt them, or twice of one")
        if client_id not in survivors or len(survivors) < self._settings.least(len(known.group)):
            raise ProtocolError(f"the server asks to open a sum of {len(survivors)} updates, which are too few")
        self._store.delete()
        return messages.encode_opening(
            server_round,
            client_id,
            [known.shares[other][0] for other in survivors],
            [known.shares[other][1] for other in dropped],
        )
