"""Console entry points. Hydra and all errors end here: one line on stderr, exit code 2, no traceback.

Heavy imports (torch, Flower, matplotlib) happen only in the branch that needs them, so ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime

from fedlp.cli.help import help_text
from fedlp.cli.output import forgive_warnings, say


def main() -> None:
    """Entry point of ``fedlp``: one federated run, a sweep (``-m``), a dry run, or a resumed run."""
    if sys.argv[1:2] == ["options"]:
        _list_options()
    if sys.argv[1:2] == ["describe"]:
        _describe()
    if sys.argv[1:2] == ["new"]:
        _make_project()
    _answer("fedlp")
    from omegaconf import OmegaConf

    from fedlp.cli.run import run_dir, run_job
    from fedlp.config import federated_prune_overrides

    OmegaConf.register_new_resolver("fedlp.run_dir", run_dir, use_cache=True, replace=True)
    pruning = federated_prune_overrides(sys.argv[1:])
    if pruning is not None:  # its name was strategy=oneshot
        sys.argv[1:] = pruning
        _name_folder("pruned")
    _run("config" if pruning is None else "federated_prune", run_job)


def prune_main() -> None:
    """Entry point of ``fedlp-prune``: one-shot pruning of a trained model; ``-m`` for sweeps."""
    _answer("fedlp-prune")
    _name_folder("pruned")
    if "federated=true" in sys.argv[1:]:
        from fedlp.cli.run import run_job

        _run("federated_prune", run_job)
    from fedlp.cli.tools import prune_job

    sys.argv[1:] = [word for word in sys.argv[1:] if word != "federated=false"]
    _run("prune", prune_job)


def search_main() -> None:
    """Entry point of ``fedlp-search``: search for an allocation function, written as a file for ``allocator=dsa``."""
    _answer("fedlp-search")
    _name_folder("searched")
    if "federated=true" in sys.argv[1:]:
        from fedlp.cli.run import run_job

        _run("federated_search", run_job)
    from fedlp.cli.tools import search_job

    sys.argv[1:] = [word for word in sys.argv[1:] if word != "federated=false"]
    _run("search", search_job)


def profile_main() -> None:
    """Entry point of ``fedlp-profile``: training costs of a model on this device; ``-m`` for sweeps."""
    _answer("fedlp-profile")
    from fedlp.cli.tools import profile_job

    _name_folder("profiles")
    _run("profile", profile_job)


def _run(root: str, job: Callable[..., float | None]) -> None:
    from fedlp.cli.common import run_hydra

    run_hydra(root, job)


def _answer(command: str) -> None:
    """Answer ``--help`` and ``--version`` without Hydra, and exit."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        say(help_text(command))
        sys.exit(0)
    _answer_version()


def _answer_version() -> None:
    forgive_warnings()
    if "--version" in sys.argv[1:]:
        from fedlp import __version__

        say(f"fedlp {__version__}")
        sys.exit(0)


def _list_options() -> None:
    """Print the options of a group, and exit."""
    forgive_warnings()
    from fedlp.cli.common import end, guard
    from fedlp.config.option_help import describe_group

    groups = sys.argv[2:] or ["strategy"]
    sys.exit(end(lambda: guard(lambda: print("\n\n".join(map(describe_group, groups))))))


def _describe() -> None:
    """Print the options that describe a sample of data, and exit."""
    _answer("fedlp")
    from fedlp.apps.describe import describe
    from fedlp.cli.common import end, guard

    sys.exit(end(lambda: guard(lambda: print(describe(sys.argv[2:])))))


def _make_project() -> None:
    """Write a project of one's own, and exit."""
    forgive_warnings()
    from fedlp.cli.common import end, guard
    from fedlp.cli.new import new_project

    sys.exit(end(lambda: guard(lambda: new_project(sys.argv[2:]))))


def _name_folder(kind: str) -> None:
    """Register the resolver of time-stamped folder names."""
    from omegaconf import OmegaConf

    stamp = datetime.now().strftime(f"{kind}/%Y-%m-%d/%H-%M-%S.%f")
    OmegaConf.register_new_resolver("fedlp.tool_dir", lambda: stamp, replace=True)


def report_main() -> None:
    """Entry point of ``fedlp-report``: a table, plots and one HTML page of one or many runs."""
    _answer_version()
    from fedlp.cli.common import end, guard
    from fedlp.cli.run import report, report_parser

    parser = report_parser(report_main.__doc__)
    sys.exit(end(lambda: guard(lambda: report(parser.parse_args()))))


def export_main() -> None:
    """Entry point of ``fedlp-export``: sub-models of a run's clients as safetensors and ONNX."""
    _answer_version()
    from fedlp.cli.common import end, guard
    from fedlp.cli.deployment import export, export_parser

    parser = export_parser(export_main.__doc__)
    sys.exit(end(lambda: guard(lambda: export(parser.parse_args()))))


def certs_main() -> None:
    """Entry point of ``fedlp-certs``: development CA, certificate of the SuperLink, keys of the SuperNodes."""
    _answer_version()
    from fedlp.cli.common import end, guard
    from fedlp.cli.deployment import certs_parser, make_certs

    parser = certs_parser(certs_main.__doc__)
    sys.exit(end(lambda: guard(lambda: make_certs(parser.parse_args()))))


def deploy_demo_main() -> None:
    """Entry point of ``fedlp-deploy-demo``: rehearsal of a deployment on this machine."""
    _answer_version()
    from fedlp.cli.common import end, guard
    from fedlp.cli.deployment import demo_parser, run_demo

    parser = demo_parser(deploy_demo_main.__doc__)
    sys.exit(end(lambda: guard(lambda: run_demo(parser.parse_args()))))
