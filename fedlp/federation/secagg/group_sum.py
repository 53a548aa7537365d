"""The server's side of one group's secure sum in one round: keys, shares, the sum of masked updates, its opening."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import ProtocolError
from fedlp.federation.secagg.client import KEY, SEED, WHOLE_SEED
from fedlp.federation.secagg.keys import Words, add_mask, agree, commit, public_key
from fedlp.federation.secagg.messages import NO_SHARE, Dealing, PublicKeys, Received
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.secagg.shamir import combine_shares

Opening = tuple[Sequence[bytes], Sequence[bytes]]
"""Shares that one client gives: of the survivors' seeds, and of the others' mask keys."""


class BadDealer(ProtocolError):
    """Shares of a client's secret do not give the secret that it committed to."""

    def __init__(self, client_id: int, text: str, is_proven: bool) -> None:
        super().__init__(text)
        self.client_id, self.is_proven = client_id, is_proven


class GroupSum:
    """The secure sum of one group; only sums of masked vectors are held.

    Parameters
    ----------
    settings : SecAggSettings
        Settings of the clients.
    """

    def __init__(self, settings: SecAggSettings, server_round: int) -> None:
        self._settings, self._round = settings, server_round
        self._keys: dict[int, PublicKeys] = {}
        self._dealt: dict[int, Dealing] = {}
        self._survivors: set[int] = set()
        self._total: tuple[Words, NDArray[np.uint64]] | None = None
        self._is_open = False

    # ---- keys
    def add_keys(self, client_id: int, keys: PublicKeys) -> None:
        """Take a client into the group; ProtocolError where its keys are no keys, or another client's."""
        taken = {key for pair in self._keys.values() for key in (pair.sealing, pair.masking)}
        if keys.sealing == keys.masking or {keys.sealing, keys.masking} & taken:
            raise ProtocolError(f"client {client_id}, round {self._round}: its keys are not its own")
        probe = bytes(range(32))
        for key in (keys.sealing, keys.masking):
            try:
                agree(probe, key, "probe", self._round, client_id, client_id)
            except ValueError as error:
                raise ProtocolError(f"client {client_id}, round {self._round}: its key gives no secret") from error
        self._keys[client_id] = keys

    @property
    def group(self) -> tuple[int, ...]:
        """Clients that gave keys, sorted."""
        return tuple(sorted(self._keys))

    @property
    def keys(self) -> list[PublicKeys]:
        """Their keys."""
        return [self._keys[client_id] for client_id in self.group]

    @property
    def least(self) -> int:
        """Updates without which the sum is not opened."""
        return self._settings.least(len(self._keys))

    # ---- shares
    def add_dealing(self, client_id: int, dealing: Dealing) -> None:
        """Take the shares of a client."""
        self._dealt[client_id] = dealing

    @property
    def dealers(self) -> tuple[int, ...]:
        """Clients that dealt shares, sorted."""
        return tuple(sorted(self._dealt))

    def received(self, client_id: int, most_examples: int) -> Received:
        """Return the shares that a dealer receives from the other ones."""
        others = [dealer for dealer in self.dealers if dealer != client_id]
        place = self.group.index(client_id)
        return Received(
            self.dealers,
            tuple(self._dealt[x].sealed[place - (x < client_id)] for x in others),
            tuple(self._dealt[x].seed_digests[place] for x in others),
            tuple(self._dealt[x].key_digests[place] for x in others),
            most_examples,
        )

    # ---- masked updates
    def add_masked(self, client_id: int, values: Words, sums: NDArray[np.uint64]) -> None:
        """Add a client's masked update to the sum."""
        assert client_id in self._dealt
        assert client_id not in self._survivors
        assert not self._is_open
        if self._total is None:
            self._total = values.copy(), sums.copy()
        else:
            np.add(self._total[0], values, out=self._total[0])
            np.add(self._total[1], sums, out=self._total[1])
        self._survivors.add(client_id)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Dealers whose update came, sorted."""
        return tuple(sorted(self._survivors))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Dealers whose update did not come, sorted."""
        return tuple(sorted(self._dealt.keys() - self._survivors))

    # ---- opening
    def check_opening(self, client_id: int, opening: Opening) -> None:
        """Raise ProtocolError where a share that a client gives is not the one that was dealt to it."""
        place = self.group.index(client_id)
        for kind, owners, shares in ((SEED, self.survivors, opening[0]), (KEY, self.dropped, opening[1])):
            for owner, share in zip(owners, shares, strict=True):
                dealt = self._dealt[owner]
                digest = (dealt.seed_digests if kind == SEED else dealt.key_digests)[place]
                if share != NO_SHARE and commit(share, kind, self._round, owner, client_id) != digest:
                    raise ProtocolError(
                        f"client {client_id}, round {self._round}: it gives a share of client {owner} that was not "
                        "dealt to it"
                    )

    def open(self, openings: Mapping[int, Opening]) -> tuple[Words, NDArray[np.uint64]]:
        """Return the sum of the survivors' updates, from checked openings.

        Raises
        ------
        ProtocolError
            If too few updates or openings came. A ``BadDealer`` if a client's shares do not give its secret.
        """
        assert self._total is not None
        assert not self._is_open
        if len(self._survivors) < self.least:  # a sum of fewer would tell too much
            raise ProtocolError(f"{len(self._survivors)} masked updates came, {self.least} are needed")
        needed = self._settings.shares(len(self._keys))
        if len(openings) < needed:
            raise ProtocolError(f"{len(openings)} clients gave shares, {needed} are needed")
        self._is_open = True
        for number, owner in enumerate(self.survivors):
            seed = self._combine(owner, {x: opening[0][number] for x, opening in openings.items()}, needed)
            if commit(seed, WHOLE_SEED, self._round, owner, owner) != self._dealt[owner].seed_digest:
                raise self._blame(owner)
            add_mask(self._total, seed, -1)
        for number, owner in enumerate(self.dropped):
            key = self._combine(owner, {x: opening[1][number] for x, opening in openings.items()}, needed)
            if public_key(key) != self._keys[owner].masking:
                raise self._blame(owner)
            self._take_off(owner, key)
        return self._total

    def _take_off(self, owner: int, key: bytes) -> None:
        """Take the masks off that survivors have in common with a client whose update did not come."""
        assert self._total is not None
        for other in self.survivors:
            shared = agree(key, self._keys[other].masking, "mask", self._round, owner, other)
            add_mask(self._total, shared, -1 if other < owner else 1)

    def _combine(self, owner: int, shares: Mapping[int, bytes], needed: int) -> bytes:
        """Return the secret of an owner."""
        points = {self.group.index(x) + 1: share for x, share in sorted(shares.items()) if share != NO_SHARE}
        if len(points) < needed:
            missing = len(shares) - len(points)
            text = f"client {owner}, round {self._round}: {missing} clients could not open its shares"
            # As many liars could have stopped the group by their silence.
            raise BadDealer(owner, text, is_proven=missing > len(self._keys) - needed)
        try:
            return combine_shares(dict(islice(points.items(), needed)))
        except ValueError:
            raise self._blame(owner) from None

    def _blame(self, owner: int) -> BadDealer:
        text = f"client {owner}, round {self._round}: the shares that it dealt do not give its secret"
        return BadDealer(owner, text, is_proven=True)
