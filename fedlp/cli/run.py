"""``fedlp``: one federated run, a dry run, or a stopped run that goes on; and ``fedlp-report`` on what runs leave."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedlp.cli.common import output_dir, set_up_logging
from fedlp.config import RunConfig, from_omegaconf, from_yaml, to_yaml, validate, with_absolute_paths
from fedlp.errors import ConfigError

_RESUMABLE_WITH = ("num_rounds", "simulation", "resume")


def run_job(composed: DictConfig) -> None:
    """Run what a composed config says."""
    config = from_omegaconf(composed, RunConfig)
    out = output_dir()
    if config.resume is not None:
        out = _check_run(config.resume)
        config = _resumed(config, out)
    set_up_logging()
    from fedlp import assembly
    from fedlp.report import run_label

    cfg = to_yaml(with_absolute_paths(config))
    if config.dry_run:
        _print_costs(assembly.dry_run(cfg, out), out)
        return
    try:
        manifest = assembly.run(cfg, out, run_label)
    except KeyboardInterrupt:
        if (out / "config.yaml").is_file():
            print(f"\nfedlp: stopped; go on with: fedlp resume={out}", file=sys.stderr)
        raise
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in manifest["final_metrics"].items() if value is not None)
    totals = manifest["totals"]
    print(f"{metrics}  up {totals['bytes_up'] / 1e6:.2f} MB  down {totals['bytes_down'] / 1e6:.2f} MB  -> {out}")


def _resumed(config: RunConfig, folder: Path) -> RunConfig:
    """Return the config of the run to go on with; only its length and its engine may be changed."""
    overrides = HydraConfig.get().overrides
    names = [override.lstrip("+~").split("=")[0] for override in overrides.task]
    foreign = [name for name in names if name.split(".")[0] not in _RESUMABLE_WITH]
    foreign += [override for override in overrides.hydra if override.startswith("hydra.run.dir")]
    if foreign:
        raise ConfigError(f"resume goes on with the run's own config, in its own folder: drop {', '.join(foreign)}")
    stored = from_yaml((folder / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    stored.resume = str(folder)
    for name in names:
        if name == "num_rounds":
            stored.num_rounds = config.num_rounds
        elif name == "simulation":
            stored.simulation.engine = config.simulation.engine
        elif name != "resume":
            option = name.removeprefix("simulation.")
            setattr(stored.simulation, option, getattr(config.simulation, option))
    validate(stored)
    return stored


def run_dir(resume: str | None) -> str:
    """Return where a run writes: a folder named by the time, or the run that is resumed."""
    return datetime.now().strftime("runs/%Y-%m-%d/%H-%M-%S.%f") if resume is None else str(_check_run(resume))


def _check_run(resume: str) -> Path:
    """Return the folder of a run; ConfigError if it is none."""
    folder = Path(resume)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"resume={resume}: that is not a run directory (it has no config.yaml)")
    return folder


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


def report(arguments: argparse.Namespace) -> None:
    """Write the report of some runs and print its table."""
    from fedlp.report import find_runs, group_runs, summary_table, write_report

    page = write_report(arguments.runs, arguments.out or arguments.runs[0] / "report")
    print(summary_table(group_runs(find_runs(arguments.runs))))
    print(f"report: {page}")
