"""Console entries. Hydra stops here, and so does every error: one line on stderr and exit code 2, no traceback.

Heavy imports (torch, Flower, matplotlib) happen only in the branch that needs them, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlp.config import RunConfig, config_dir, first_line, from_omegaconf, from_yaml, register_schemas, to_yaml
from fedlp.errors import ConfigError, FedLPError

INTERRUPTED = 130
_RESUMABLE_WITH = ("num_rounds", "simulation", "resume")


def main() -> None:
    """Run one federated run, a sweep (``-m``), a dry run, or go on with a stopped one."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach _guard whole, instead of being printed by Hydra
    register_schemas()
    OmegaConf.register_new_resolver("fedlp.run_dir", _run_dir, use_cache=True, replace=True)
    job = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(_job)
    sys.exit(_guard(job))


def report_main() -> None:
    """Turn one or many runs into a table, plots and one HTML page."""
    parser = argparse.ArgumentParser(prog="fedlp-report", description=report_main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run, or a folder of runs (a sweep)")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN_DIR/report of the first)")
    arguments = parser.parse_args()
    sys.exit(_guard(lambda: _report(arguments.runs, arguments.out or arguments.runs[0] / "report")))


def _job(composed: DictConfig) -> None:
    config = from_omegaconf(composed)
    hydra_config = HydraConfig.get()
    out = Path(hydra_config.runtime.output_dir)
    if config.resume is not None:
        config = _resumed(config, list(hydra_config.overrides.task))
    _set_up_logging()
    from fedlp import assembly
    from fedlp.report import run_label

    cfg = to_yaml(config)
    if config.dry_run:
        _print_costs(assembly.dry_run(cfg, out), out)
        return
    try:
        manifest = assembly.run(cfg, out, run_label)
    except KeyboardInterrupt:
        print(f"\nfedlp: stopped; go on with: fedlp resume={out}", file=sys.stderr)
        raise
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in manifest["final_metrics"].items() if value is not None)
    totals = manifest["totals"]
    print(f"{metrics}  up {totals['bytes_up'] / 1e6:.2f} MB  down {totals['bytes_down'] / 1e6:.2f} MB  -> {out}")


def _resumed(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return the config of the run to go on with; only its length and its engine may be changed."""
    assert config.resume is not None
    names = [override.lstrip("+~").split("=")[0] for override in overrides]
    foreign = [name for name in names if name.split(".")[0] not in _RESUMABLE_WITH]
    if foreign:
        raise ConfigError(f"resume goes on with the run's own config: drop {', '.join(foreign)}")
    folder = Path(config.resume)
    stored = from_yaml((folder / "config.yaml").read_text())
    stored.resume = str(folder)
    if "num_rounds" in names:
        stored.num_rounds = config.num_rounds
    if any(name.startswith("simulation") for name in names):
        stored.simulation = config.simulation
    return stored


def _run_dir(resume: str | None) -> str:
    """Return where a run writes: a folder named by the time, or the run that is resumed."""
    if resume is None:
        return datetime.now().strftime("runs/%Y-%m-%d/%H-%M-%S")
    if not (Path(resume) / "config.yaml").is_file():
        raise ConfigError(f"resume={resume}: that is not a run directory (it has no config.yaml)")
    return resume


def _print_costs(manifest: dict[str, dict[str, float]], out: Path) -> None:
    expected, totals = manifest["expected"], manifest["expected_totals"]
    print(
        f"parameters per client and round: {expected['params_down_per_client']:,.0f} down, "
        f"{expected['params_up_per_client']:,.0f} up"
    )
    print(
        f"bytes per client and round: {expected['bytes_down_per_client']:,.0f} down, "
        f"{expected['bytes_up_per_client']:,.0f} up"
    )
    print(
        f"MACs per example: {expected['macs_per_example'] / 1e6:,.2f} M forward, "
        f"{expected['training_macs_per_example'] / 1e6:,.2f} M in training"
    )
    print(
        f"the whole run: {totals['bytes_down'] / 1e6:,.1f} MB down, {totals['bytes_up'] / 1e6:,.1f} MB up"
        + (f", {totals['macs'] / 1e9:,.1f} GMACs on clients" if "macs" in totals else "")
        + f"  -> {out}"
    )


def _report(runs: list[Path], out: Path) -> None:
    from fedlp.report import find_runs, group_runs, summary_table, write_report

    page = write_report(runs, out)
    print(summary_table(group_runs(find_runs(runs))))
    print(f"report: {page}")


def _set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fedlp: %(message)s"))
    logger = logging.getLogger("fedlp")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)


def _guard(action: Callable[[], object]) -> int:
    """Run an action; turn what a user can cause into one line and an exit code."""
    try:
        action()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (FedLPError, HydraException, OmegaConfBaseException) as error:
        print(f"fedlp: {_explain(error)}", file=sys.stderr)
        return 2
    return 0


def _explain(error: BaseException) -> str:
    """Return the line of the FedLPError at the root of an error, if there is one, else of the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FedLPError):
            return str(cause)
        cause = cause.__cause__
    return first_line(error)
