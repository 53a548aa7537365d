"""Structured config: names, types, units. ``conf/*.yaml`` holds values, :mod:`fedlp.config.validation` the ranges.

Longer than other files: all groups of options are looked up here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from fedlp.config.parts import PartConfig
from fedlp.errors import ConfigError


@dataclass
class ModelConfig(PartConfig):
    """Model that is trained; ``source`` names the part, whose options follow.

    A user's own model is ``model=MODULE:OBJECT``: an ``nn.Module`` class, or a function that returns a module.
    """

    kind: ClassVar[str] = "model"
    key: ClassVar[str] = "source"

    name: str = MISSING  # name in reports; torchvision, cifar_resnet: the model's name there
    source: str = MISSING
    frozen: list[str] = field(default_factory=list)  # frozen layers, by name or shell pattern (fc*):
    # they are neither trained nor sent back


@dataclass
class DatasetConfig(PartConfig):
    """Data set; its own options are those of the reader in ``fedlp/data``.

    User data are ``dataset=MODULE:OBJECT``: a function that returns training and test data, or a reader.
    """

    kind: ClassVar[str] = "dataset"

    max_train_examples: int | None = None  # size of a random subset, >= 1; all examples if null
    max_test_examples: int | None = None  # size of a random subset, >= 1; all examples if null
    client_test_fraction: float = 0.0  # held-out fraction of each client's examples, for evaluation=clients; in [0, 1)
    on_devices: bool = False  # devices' own examples: --node-config 'data="/srv/images"' of each SuperNode
    server: str | None = None  # on_devices: file or folder of the server's test set; no central evaluation if null

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
    """Task: loss, metrics and their options; "auto" is the task of the data set's targets."""

    kind: ClassVar[str] = "task"

    name: str = "auto"


@dataclass
class PartitionConfig(PartConfig):
    """Division of the training examples among clients; the method's own options are those of the part."""

    kind: ClassVar[str] = "partition"

    min_examples: int = 1  # fewest examples of a client, >= 0; dirichlet redraws until it is met

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

    values: str = "weights"  # "weights", or "deltas": differences from the received values
    error_feedback: bool = False  # deltas: the encoding's error is added to the next upload
    entropy_coding: bool = False  # int8, int4, int2: lossless Huffman codes of the quantised values

    def __post_init__(self) -> None:
        if self.values not in ("weights", "deltas"):
            raise ConfigError(f"upload.values={self.values} is not allowed: it must be one of weights, deltas")
        if self.error_feedback and self.values != "deltas":
            raise ConfigError(
                "upload.error_feedback=true needs upload.values=deltas: only differences can be caught up"
            )


@dataclass
class DownloadConfig(PartConfig):
    """Encoding of downloads: of frozen tensors, which a client receives once, or of all; options are those of the part.

    Clients train against the decoded values, and tiers are evaluated with them; the server's model keeps its own.
    """

    kind: ClassVar[str] = "encoding"

    name: str = "float32"
    tensors: str = "frozen"  # "frozen", or "all": trained ones too, in every round; needs upload.values=deltas

    def __post_init__(self) -> None:
        if self.tensors not in ("frozen", "all"):
            raise ConfigError(f"download.tensors={self.tensors} is not allowed: it must be one of frozen, all")


@dataclass
class AggregatorConfig(PartConfig):
    """Combination of updates; the rule's own options are those of the part in ``federation/aggregation``."""

    kind: ClassVar[str] = "aggregator"

    weighting: str = "examples"  # "examples", "equal", or "held": examples times the held fraction of the model
    batch_norm: str = "auto"  # running statistics: "average" of all clients; of clients with the "whole" model;
    # "static": never sent, re-measured before each evaluation on three clients that hold the largest sub-model; "auto":
    # "static" if some clients hold narrow sub-models of a model with batch norms, else "average"

    def __post_init__(self) -> None:
        for name, allowed in (("weighting", _WEIGHTINGS), ("batch_norm", _BATCH_NORMS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"aggregator.{name}={getattr(self, name)} is not allowed: it must be one of {', '.join(allowed)}"
                )


_WEIGHTINGS, _BATCH_NORMS = ("examples", "equal", "held"), ("auto", "average", "whole", "static")


@dataclass
class ServerOptimizerConfig(PartConfig):
    """Server optimizer (FedOpt): the aggregate as a pseudo-gradient."""

    kind: ClassVar[str] = "server_optimizer"


@dataclass
class PrunerConfig(PartConfig):
    """Pruning score, and recovery of the kept weights; the score's own options are those of its part."""

    kind: ClassVar[str] = "score"

    recovery: str = "none"  # "least_squares", "bias" (means of removed inputs) or "none"
    centred: bool = True  # least_squares: fit with a bias
    correction: float = 0.0  # least_squares: weight of the dense model's outputs in the target, in [0, 1]
    fisher: bool = False  # obs: weigh outputs by their Fisher information
    damping: float | None = (
        None  # of the Hessian, a fraction of its mean diagonal; null: shrinkage by two halves of the data
    )
    keeps_batch_norm: bool = False  # classifiers: shift batch norms by recovery's bias; else re-estimate them
    shared: bool = True  # classifiers: also channels with several readers: squeeze-and-excitation, residual streams
    depth: bool = False  # also whole residual branches: attentions, MLPs, blocks of a ResNet with one inner width


@dataclass
class AllocatorConfig(PartConfig):
    """Allocation rule: per-layer sparsity within a budget; options are those of the part in ``allocation/rules``."""

    kind: ClassVar[str] = "allocator"


@dataclass
class CalibrationConfig:
    """Calibration set: the training examples that pruning reads."""

    examples: int = 256  # calibration examples, >= 1; of each client in a federated run
    batch_size: int = 32


@dataclass
class LocalConfig:
    """Local training of a client in one round."""

    optimizer: str = MISSING  # "sgd", "adam", "adamw", or MODULE:OBJECT
    epochs: int = 1  # passes over the client's examples, >= 1
    batch_size: int = 32
    lr: float = 0.05  # learning rate, > 0
    momentum: float = 0.0  # sgd: in [0, 1)
    weight_decay: float = 0.0  # >= 0
    max_grad_norm: float | None = None  # gradient clipping: largest L2 norm, > 0; none if null
    skip_backward: bool = False  # whether leading layers that are not sent get no gradients
    logit_adjustment: float = 0.0  # classification: strength, >= 0, of the offset of training logits by the log of each
    # class's share on the client (Menon et al., ICLR 2021); absent classes get no gradient
    proximal: float = 0.0  # FedProx: mu >= 0 of the penalty mu / 2 x squared distance from the received weights
    accumulation: int = 1  # gradient accumulation: batches per step, >= 1; equal to one large batch
    optimizer_options: dict[str, Any] = field(default_factory=dict)  # further options, such as {beta2: 0.99} of adam
    precision: str = "float32"  # forward and backward passes: "float32", or "bfloat16" (autocast)
    schedule: Any = "constant"  # learning rate schedule: "constant", "cosine", "step", "warmup", MODULE:OBJECT, or
    # a mapping of name and options, such as {name: cosine, floor: 0.1}


@dataclass
class AdapterConfig:
    """Adapters of a language model: "none" or "lora"; only adapters are trained and uploaded."""

    name: str = "none"
    rank: int = 8  # rank of the matrices, >= 1
    alpha: float = 16.0  # scale of the product is alpha / rank, > 0
    targets: list[str] = field(default_factory=lambda: ["*_proj"])  # adapted linear layers, by name or shell pattern
    dropout: float = 0.0  # dropout probability of adapters' inputs, in [0, 1)
    freeze_a: bool = False  # whether B alone is trained (FFA-LoRA)
    cut: str = "widths"  # what sub-models cut: "widths" of the model, or "ranks" of the adapters on the whole base
    base: str = "float32"  # what clients hold the frozen base in: "float32", or "encoded": as download=nf4 (block4,
    # block8, int8, bfloat16, ...) sent it, widened to float32 a layer at a time (QLoRA)
    self_pruning: bool = False  # whether clients cut their last ranks (HETLoRA); with cut=ranks
    rank_decay: float = 0.99  # gamma: share of a client's ranks that a cut leaves, rounded down, in (0, 1)
    rank_penalty: float = 0.01  # lambda: weight in the loss of the norms of the ranks that may be cut, >= 0
    min_rank: int = 1  # fewest ranks that cuts leave, >= 1


@dataclass
class SimulationConfig:
    """Simulation engine."""

    engine: str = MISSING  # "local" (worker processes of this machine), "ray" (Ray actors on one or many machines) or
    # "flower" (Flower's simulation runtime)
    workers: int | None = None  # worker processes, >= 1; number of cores if null; 0 (local engine): clients train one
    # after another in this process
    start: str = "auto"  # local engine: "fork" or "spawn" of workers; "auto" spawns where fork is unsafe or absent
    address: str | None = None  # Ray: "auto" or HOST:PORT of a running cluster; a private one on this machine if null
    gpus_per_client: float | None = None  # Ray: GPUs of a worker: 0, a fraction such as 0.25, or a whole number; 1 with
    # device=cuda and 0 with cpu if null
    object_store_bytes: int | None = None  # private Ray: size of its object store, at least 78,643,200; Ray's choice if
    # null
    round_timeout_s: float = 3600.0  # deadline of a client, > 0; a later answer counts as failed
    batched: Any = False  # local engine: clients of equal shapes train together, equal to one by one up to rounding;
    # true, false, or "auto": models for which it was measured to be faster


@dataclass
class DeviceConfig:
    """Device class; ``conf/fleet/mixed.yaml`` names the sources of its figures."""

    memory_bytes: float = MISSING  # memory of the device
    flops: float = MISSING  # sustained float32 operations per second in training
    uplink_bytes_s: float = MISSING  # uplink bandwidth, bytes per second
    downlink_bytes_s: float | None = None  # downlink bandwidth, bytes per second; that of the uplink if null
    watts: float | None = None  # clock=virtual: power while it takes part in a round; no energy on record if null
    profile: str | None = None  # clock=virtual: profile.json of fedlp-profile, whose measured steps replace flops
    share: float = 1.0  # share of the clients, relative to the other classes


@dataclass
class FleetConfig:
    """Budgets of clients' sub-models: unlimited, by ``fractions``, or by ``devices``."""

    name: str = "full"
    fractions: list[float] = field(default_factory=list)  # tiers: fractions of the whole model's costs, each in (0, 1]
    limited: list[str] = field(default_factory=lambda: ["params"])  # tiers: limited costs, of Budget's
    shares: list[float] | None = None  # tiers: shares of the clients, relative to each other; equal if null
    devices: dict[str, DeviceConfig] = field(default_factory=dict)
    memory_share: float = 0.5  # devices: fraction of memory for training, in (0, 1]
    seconds_per_example: float = 0.05  # devices: longest training time of one example
    upload_s: float = 60.0  # devices: longest time of one upload
    availability: Any = None  # probability that a client is available in a round, in (0, 1], or a CSV trace of client,
    # from, to (rounds, or seconds with round_s); always available if null
    round_s: float | None = None  # duration of a round on the clock of a trace in seconds; a trace in rounds if null
    dropout: float = 0.0  # probability that a client drops out after receiving its sub-model, in [0, 1)
    extra_clients: int = 0  # over-selection: clients asked beyond clients_per_round; the first answers count
    only_whole: bool = False  # whether only clients whose budget holds the whole model take part
    clock: str = "wall"  # "wall", or "virtual": seconds that the device classes need, simulated


@dataclass
class RoundsConfig:
    """Rounds: "synchronous", or "asynchronous" (FedBuff): reproducible with ``fleet.clock=virtual`` alone."""

    name: str = "synchronous"
    deadline_s: float | None = None  # clock=virtual: simulated seconds after which an answer is late; none if null
    buffer_size: int | None = None  # asynchronous: updates per step of the server; clients_per_round if null
    staleness_exponent: float = 0.5  # asynchronous: a >= 0 of an update's factor (1 + staleness) ** -a


@dataclass
class EvaluationConfig:
    """Evaluation: central, on clients, or both.

    ``name`` is "central" (the global model on the server's test set), "clients" (each client's sub-model, with its
    personal head where it has one, on the client's own test examples), or "both".
    """

    name: str = "central"
    clients: int | None = None  # clients per evaluation, drawn by the seed; all if null
    personal_steps: int = 0  # personalisation: local steps before a client evaluates; discarded afterwards
    tiers: bool = False  # whether each tier's sub-model is evaluated on the server's test set after the last round


@dataclass
class TrackerConfig(PartConfig):
    """Tracker of the run on the server; options are those of the part in ``fedlp/report/trackers``.

    A user's own tracker is ``tracker=MODULE:OBJECT``: a class with ``begin``, ``round`` and ``end``.
    """

    kind: ClassVar[str] = "tracker"

    name: str = "none"


@dataclass
class CallbackConfig(PartConfig):
    """Callback: function called after each round; options are those of the part."""

    kind: ClassVar[str] = "callback"


@dataclass
class PrivacyConfig:
    """Privacy of updates; ``docs/privacy.md`` states the guarantees.

    ``name`` is "none"; "local_dp": every upload is clipped and noised by Flower's ``LocalDpMod``; "central_dp": the
    server clips each update and noises their sum; or "secagg": the server learns sums over groups of clients alone.
    """

    name: str = "none"
    clipping_norm: float = 1.0  # largest L2 norm of an update, > 0; the sensitivity of local_dp is twice this
    epsilon: float | None = 0.5  # local_dp: epsilon of one upload, > 0; the Gaussian mechanism's bound holds below 1;
    # central_dp: epsilon of the whole run, from which the noise is found; null if noise_multiplier is given
    delta: float = 1e-5  # delta in (0, 1): of one upload (local_dp), and of the epsilon on record
    seeded: bool = False  # local_dp: noise from the run's seed, which any reader of the config can subtract
    noise_multiplier: float | None = None  # central_dp: standard deviation of the noise on the sum, in clipping norms
    clipping_quantile: float | None = None  # central_dp: quantile of the norms that the clipping norm adapts to, from
    # clipping_norm on (Andrew et al., 2021), in (0, 1); fixed if null
    max_epsilon: float | None = None  # the run ends before its epsilon would pass this
    accountant: str = "pld"  # accountant of dp-accounting: "pld" (tight) or "rdp" (quick)
    secure_noise: bool = False  # central_dp: cohorts and noise from the operating system; no run can be repeated then
    threshold: float = 0.6  # secagg: fraction of a group whose shares open its sum, in (0.5, 1]; others may drop out
    min_group: int = 3  # secagg: updates without which no sum is opened, at least 2
    bits: int = 32  # secagg: bits of each masked value, 32 or 64
    value_range: float = 4.0  # secagg: largest absolute change of a weight in a round, > 0; larger ones are clipped
    phase_timeout_s: float = 300.0  # secagg: seconds that a phase without training waits for clients, > 0


@dataclass
class RunConfig:
    """One federated run."""

    command: ClassVar[str] = "fedlp"
    trains: ClassVar[bool] = True
    unread: ClassVar[frozenset[str]] = frozenset()

    seed: int = 0  # seed of all random streams, >= 0
    num_rounds: int = 10  # >= 1
    num_clients: int = 10  # clients of the federation, >= 1
    clients_per_round: int = 5  # clients sampled per round, in [1, num_clients]
    min_clients: int = 1  # fewest good updates for a round to change the model
    eval_every: int = 1  # rounds between evaluations, >= 1; the last round is always evaluated
    eval_batch_size: int = 500  # test examples per batch, >= 1
    checkpoint_every: int = 1  # rounds between checkpoints, >= 1
    device: str = "cpu"  # device of clients' training: "cpu", "cuda", "cuda:1", ...
    dry_run: bool = False  # whether only expected costs are written, without data or training
    resume: str | None = None  # run directory of a stopped run to resume
    plot_partition: bool = False  # whether class counts of clients are drawn as partition.png (loads the data)
    keep_best: str | None = None  # metric whose best model is also written, as model-best.safetensors
    callbacks: list[Any] = field(default_factory=list)  # functions called after each round: names, MODULE:OBJECT, or
    # mappings of name and options, such as {name: early_stopping, patience: 3}
    objective: str | None = None  # metric that a sweep's job returns; the task's first one if null
    label: str | None = None  # name of the run in reports; made from the config if null
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    upload: UploadConfig = field(default_factory=UploadConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
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
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
