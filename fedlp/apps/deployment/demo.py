"""Rehearsal of a deployment on one machine, compared with the local engine and with bytes on the wire."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedlp.apps import runs as assembly
from fedlp.apps.deployment.certificates import make_certificates
from fedlp.apps.deployment.loopback import LoopbackFederation, SuperNode
from fedlp.config import from_yaml
from fedlp.federation.server.checkpoint import write_atomically
from fedlp.federation.server.run_directory import RunDirectory
from fedlp.simulation.flower_process import write_app


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client or all: recorded in ``rounds.jsonl`` on encoded records, and measured on the wire.

    The wire also carries joining, the app bundle, the question for capabilities, and polling as long as the run takes.

    Attributes
    ----------
    part : str
        The client, or ``all``.
    """

    part: str
    recorded_up: int
    recorded_down: int
    wire_up: int
    wire_down: int

    def overhead(self, way: str) -> float | None:
        """Return framing in percent of the recorded bytes, ``up`` or ``down``; None without records."""
        recorded: int = getattr(self, f"recorded_{way}")
        wire: int = getattr(self, f"wire_{way}")
        return 100 * (wire / recorded - 1) if recorded else None


@dataclass(frozen=True)
class Rehearsal:
    """Result of a rehearsal.

    Attributes
    ----------
    traffic : tuple of Traffic
        Every client, and all of them.
    difference : float or None
        Largest absolute difference between the deployed run's model and the local engine's: 0 for equal
        bits. None if a client failed, so that the cohorts differ.
    """

    manifest: Mapping[str, Any]
    traffic: tuple[Traffic, ...]
    difference: float | None


def run_demo(cfg: str, out: Path, on_line: Callable[[dict[str, Any]], None]) -> Rehearsal:
    """Run a config on the local engine, then on a SuperLink and one SuperNode per client; compare.

    Leaves the run directory of the deployed run, the processes' output in ``logs/`` and the traffic in ``wire.json``.
    Nothing else stays: keys, Flower's settings and every process are gone when this returns or raises.

    Parameters
    ----------
    cfg : str
        The composed config (YAML); every client becomes a SuperNode.
    on_line : callable
        Called with the record of every deployed round.
    """
    directory = RunDirectory(out.absolute())
    directory.refuse_if_used()
    num_clients = from_yaml(cfg).num_clients
    logs = directory.path / "logs"
    with tempfile.TemporaryDirectory(prefix="fedlp-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        local = scratch / "local"
        assembly.run_locally(cfg, local)
        certificates = make_certificates(scratch / "certificates", (), num_clients)
        logs.mkdir(parents=True, exist_ok=True)
        lines: list[dict[str, Any]] = []

        def record(line: dict[str, Any]) -> None:
            lines.append(line)
            on_line(line)

        with LoopbackFederation(scratch / "flower", certificates, logs) as federation:
            for i, key in enumerate(certificates.node_keys):
                federation.register(key.with_suffix(".pub"))
                state = scratch / "flower" / key.name / "state"
                config: dict[str, int | str] = {"partition-id": i, "num-partitions": num_clients}
                config["state-dir"] = str(state)
                federation.start_node(key.name, config, key)
            federation.run(write_app(scratch), {"cfg": cfg, "out": str(directory.path)}, record)
        traffic = _traffic(lines, list(federation.nodes.values()))
        manifest = directory.read_manifest()
        difference = None if manifest["totals"]["failures"] else model_difference(directory.path, local)
    found = {"traffic": [asdict(part) for part in traffic], "difference_from_local_engine": difference}
    write_atomically(directory.path / "wire.json", json.dumps(found, indent=2).encode() + b"\n")
    return Rehearsal(manifest, traffic, difference)


def model_difference(one: Path, other: Path) -> float:
    """Return the largest absolute difference between the models of two runs.

    0 for equal bytes only; the smallest number if only signs of zeros differ; infinite if names,
    shapes or types do, or something is not a number.
    """
    files = [folder / "model.safetensors" for folder in (one, other)]
    if files[0].read_bytes() == files[1].read_bytes():
        return 0.0
    ours, theirs = (load_file(file) for file in files)
    kinds = [{name: (x.shape, x.dtype) for name, x in model.items()} for model in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return math.inf
    gaps = [float((x.double() - theirs[name].double()).abs().max()) for name, x in ours.items() if x.numel()]
    return math.inf if any(math.isnan(gap) for gap in gaps) else max([math.ulp(0.0), *gaps])


def traffic_table(traffic: Iterable[Traffic]) -> str:
    """Return traffic as a plain-text table; bytes, and framing in percent of the bytes in ``rounds.jsonl``."""
    lines = [f"{'bytes':>9}{'rounds.jsonl':>26}{'on the wire':>26}{'framing':>22}"]
    lines.append(f"{'':>9}" + f"{'up':>13}{'down':>13}" * 2 + f"{'up':>11}{'down':>11}")
    for part in traffic:
        overheads = (part.overhead("up"), part.overhead("down"))
        shown = "".join(f"{'-':>11}" if value is None else f"{value:>+10.1f}%" for value in overheads)
        counts = (part.recorded_up, part.recorded_down, part.wire_up, part.wire_down)
        lines.append(f"{part.part:>9}" + "".join(f"{count:>13,}" for count in counts) + shown)
    return "\n".join(lines)


def _traffic(lines: Iterable[Mapping[str, Any]], nodes: Sequence[SuperNode]) -> tuple[Traffic, ...]:
    """Return the traffic of every client, and of all."""
    recorded = [[0, 0] for _ in nodes]
    for line in lines:
        for cost in line["clients"]:
            recorded[cost["client_id"]][0] += cost["bytes_up"]
            recorded[cost["client_id"]][1] += cost["bytes_down"]
    rows = [(up, down, node.wire.up, node.wire.down) for (up, down), node in zip(recorded, nodes, strict=True)]
    sums = [sum(column) for column in zip(*rows, strict=True)]
    return (*(Traffic(f"client {i}", *row) for i, row in enumerate(rows)), Traffic("all", *sums))
