"""Composition root of ``fedlp-profile``: training costs of a model on this device over densities."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fedlp.allocation.budget.costs import CostModel, make_costs
from fedlp.apps.peak_memory import peak_memory
from fedlp.config import LocalConfig, ProfileConfig, to_plain
from fedlp.data.datasets import DataInfo, Examples, describe_dataset
from fedlp.errors import ConfigError, FedLPError
from fedlp.models import ModelSpec, describe_model, state_tensors
from fedlp.models.cost import count_macs
from fedlp.pruning.costs.activations import activation_footprint
from fedlp.pruning.costs.footprint import Footprint, macs_footprint
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import WidthSpec, cut_model, trace_widths
from fedlp.rng import Stream, generator
from fedlp.tasks import task_of, with_task
from fedlp.training.loop import check_loss, train_locally
from fedlp.types import Budget, Keep, PrunableLayer

log = logging.getLogger("fedlp")
_PEAK_RESET = "5"  # what Linux's clear_refs takes to forget the peak of a process


@dataclass(frozen=True)
class Subject:
    """Subject of a profile."""

    spec: ModelSpec
    model: nn.Module
    info: DataInfo
    widths: WidthSpec
    layers: tuple[PrunableLayer, ...]


def profile(config: ProfileConfig, out: Path) -> dict[str, Any]:
    """Measure training steps of a model cut uniformly; write ``profile.json`` and ``budget.yaml``; return the report.

    ``budget.yaml`` holds the fields of :class:`~fedlp.types.Budget`: the limits of the config, and the device's free
    memory if none was given. The columns ``macs`` and ``step_s`` of the report form a
    :class:`~fedlp.allocation.budget.costs.LatencyTable`.

    Raises
    ------
    FedLPError
        If there is no such device or no prunable unit, or ``out`` already holds a profile.
    """
    if (out / "profile.json").exists():
        raise ConfigError(f"hydra.run.dir={out} already holds a profile; choose another folder")
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={config.device}, but torch finds no CUDA device here; use device=cpu")
    budget = Budget(
        memory_bytes=config.memory_bytes or free_memory(device),
        latency_s=config.latency_s,
        upload_bytes=config.upload_bytes,
    )
    subject = _load_subject(config)
    costs = describe_costs(subject.model, subject.widths, subject.layers, subject.spec, config.local)
    rows: list[dict[str, float]] = []
    _measure(subject, _uniform(subject, min(config.densities)), config, device)  # loads what later steps find loaded
    for density in sorted(config.densities):
        kept = _uniform(subject, density)
        modelled = dict(zip(("params", "macs", "memory_bytes"), _evaluate(costs, kept), strict=False))
        if not rows or modelled["macs"] > rows[-1]["macs"]:  # small layers may round to the same units
            rows.append({"density": density} | _measure(subject, kept, config, device) | modelled)
    report = _report(config, subject, device, rows) | {"budget": asdict(budget)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "budget.yaml").write_text(yaml.safe_dump(asdict(budget), sort_keys=False), encoding="utf-8")
    (out / "profile.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def describe_costs(
    model: nn.Module, widths: WidthSpec, layers: tuple[PrunableLayer, ...], spec: ModelSpec, local: LocalConfig
) -> CostModel:
    """Return the costs of a model's prunable layers under the local training options."""
    axes = {layer.name for layer in layers}
    inputs = spec.example_inputs(1)
    return make_costs(
        layers,
        Footprint(model, widths).terms(axes),
        macs_footprint(model, widths, inputs).terms(axes),
        activation_footprint(model, widths, inputs).terms(axes),
        local.batch_size,
        "adam" if local.optimizer == "adam" else "momentum" if local.momentum else "sgd",
    )


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a device now."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="ascii").splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def table(report: Mapping[str, Any]) -> str:
    """Return a report's measurements as lines of text."""
    head = f"{'density':>8}{'params':>12}{'MACs':>12}{'step':>12}{'memory':>12}{'measured':>12}{'upload':>12}"
    columns = ("densities", "params", "macs", "step_s", "memory_bytes", "memory_growth_bytes", "upload_bytes")
    lines = [
        f"{density:>8.3g}{params:>12,.0f}{macs / 1e6:>10,.2f} M{step * 1e3:>9,.2f} ms{memory / 1e6:>9,.2f} MB"
        f"{growth / 1e6:>9,.2f} MB{upload / 1e6:>9,.2f} MB"
        for density, params, macs, step, memory, growth, upload in zip(*(report[n] for n in columns), strict=True)
    ]
    return "\n".join([head, *lines])


# ---------------------------------------------------------------------------------------------------------------- parts
def _load_subject(config: ProfileConfig) -> Subject:
    info = with_task(describe_dataset(config.dataset), config.task.make())
    spec = describe_model(config.model, info.input_shape, info.num_classes, info.task, info.vocabulary)
    check_loss(config.local, info)
    model = spec.build(config.seed)
    widths = trace_widths(model, spec.example_inputs(1))
    if line := widths.whole_line():
        log.warning("%s", line)
    return Subject(spec, model, info, widths, find_layers(model, widths, shared=not spec.reads_tokens))


def _uniform(subject: Subject, density: float) -> dict[str, int]:
    return {layer.name: max(1, round(density * layer.num_units)) for layer in subject.layers}


def _evaluate(costs: CostModel, kept: Mapping[str, int]) -> list[float]:
    found: list[float] = costs.evaluate(
        torch.tensor([float(kept[name]) for name in costs.layers]).double().numpy()
    ).tolist()
    return found


def _measure(
    subject: Subject, kept: Mapping[str, int], config: ProfileConfig, device: torch.device
) -> dict[str, float]:
    """Return the cost of real training steps of a model cut to its first units."""
    axes = subject.widths.axes
    examples = _draw_examples(subject, config)
    rng = generator(config.seed, Stream.LOCAL_TRAINING)
    local = LocalConfig(**{**vars(config.local), "epochs": 1})
    gc.collect()
    before = _start_peak(device)
    cut = cut_model(
        subject.model, subject.widths, {name: Keep.first(count, axes[name]) for name, count in kept.items()}
    )
    cut = cut.to(device)
    times: list[float] = []
    for _ in range(1 + config.repeats):
        started = time.perf_counter()
        train_locally(cut, examples, subject.info, local, rng)
        times.append(time.perf_counter() - started)
    return {
        "step_s": statistics.median(times[1:]),
        "step_macs": config.local.batch_size * count_macs(cut, subject.spec.example_inputs(1).to(device)).training,
        "memory_growth_bytes": max(0.0, _peak(device) - before),
        "upload_bytes": float(sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(cut).values())),
    }


def _draw_examples(subject: Subject, config: ProfileConfig) -> Examples:
    """Return one batch of noise in the shape of the data set's examples."""
    rng, count, info = generator(config.seed, Stream.DATA), config.local.batch_size, subject.info
    return task_of(info).draw_examples(info, count, rng)


def _start_peak(device: torch.device) -> float:
    """Reset the peak of memory, if the system can, and return the memory in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    reset = Path("/proc/self/clear_refs")
    if os.access(reset, os.W_OK):
        reset.write_text(_PEAK_RESET, encoding="ascii")
    return _peak(device)


def _peak(device: torch.device) -> float:
    """Return the peak of bytes in use since :func:`_start_peak`; since the process started if it cannot be reset."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return 1024.0 * int(lines["VmHWM"].split()[0])
    peak = peak_memory()
    if peak is None:
        raise FedLPError("fedlp-profile cannot read the peak memory of a process on Windows; use Linux, macOS or WSL")
    return float(peak)


def _report(
    config: ProfileConfig, subject: Subject, device: torch.device, rows: list[dict[str, float]]
) -> dict[str, Any]:
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    columns = ("macs", "step_s", "step_macs", "memory_bytes", "memory_growth_bytes", "upload_bytes", "params")
    return {
        "device": {
            "kind": device.type,
            "name": machine,
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "model": subject.spec.blueprint.name,
        "densities": [row["density"] for row in rows],
        **{name: [row[name] for row in rows] for name in columns},
        "config": to_plain(config),
    }
