"""``fedlp``: one federated run, a dry run or a resumed run; ``fedlp-report``: the report of finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fedlp.cli.common import announce, output_dir, set_up_logging
from fedlp.cli.sweeps import job_header, job_name
from fedlp.config import (
    FederatedSearchConfig,
    RunConfig,
    from_omegaconf,
    refuse_unread,
    schema_for,
    to_plain,
    to_yaml,
    with_absolute_paths,
)
from fedlp.config.resuming import check_run, resumed_config, searched_config
from fedlp.progress import is_loss


def run_job(composed: DictConfig) -> float | None:
    """Run a composed config; return the objective, None for a dry run.

    A job of a sweep whose folder holds its run is not run again: a finished one gives its objective, a stopped one goes
    on.
    """
    _announce(composed)  # the next line imports torch, which takes seconds
    config = from_omegaconf(composed, schema_for(composed))
    refuse_unread(config, HydraConfig.get().overrides.task)
    if isinstance(config, FederatedSearchConfig):
        config = searched_config(config, HydraConfig.get().overrides.task)
    out = output_dir()
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if config.resume is not None:
        overrides, out = HydraConfig.get().overrides, Path(config.resume)
        folders = [override for override in overrides.hydra if override.startswith("hydra.run.dir")]
        config = resumed_config(config, [*overrides.task, *folders])
    set_up_logging()
    from fedlp.apps.sweep_jobs import earlier_run, objective_of

    config = with_absolute_paths(config)
    if is_sweep and config.resume is None and not config.dry_run:
        config, manifest = earlier_run(config, out)
        if manifest is not None:
            print(f"{job_header()}finished before  -> {out}", flush=True)
            return objective_of(config, manifest)
    from fedlp.report import run_label

    def label(plain: dict[str, Any]) -> str:
        return f"{job_name()}{run_label(plain)}"

    if not config.dry_run:
        clients = f"{config.clients_per_round} of {config.num_clients} clients"
        rounds = f"{config.num_rounds} rounds with " if config.trains else ""
        print(f"{label(to_plain(config))}: {rounds}{clients}", flush=True)
    from fedlp.apps import runs as assembly

    if config.dry_run:
        _print_costs(assembly.dry_run(to_yaml(config), out), out)
        return None
    try:
        manifest = assembly.run(config, out, label)
    except KeyboardInterrupt:
        if (out / "config.yaml").is_file():
            with suppress(OSError):  # the terminal may be gone
                print(f"\nfedlp: stopped; {_way_on(config, out)}", file=sys.stderr)
        raise
    _print_result(manifest, out)
    return objective_of(config, manifest)


def _way_on(config: RunConfig, out: Path) -> str:
    """Return how to go on with a stopped run."""
    if config.trains:
        return f"go on with: fedlp resume={out}"
    if isinstance(config, FederatedSearchConfig):
        return f"go on with the same command and hydra.run.dir={out}"
    return "a one-shot pruning starts anew"


def _announce(composed: DictConfig) -> None:
    """Print the first line of a run: its data and model, and its folder."""
    if composed.get("dry_run"):
        return
    if resume := composed.get("resume"):
        print(f"going on with the run in {resume}", flush=True)
    elif not (output_dir() / "manifest.json").is_file():
        announce(composed)


def _print_result(manifest: Mapping[str, Any], out: Path) -> None:
    """Print the final metrics, the task's first one in front, the bytes, and the callback that ended the run."""
    final, totals = manifest["final_metrics"], manifest["totals"]
    if stopped_by := manifest.get("stopped_by"):
        asked = manifest["config"]["num_rounds"]
        print(f"fedlp: {stopped_by} ended the run after round {totals['rounds']} of {asked}", file=sys.stderr)
    names = [name for name, value in final.items() if value is not None]
    names.sort(key=lambda name: (name == "train_loss", is_loss(name)))
    if found := manifest.get("search"):
        for name, values in found["held_out"].items():
            print(f"{name}: {values['mean']:.4f} of uniform's divergence on held-out data of clients")
        print(f"{found['winner']} wins  -> {out / 'winner.yaml'}")
    if tiers := manifest.get("tiers"):
        from fedlp.apps.tier_table import tier_table

        print(tier_table(tiers))
        names = [name for name in names if not name.startswith("tier_")]
    metrics = "  ".join(f"{name} {final[name]:.4f}" for name in names)
    print(f"{metrics}  up {totals['bytes_up'] / 1e6:.2f} MB  down {totals['bytes_down'] / 1e6:.2f} MB  -> {out}")


def run_dir(resume: str | None) -> str:
    """Return the output folder of a run: time-stamped, or that of the resumed run."""
    return datetime.now().strftime("runs/%Y-%m-%d/%H-%M-%S.%f") if resume is None else str(check_run(resume))


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


def report_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line of ``fedlp-report``."""
    parser = argparse.ArgumentParser(
        prog="fedlp-report",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  fedlp-report runs/2026-11-29/10-00-00.0     one run\n"
        "  fedlp-report multirun/DATE/TIME              a sweep: seeds of one config are one curve with a band\n"
        "  fedlp-report a b --out compared              two runs on one page",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run, a folder of runs (a sweep), or a *.runs.jsonl.xz"
    )
    parser.add_argument(
        "--out", type=Path, help="where to write (default, of the first: RUN_DIR/report; report-NAME beside a file)"
    )
    parser.add_argument(
        "--format",
        dest="formats",
        action="append",
        choices=["png", "svg", "pdf"],
        metavar="FORMAT",
        help="of the plots beside the page: png (default), svg or pdf; repeat it for several",
    )
    return parser


def report(arguments: argparse.Namespace) -> None:
    """Write the report of some runs and print its table."""
    from fedlp.report import default_report_dir, find_runs, group_runs, summary_table, write_report

    out = arguments.out or default_report_dir(arguments.runs[0])
    page = write_report(arguments.runs, out, formats=arguments.formats or ["png"])
    print(summary_table(group_runs(find_runs(arguments.runs))))
    print(f"report: {page}")
