"""Peak memory of a client in one round, against the estimate that memory budgets use.

    python experiments/memory/run.py --data FOLDER     # FOLDER holds models/ and text/; six minutes

A case is one tier of a fleet whose memory is limited. Its client's round (instruction decoded, sub-model loaded and
trained for three steps, upload encoded) runs in a process of its own that has done a round of another model before, so
that libraries are loaded. Measured is the growth of the process's resident memory at its peak, the received message
included; Linux counts it (``VmHWM``). ``results/memory.json`` holds every case, ``results/tables.md`` the table;
``--cases`` measures some anew and leaves the others.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.memory.tables import regenerate  # noqa: E402

LARGE, SMALL, SMOLLM = "lm-3.3m", "stories260K", "smollm2-135m"
WARM = ("local.batch_size=1", "dataset.sequence_length=32", "dataset.max_train_examples=18", "fleet.fractions=[1.0]")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "adam, batch 8 of 128": (LARGE, ()),
    "adam, batch 1 of 128": (LARGE, ("local.batch_size=1", "fleet.fractions=[1.0,0.5,0.35]")),
    "adam, batch 4 of 256": (
        LARGE,
        ("dataset.sequence_length=256", "local.batch_size=4", "fleet.fractions=[1.0,0.6,0.4]"),
    ),
    "sgd, batch 4 of 128": (LARGE, ("local=sgd", "local.batch_size=4", "fleet.fractions=[1.0,0.6,0.4]")),
    "lora, adam, batch 8 of 128": (LARGE, ("adapter=lora", "fleet.fractions=[1.0,0.7,0.5]")),
    "stories260K, adam, batch 32 of 128": (SMALL, ("local.batch_size=32",)),
}
LORA = ("adapter=lora", "fleet.fractions=[1.0]")
FOUR, ONE = (*LORA, "local.batch_size=4"), (*LORA, "local.batch_size=1")
ENCODED = "adapter.base=encoded"
CASES |= {
    "lora, batch 4 of 128": (LARGE, FOUR),
    "lora, base in nf4, batch 4 of 128": (LARGE, (*FOUR, ENCODED, "download=nf4")),
    "lora, base in int8, batch 4 of 128": (LARGE, (*FOUR, ENCODED, "download=int8")),
    "smollm2, lora, batch 1 of 128": (SMOLLM, (*ONE, "download=nf4")),
    "smollm2, lora, base in block8, batch 1 of 128": (SMOLLM, (*ONE, ENCODED, "download=block8")),
    "smollm2, lora, base in nf4, batch 1 of 128": (SMOLLM, (*ONE, ENCODED, "download=nf4")),
}
STEPS = 3
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the kernel: the need, not glibc's store of it


def overrides(data: Path, case: str) -> list[str]:
    """Return the config of a case."""
    model, options = CASES[case]
    folder = data / "models" / model
    batch = next((int(x.partition("=")[2]) for x in options if x.startswith("local.batch_size=")), 8)
    return [
        *("experiment=pretrained", f"model.path={folder}", f"dataset.tokenizer={folder}"),
        *(f"dataset.root={data}/text/wikitext2-test.txt", "partition=iid", "strategy.sparsity=0"),
        *(
            "num_clients=6",
            "local.accumulation=1",
            f"local.batch_size={batch}",
            f"dataset.max_train_examples={6 * STEPS * batch}",
            "fleet.fractions=[1.0,0.7,0.45]",
        ),
        *("calibration.examples=12", *(x for x in options if not x.startswith("local.batch_size="))),
    ]


def measure(asked: Sequence[str], client_id: int) -> dict[str, float]:
    """Return estimate and measurement of one client's first round, bytes; to be called in a fresh process."""
    import torch

    from fedlp.apps.federate import Federation
    from fedlp.config import compose
    from fedlp.federation.budgets import submodel_costs
    from fedlp.federation.wire import messages

    torch.set_num_threads(1)
    state = tempfile.TemporaryDirectory()
    warm = [option.replace(SMOLLM, LARGE) for option in asked]
    _round(Federation(compose([*warm, *WARM])), 0, state.name)
    plan = Federation(compose(asked))
    content, submodel = _instruction(plan, client_id)
    runtime = plan.runtime(state.name)
    costs = submodel_costs(submodel, plan.submodels, plan.costs, plan.config.local, plan.base_encoding)
    before = _reset_peak()
    instruction = _decoded(runtime, content)
    update = runtime.train(instruction)
    messages.encode_update(update, plan.submodels, plan.config.upload.entropy_coding)
    peak = _status("VmHWM")
    message = messages.count_bytes(content)
    return {
        "share": sum(p.numel() for p in plan.costs.model(submodel).parameters())
        / sum(p.numel() for p in plan.submodels.skeleton().parameters()),
        "estimate": costs["memory_bytes"],
        "measured": peak - before + message,
        "message": float(message),
    }


def _instruction(plan: Any, client_id: int) -> tuple[Any, Any]:
    from fedlp.apps.run_settings import make_download
    from fedlp.federation.server.frozen_tensors import EncodedDownlink
    from fedlp.federation.wire import messages

    params = plan.initial_params()
    assigned = plan.policy.assign(1, client_id, {}, params)
    assigned = replace(assigned, uploads=assigned.uploads - plan.submodels.spec.frozen)  # as the server does
    layout = plan.submodels.layout(assigned.submodel)
    downlink = EncodedDownlink(plan.submodels, make_download(plan.config), plan.config.seed)
    sent = downlink.encode(layout, layout.slice(params))
    return messages.encode_instruction(assigned, sent, plan.submodels), assigned.submodel


def _decoded(runtime: Any, content: Any) -> Any:
    from fedlp.federation.wire import messages

    settings = runtime.settings
    return messages.decode_instruction(content, runtime.submodels, None, settings.download, settings.encoded_base)


def _round(plan: Any, client_id: int, state: str) -> None:
    content, _ = _instruction(plan, client_id)
    runtime = plan.runtime(state)
    runtime.train(_decoded(runtime, content))


def _reset_peak() -> float:
    """Hand freed memory back to the kernel, forget the peak and return the resident memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return 1024.0 * int(lines[name].split()[0])


def tiers(asked: Sequence[str]) -> dict[str, int]:
    """Return the first client of each tier."""
    from fedlp.config import compose
    from fedlp.federation.fleet import tier_names

    config = compose(asked)
    found: dict[str, int] = {}
    for client_id, name in tier_names(config.fleet, config.num_clients, config.seed).items():
        found.setdefault(name, client_id)
    return dict(sorted(found.items(), key=lambda item: -float(item[0])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds models/ and text/")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", help="internal: measure one client of a case in this process")
    parser.add_argument("--client", type=int)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(overrides(arguments.data, arguments.case), arguments.client)))
        return 0
    path, results = arguments.out / "memory.json", list[dict[str, Any]]()
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for case in arguments.cases:
        for tier, client_id in tiers(overrides(arguments.data, case)).items():
            command = [sys.executable, __file__, "--data", str(arguments.data), "--case", case]
            done = subprocess.run(
                [*command, "--client", str(client_id)],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | MALLOC,
            )
            results.append({"case": case, "tier": tier, **json.loads(done.stdout.splitlines()[-1])})
            print(
                {k: (round(v / 1e6, 1) if isinstance(v, float) and v > 2 else v) for k, v in results[-1].items()},
                flush=True,
            )
    results += [found for found in before if found["case"] not in arguments.cases]
    results.sort(key=lambda found: list(CASES).index(found["case"]))
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    regenerate(arguments.out, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
