"""Cost of secure aggregation per client and round, for a model of a million parameters and groups of 10 and 50 clients.

    python experiments/secagg/bench.py --json experiments/secagg/results/cost.json

One process of one thread plays all clients and the server of one group, without training and without a network: what is
timed is cryptography, fixed-point arithmetic, records and the file of secrets.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.bench.timing import parse_args, print_table, write_report  # noqa: E402
from fedlp.config import compose  # noqa: E402
from fedlp.federation.secagg import messages as phases  # noqa: E402
from fedlp.federation.secagg.client import SecAggClient  # noqa: E402
from fedlp.federation.secagg.group_sum import GroupSum, Opening  # noqa: E402
from fedlp.federation.secagg.settings import SecAggSettings  # noqa: E402
from fedlp.federation.secagg.sums import SumLayout  # noqa: E402
from fedlp.federation.submodels import SubModels  # noqa: E402
from fedlp.federation.wire import messages  # noqa: E402
from fedlp.models import describe_model, state_tensors  # noqa: E402
from fedlp.types import ClientUpdate, SubModel, TrainInstruction  # noqa: E402

ROUND, EXAMPLES = 1, 100


class Clock:
    """Seconds and bytes of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.sizes: dict[str, list[int]] = defaultdict(list)

    def time(self, name: str, action: Any, *arguments: Any) -> Any:
        """Return what an action returns."""
        started = time.perf_counter()
        found = action(*arguments)
        self.seconds[name].append(time.perf_counter() - started)
        return found

    def weigh(self, name: str, content: RecordDict) -> RecordDict:
        """Return a message."""
        self.sizes[name].append(messages.count_bytes(content))
        return content


def mask(client: SecAggClient, record: RecordDict, told: TrainInstruction, update: ClientUpdate) -> RecordDict:
    """Return a masked update."""
    return client.mask(*client.begin_masking(record, told.client_id), told, update)


def play(submodels: SubModels, params: dict[str, torch.Tensor], count: int, dropped: int, folder: Path) -> Clock:
    """Play a round of one group, of which some clients drop out after they dealt shares."""
    settings, clock = SecAggSettings(), Clock()
    total = GroupSum(settings, ROUND)
    clients = {x: SecAggClient(settings, submodels, folder / str(x), sends_deltas=False) for x in range(count)}
    update = ClientUpdate(ROUND, 0, EXAMPLES, {}, params={name: x + 0.01 for name, x in params.items()})
    clock.weigh("plain up", clock.time("plain encoding", messages.encode_update, update, submodels))
    for x, client in clients.items():
        asked = clock.weigh("keys down", phases.encode_keys_request(ROUND, x))
        content = clock.weigh("keys up", clock.time("client: keys", client.answer, phases.KEYS, asked, x))
        clock.time("server: keys", lambda x=x, c=content: total.add_keys(x, phases.decode_keys(c, ROUND, x)))
    for x, client in clients.items():
        asked = clock.weigh("shares down", phases.encode_shares_request(ROUND, x, total.group, total.keys))
        content = clock.weigh("shares up", clock.time("client: shares", client.answer, phases.SHARES, asked, x))
        total.add_dealing(x, phases.decode_dealing(content, ROUND, x, count))
    size = sum(tensor.numel() for tensor in params.values())
    for x, client in list(clients.items())[: count - dropped]:
        told = TrainInstruction(ROUND, x, SubModel(), frozenset(params), params=params)
        record = RecordDict({phases.SECAGG: phases.encode_received(ROUND, x, total.received(x, EXAMPLES))})
        clock.weigh("train down, beside the model", record)

        content = clock.weigh("train up", clock.time("client: masks", mask, client, record, told, update))
        num_sums = SumLayout.of(told, submodels, count, EXAMPLES).size
        parts = phases.decode_masked(content, ROUND, x, settings.bits, size, num_sums)
        clock.time("server: adding an update", total.add_masked, x, *parts)
    openings: dict[int, Opening] = {}
    for x in total.survivors:
        asked = clock.weigh("unmask down", phases.encode_unmask_request(ROUND, x, total.survivors, total.dropped))
        content = clock.weigh("unmask up", clock.time("client: opening", clients[x].answer, phases.UNMASK, asked, x))
        openings[x] = phases.decode_opening(content, ROUND, x, len(total.survivors), len(total.dropped))
        clock.time("server: checks of an opening", total.check_opening, x, openings[x])
    clock.time("server: opening the sum", total.open, openings)
    return clock


def main() -> None:
    arguments = parse_args(__doc__ or "")
    torch.set_num_threads(1)
    submodels = SubModels(describe_model(compose(("model=fedlp_mlp",)).model, (1, 40, 50), 10, "classification"))
    params = {name: tensor.detach() for name, tensor in state_tensors(submodels.spec.build(0)).items()}
    cases = []
    for count in (5,) if arguments.quick else (10, 50):
        for dropped in (0, count // 10, 2 * count // 5):
            with tempfile.TemporaryDirectory() as folder:
                clock = play(submodels, params, count, dropped, Path(folder))
            seconds = {name: statistics.median(found) for name, found in clock.seconds.items()}
            sizes = {name: statistics.mean(found) for name, found in clock.sizes.items()}
            cases.append({"clients": count, "dropped": dropped, "seconds": seconds, "bytes": sizes})
            rows = [(name, f"{1000 * value:.1f} ms") for name, value in seconds.items()]
            rows += [(name, f"{value:,.0f} B") for name, value in sizes.items()]
            print_table(f"{count} clients, {dropped} drop out after shares", ("step", "median or mean"), rows)
    num_params = sum(tensor.numel() for tensor in params.values())
    write_report(arguments.json, arguments.quick, {"parameters": num_params, "cases": cases})


if __name__ == "__main__":
    main()
