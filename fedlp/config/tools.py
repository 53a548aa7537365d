"""Structured config of the tools beside ``fedlp``: pruning, searching and profiling one model."""

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
    max_examples: int | None = None  # of the training examples, counted from the first
    steps: int = 6  # newton: at most so many


@dataclass
class PruneConfig:
    """One-shot pruning of one model. One of ``sparsity``, ``target_params`` and ``target_macs`` says how far."""

    seed: int = 0
    sparsity: float | None = None  # fraction removed of the parameters that belong to prunable units, in (0, 1)
    target_params: float | None = None  # parameters of the whole model that may stay
    target_macs: float | None = None  # multiply-accumulates per example that may stay
    run: str | None = None  # prune the model of this run directory, on its data; ``model`` and ``dataset`` are its own
    evaluate: bool = True  # measure before and after on the test examples
    eval_batch_size: int = 100
    onnx: bool = False  # also write model.onnx, in float32
    dtype: str = "auto"  # of the weights written: "float32", "float16", "bfloat16", or "auto": that of the weights read
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
    """Measuring this device: what a training step of a model costs on it as the model is cut."""

    seed: int = 0
    densities: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 0.75, 1.0])  # of every layer's units
    repeats: int = 10  # timed steps at each density, of which the median counts
    memory_bytes: float | None = None  # limit for the budget file; the memory that is free now where null
    latency_s: float | None = None  # limit for the budget file, of one step; none where null
    upload_bytes: float | None = None  # limit for the budget file; none where null
    device: str = "cpu"
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    local: LocalConfig = field(default_factory=LocalConfig)


@dataclass
class SearchSettings:
    """How allocation functions are searched."""

    space: str = "trees"  # "trees" (typed expression trees) or "chains" (those that DSA published)
    modes: list[str] = field(default_factory=lambda: ["evolution", "random", "vector"])  # at equal evaluations
    evaluations: int = 150  # distinct candidates of each mode
    population: int = 24
    ratios: list[float] = field(default_factory=lambda: [0.2, 0.35, 0.5])  # sparsities that fitness averages over
    fitness_examples: int = 16  # training examples that candidates are measured on
    held_out_examples: int = 32  # training examples that the final check looks at
    batch_size: int = 2
    workers: int | None = None  # processes; as many as cores where absent


@dataclass
class SearchConfig:
    """A search for an allocation function on one model."""

    seed: int = 0
    run: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    search: SearchSettings = field(default_factory=SearchSettings)
