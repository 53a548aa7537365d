"""Structured config of the tools of one model: pruning, search, profiling."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from fedlp.config.schema import (
    AllocatorConfig,
    CalibrationConfig,
    DatasetConfig,
    LocalConfig,
    ModelConfig,
    PrunerConfig,
    TaskConfig,
)


@dataclass
class FinetuneConfig:
    """Training after pruning."""

    name: str = MISSING  # "none", "newton" (on the calibration data), "lora" (language models, through peft) or "full"
    epochs: int = 1
    batch_size: int = 32
    lr: float = 1e-3
    rank: int = 8  # lora
    alpha: float = 16.0  # lora
    max_examples: int | None = None  # first training examples used; all if null
    steps: int = 6  # newton: largest number of steps


@dataclass
class PruneConfig:
    """One-shot pruning of one model to one of ``sparsity``, ``target_params`` and ``target_macs``."""

    seed: int = 0
    sparsity: float | None = None  # fraction removed of the prunable parameters, in (0, 1)
    target_params: float | None = None  # largest number of parameters of the pruned model
    target_macs: float | None = None  # largest number of multiply-accumulates per example
    run: str | None = None  # run directory whose model is pruned, with its own ``model`` and ``dataset``
    evaluate: bool = True  # whether test metrics are measured before and after
    eval_batch_size: int = 100
    onnx: bool = False  # whether model.onnx is written too, in float32
    dtype: str = "auto"  # written weights: "float32", "float16", "bfloat16", or "auto": that of the source
    device: str = "cpu"
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    allocator: AllocatorConfig = field(default_factory=AllocatorConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass
class ProfileConfig:
    """Profile of this device: cost of a model's training step over densities."""

    seed: int = 0
    densities: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 0.75, 1.0])  # kept fractions, in (0, 1]
    repeats: int = 10  # timed steps at each density; the median counts
    memory_bytes: float | None = None  # limit for the budget file; the device's free memory if null
    latency_s: float | None = None  # limit for the budget file, of one step; none if null
    upload_bytes: float | None = None  # limit for the budget file; none if null
    device: str = "cpu"
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    local: LocalConfig = field(default_factory=LocalConfig)


@dataclass
class SearchSettings:
    """Settings of the search for allocation functions."""

    space: str = "trees"  # "trees" (typed expression trees) or "chains" (DSA's published form)
    modes: list[str] = field(default_factory=lambda: ["evolution", "random", "vector"])  # compared at equal evaluations
    evaluations: int = 150  # distinct candidates of each mode, >= 1
    population: int = 24
    ratios: list[float] = field(default_factory=lambda: [0.2, 0.35, 0.5])  # sparsities averaged in the fitness
    fitness_examples: int = 16  # training examples of the fitness
    held_out_examples: int = 32  # training examples of the final check
    batch_size: int = 2
    workers: int | None = None  # worker processes, >= 1; number of cores if null; 1 where the system cannot fork


@dataclass
class SearchConfig:
    """Search for an allocation function on one model."""

    seed: int = 0
    run: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    search: SearchSettings = field(default_factory=SearchSettings)
