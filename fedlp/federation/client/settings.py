"""Settings of clients: values that a composition root takes from a config."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlp.config import CalibrationConfig, LocalConfig, PrivacyConfig
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.secagg.settings import SecAggSettings
from fedlp.federation.strategies.policy import ClientOptions
from fedlp.federation.wire.downloads import Download
from fedlp.federation.wire.encodings import Encoding
from fedlp.federation.wire.encodings.float32 import Float32
from fedlp.pruning.reader_layers import Method


@dataclass(frozen=True)
class ClientSettings:
    """Settings of all clients of one run.

    Attributes
    ----------
    local : LocalConfig
        Options of local training.
    seed : int
        Seed of every draw, >= 0.
    num_rounds : int
        Rounds of the run, for schedules.
    device : str
        Device that clients train on: "cpu", "cuda" or "cuda:NUMBER".
    eval_batch_size : int
        Test examples per batch, >= 1.
    personal_steps : int
        Local steps before an evaluation on the client's own test examples, >= 0.
    encoding : Encoding
        Encoding of uploads.
    download : Download
        Encoding of downloads.
    encoded_base : bool
        Whether frozen weights stay as they were sent while adapters are trained.
    rank_penalty : float
        Weight in the loss of the norms of ranks that a client may cut, >= 0.
    sends_deltas, error_feedback, entropy_coding : bool
        Whether updates are differences, whether the encoding's error is added to the next upload, and whether single
        bytes travel as Huffman codes.
    options : ClientOptions
        Options of the strategy that clients read.
    method : Method
        Score of units, and recovery of the weights that stay.
    calibration : CalibrationConfig
        Calibration examples of scores.
    privacy : PrivacyConfig
        Noise on uploads.
    secagg : SecAggSettings or None
        Settings of secure aggregation, where updates are masked.
    oneshot : OneShotSettings or None
        Settings of federated one-shot pruning, if the run is one.
    batched : bool or "auto"
        Whether clients of one message train together; "auto" for models for which it was measured to be faster.
    """

    local: LocalConfig
    seed: int = 0
    num_rounds: int = 1
    device: str = "cpu"
    eval_batch_size: int = 500
    personal_steps: int = 0
    encoding: Encoding = field(default_factory=Float32)
    download: Download = field(default_factory=Download)
    encoded_base: bool = False
    rank_penalty: float = 0.0
    sends_deltas: bool = False
    error_feedback: bool = False
    entropy_coding: bool = False
    options: ClientOptions = field(default_factory=ClientOptions)
    method: Method = field(default_factory=Method)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    secagg: SecAggSettings | None = None
    oneshot: OneShotSettings | None = None
    batched: bool | str = False
