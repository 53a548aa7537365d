"""What hostile clients do to a run, by aggregator: FedLP's MLP on digits, 10 clients, 10 rounds.

    python experiments/robustness/run.py            (about 20 minutes of one core; resumable)

To decide: which rule may be the default, so what each rule costs where nobody is hostile (iid, Dirichlet, tiers), and
which attacks each one bears. Attacks: an update with its sign flipped and ten times as large, by 1 or 3 of 10 clients;
the same sign flip with a claim of 10^6 examples; a sign flip of ordinary size; values of 3e38; negative variances.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.robustness.tables import (  # noqa: E402
    CHOICE_SEEDS,
    CHOICES,
    HONEST,
    HUGE,
    MULTIPLES,
    NEGATIVE,
    RULES,
    SEEDS,
    SETTINGS,
    regenerate,
)
from fedlp.apps.federate import Federation  # noqa: E402
from fedlp.config import compose, to_yaml  # noqa: E402
from fedlp.federation.client.app import make_client_app  # noqa: E402
from fedlp.federation.wire import messages  # noqa: E402
from fedlp.simulation.flower_apps import settings_of  # noqa: E402
from fedlp.simulation.local import LocalGrid  # noqa: E402
from fedlp.types import RoundRecord  # noqa: E402

HERE = Path(__file__).resolve().parent
RUNS = HERE / "results" / "runs.jsonl"
COMMON = "model=fedlp_mlp num_clients=10 clients_per_round=10 num_rounds=10 eval_every=10 local.lr=0.1 strategy=fedavg"


def attack(
    honest: Callable[[Message, Context], Message],
    hostile: int,
    examples: int | None,
    change: float | str,
    is_delta: bool,
    variances: NDArray[np.bool_],
) -> object:
    """Return a client app in which the first clients attack.

    They send x + factor (y - x) in place of their update y of x, or 3e38 everywhere, or -50 as running variances, whose
    places among all float32 values are given.
    """

    def changed(values: NDArray[Any], start: Any) -> NDArray[Any]:
        if change == HUGE:
            return np.full_like(values, 3e38)
        if change == NEGATIVE:
            return np.where(variances, values.dtype.type(-50), values)
        assert isinstance(change, float | int)
        return (start + change * (values - start)).astype(values.dtype)

    def app(message: Message, context: Context) -> Message:
        before = messages.PARAMS in message.content and {
            name: array.numpy().copy() for name, array in message.content[messages.PARAMS].items()
        }
        reply = honest(message, context)
        client = int(context.node_config["partition-id"])
        if message.metadata.message_type != messages.TRAIN or client >= hostile or reply.has_error():
            return reply
        arrays = reply.content[messages.PARAMS]
        for name, array in list(arrays.items()):
            values = array.numpy()
            if values.dtype.kind == "f":
                arrays[name] = type(array)(changed(values, 0.0 if is_delta else before[name]))
        if examples is not None:
            reply.content[messages.METRICS]["num-examples"] = examples
        return reply

    return app


def run(setting: str, rule: str, seed: int) -> dict[str, float]:
    """Return what :func:`simulate` does for a cell of the tables of rules."""
    options, *about = SETTINGS[setting]
    return simulate(f"{COMMON} {options} aggregator={RULES[rule]} seed={seed}", *about)


def choose(name: str, multiple: int | None, seed: int) -> dict[str, float]:
    """Return what :func:`simulate` does for a cell of the table of multiples."""
    bound = "null" if multiple is None else multiple
    options = f"{COMMON} num_clients=20 num_rounds=15 eval_every=15 {CHOICES[name]} aggregator.max_norm={bound}"
    return simulate(f"{options} seed={seed}", 0, None, 0)


def simulate(options: str, hostile: int, examples: int | None, change: float | str) -> dict[str, float]:
    """Return the accuracy after the last round, and how many updates were scaled down or had too many examples."""
    config = compose(options.split())
    federation = Federation(config)
    clipped: list[int] = []
    capped: list[int] = []

    def count(record: RoundRecord, _: object) -> None:
        clipped.append(len(record.clipped))
        examples = [client.num_examples for client in record.clients]
        capped.append(sum(number > 10 * statistics.median(examples) for number in examples))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        federation.runtime(str(out / "clients"))
        app: object = make_client_app(lambda cfg, state_dir: federation.runtime(state_dir), settings_of)
        if hostile:
            floats = {n: x for n, x in federation.submodels.spec.tensors.items() if x.dtype == torch.float32}
            variances = [np.full(math.prod(x.shape), n.endswith("running_var")) for n, x in floats.items()]
            is_delta = config.upload.values == "deltas"
            app = attack(app, hostile, examples, change, is_delta, np.concatenate(variances))  # type: ignore[arg-type]
        with LocalGrid(
            lambda: app,  # type: ignore[arg-type, return-value]
            num_clients=config.num_clients,
            num_workers=1,
            message_bytes=16 * federation.submodels.spec.num_params,
            run_config={"cfg": to_yaml(config), "out": str(out)},
        ) as grid:
            manifest = federation.serve(grid, out, [count])
    metrics = manifest["final_metrics"]
    accuracy = metrics["client_accuracy" if config.evaluation.name == "clients" else "accuracy"]
    return {"accuracy": float(accuracy), "clipped": sum(clipped), "capped": sum(capped)}


def main() -> None:
    """Run what is missing, and write the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    RUNS.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    done = {(line["setting"], line["rule"], line["seed"]) for line in lines}

    def note(setting: str, rule: str, seed: int, measure: Callable[[], dict[str, float]]) -> None:
        if (setting, rule, seed) not in done:
            line = {"setting": setting, "rule": rule, "seed": seed, **measure()}
            print(line, flush=True)
            with RUNS.open("a") as file:
                file.write(json.dumps(line) + "\n")

    for name, seed, multiple in itertools.product(CHOICES, CHOICE_SEEDS, MULTIPLES):  # first: they decide the default
        note(f"choice: {name}", f"max_norm={multiple}", seed, partial(choose, name, multiple, seed))
    for setting in sorted(SETTINGS, key=HONEST.__contains__):
        for seed, rule in itertools.product(SEEDS, RULES):
            if setting.startswith(("CNN", "mixed")) and not rule.startswith("coverage"):
                continue  # asks what bounds cost where clients differ most
            note(setting, rule, seed, partial(run, setting, rule, seed))
    regenerate(RUNS.parent, RUNS.parent)


if __name__ == "__main__":
    main()
