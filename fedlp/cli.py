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
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlp.config import (
    RunConfig,
    config_dir,
    explain,
    from_omegaconf,
    from_yaml,
    profile_from_omegaconf,
    prune_from_omegaconf,
    register_schemas,
    search_from_omegaconf,
    to_yaml,
    validate,
    with_absolute_paths,
)
from fedlp.errors import ConfigError, FedLPError

BAD_INPUT, INTERRUPTED = 2, 130
_RESUMABLE_WITH = ("num_rounds", "simulation", "resume")


def main() -> None:
    """Run one federated run, a sweep (``-m``), a dry run, or go on with a stopped one."""
    OmegaConf.register_new_resolver("fedlp.run_dir", _run_dir, use_cache=True, replace=True)
    _main("config", _job)


def prune_main() -> None:
    """Prune one trained model and write it so that its own ecosystem loads it; ``-m`` for sweeps."""
    stamp = datetime.now().strftime("pruned/%Y-%m-%d/%H-%M-%S.%f")
    OmegaConf.register_new_resolver("fedlp.prune_dir", lambda: stamp, replace=True)
    _main("prune", _prune_job)


def search_main() -> None:
    """Search for an allocation function on one trained model and write it as a file that ``allocator=dsa`` takes."""
    stamp = datetime.now().strftime("searched/%Y-%m-%d/%H-%M-%S.%f")
    OmegaConf.register_new_resolver("fedlp.search_dir", lambda: stamp, replace=True)
    _main("search", _search_job)


def profile_main() -> None:
    """Measure what training a model costs on this device, and write its budget file; ``-m`` for sweeps."""
    stamp = datetime.now().strftime("profiles/%Y-%m-%d/%H-%M-%S.%f")
    OmegaConf.register_new_resolver("fedlp.profile_dir", lambda: stamp, replace=True)
    _main("profile", _profile_job)


def _main(config_name: str, job: Callable[[DictConfig], None]) -> None:
    """Run Hydra's command line on one of the config tree's roots, and exit."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach _guard whole, instead of being printed by Hydra
    register_schemas()
    codes: list[int] = []

    def guarded(composed: DictConfig) -> None:
        codes.append(0)
        codes[-1] = _guard(lambda: job(composed), _job_name())  # here, so that the rest of a sweep still runs

    run = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(guarded)

    def compose_and_run() -> None:
        try:
            run()
        except ValueError as error:  # what Hydra raises about some overrides and flags, before there is a job
            if codes:
                raise
            raise ConfigError(explain(error)) from error

    sys.exit(_end(lambda: max(_guard(compose_and_run), *codes, 0)))


def report_main() -> None:
    """Turn one or many runs into a table, plots and one HTML page."""
    parser = argparse.ArgumentParser(prog="fedlp-report", description=report_main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run, or a folder of runs (a sweep)")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN_DIR/report of the first)")
    sys.exit(_end(lambda: _guard(lambda: _report(parser.parse_args()))))


def _job(composed: DictConfig) -> None:
    config = from_omegaconf(composed)
    out = Path(HydraConfig.get().runtime.output_dir)
    if config.resume is not None:
        out = _check_run(config.resume)
        config = _resumed(config, out)
    _set_up_logging()
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


def _prune_job(composed: DictConfig) -> None:
    config = with_absolute_paths(prune_from_omegaconf(composed))
    out = Path(HydraConfig.get().runtime.output_dir)
    _set_up_logging()
    from fedlp import oneshot

    report = oneshot.prune(config, out)
    before, after = report["metrics_before"], report["metrics_after"]
    metrics = "  ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in before)
    print(
        f"{metrics}  parameters {report['params_before']:,} -> {report['params_after']:,}  "
        f"MACs {report['macs_before'] / 1e6:,.1f} M -> {report['macs_after'] / 1e6:,.1f} M  -> {out}"
    )


def _search_job(composed: DictConfig) -> None:
    config = with_absolute_paths(search_from_omegaconf(composed))
    out = Path(HydraConfig.get().runtime.output_dir)
    _set_up_logging()
    from fedlp import searching

    report = searching.run_search(config, out)
    for name, found in report["held_out"].items():
        print(f"{name}: {found['mean']:.4f} of uniform's divergence on held-out data, really pruned")
    print(f"{report['winner']} wins  search {report['search_s']:.0f} s  -> {out / 'winner.yaml'}")


def _profile_job(composed: DictConfig) -> None:
    config = with_absolute_paths(profile_from_omegaconf(composed))
    out = Path(HydraConfig.get().runtime.output_dir)
    _set_up_logging()
    from fedlp import profiling

    print(f"{profiling.table(profiling.profile(config, out))}\nbudget: {out / 'budget.yaml'}")


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


def _run_dir(resume: str | None) -> str:
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


def _report(arguments: argparse.Namespace) -> None:
    from fedlp.report import find_runs, group_runs, summary_table, write_report

    page = write_report(arguments.runs, arguments.out or arguments.runs[0] / "report")
    print(summary_table(group_runs(find_runs(arguments.runs))))
    print(f"report: {page}")


def _set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fedlp: %(message)s"))
    logger = logging.getLogger("fedlp")
    logger.handlers, logger.propagate = [handler], False
    logger.disabled = False  # Hydra disables all loggers it finds before every job of a sweep
    logger.setLevel(logging.WARNING)


def _job_name() -> str:
    """Return what errors of a sweep's job start with."""
    config = HydraConfig.get()
    return f"job {config.job.num} ({', '.join(config.overrides.task)}): " if config.mode == RunMode.MULTIRUN else ""


def _guard(action: Callable[[], object], name: str = "") -> int:
    """Run an action; turn what a user can cause into one line and an exit code."""
    try:
        action()
    except (FedLPError, HydraException, OmegaConfBaseException, OSError) as error:
        print(f"fedlp: {name}{explain(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _end(guarded: Callable[[], int]) -> int:
    """Return the exit code of the whole program."""

    def refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ConfigError(message)

    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign, assignment] # Hydra's own parser would print its usage
    try:
        return guarded()
    except KeyboardInterrupt:
        return INTERRUPTED
