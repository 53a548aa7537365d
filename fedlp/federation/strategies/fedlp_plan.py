"""FedLP-Plan: a per-layer plan for each client from its own budget, under FedLP's aggregation.

A client gets the largest sub-model within its budget (parameters, MACs, memory, seconds), divided among layers by
the allocator; it sends the part that ``sparsity`` and its limit on uploads leave. Units are selected by the
server or by the client, by the pruner's score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedlp.allocation.evidence import needs_of
from fedlp.errors import ConfigError
from fedlp.federation.strategies.fedlp_homo import LayerUploads, check_rates, client_rates
from fedlp.federation.strategies.plan_policy import PlanPolicy
from fedlp.federation.strategies.plan_solver import limits_what_is_held
from fedlp.federation.strategies.policy import ClientOptions, Policy, PolicyContext
from fedlp.registry import register

_IN_A_ROUND = frozenset({"weights", "input_norms", "unit_scores", "error_curves"})


@register("strategy", "fedlp_plan")
@dataclass(frozen=True)
class FedLPPlan:
    """A per-layer plan for each client from its own budget, under FedLP's aggregation.

    Attributes
    ----------
    layer_preserving_rate : float or list of float
        Probability that a layer is uploaded, in [0, 1]; a list has one per client.
    upload_unit : "layer" or "tensor"
        Unit of that draw.
    sparsity : float
        Fraction of the prunable parameters that uploads leave out, in [0, 1).
    spread : "macs" or "allocator"
        Division of the upload budget among layers: in proportion to their MACs per weight, or by the allocator.
    unit_selection : "server", "client" or "random"
        Selection of the sent units: by the server (nested), by each client, or at random.
    criterion : "weights" or "update"
        Values whose loss scores measure: the client's weights, or its update of them.
    compensate : bool
        Whether the sent weights compensate for the units left out; needs unit_selection=client.
    scores : "fine" or "coarse"
        Precision of clients' OBS scores. Coarse ones take steps of a 16th of the units instead of a 32nd, at most 256
        input vectors a layer instead of 512, and 64 random projections of its outputs: a third to a half of the time.
    refresh_every : int
        Rounds between fresh measurements of units and inputs, >= 1.
    measured_by : "all" or "whole"
        Clients that make these measurements: all of the round, or those of them that hold the whole model.
    warmup_rounds : int
        First rounds in which clients send all held units, >= 0.
    ramp_rounds : int
        Following rounds in which sparsity moves linearly from ``ramp_from`` to ``sparsity``, >= 0.
    ramp_from : float
        Sparsity before the ramp, in [0, 1).
    width_multiple : int
        Widths are a multiple of it where budgets allow, >= 1.
    regrow : float or None
        Fraction of the units that goes to the least recently updated ones, in [0, 1]; if None 1, or 0 if budgets
        limit some clients and others hold the whole model.
    train_sent : bool
        Whether clients train only entries that they will send, if the server selects the units.
    submodels : "slices", "pruned" or None
        Sub-models of clients with a budget: slices of the global values, or the model pruned by the pruner's score and
        refitted; see :mod:`~fedlp.federation.strategies.pruned_submodels`. Where None "pruned", if training starts from
        pretrained weights, budgets limit the size of sub-models and updates are differences; else "slices".
    calibrate_on : "server", "clients" or None
        Examples that pruned sub-models are calibrated on: the first ``calibration.examples`` whole examples of
        ``dataset.server`` where that is given, else of the server's copy of the training data, which in a simulation
        are clients' too; or as many of each client that holds the whole model, which sends sums over them (second
        moments of each layer's inputs). Where None "clients", if the server has no data; else "server".
    refit_every : int or None
        Rounds between fresh prunings, >= 0; pruned once, before the first round, if 0. Where None 0, if clients
        calibrate or tensors are frozen, which would be sent again; else 2.
    """

    layer_preserving_rate: Any = 1.0
    upload_unit: str = "layer"
    sparsity: float = 0.5
    spread: str = "macs"
    unit_selection: str = "server"
    criterion: str = "weights"
    compensate: bool = False
    scores: str = "fine"
    refresh_every: int = 10
    measured_by: str = "all"
    warmup_rounds: int = 0
    ramp_rounds: int = 0
    ramp_from: float = 0.0
    width_multiple: int = 1
    regrow: float | None = None
    train_sent: bool = True
    submodels: str | None = None
    calibrate_on: str | None = None
    refit_every: int | None = None

    reads: ClassVar[frozenset[str]] = frozenset({"allocator", "pruner", "calibration"})

    @staticmethod
    def uses_of_pruner(options: Mapping[str, Any], is_pretrained: bool) -> frozenset[str]:
        """Return the uses of the pruner besides scores of units: "pruning" of sub-models, or "recovery" of uploads."""
        submodels = options.get("submodels")
        if submodels == "pruned" or (submodels is None and is_pretrained):  # whether budgets limit is not known yet
            return frozenset({"pruning"})
        return frozenset({"recovery"}) if options.get("compensate") else frozenset()

    def __post_init__(self) -> None:
        check_rates(self.layer_preserving_rate, self.upload_unit)
        for name, part in (("sparsity", self.sparsity), ("ramp_from", self.ramp_from)):
            _require(0 <= part < 1, name, part, "in [0, 1)")
        for name, value, allowed in (
            ("spread", self.spread, ("allocator", "macs")),
            ("unit_selection", self.unit_selection, ("client", "server", "random")),
            ("criterion", self.criterion, ("weights", "update")),
            ("scores", self.scores, ("fine", "coarse")),
            ("measured_by", self.measured_by, ("all", "whole")),
            ("submodels", self.submodels or "slices", ("pruned", "slices")),
            ("calibrate_on", self.calibrate_on or "server", ("server", "clients")),
        ):
            _require(value in allowed, name, value, f"one of {', '.join(allowed)}")
        for name, count, least in (
            ("refresh_every", self.refresh_every, 1),
            ("width_multiple", self.width_multiple, 1),
            ("warmup_rounds", self.warmup_rounds, 0),
            ("ramp_rounds", self.ramp_rounds, 0),
        ):
            _require(count >= least, name, count, f"at least {least}")
        _require((self.refit_every or 0) >= 0, "refit_every", self.refit_every, "null or at least 0")
        _require(self.regrow is None or 0 <= self.regrow <= 1, "regrow", self.regrow, "null or in [0, 1]")
        if self.ramp_from and not self.ramp_rounds:
            raise ConfigError("strategy.ramp_from needs strategy.ramp_rounds: over how many rounds sparsity changes")
        if self.compensate and self.unit_selection != "client":
            raise ConfigError("strategy.compensate=true needs strategy.unit_selection=client")

    @property
    def client(self) -> ClientOptions:
        """Options that clients read."""
        return ClientOptions(
            train_sent=self.train_sent, criterion=self.criterion, compensate=self.compensate, scores=self.scores
        )

    def policy(self, context: PolicyContext) -> Policy:
        """Return the policy; ConfigError for an allocator whose evidence a round cannot give."""
        if self.submodels is None:
            found = replace(self, submodels="pruned" if self._prunes(context) else "slices").policy(context)
            return replace(found, asked=None) if isinstance(found, PlanPolicy) else found
        if self.submodels == "pruned" and not context.sends_deltas:
            raise ConfigError(
                "strategy.submodels=pruned needs upload.values=deltas: refitted weights are not the global model's"
            )
        if self.submodels == "pruned" and context.pruner is None:
            raise ConfigError("strategy.submodels=pruned needs a server that holds calibration examples")
        measured = self.submodels == "pruned" and self.spread == "macs"  # all evidence is the server's own
        if not measured and (missing := sorted(needs_of(context.allocator) - _IN_A_ROUND)):
            raise ConfigError(
                f"the allocator needs {missing[0]}, for which the whole model and the data must be in one place; in a "
                "round choose a rule of weights, input norms or unit scores, such as allocator=dsa or dp"
            )
        rates = client_rates(self.layer_preserving_rate, context.num_clients)
        if not context.submodels.layers:
            return _whole_models(context, rates, self.upload_unit)
        found = PlanPolicy(context, self, context.layer_costs(), rates)
        if self.measured_by == "whole" and not found.somebody_is_whole:
            raise ConfigError("strategy.measured_by=whole needs a client whose budget holds the whole model")
        return found

    def _prunes(self, context: PolicyContext) -> bool:
        """Return whether sub-models are pruned where the option leaves it open."""
        if not (context.is_pretrained and context.sends_deltas and context.scores_units and context.pruner is not None):
            return False
        if self.unit_selection != "server":
            return False
        return any(limits_what_is_held(budget) for budget in context.budgets)


def _whole_models(context: PolicyContext, rates: float | tuple[float, ...], upload_unit: str) -> Policy:
    """Return the policy for a model of which nothing can be cut; ConfigError where a budget does not hold it whole."""
    try:
        return LayerUploads.of(context, rates, upload_unit)
    except ConfigError as error:
        context.submodels.refuse_narrow(str(error).partition(", but")[0])


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"strategy.{name}={value} is not allowed: it must be {allowed}")
