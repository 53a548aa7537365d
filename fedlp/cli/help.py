"""Help of the commands: purpose, examples, groups; it imports neither Hydra nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_CONF = Path(__file__).resolve().parents[1] / "conf"


@dataclass(frozen=True, slots=True)
class Help:
    """Help of one command.

    Attributes
    ----------
    purpose : str
        One paragraph.
    examples : tuple of (str, str)
        Command lines and their meaning.
    groups : tuple of str
        Config groups that apply.
    options : tuple of (str, str)
        Options outside of groups, the frequent ones, and their meaning.
    """

    purpose: str
    examples: tuple[tuple[str, str], ...]
    groups: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


_MODEL_GROUPS = ("model", "dataset", "pruner", "allocator")

HELP = {
    "fedlp": Help(
        "Train one model over many clients. Each round, every client gets a sub-model that its budget holds,\n"
        "trains it on its own data, and returns the part that the strategy asks for. Runs offline by default.",
        (
            ("fedlp", "FedLP-Homo on scikit-learn's digits, half a minute"),
            ("fedlp strategy=fedlp_plan fleet=tiers 'fleet.fractions=[1.0,0.5,0.25]'", "clients with three budgets"),
            ("fedlp model=my_pkg.nets:Net model.width=32 dataset=cifar10", "a model of one's own"),
            ("fedlp -m strategy=fedavg,fedlp_plan seed=0,1,2", "a sweep of six runs"),
            ("fedlp describe dataset=imagefolder dataset.path=SAMPLE", "options for devices with data of their own"),
            ("fedlp new DIR", "a project of one's own: model, data, config and a test, which run"),
            ("fedlp options strategy", "the options of a group: meaning, type, default"),
            ("fedlp resume=RUN_DIR", "go on with a stopped run; the same bytes as one never stopped"),
        ),
        (
            *("model", "adapter", "dataset", "partition", "strategy", "upload", "download", "aggregator"),
            *(
                "server_optimizer",
                "local",
                "pruner",
                "allocator",
                "fleet",
                "privacy",
                "rounds",
                "evaluation",
                "simulation",
                "tracker",
                "experiment",
            ),
        ),
        (
            ("seed=0", "seed of every draw"),
            ("num_rounds=20", "rounds"),
            ("num_clients=20 clients_per_round=10", "clients, and those sampled in a round"),
            ("device=cpu", "cpu, cuda or cuda:NUMBER"),
            ("dry_run=true", "print the expected bytes and MACs; load no data"),
            ("hydra.run.dir=DIR", "run directory (default: runs/DATE/TIME)"),
        ),
    ),
    "fedlp-prune": Help(
        "Prune one trained model in one shot and write it so that plain transformers or PyTorch loads it.",
        (
            ("fedlp-prune run=RUN_DIR sparsity=0.3", "the model of a federated run, on its data"),
            (
                "fedlp-prune model=hf model.path=DIR dataset=text dataset.root=FILE sparsity=0.35",
                "a language model of transformers",
            ),
            ("fedlp-prune run=RUN_DIR target_params=1e5 pruner=wanda allocator=owl", "Wanda's score, OWL's allocation"),
        ),
        (*_MODEL_GROUPS, "finetune"),
        (
            ("sparsity=0.3", "fraction removed of the prunable parameters; or target_params=, target_macs="),
            (
                "federated=true",
                "calibration data stay with clients, who send sums (num_clients=20 clients_per_round=10)",
            ),
            ("calibration.examples=256", "training examples that pruning looks at"),
            ("onnx=true", "also write model.onnx"),
        ),
    ),
    "fedlp-search": Help(
        "Search for an allocation function on one trained model; `allocator=dsa allocator.path=winner.yaml` uses it.",
        (
            ("fedlp-search run=RUN_DIR", "on the model of a federated run"),
            ("fedlp-search model=hf model.path=DIR dataset=text dataset.root=FILE", "on a language model"),
            (
                "fedlp-search run=RUN_DIR search.evaluations=50 search.space=chains",
                "DSA's published space, a short search",
            ),
        ),
        ("model", "dataset", "pruner"),
        (
            ("search.evaluations=150", "candidates of each mode"),
            ("search.ratios=[0.2,0.35,0.5]", "sparsities"),
            ("federated=true", "clients judge candidates on data of theirs (num_clients=20 clients_per_round=10)"),
        ),
    ),
    "fedlp-profile": Help(
        "Measure the cost of training a model on this device, and write its budget file for a SuperNode.",
        (
            ("fedlp-profile model=resnet18 dataset=cifar10", "step time and memory at five widths"),
            ("fedlp-profile model=small_cnn latency_s=0.05", "a limit of 50 ms a step"),
            ("fedlp-profile model=llama_tiny dataset=topics memory_bytes=2e8", "a limit of 200 MB"),
        ),
        ("model", "dataset", "local"),
        (("densities=[0.25,0.5,1.0]", "fractions of every layer's units"), ("repeats=10", "timed steps at each")),
    ),
}


def help_text(command: str) -> str:
    """Return the help of a command."""
    found = HELP[command]
    width = max(len(line) for line, _ in found.examples)
    lines = [f"usage: {command} [GROUP=CHOICE ...] [GROUP.OPTION=VALUE ...]", "", found.purpose, "", "examples:"]
    for line, meaning in found.examples:
        lines += [f"  {line.ljust(width)}  {meaning}"] if width < 60 else [f"  {line}", f"      {meaning}"]
    if found.options:
        wide = max(len(name) for name, _ in found.options)
        lines += ["", "options:", *(f"  {name.ljust(wide)}  {meaning}" for name, meaning in found.options)]
    lines += ["", "groups (fedlp options GROUP lists the options of each choice):"]
    lines += [f"  {group.ljust(17)} {' '.join(choices(group))}" for group in found.groups]
    lines += ["", "A model, dataset, strategy, allocator, ... of one's own is MODULE:OBJECT in place of a choice.", ""]
    lines += ["  -m, --multirun   a sweep over comma-separated values     --version   version of fedlp"]
    lines += ["  --cfg job        the composed config                     --hydra-help   flags of Hydra"]
    return "\n".join(lines)


def choices(group: str) -> list[str]:
    """Return the choices of a config group that have a YAML."""
    conf = _CONF if _CONF.is_dir() else _CONF.parents[1] / "conf"
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))
