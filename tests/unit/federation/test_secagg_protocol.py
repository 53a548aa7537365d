"""The protocol of secure aggregation, client by client, without a network: what opens, what does not, who is named."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedlp.config import compose
from fedlp.errors import DataError, ProtocolError
from fedlp.federation.secagg import client as client_module
from fedlp.federation.secagg import messages, shamir
from fedlp.federation.secagg.client import SecAggClient
from fedlp.federation.secagg.fixed_point import FixedPoint
from fedlp.federation.secagg.group_sum import BadDealer, GroupSum
from fedlp.federation.secagg.keys import add_mask
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.secagg.sums import SumLayout
from fedlp.federation.submodels import SubModels
from fedlp.models import describe_model, state_tensors
from fedlp.types import Assignment, ClientUpdate, Keep, SubModel, TrainInstruction

ROUND, EXAMPLES = 3, 10
SETTINGS = SecAggSettings(threshold=0.6, min_group=3)
IDS = (2, 3, 5, 7, 11)
NOBODY: Collection[int] = ()

SUBMODELS = SubModels(describe_model(compose(("model=fedlp_mlp",)).model, (1, 8, 8), 10, "classification"))
PARAMS = {name: tensor.detach() for name, tensor in state_tensors(SUBMODELS.spec.build(0)).items()}
SIZE = sum(tensor.numel() for tensor in PARAMS.values())

Change = Callable[[str, int, RecordDict], RecordDict]


@dataclass
class Played:
    """One round, as the server saw it."""

    sum: GroupSum
    seen: dict[tuple[str, int], RecordDict] = field(default_factory=dict)
    opened: tuple[np.ndarray, np.ndarray] | None = None
    openings: dict[int, object] = field(default_factory=dict)


def instruction(client_id: int) -> TrainInstruction:
    return TrainInstruction(ROUND, client_id, SubModel(), frozenset(PARAMS), params=PARAMS)


def update(client_id: int, change: float, examples: int = EXAMPLES) -> ClientUpdate:
    params = {name: tensor.to(torch.float64) + change for name, tensor in PARAMS.items()}
    return ClientUpdate(ROUND, client_id, examples, {"train-loss": 1.0}, params=params)


def play(
    folder: Path,
    changes: Mapping[int, float],
    gone: Mapping[str, Collection[int]] | None = None,
    tamper: Change = lambda phase, client_id, content: content,
    settings: SecAggSettings = SETTINGS,
) -> Played:
    """Play a round whose clients change all weights by a number each."""
    gone = gone or {}
    clients = {x: SecAggClient(settings, SUBMODELS, folder / str(x), sends_deltas=False) for x in changes}
    played = Played(GroupSum(settings, ROUND))
    total = played.sum

    def heard(phase: str, client_id: int, content: RecordDict) -> RecordDict | None:
        if client_id in gone.get(phase, ()):
            return None
        played.seen[phase, client_id] = content = tamper(phase, client_id, content)
        return content

    for x, client in clients.items():
        content = heard("keys", x, client.answer(messages.KEYS, messages.encode_keys_request(ROUND, x), x))
        if content is not None:
            total.add_keys(x, messages.decode_keys(content, ROUND, x))
    for x in total.group:
        request = messages.encode_shares_request(ROUND, x, total.group, total.keys)
        content = heard("shares", x, clients[x].answer(messages.SHARES, request, x))
        if content is not None:
            total.add_dealing(x, messages.decode_dealing(content, ROUND, x, len(total.group)))
    for x in total.dealers:
        record = RecordDict({messages.SECAGG: messages.encode_received(ROUND, x, total.received(x, EXAMPLES))})
        secrets, most = clients[x].begin_masking(record, x)
        content = heard("train", x, clients[x].mask(secrets, most, instruction(x), update(x, changes[x])))
        if content is not None:
            sums = SumLayout.of(instruction(x), SUBMODELS, len(total.dealers), EXAMPLES)
            total.add_masked(x, *messages.decode_masked(content, ROUND, x, settings.bits, SIZE, sums.size))
    for x in total.survivors:
        request = messages.encode_unmask_request(ROUND, x, total.survivors, total.dropped)
        content = heard("unmask", x, clients[x].answer(messages.UNMASK, request, x))
        if content is not None:
            found = messages.decode_opening(content, ROUND, x, len(total.survivors), len(total.dropped))
            total.check_opening(x, found)
            played.openings[x] = found
    values, sums_ = total.open(played.openings)  # type: ignore[arg-type]
    played.opened = values.copy(), sums_.copy()
    return played


def mean(played: Played) -> float:
    """Return the one change that the mean of the updates is."""
    assert played.opened is not None
    found = FixedPoint(32, SETTINGS.value_range, len(played.sum.dealers)).decode(played.opened[0])
    found = found / len(played.sum.survivors)
    assert np.ptp(found) < 1e-6
    return float(found[0])


CHANGES = {2: 0.5, 3: -0.25, 5: 1.0, 7: 0.125, 11: -0.75}


@pytest.mark.parametrize(
    "gone",
    [
        {},
        {"keys": (3,)},
        {"shares": (2,)},
        {"train": (11,)},
        {"unmask": (5,)},
        {"train": (2, 11)},
        {"unmask": (2, 11)},
        {"shares": (3,), "train": (7,), "unmask": ()},
        {"train": (7,), "unmask": (2,)},
    ],
    ids=str,
)
def test_the_sum_of_those_that_answered_opens(gone: Mapping[str, Collection[int]], tmp_path: Path) -> None:
    lost = {x for phase in ("keys", "shares", "train") for x in gone.get(phase, ())}
    expected = float(np.mean([change for x, change in CHANGES.items() if x not in lost]))
    assert mean(play(tmp_path, CHANGES, gone)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gone", [{"train": (2, 3, 5)}, {"unmask": (2, 3, 5)}], ids=str)
def test_fewer_than_the_threshold_open_nothing(gone: Mapping[str, Collection[int]], tmp_path: Path) -> None:
    with pytest.raises((ProtocolError, DataError), match=r"needed|too few"):
        play(tmp_path, CHANGES, gone)


def test_no_secret_is_left_on_disk(tmp_path: Path) -> None:
    play(tmp_path, CHANGES)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---- what the server can open
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw keys from a seed, for a comparison of two rounds."""
    rng = random.Random(0)
    monkeypatch.setattr(client_module.system, "token_bytes", rng.randbytes)
    monkeypatch.setattr(shamir.secrets, "randbelow", rng.randrange)


@pytest.mark.parametrize("gone", [{}, {"train": (11,)}], ids=str)
def test_two_clients_for_others_of_equal_sum_change_nothing_that_the_server_can_open(
    gone: Mapping[str, Collection[int]], tmp_path: Path
) -> None:
    others = CHANGES | {3: CHANGES[3] + 0.5, 7: CHANGES[7] - 0.5}
    with pytest.MonkeyPatch.context() as patch:
        seeded(patch)
        one = play(tmp_path, CHANGES, gone)
    with pytest.MonkeyPatch.context() as patch:
        seeded(patch)
        other = play(tmp_path, others, gone)
    assert one.opened is not None
    assert other.opened is not None
    assert all((a == b).all() for a, b in zip(one.opened, other.opened, strict=True))
    changed = [key for key, content in one.seen.items() if content != other.seen[key]]
    assert changed == [("train", 3), ("train", 7)], "only what is masked differs"


def masked(played: Played, client_id: int) -> np.ndarray:
    sums = SumLayout.of(instruction(client_id), SUBMODELS, len(played.sum.dealers), EXAMPLES)
    content = played.seen["train", client_id]
    return messages.decode_masked(content, ROUND, client_id, 32, SIZE, sums.size)[0]


def test_no_part_of_the_sum_opens_with_all_that_the_server_learns(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seeded(patch)
        played = play(tmp_path, CHANGES)
    seeds = {x: played.sum._combine(x, {y: o[0][i] for y, o in played.openings.items()}, 3) for i, x in enumerate(IDS)}  # type: ignore[index]
    fixed = FixedPoint(32, SETTINGS.value_range, len(IDS))
    plain = {x: fixed.encode(np.full(SIZE, change, dtype=np.float64), 1.0) for x, change in CHANGES.items()}
    for count in range(1, len(IDS) + 1):
        for members in combinations(IDS, count):
            total = np.add.reduce([masked(played, x) for x in members], dtype=np.uint32)
            for x in members:
                add_mask([total], seeds[x], -1)
            off = (total - np.add.reduce([plain[x] for x in members], dtype=np.uint32)).view(np.int32)
            is_open = bool((np.abs(off) <= 4 * count).mean() > 0.5)
            assert is_open == (count == len(IDS)), members


# ---- clients that cheat
def in_record(phase: str, whose: int, key: str, change: Callable[[bytes], bytes]) -> Change:
    def tamper(at: str, client_id: int, content: RecordDict) -> RecordDict:
        if (at, client_id) == (phase, whose):
            record = content[messages.SECAGG]
            assert isinstance(record, ConfigRecord)
            record[key] = change(record[key])  # type: ignore[arg-type]
        return content

    return tamper


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_share_that_was_not_dealt_names_its_holder(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="client 5, round 3: it gives a share of client 2 that was not dealt to it"):
        play(tmp_path, CHANGES, tamper=in_record("unmask", 5, "seed-shares", flip))


def test_shares_that_nobody_can_open_name_their_dealer(tmp_path: Path) -> None:
    with pytest.raises(BadDealer, match="client 7, round 3: 4 clients could not open its shares") as caught:
        play(tmp_path, CHANGES, tamper=in_record("shares", 7, "sealed", lambda data: bytes(len(data))))
    assert caught.value.is_proven


def test_shares_that_some_cannot_open_do_no_harm_unless_others_drop_out(tmp_path: Path) -> None:
    def spoil(data: bytes) -> bytes:  # those for two of the four others
        return bytes(len(data) // 2) + data[len(data) // 2 :]

    tamper = in_record("shares", 7, "sealed", spoil)
    assert mean(play(tmp_path, CHANGES, tamper=tamper)) == pytest.approx(np.mean(list(CHANGES.values())), abs=1e-6)
    with pytest.raises(BadDealer, match="client 7, round 3: 2 clients could not open its shares") as caught:
        play(tmp_path, CHANGES, gone={"unmask": (11,)}, tamper=tamper)
    assert not caught.value.is_proven


def test_a_seed_that_is_not_the_one_committed_to_convicts_its_dealer(tmp_path: Path) -> None:
    with pytest.raises(BadDealer, match="client 7, round 3: the shares that it dealt do not give its secret") as caught:
        play(tmp_path, CHANGES, tamper=in_record("shares", 7, "seed-digest", flip))
    assert caught.value.is_proven


@pytest.mark.parametrize("key", ["sealing-key", "masking-key"])
def test_a_key_without_a_secret_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="client 5, round 3: its key gives no secret"):
        play(tmp_path, CHANGES, tamper=in_record("keys", 5, key, lambda data: bytes(32)))


# ---- servers that cheat: what a client refuses
def ready(folder: Path, dealt: bool = True) -> tuple[GroupSum, dict[int, SecAggClient]]:
    """Return clients that have given keys, and shares."""
    clients = {x: SecAggClient(SETTINGS, SUBMODELS, folder / str(x), sends_deltas=False) for x in IDS}
    total = GroupSum(SETTINGS, ROUND)
    for x, client in clients.items():
        content = client.answer(messages.KEYS, messages.encode_keys_request(ROUND, x), x)
        total.add_keys(x, messages.decode_keys(content, ROUND, x))
    for x in IDS if dealt else ():
        request = messages.encode_shares_request(ROUND, x, total.group, total.keys)
        content = clients[x].answer(messages.SHARES, request, x)
        total.add_dealing(x, messages.decode_dealing(content, ROUND, x, len(IDS)))
    return total, clients


def train(total: GroupSum, client: SecAggClient, client_id: int) -> RecordDict:
    received = total.received(client_id, EXAMPLES)
    record = RecordDict({messages.SECAGG: messages.encode_received(ROUND, client_id, received)})
    secrets, most = client.begin_masking(record, client_id)
    return client.mask(secrets, most, instruction(client_id), update(client_id, 0.5))


def test_a_client_masks_once_with_its_keys(tmp_path: Path) -> None:
    total, clients = ready(tmp_path)
    train(total, clients[5], 5)
    with pytest.raises(DataError, match="after its phase train, not of round 3 after shares"):
        train(total, clients[5], 5)


def test_a_client_opens_once(tmp_path: Path) -> None:
    total, clients = ready(tmp_path)
    for x in IDS:
        train(total, clients[x], x)
    request = messages.encode_unmask_request(ROUND, 5, IDS, ())
    clients[5].answer(messages.UNMASK, request, 5)
    with pytest.raises(DataError, match="no keys of this round"):
        clients[5].answer(messages.UNMASK, messages.encode_unmask_request(ROUND, 5, IDS[1:], IDS[:1]), 5)


@pytest.mark.parametrize(
    ("survivors", "dropped", "words"),
    [
        (IDS, (2,), "of other clients than dealt them, or twice of one"),
        (IDS[:4], (), "of other clients than dealt them, or twice of one"),
        ((2, 5), (3, 7, 11), "a sum of 2 updates, which are too few"),
        ((2, 3, 7, 11), (5,), "too few"),
    ],
)
def test_a_client_gives_no_shares_that_show_too_much(
    survivors: tuple[int, ...], dropped: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    total, clients = ready(tmp_path)
    train(total, clients[5], 5)
    with pytest.raises(ProtocolError, match=words):
        clients[5].answer(messages.UNMASK, messages.encode_unmask_request(ROUND, 5, survivors, dropped), 5)


def test_a_client_deals_no_shares_in_a_group_that_is_too_small_or_under_other_keys(tmp_path: Path) -> None:
    total, clients = ready(tmp_path, dealt=False)
    keys = dict(zip(total.group, total.keys, strict=True))
    for group, known, words in (
        ((2, 5), keys, "2 clients are no group of privacy.min_group=3"),
        ((2, 3, 7), keys, "3 clients are no group"),
        ((2, 3, 5), keys | {5: keys[7]}, "other keys than this client's"),
        ((2, 3, 5), keys | {2: keys[3]}, "two clients of the group have the same key"),
    ):
        request = messages.encode_shares_request(ROUND, 5, group, [known[x] for x in group])
        with pytest.raises(ProtocolError, match=words):
            clients[5].answer(messages.SHARES, request, 5)


def test_a_client_does_not_send_what_is_not_finite(tmp_path: Path) -> None:
    total, clients = ready(tmp_path)
    record = RecordDict({messages.SECAGG: messages.encode_received(ROUND, 5, total.received(5, EXAMPLES))})
    secrets, most = clients[5].begin_masking(record, 5)
    with pytest.raises(DataError, match="not finite"):
        clients[5].mask(secrets, most, instruction(5), update(5, float("nan")))
    with pytest.raises(DataError, match=r"has 11 examples, not in \[1, 10\]"):
        clients[5].mask(secrets, most, instruction(5), update(5, 0.5, examples=11))


def test_units_that_the_server_has_chosen_are_what_is_masked(tmp_path: Path) -> None:
    whole = SUBMODELS.layout(SubModel())
    assert Assignment(ROUND, 5, SubModel(), whole.name_set).returned == {}
    axis, size = next(iter(SUBMODELS.widths.axes.items()))
    returned = {axis: Keep.window(3, size // 2, size)}
    chosen = SUBMODELS.layout(SubModel(widths=returned))
    total, clients = ready(tmp_path)
    record = RecordDict({messages.SECAGG: messages.encode_received(ROUND, 5, total.received(5, EXAMPLES))})
    secrets, most = clients[5].begin_masking(record, 5)
    sent = {name: tensor + 0.5 for name, tensor in chosen.slice(PARAMS).items()}
    asked = replace(instruction(5), returned=returned)
    params = clients[5]._differences(asked, sent)
    for values in params.values():
        torch.testing.assert_close(values, torch.full_like(values, 0.5), atol=1e-6, rtol=0)
    found = clients[5].mask(secrets, most, asked, ClientUpdate(ROUND, 5, EXAMPLES, {}, params=sent))
    assert messages.decode_masked(found, ROUND, 5, 32, chosen.num_params(), 5)[0].shape == (chosen.num_params(),)
