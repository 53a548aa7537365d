"""Tools of one model: pruning, search, profiling."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fedlp.cli.common import announce, output_dir, set_up_logging
from fedlp.config import ProfileConfig, PruneConfig, SearchConfig, from_omegaconf, refuse_unread, with_absolute_paths


def prune_job(composed: DictConfig) -> None:
    """Prune one model."""
    run = composed.get("run")
    announce(composed, None if run is None else f"the run in {run}")  # the next line imports torch, which takes seconds
    config = with_absolute_paths(from_omegaconf(composed, PruneConfig))
    refuse_unread(config, HydraConfig.get().overrides.task)
    out = output_dir()
    set_up_logging()
    from fedlp.apps import prune as oneshot

    report = oneshot.prune(config, out)
    before, after = report["metrics_before"], report["metrics_after"]
    metrics = "  ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in before)
    print(
        f"{metrics}  parameters {report['params_before']:,} -> {report['params_after']:,}  "
        f"MACs {report['macs_before'] / 1e6:,.1f} M -> {report['macs_after'] / 1e6:,.1f} M  -> {out}"
    )


def search_job(composed: DictConfig) -> None:
    """Search for an allocation function."""
    announce(composed)
    config = with_absolute_paths(from_omegaconf(composed, SearchConfig))
    refuse_unread(config, HydraConfig.get().overrides.task)
    out = output_dir()
    set_up_logging()
    from fedlp.apps.search import run_search

    report = run_search(config, out)
    for name, found in report["held_out"].items():
        print(f"{name}: {found['mean']:.4f} of uniform's divergence on held-out data, really pruned")
    print(f"{report['winner']} wins  search {report['search_s']:.0f} s  -> {out / 'winner.yaml'}")


def profile_job(composed: DictConfig) -> None:
    """Measure this device."""
    announce(composed)
    config = with_absolute_paths(from_omegaconf(composed, ProfileConfig))
    out = output_dir()
    set_up_logging()
    from fedlp.apps import profile as profiling

    print(f"{profiling.table(profiling.profile(config, out))}\nbudget: {out / 'budget.yaml'}")
