"""Structured config: names, types, units. ``conf/*.yaml`` holds values, :mod:`fedlp.config.validation` the ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from fedlp.config.parts import PartConfig
from fedlp.errors import ConfigError


@dataclass
class ModelConfig(PartConfig):
    """Model that is trained; ``source`` names the part, whose options follow.

    A model of one's own is ``model=MODULE:OBJECT``: an ``nn.Module`` class, or a function that returns a module.
    """

    kind: ClassVar[str] = "model"
    key: ClassVar[str] = "source"

    name: str = MISSING  # what reports call it; torchvision, cifar_resnet: which of their models
    source: str = MISSING
    frozen: list[str] = field(default_factory=list)  # layers that keep their first values, by name or pattern (fc*):
    # they are neither trained nor sent back


@dataclass
class DatasetConfig(PartConfig):
    """Data set; its own options are those of the reader in ``fedlp/data``.

    Data of one's own are ``dataset=MODULE:OBJECT``: a function that returns training and test data, or a reader.
    """

    kind: ClassVar[str] = "dataset"

    max_train_examples: int | None = None  # a random subset of so many; all where null
    max_test_examples: int | None = None
    client_test_fraction: float = 0.0  # of each client's examples, held out for evaluation=clients; in [0, 1)
    on_devices: bool = False  # devices bring their own examples: --node-config 'data="/srv/images"' of each SuperNode
    server: str | None = None  # on_devices: file or folder of the server's test set; no central evaluation where null

    def __post_init__(self) -> None:
        if not 0 <= self.client_test_fraction < 1:
            raise ConfigError(
                f"dataset.client_test_fraction={self.client_test_fraction} is not allowed: it must be in [0, 1)"
            )
        if self.server is not None and not self.on_devices:
            raise ConfigError(
                "dataset.server is the test set of a server without training data: set dataset.on_devices=true too"
            )


@dataclass
class TaskConfig(PartConfig):
    """Task: loss, metrics and their options; "auto" is the one that the data set's targets are for."""

    kind: ClassVar[str] = "task"

    name: str = "auto"


@dataclass
class PartitionConfig(PartConfig):
    """Division of the training examples among clients; the method's own options are those of the part."""

    kind: ClassVar[str] = "partition"

    min_examples: int = 1  # smallest number of examples of a client, at least 0; dirichlet draws again until it is met

    def __post_init__(self) -> None:
        if self.min_examples < 0:
            raise ConfigError(f"partition.min_examples={self.min_examples} is not allowed: it must be at least 0")


@dataclass
class StrategyConfig(PartConfig):
    """Method: sub-model and upload set of each client; options are those of the part in ``federation/strategies``."""

    kind: ClassVar[str] = "strategy"


@dataclass
class UploadConfig(PartConfig):
    """Encoding of uploads; the encoding's own options are those of the part in ``federation/wire/encodings``."""

    kind: ClassVar[str] = "encoding"

    values: str = "weights"  # "weights", or "deltas": differences from what the client received
    error_feedback: bool = False  # deltas: the part that an encoding loses is added to the next upload
    entropy_coding: bool = False  # int8, int4, int2: lossless Huffman codes of the quantised values

    def __post_init__(self) -> None:
        if self.values not in ("weights", "deltas"):
            raise ConfigError(f"upload.values={self.values} is not allowed: it must be one of weights, deltas")
        if self.error_feedback and self.values != "deltas":
            raise ConfigError(
                "upload.error_feedback=true needs upload.values=deltas: only differences can be caught up"
            )


@dataclass
class AggregatorConfig(PartConfig):
    """Combination of updates; the rule's own options are those of the part in ``federation/aggregation``."""

    kind: ClassVar[str] = "aggregator"

    weighting: str = "examples"  # "examples", "equal", or "held": examples times the fraction of the model that is held
    batch_norm: str = "auto"  # running statistics: "average" of all clients; of clients with the "whole" model;
    # "static": never sent, re-measured before each evaluation on three clients that hold the largest sub-model; "auto":
    # "static" where some clients hold narrow sub-models of a model with batch norms, else "average"

    def __post_init__(self) -> None:
        for name, allowed in (("weighting", _WEIGHTINGS), ("batch_norm", _BATCH_NORMS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"aggregator.{name}={getattr(self, name)} is not allowed: it must be one of {', '.join(allowed)}"
                )


_WEIGHTINGS, _BATCH_NORMS = ("examples", "equal", "held"), ("auto", "average", "whole", "static")


@dataclass
class ServerOptimizerConfig(PartConfig):
    """Server optimizer (FedOpt): the aggregate taken as a pseudo-gradient."""

    kind: ClassVar[str] = "server_optimizer"


@dataclass
class PrunerConfig(PartConfig):
    """Score by which units are removed, and recovery of the other weights; the score's own options are its part's."""

    kind: ClassVar[str] = "score"

    recovery: str = "none"  # "least_squares", "bias" (of the removed means) or "none"
    centred: bool = True  # least_squares: fit with a bias
    correction: float = 0.0  # least_squares: aim at the dense model's outputs, in [0, 1]
    fisher: bool = False  # obs: weigh outputs by their Fisher information
    damping: float | None = (
        None  # of the Hessian, a fraction of its mean diagonal; null: for rounding only, or 0.01 where it is singular
    )
    keeps_batch_norm: bool = False  # classifiers: shift batch norms by what recovery adds, or estimate them anew
    shared: bool = False  # classifiers: also channels that several layers read, such as residual streams


@dataclass
class AllocatorConfig(PartConfig):
    """Allocation rule: per-layer sparsity within a budget; options are those of the part in ``allocation/rules``."""

    kind: ClassVar[str] = "allocator"


@dataclass
class CalibrationConfig:
    """What pruning may look at, of the training examples."""

    examples: int = 256
    batch_size: int = 32


@dataclass
class LocalConfig:
    """How a client trains in one round."""

    optimizer: str = MISSING  # "sgd", "adam", "adamw", or MODULE:OBJECT
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.0  # sgd
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    skip_backward: bool = False  # no gradients for the leading layers that are not sent
    logit_adjustment: float = 0.0  # classification: while training, logits gain so many times the log of the client's
    # share of each class (Menon et al., ICLR 2021): classes that a client lacks are left alone; at least 0
    proximal: float = 0.0  # FedProx: mu of the penalty mu / 2 x squared distance from the received weights, at least 0
    accumulation: int = 1  # batches whose gradients make one step; their mean loss is that of one large batch
    optimizer_options: dict[str, Any] = field(default_factory=dict)  # further ones, such as {beta2: 0.99} of adam
    precision: str = "float32"  # of forward and backward passes: "float32", or "bfloat16" (autocast)
    schedule: Any = "constant"  # of the learning rate: "constant", "cosine", "step", "warmup", MODULE:OBJECT, or
    # a mapping of name and options, such as {name: cosine, floor: 0.1}


@dataclass
class AdapterConfig:
    """Adapters of a language model, which alone are trained and sent back: "none" or "lora"."""

    name: str = "none"
    rank: int = 8
    alpha: float = 16.0  # the product of both matrices is scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # linear layers, by name or pattern
    dropout: float = 0.0  # of adapters' inputs, in training
    freeze_a: bool = False  # train B alone (FFA-LoRA)


@dataclass
class SimulationConfig:
    """Which engine carries the messages."""

    engine: str = MISSING  # "local" (worker processes of this machine) or "ray" (Flower's simulation runtime)
    workers: int | None = None  # processes; as many as cores where absent
    round_timeout_s: float = 3600.0  # a client that has not answered by then is counted as failed
    batched: Any = False  # local: clients of one shape train together, with parameters stacked; equal up to rounding.
    # false, true, or "auto": where that was measured to be faster


@dataclass
class DeviceConfig:
    """One class of devices; see ``conf/fleet/mixed.yaml`` for where figures come from."""

    memory_bytes: float = MISSING
    flops: float = MISSING  # float32 operations per second that training sustains
    uplink_bytes_s: float = MISSING
    share: float = 1.0  # of the clients, relative to the other classes


@dataclass
class FleetConfig:
    """What the clients' sub-models may cost: nothing is limited, or by ``fractions``, or by ``devices``."""

    name: str = "full"
    fractions: list[float] = field(default_factory=list)  # tiers: of what the whole model costs, each in (0, 1]
    limited: list[str] = field(default_factory=lambda: ["params"])  # tiers: which costs, of Budget's
    shares: list[float] | None = None  # tiers: of the clients, relative to each other; equal where absent
    devices: dict[str, DeviceConfig] = field(default_factory=dict)
    memory_share: float = 0.5  # devices: of their memory that training may use, in (0, 1]
    seconds_per_example: float = 0.05  # devices: time that one example may take in training
    upload_s: float = 60.0  # devices: time that one upload may take
    availability: Any = None  # probability that a client is there in a round, in (0, 1], or a CSV file of client, from,
    # to (rounds); all clients, always, where null
    dropout: float = 0.0  # probability that a client drops out after it got its sub-model, in [0, 1)
    extra_clients: int = 0  # clients asked beyond clients_per_round, of which the first answers are taken
    only_whole: bool = False  # only clients whose budget holds the whole model take part in rounds


@dataclass
class EvaluationConfig:
    """Where models are evaluated.

    ``name`` is "central" (the global model on the server's test set), "clients" (each client's sub-model, with its
    personal head where it has one, on the client's own test examples), or "both".
    """

    name: str = "central"
    clients: int | None = None  # clients that an evaluation asks, drawn by the seed; all where null
    personal_steps: int = 0  # local steps that a client trains before it evaluates; none of them is kept
    tiers: bool = False  # after the last round, the sub-model of each tier on the server's test set


@dataclass
class TrackerConfig(PartConfig):
    """Tracker that follows the run where the server runs; options are those of the part in ``fedlp/trackers``.

    A tracker of one's own is ``tracker=MODULE:OBJECT``: a class with ``begin``, ``round`` and ``end``.
    """

    kind: ClassVar[str] = "tracker"

    name: str = "none"


@dataclass
class CallbackConfig(PartConfig):
    """Function that is called after each round; options are those of the part."""

    kind: ClassVar[str] = "callback"


@dataclass
class PrivacyConfig:
    """What is done to a client's weights before they leave it; see ``docs/privacy.md`` for what that promises.

    ``name`` is "none", or "local_dp": every upload is clipped and noised by Flower's ``LocalDpMod``.
    """

    name: str = "none"
    clipping_norm: float = 1.0  # longest update (L2 norm over all weights); the sensitivity is twice this
    epsilon: float = 0.5  # of one upload, > 0; the Gaussian mechanism keeps its promise below 1
    delta: float = 1e-5  # of one upload, in (0, 1)
    seeded: bool = False  # draw noise from the run's seed, which whoever reads the config can take off again


@dataclass
class RunConfig:
    """One federated run."""

    seed: int = 0
    num_rounds: int = 10
    num_clients: int = 10
    clients_per_round: int = 5
    min_clients: int = 1  # a round with fewer good updates leaves the model unchanged
    eval_every: int = 1  # rounds between evaluations of the global model; the last round always is
    eval_batch_size: int = 500
    checkpoint_every: int = 1
    device: str = "cpu"  # where clients train: "cpu", "cuda", "cuda:1"...
    dry_run: bool = False
    resume: str | None = None  # a run directory
    plot_partition: bool = False  # draw who has how many examples of which class as partition.png (loads the data)
    keep_best: str | None = None  # metric; the model with its best value is written as model-best.safetensors too
    callbacks: list[Any] = field(default_factory=list)  # called after each round: names, MODULE:OBJECT, or mappings of
    # name and options, such as {name: early_stopping, patience: 3}
    objective: str | None = None  # metric that a job of a sweep returns; the task's first one where absent
    label: str | None = None  # what reports call the run; a name is made from the config where absent
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    upload: UploadConfig = field(default_factory=UploadConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    allocator: AllocatorConfig = field(default_factory=AllocatorConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
