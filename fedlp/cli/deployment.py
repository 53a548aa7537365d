"""``fedlp-certs``, ``fedlp-deploy-demo``, ``fedlp-export``: keys, rehearsal, export."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from fedlp.cli.common import set_up_logging
from fedlp.config import compose, to_plain, to_yaml, with_absolute_paths
from fedlp.errors import ConfigError, FedLPError

_DEMO = ("num_clients=3", "clients_per_round=3", "num_rounds=3")


def certs_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line of ``fedlp-certs``."""
    parser = argparse.ArgumentParser(prog="fedlp-certs", description=description)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write; nothing there is overwritten")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="HOST",
        help="a name or address under which the SuperLink is reached (repeatable; localhost and 127.0.0.1 are added)",
    )
    parser.add_argument("--supernodes", type=int, default=1, metavar="N", help="key pairs to make (default: 1)")
    parser.add_argument("--days", type=int, default=365, help="how long the certificates are valid (default: 365)")
    return parser


def make_certs(arguments: argparse.Namespace) -> None:
    """Make a CA, a server certificate and SuperNode keys; say where they are."""
    from fedlp.apps.deployment.certificates import make_certificates

    made = make_certificates(arguments.folder, arguments.host, arguments.supernodes, arguments.days)
    print(f"SuperLink: {made.ca} {made.server} {made.server_key}")
    for key in made.node_keys:
        print(f"SuperNode: {made.ca} {key}   to register: {key.with_suffix('.pub')}")
    print(f"keep to yourself: {made.ca.with_suffix('.key')}")


def export_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line of ``fedlp-export``."""
    parser = argparse.ArgumentParser(prog="fedlp-export", description=description)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run, finished or stopped after a checkpoint")
    parser.add_argument("--clients", nargs="+", default=["all"], metavar="I", help="client numbers (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: RUN_DIR/artefacts)")
    parser.add_argument("--no-onnx", action="store_true", help="write no model.onnx, which needs fedlp[export]")
    parser.add_argument(
        "--examples",
        type=int,
        default=1000,
        metavar="N",
        help="training examples on which narrower models measure their batch norms (default: 1000; 0: the global ones)",
    )
    return parser


def export(arguments: argparse.Namespace) -> None:
    """Export the sub-models of a run and print their table."""
    if arguments.clients != ["all"] and not all(word.isdecimal() for word in arguments.clients):
        raise ConfigError(f"--clients {' '.join(arguments.clients)}: give client numbers, or all")
    if arguments.examples < 0:
        raise ConfigError(f"--examples {arguments.examples}: give a number of examples, or 0")
    clients = None if arguments.clients == ["all"] else [int(word) for word in arguments.clients]
    set_up_logging()
    from fedlp.apps import export as exporting

    out = arguments.out or arguments.run / "artefacts"
    onnx = not arguments.no_onnx
    index = exporting.export_run(arguments.run, out, clients, onnx=onnx, examples=arguments.examples)
    print(f"{exporting.table(index)}\n-> {out / exporting.INDEX}")


def demo_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line of ``fedlp-deploy-demo``."""
    parser = argparse.ArgumentParser(prog="fedlp-deploy-demo", description=description)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=f"as of fedlp; default: {' '.join(_DEMO)}")
    default = datetime.now().strftime("runs/deploy-demo/%Y-%m-%d_%H-%M-%S.%f")
    parser.add_argument("--out", type=Path, default=Path(default), metavar="DIR", help=f"default: {default}")
    return parser


def run_demo(arguments: argparse.Namespace) -> None:
    """Rehearse a deployment and print its result; FedLPError if the models differ."""
    config = with_absolute_paths(compose((*_DEMO, *arguments.overrides)))
    set_up_logging()
    from fedlp.apps.deployment import demo
    from fedlp.progress import Progress
    from fedlp.report import find_runs, group_runs, run_label, summary_table

    out = arguments.out
    progress = Progress(config.num_rounds, run_label(to_plain(config)))
    found = demo.run_demo(to_yaml(config), out, progress.show)
    print(summary_table(group_runs(find_runs([out]))))
    print(demo.traffic_table(found.traffic))
    print("\n" + _verdict(found.difference) + f"  -> {out}")
    if found.difference:
        raise FedLPError(f"the deployed model differs from the local engine's by up to {found.difference:g}")


def _verdict(difference: float | None) -> str:
    if difference is None:
        return "clients failed, so the model is not that of the local engine; rounds.jsonl names them"
    return "model: " + ("the local engine's, bit for bit" if difference == 0 else "not the local engine's")
