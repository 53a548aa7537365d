"""A client's secrets of one round, on its own disk: every message may come to a new process.

One file, readable by its owner alone. It is deleted once the client has given its shares, when a round fails for the
client, and when the next round begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlp.errors import DataError, one_line

_NAME = "secagg.json"


@dataclass(frozen=True)
class Secrets:
    """Secrets of a client between the messages of a round.

    Attributes
    ----------
    phase : "keys", "shares" or "train"
        The last phase that it answered.
    sealing, masking : bytes
        Private keys.
    seed : bytes
        Key of its own mask.
    group : tuple of int
        Clients that share keys, sorted.
    public : mapping from client id to (bytes, bytes)
        Their public keys, for sealing and for masking.
    dealers : tuple of int
        Clients whose masks the update has.
    shares : mapping from client id to (bytes, bytes)
        Shares of each dealer's seed and mask key.
    """

    server_round: int
    phase: str
    sealing: bytes
    masking: bytes
    seed: bytes
    group: tuple[int, ...] = ()
    public: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict)
    dealers: tuple[int, ...] = ()
    shares: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict)


class SecretStore:
    """The file of one client's secrets.

    Parameters
    ----------
    folder : Path
        The client's; made on the first save.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME

    def save(self, secrets: Secrets) -> None:
        """Replace the secrets on disk, whole or not at all; DataError if the disk refuses."""
        data = json.dumps(_to_plain(secrets)).encode()
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            partial.replace(self._path)
        except OSError as error:
            raise DataError(
                f"a client cannot keep its keys of the round ({one_line(error)}); free or repair its disk"
            ) from error

    def load(self, server_round: int, phase: str) -> Secrets:
        """Return the secrets of a round whose last phase was ``phase``; DataError where there are none."""
        try:
            plain = json.loads(self._path.read_bytes())
            found = _from_plain(plain)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError("the client has no keys of this round") from error
        if found.server_round != server_round or found.phase != phase:
            raise DataError(
                f"the client has keys of round {found.server_round} after its phase {found.phase}, not of round "
                f"{server_round} after {phase}"
            )
        return found

    def delete(self) -> None:
        """Forget the secrets."""
        self._path.unlink(missing_ok=True)


def _to_plain(secrets: Secrets) -> dict[str, object]:
    return {
        "server_round": secrets.server_round,
        "phase": secrets.phase,
        "keys": [secrets.sealing.hex(), secrets.masking.hex(), secrets.seed.hex()],
        "group": secrets.group,
        "public": _hex(secrets.public),
        "dealers": secrets.dealers,
        "shares": _hex(secrets.shares),
    }


def _from_plain(plain: dict[str, object]) -> Secrets:
    keys, group, dealers = plain["keys"], plain["group"], plain["dealers"]
    assert isinstance(keys, list)
    assert isinstance(group, list)
    assert isinstance(dealers, list)
    sealing, masking, seed = (bytes.fromhex(key) for key in keys)
    return Secrets(
        server_round=int(str(plain["server_round"])),
        phase=str(plain["phase"]),
        sealing=sealing,
        masking=masking,
        seed=seed,
        group=tuple(group),
        public=_unhex(plain["public"]),
        dealers=tuple(dealers),
        shares=_unhex(plain["shares"]),
    )


def _hex(pairs: Mapping[int, tuple[bytes, bytes]]) -> dict[str, list[str]]:
    return {str(client_id): [item.hex() for item in pair] for client_id, pair in pairs.items()}


def _unhex(pairs: object) -> dict[int, tuple[bytes, bytes]]:
    assert isinstance(pairs, dict)
    return {int(key): (bytes.fromhex(one), bytes.fromhex(other)) for key, (one, other) in pairs.items()}
