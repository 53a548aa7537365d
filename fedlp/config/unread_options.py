"""Overrides of single options that the chosen parts do not read: refused, not ignored.

Options of a part are its signature, so another part's option is refused when the config is read. Here are the options
that all parts of a group share, or of a group without parts, of which some choices read only some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fedlp.config.federated_prune import FederatedPruneConfig
from fedlp.config.federated_search import FederatedSearchConfig
from fedlp.config.schema import PrunerConfig, RunConfig
from fedlp.config.tools import PruneConfig, SearchConfig
from fedlp.errors import ConfigError

_OFF = ("", "null", "none", "false", "0", "0.0", "[]")  # values that ask for nothing
_ERROR_CURVES = frozenset({"error_curves", "model"})
_UNREAD_IN_SEARCH = (
    *(f"pruner.{name}" for name in ("recovery", "correction", "fisher", "centred", "keeps_batch_norm")),
    *("calibration.batch_size", "search.workers"),
)
_FINETUNE = {
    "none": frozenset[str](),
    "newton": frozenset({"steps"}),
    "full": frozenset({"epochs", "batch_size", "lr", "max_examples"}),
    "lora": frozenset({"epochs", "batch_size", "lr", "max_examples", "rank", "alpha"}),
}


def refuse_unread_options(config: object, overrides: Iterable[str]) -> None:
    """Raise ConfigError for an override of an option that nothing reads with the other choices of the config.

    An override that turns an option off is accepted.
    """
    unread: dict[str, str] | None = None
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        if "." not in name or value.strip().lower() in _OFF:
            continue
        unread = unread_with(config) if unread is None else unread
        if name in unread:
            group = name.partition(".")[0]
            chosen = getattr(getattr(config, group), "name", "")
            raise ConfigError(
                f"{group}={chosen} does not read {name} here: drop {override.lstrip('+')}, or choose {unread[name]}"
            )


def unread_with(config: object) -> dict[str, str]:
    """Return the options that the other choices of a config do not read, each with a choice that would."""
    match config:
        case FederatedPruneConfig():
            return {**_pruner_alone(config.pruner, True), **_named(("pruner.depth", False, _CENTRAL))}
        case FederatedSearchConfig():
            unread = dict.fromkeys(_UNREAD_IN_SEARCH, "fedlp-search without federated=true")
            return {**unread, **_named(("pruner.depth", False, _CENTRAL))}
        case RunConfig():
            return {**_pruner_of_run(config), **_groups_of_run(config)}
        case PruneConfig():
            read = _FINETUNE[config.finetune.name]
            options = vars(config.finetune).keys() - {"name"} - read
            needs = _needs(config.allocator.target)
            return {
                **_pruner_alone(config.pruner, needs is None or bool(needs & _ERROR_CURVES)),
                **{f"finetune.{name}": f"finetune={_who_reads(name, _FINETUNE)}" for name in options},
            }
        case SearchConfig():
            return {**_pruner_alone(config.pruner, False), **_named(("pruner.depth", False, _CENTRAL))}
    return {}


def _who_reads(option: str, choices: Mapping[str, Iterable[str]]) -> str:
    return " or ".join(name for name, options in choices.items() if option in options)


# ---- the pruner
def _pruner_alone(pruner: PrunerConfig, measures_curves: bool) -> dict[str, str]:
    """Return the unread options of a score that prunes one model."""
    solves, fits = _solves(pruner), pruner.recovery == "least_squares"
    return _named(
        ("pruner.fisher", solves, "a score that is solved for: pruner=obs or slimgpt"),
        ("pruner.correction", fits, "pruner.recovery=least_squares"),
        ("pruner.centred", solves or fits, "pruner.recovery=least_squares, or pruner=obs or slimgpt"),
        ("pruner.damping", solves or fits or measures_curves, "pruner.recovery=least_squares, pruner=obs or slimgpt"),
    )


def _pruner_of_run(config: RunConfig) -> dict[str, str]:
    """Return the unread options of a score in a federated run."""
    pruner, uses = config.pruner, getattr(config.strategy.target, "uses_of_pruner", None)
    if uses is None:  # a method of one's own may read all
        return {}
    model = config.model.options
    used = uses(config.strategy.options, bool(model.get("pretrained") or model.get("path")))
    if "pruning" in used:
        alone = _pruner_alone(pruner, True)
        return alone | _named(("pruner.keeps_batch_norm", False, _ONESHOT), ("pruner.shared", False, _ONESHOT))
    solves, recovers = _solves(pruner), "recovery" in used
    fits = recovers and pruner.recovery == "least_squares"
    return _named(
        ("pruner.recovery", recovers, "strategy.compensate=true or submodels=pruned"),
        ("pruner.correction", False, "strategy.submodels=pruned"),
        ("pruner.fisher", solves, "a score that is solved for: pruner=obs or slimgpt"),
        ("pruner.centred", solves, "pruner=obs or slimgpt, or strategy.submodels=pruned"),
        ("pruner.damping", solves or fits, "pruner=obs or slimgpt, or strategy.submodels=pruned"),
        ("pruner.keeps_batch_norm", False, _ONESHOT),
        ("pruner.shared", False, _ONESHOT),
        ("pruner.depth", False, "strategy.submodels=pruned"),
        ("strategy.scores", solves, "pruner=obs or slimgpt"),
    )


_ONESHOT, _CENTRAL = "fedlp-prune", "fedlp-prune without federated=true, or fedlp with strategy.submodels=pruned"


def _solves(pruner: PrunerConfig) -> bool:
    """Return whether a score reads second moments, so that a Hessian is inverted for it."""
    needs = _needs(pruner.target)
    return needs is None or "moments" in needs


def _needs(target: Callable[..., object]) -> frozenset[str] | None:
    """Return the evidence that a part needs; None where only its instances say."""
    needs: object = getattr(target, "needs", frozenset())
    return frozenset(needs) if isinstance(needs, frozenset | set) else None


# ---- other groups of a run
def _groups_of_run(config: RunConfig) -> dict[str, str]:
    fleet, clients = config.fleet, config.evaluation.name != "central"
    tiers, devices, is_buffered = bool(fleet.fractions), bool(fleet.devices), config.rounds.name == "asynchronous"
    adapter, privacy = config.adapter.name != "none", _PRIVACY[config.privacy.name]
    shown, weighted = config.privacy.name in ("none", "local_dp"), config.aggregator.weighting != "equal"
    return _named(
        *((f"adapter.{name}", adapter, "adapter=lora") for name in vars(config.adapter) if name != "name"),
        *(
            (f"adapter.{name}", config.adapter.self_pruning, "adapter.self_pruning=true")
            for name in ("rank_decay", "rank_penalty", "min_rank")
            if adapter
        ),
        *(
            (f"privacy.{name}", name in privacy, f"privacy={_who_reads(name, _PRIVACY)}")
            for name in vars(config.privacy).keys() - {"name"}
        ),
        ("aggregator.max_norm", shown, _SEEN),
        (
            "aggregator.max_examples",
            shown and weighted,
            f"{_SEEN} with {_WEIGHTED}",
        ),
        *((f"evaluation.{name}", clients, "evaluation=clients or both") for name in ("clients", "personal_steps")),
        *((f"fleet.{name}", tiers, "fleet=tiers") for name in ("limited", "shares")),
        *((f"fleet.{name}", devices, "fleet=mixed") for name in ("memory_share", "seconds_per_example", "upload_s")),
        *((f"rounds.{name}", is_buffered, "rounds=asynchronous") for name in ("buffer_size", "staleness_exponent")),
        ("upload.entropy_coding", config.upload.name not in _UNCODED, "upload=int8, int4 or int2"),
    )


_BOTH = frozenset({"clipping_norm", "epsilon", "delta", "max_epsilon", "accountant"})
_PRIVACY = {
    "none": frozenset[str](),
    "local_dp": _BOTH | {"seeded"},
    "central_dp": _BOTH | {"noise_multiplier", "clipping_quantile", "secure_noise"},
    "secagg": frozenset({"threshold", "min_group", "bits", "value_range", "phase_timeout_s"}),
}
_SEEN = "privacy=none or local_dp, which show single updates,"
_WEIGHTED = "aggregator.weighting=examples or held"
_UNCODED = frozenset({"float32", "bfloat16"})


def _named(*options: tuple[str, bool, str]) -> dict[str, str]:
    """Return the options that are not read, each with the choice that would read it."""
    return {name: choice for name, is_read, choice in options if not is_read}
