"""Console entries. Hydra stops here, and so does every error: one line on stderr and exit code 2, no traceback.

Heavy imports (torch, Flower, matplotlib) happen only in the branch that needs them, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from fedlp.cli.common import end, guard, run_hydra
from fedlp.cli.deployment import certs_parser, demo_parser, export, export_parser, make_certs, run_demo
from fedlp.cli.run import report, run_dir, run_job
from fedlp.cli.tools import profile_job, prune_job, search_job


def main() -> None:
    """Run one federated run, a sweep (``-m``), a dry run, or go on with a stopped one."""
    OmegaConf.register_new_resolver("fedlp.run_dir", run_dir, use_cache=True, replace=True)
    run_hydra("config", run_job)


def prune_main() -> None:
    """Prune one trained model and write it so that its own ecosystem loads it; ``-m`` for sweeps."""
    _name_folder("pruned")
    run_hydra("prune", prune_job)


def search_main() -> None:
    """Search for an allocation function on one trained model and write it as a file that ``allocator=dsa`` takes."""
    _name_folder("searched")
    run_hydra("search", search_job)


def profile_main() -> None:
    """Measure what training a model costs on this device, and write its budget file; ``-m`` for sweeps."""
    _name_folder("profiles")
    run_hydra("profile", profile_job)


def _name_folder(kind: str) -> None:
    """Let configs name a folder by the time."""
    stamp = datetime.now().strftime(f"{kind}/%Y-%m-%d/%H-%M-%S.%f")
    OmegaConf.register_new_resolver("fedlp.tool_dir", lambda: stamp, replace=True)


def report_main() -> None:
    """Turn one or many runs into a table, plots and one HTML page."""
    parser = argparse.ArgumentParser(prog="fedlp-report", description=report_main.__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run, a folder of runs (a sweep), or a *.runs.jsonl.xz"
    )
    parser.add_argument(
        "--out", type=Path, help="where to write (default, of the first: RUN_DIR/report; report-NAME beside a file)"
    )
    sys.exit(end(lambda: guard(lambda: report(parser.parse_args()))))


def export_main() -> None:
    """Write the sub-models of a run's clients as files that devices run without fedlp: safetensors and ONNX."""
    parser = export_parser(export_main.__doc__)
    sys.exit(end(lambda: guard(lambda: export(parser.parse_args()))))


def certs_main() -> None:
    """Make a development CA, the SuperLink's certificate and the SuperNodes' keys."""
    parser = certs_parser(certs_main.__doc__)
    sys.exit(end(lambda: guard(lambda: make_certs(parser.parse_args()))))


def deploy_demo_main() -> None:
    """Rehearse a deployment here: SuperLink, TLS, one SuperNode with its own key per client; compare, count bytes."""
    parser = demo_parser(deploy_demo_main.__doc__)
    sys.exit(end(lambda: guard(lambda: run_demo(parser.parse_args()))))
