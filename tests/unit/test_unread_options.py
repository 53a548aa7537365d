"""Options that the other choices of a config do not read: refused in one line, in all commands."""

from __future__ import annotations

import re

import pytest

from fedlp.config import RunConfig, compose, compose_prune, compose_search, refuse_unread
from fedlp.errors import ConfigError
from fedlp.registry import lookup, names

PRUNE = ("sparsity=0.5",)
PLAN = ("strategy=fedlp_plan",)
FEDERATED = (*PRUNE, "federated=true")
PRUNED = (*PLAN, "strategy.submodels=pruned", "upload.values=deltas")
SOLVED = {"obs", "slimgpt"}  # scores that invert a Hessian

REFUSED = [
    (compose, (*PLAN, "pruner=random", "strategy.scores=coarse"), "pruner=obs or slimgpt"),
    (compose_prune, (*PRUNE, "pruner=random", "pruner.fisher=true"), "pruner=obs or slimgpt"),
    (compose_prune, (*PRUNE, "pruner=wanda", "pruner.correction=0.5"), "pruner.recovery=least_squares"),
    (compose_prune, (*PRUNE, "pruner=flap", "pruner.centred=true"), "pruner.recovery=least_squares"),
    (compose_prune, (*PRUNE, "pruner=taylor", "allocator=uniform", "pruner.damping=0.1"), "pruner=obs or slimgpt"),
    (compose_prune, (*PRUNE, "finetune.epochs=3"), "finetune=full or lora"),
    (compose_prune, (*PRUNE, "finetune=newton", "finetune.lr=0.1"), "finetune=full or lora"),
    (compose_prune, (*PRUNE, "finetune=full", "finetune.rank=4"), "finetune=lora"),
    (compose_prune, (*PRUNE, "finetune=full", "finetune.steps=4"), "finetune=newton"),
    (compose_search, ("pruner=magnitude", "pruner.fisher=true"), "pruner=obs or slimgpt"),
    (compose, (*PLAN, "pruner=random", "pruner.fisher=true"), "pruner=obs or slimgpt"),
    (compose, (*PLAN, "pruner=magnitude", "pruner.damping=0.1"), "pruner=obs or slimgpt"),
    (compose, (*PLAN, "pruner.recovery=bias"), "strategy.compensate=true or submodels=pruned"),
    (compose, (*PLAN, "pruner.correction=0.5"), "strategy.submodels=pruned"),
    (compose, (*PLAN, "pruner.keeps_batch_norm=true"), "fedlp-prune"),
    (compose, (*PLAN, "pruner.shared=true"), "fedlp-prune"),
    (compose, (*PRUNED, "pruner.shared=true"), "fedlp-prune"),
    (compose, (*PLAN, "pruner.depth=true"), "strategy.submodels=pruned"),
    (compose, (*FEDERATED, "pruner.depth=true"), "fedlp-prune without federated=true"),
    (compose_search, ("pruner.depth=true",), "fedlp-prune without federated=true"),
    (compose, (*PRUNED, "pruner=random", "pruner.fisher=true"), "pruner=obs or slimgpt"),
    (compose, (*FEDERATED, "pruner=wanda", "pruner.fisher=true"), "pruner=obs or slimgpt"),
    (compose, ("adapter.rank=4",), "adapter=lora"),
    (compose, ("privacy.epsilon=0.1",), "privacy=local_dp"),
    (compose, ("evaluation.personal_steps=3",), "evaluation=clients or both"),
    (compose, ("fleet.limited=[macs]",), "fleet=tiers"),
    (compose, ("fleet=tiers", "fleet.upload_s=5"), "fleet=mixed"),
    (compose, ("upload.entropy_coding=true",), "upload=int8, int4 or int2"),
    (compose, ("strategy=fedavg", "privacy=secagg", "aggregator.max_norm=3"), "privacy=none or local_dp"),
    (compose, ("strategy=fedavg", "privacy=central_dp", "aggregator.max_examples=3"), "privacy=none or local_dp"),
    (compose, ("aggregator.weighting=equal", "aggregator.max_examples=3"), "aggregator.weighting=examples"),
]

ACCEPTED = [
    (compose_prune, (*PRUNE, "pruner=slimgpt", "pruner.fisher=true", "pruner.damping=0.1")),
    (compose_prune, (*PRUNE, "pruner=random", "pruner.fisher=false", "pruner.correction=0.0", "pruner.damping=null")),
    (compose_prune, (*PRUNE, "pruner=magnitude", "pruner.recovery=least_squares", "pruner.correction=0.5")),
    (compose_prune, (*PRUNE, "pruner=random", "pruner.damping=0.1")),  # allocator=dp measures with it
    (compose_prune, (*PRUNE, "finetune=lora", "finetune.rank=4", "finetune.epochs=2")),
    (compose_search, ("pruner=obs", "pruner.fisher=true")),
    (compose, (*PLAN, "pruner=obs", "pruner.fisher=true", "pruner.damping=0.1")),
    (compose, (*PLAN, "strategy.compensate=true", "strategy.unit_selection=client", "pruner.recovery=bias")),
    (compose, (*PLAN, "strategy.scores=coarse")),
    (compose, (*PRUNED, "pruner.correction=0.5", "pruner.recovery=least_squares")),
    (compose, (*PRUNED, "pruner.depth=true")),
    (compose_prune, (*PRUNE, "pruner.depth=true")),
    (compose, (*PLAN, "model=resnet18", "model.pretrained=true", "pruner.correction=0.5")),  # pruned by itself
    (compose, (*FEDERATED, "pruner.shared=true", "pruner.keeps_batch_norm=true")),
    (compose, ("adapter=lora", "adapter.rank=4")),
    (compose, ("privacy=local_dp", "privacy.epsilon=0.1")),
    (compose, ("fleet=tiers", "fleet.limited=[macs]")),
    (compose, ("strategy=fedavg", "privacy=secagg", "aggregator.max_norm=null")),
    (compose, ("aggregator.max_norm=3", "aggregator.max_examples=null")),
    (compose, ("aggregator=flexlora", "aggregator.max_norm=2", "aggregator.max_examples=5")),
    (compose, ("upload=int8", "upload.entropy_coding=true")),
]


@pytest.mark.parametrize(
    ("read", "overrides", "choice"), REFUSED, ids=lambda x: " ".join(x) if type(x) is tuple else ""
)
def test_an_unread_option_is_refused(read, overrides: tuple[str, ...], choice: str) -> None:  # type: ignore[no-untyped-def]
    name = overrides[-1].partition("=")[0]
    line = rf"does not read {name} here: drop {re.escape(overrides[-1])}, or choose .*{re.escape(choice)}"
    with pytest.raises(ConfigError, match=line) as caught:
        read(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("read", "overrides"), ACCEPTED, ids=lambda x: " ".join(x) if type(x) is tuple else "")
def test_an_option_that_is_read_or_turned_off_is_accepted(read, overrides: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    read(overrides)


@pytest.mark.parametrize("score", names("score"))
def test_the_fisher_information_is_for_the_scores_that_invert_a_hessian(score: str) -> None:
    assert ("moments" in lookup("score", score).needs) == (score in SOLVED)
    line = (*PRUNE, f"pruner={score}", "pruner.fisher=true")
    if score in SOLVED:
        assert compose_prune(line).pruner.fisher
    else:
        with pytest.raises(ConfigError, match=r"does not read pruner\.fisher"):
            compose_prune(line)


def test_a_config_without_overrides_is_not_looked_at() -> None:
    refuse_unread(RunConfig(), [])
