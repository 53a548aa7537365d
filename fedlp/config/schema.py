"""Structured config: names, types, units. ``conf/*.yaml`` holds values, :mod:`fedlp.config.validation` the ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """Which model is trained.

    ``source`` is one of ``fedlp_cnn``, ``fedlp_mlp``, ``small_cnn`` (ours), ``cifar_resnet`` (``name`` is resnet20, 32,
    44, 56 or 110), ``torchvision`` (``name`` is any of its classifiers), ``llama`` (a LLaMA of the sizes below) or
    ``hf`` (``path`` is a Hugging Face name or local folder).
    """

    name: str = MISSING
    source: str = MISSING
    path: str | None = None  # hf: model name or folder; cifar_resnet: a safetensors file of weights
    pretrained: bool = False  # torchvision, hf: start from pretrained weights
    variant: str = "plain"  # fedlp_mlp: "plain" (one hidden layer of 500), "deep" (five, each one a depth) or "linear"
    frozen: list[str] = field(default_factory=list)  # layers that keep their first values, by name or pattern (fc*):
    # they are neither trained nor sent back
    norm: str = "batch"  # torchvision: "batch" or "group" (GroupNorm in place of every BatchNorm)
    hidden_size: int = 64  # llama
    intermediate_size: int = 172  # llama
    num_layers: int = 4  # llama
    num_heads: int = 4  # llama: query heads
    num_kv_heads: int = 2  # llama: key/value heads


@dataclass
class DatasetConfig:
    """Which examples there are. ``root`` is where they lie or are downloaded to."""

    name: str = MISSING
    root: str | None = None
    download: bool = True
    path: str | None = None  # hf: data set name on the Hugging Face hub, or a local folder
    subset: str | None = None  # hf: configuration name
    split: str = "train"  # hf
    text_column: str = "text"  # hf
    tokenizer: str = "bytes"  # text: "bytes", or a Hugging Face tokenizer's name or folder
    documents: str = "auto"  # text: "file", "line", "paragraph", "separator", "speaker"; "auto" looks at the text
    sequence_length: int = 128  # text: tokens of context per example
    test_fraction: float = 0.1  # data sets without a test split of their own, in (0, 1)
    max_train_examples: int | None = None  # use only the first so many (after a seeded shuffle)
    max_test_examples: int | None = None
    augment: bool = False  # images: random crop with padding 4 and horizontal flip while training
    mean: list[float] | None = None  # images: what a pretrained model takes off each channel, on a [0, 1] scale
    std: list[float] | None = None  # images: what it then divides by; both are the data set's own where absent


@dataclass
class PartitionConfig:
    """How the training examples are spread over clients."""

    name: str = MISSING
    alpha: float = 1.0  # dirichlet: concentration, > 0
    shards_per_client: int = 2  # shards, mixed
    mixrate: float = 0.95  # mixed, devices: fraction of the examples that are sorted by class, in [0, 1]
    min_examples: int = 1  # smallest number of examples a client may get; dirichlet draws again until it is met


@dataclass
class StrategyConfig:
    """Which sub-model, upload set and weights each client gets; see ``conf/strategy``."""

    name: str = MISSING
    layer_preserving_rate: Any = 1.0  # probability that a layer is uploaded, in [0, 1]; or one per client
    mask_unit: str = "layer"  # "layer", or "tensor" as in FedLP's official code
    weighting: str = "examples"  # "examples", "equal", or "held": examples times the share of the model that is held
    depths: Any = "u"  # fedlp_hetero: "u" (uniform), a depth (0.6 there, rest shared), or one depth per client
    persist_heads: bool = True  # fedlp_hetero: keep personal heads between rounds
    widths: list[float] = field(default_factory=lambda: [1.0])  # width levels, each in (0, 1]
    width_probabilities: list[float] | None = None  # share of clients at each level; uniform where absent
    sparsity: float = 0.0  # fedlp, oneshot: fraction of the prunable units' parameters that is left out, in [0, 1)
    spread: str = "allocator"  # fedlp: what is sent is spread over layers by the "allocator", as what is held, or by
    # "macs": the more multiply-adds a layer's weights take part in, the more of them
    masks: str = "client"  # fedlp: units are chosen by each "client", by the "server" (nested), or at "random";
    # oneshot: the "server" prunes on pooled moments, or each "client" prunes alone and votes
    criterion: str = "weights"  # fedlp: what must not be lost: the client's "weights", or its "update" of them
    compensate: bool = False  # fedlp: send weights that make up for the units left out
    refresh_every: int = 1  # fedlp: rounds between fresh scores of units; in between the last choice stays
    warmup_rounds: int = 0  # fedlp: first rounds in which whoever can sends everything it holds
    ramp_rounds: int = 0  # fedlp: rounds after those in which sparsity goes evenly from ramp_from to its last value
    ramp_from: float = 0.0  # fedlp: sparsity before the ramp, in [0, 1)
    width_multiple: int = 1  # fedlp: widths are a multiple of it where budgets allow
    regrow: float | None = None  # fedlp: share of units held, in [0, 1], that goes to those not returned for longest;
    # where null 1, or 0 if budgets limit what some clients hold and others hold the whole model
    encoding: str = "float32"  # of uploads: "float32", "bfloat16", or "int8", "int4", "int2" (stochastic rounding,
    # a scale per row); oneshot: of sums, "float32" or "float64"
    entropy_coding: bool = False  # int8, int4, int2: Huffman codes of the numbers travel, which lose nothing
    coarseness: float = 1.0  # int8, int4, int2: steps of so many times what the largest number of a row asks for, >= 1
    values: str = "weights"  # what is sent: "weights", or "deltas" from what the client received
    error_feedback: bool = False  # deltas: clients add what they could not send last time
    batch_norm: str = "average"  # running statistics: "average" of all; of clients with the "whole" model only; or
    # "static": never sent, but measured anew on three such clients' examples before the global model is evaluated
    train_sent: bool = False  # fedlp: where the server has chosen the units, only entries that will be sent are trained
    skip_backward: bool = False  # leading layers that are not sent are not trained
    server_optimizer: str = "none"  # "none" (plain averaging), "momentum" or "adam"
    server_lr: float = 1.0
    server_momentum: float = 0.9  # momentum; adam: beta1
    server_beta2: float = 0.99  # adam
    server_epsilon: float = 1e-3  # adam


@dataclass
class PrunerConfig:
    """How units are chosen, and how the other weights make up for them; see ``conf/pruner``."""

    name: str = MISSING
    recovery: str = MISSING  # "least_squares", "bias" (of the removed means) or "none"
    centred: bool = True  # least_squares: fit with a bias
    correction: float = 0.0  # least_squares: aim at the dense model's outputs, in [0, 1]
    fisher: bool = False  # obs: weigh outputs by their Fisher information
    damping: float | None = (
        None  # of the Hessian, a fraction of its mean diagonal; least that rounding asks for if null
    )
    keeps_batch_norm: bool = False  # classifiers: shift batch norms by what recovery adds, or estimate them anew
    shared: bool = False  # classifiers: also channels that several layers read, such as residual streams


@dataclass
class AllocatorConfig:
    """How sparsity is spread over layers; see ``conf/allocator``."""

    name: str = MISSING
    path: str | None = None  # plan: a YAML or JSON file, layer name -> sparsity; dsa: what fedlp-search wrote
    amplitude: float | None = None  # depth rules: rise from the first layer to the last; grows with sparsity where null


@dataclass
class CalibrationConfig:
    """What pruning may look at, of the training examples."""

    examples: int = 256
    batch_size: int = 32


@dataclass
class LocalConfig:
    """How a client trains in one round."""

    optimizer: str = MISSING  # "sgd" or "adam"
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.0  # sgd
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    logit_adjustment: float = 0.0  # classification: while training, logits gain so many times the log of the client's
    # share of each class (Menon et al., ICLR 2021): classes that a client lacks are left alone; at least 0


@dataclass
class SimulationConfig:
    """Which engine carries the messages."""

    engine: str = MISSING  # "local" (worker processes of this machine) or "ray" (Flower's simulation runtime)
    workers: int | None = None  # processes; as many as cores where absent
    round_timeout_s: float = 3600.0  # a client that has not answered by then is counted as failed


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
    label: str | None = None  # what reports call the run; a name is made from the config where absent
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    allocator: AllocatorConfig = field(default_factory=AllocatorConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
