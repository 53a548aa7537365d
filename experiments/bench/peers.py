"""Simulators side by side: ``python experiments/bench/peers.py [--env DIR] [--quick] [--json FILE]``; half an hour.

The same FedAvg work (``workload.py``) as whole runs from the start of Python to its end, one of each in turn: fedlp on
its local engine with two workers and with one, a bare loop, Flower on Ray, and pfl-research, FedLab and fluke from
their packages, which are installed into an environment of their own (``--env``) on the first call. Of each: seconds of
a round without the first, seconds of everything that is not a round (start, end), and peak memory of all its processes.

These three train clients in one process on one core: fedlp with one worker is the comparison of a core, with two what a
user of this machine gets. blazefl is not in the table: no release of it on PyPI installs beside Python 3.11.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bare import BareLoop, normalise, plain_net
from timing import MemoryPeak, paired_ratio, print_table, write_report
from torch import Tensor, nn
from workload import LR, NUM_CLASSES, WORKLOADS, Workload, make_images

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TORCH = ["torch==2.13.0", "numpy"]
PEERS = ["pfl==0.6.0"]
ALONE = ["fedlab==1.3.0", "fluke-fl==0.8.1", "torchvision==0.28.0"]  # whose own requirements would bring a CUDA torch
NEEDED = (  # by these, as far as a run of FedAvg imports them
    *("munch", "tqdm", "pillow", "nvidia-ml-py", "pandas", "scikit-learn", "torchmetrics", "rich", "typer", "wandb"),
    *("datasets", "psutil", "tensorboard", "clearml", "matplotlib", "seaborn", "diskcache", "opacus", "cerberus"),
    *("hydra-core", "requests", "pyyaml", "omegaconf"),
)
ROUNDS = 5
CASES = [("linear", 10), ("linear", 100), ("linear", 1000), ("mlp", 100), ("cnn_short", 10), ("payload", 10)]  # clients
QUICK = [("linear", 10)]


def make_environment(folder: Path) -> str:
    """Return the Python of the environment of the peers; made on the first call."""
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"installing the peers into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for packages in (TORCH, PEERS, ["--no-deps", *ALONE], list(NEEDED)):
            subprocess.run([*install, *packages], check=True)
        ready.touch()
    return str(python)


def programs(python: str) -> dict[str, list[str]]:
    """Return the command of each simulator without its arguments: workload, rounds, clients."""
    here = str(HERE / "peers.py")
    ours = [sys.executable, str(HERE / "workload.py")]
    return {
        "fedlp, two workers": [*ours, "2"],
        "fedlp, one worker": [*ours, "1"],
        "bare loop": [sys.executable, here, "--one", "bare"],
        "pfl-research": [python, here, "--one", "pfl"],
        "FedLab": [python, here, "--one", "fedlab"],
        "fluke": [python, here, "--one", "fluke"],
        "Flower on Ray": [sys.executable, str(HERE / "plain_flower.py")],
    }


def command_of(program: Sequence[str], name: str, clients: int) -> list[str]:
    """Return the whole command line of a run."""
    if program[1].endswith("workload.py"):
        return [*program[:2], name, str(ROUNDS), str(clients), str(clients), "local", program[2], "auto"]
    return [*program, name, str(ROUNDS), str(clients)]


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run a program; return the seconds of its rounds and of all of it, and the bytes of its peak memory."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process,
        MemoryPeak(process.pid, every_s=0.05) as memory,
    ):
        out, errors = process.communicate()
    wall = time.perf_counter() - started
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed: {errors[-2000:]}")
    rounds = json.loads(out.strip().splitlines()[-1])
    return {"rounds": rounds, "wall": wall, "bytes": memory.bytes}


def compare(name: str, clients: int, commands: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Run every program in turn; print and return medians and paired ratios over fedlp with one worker."""
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
    for _ in range(repeats):
        for who, program in commands.items():
            runs[who].append(run(command_of(program, name, clients)))
    steady = {who: [statistics.median(one["rounds"][1:]) for one in found] for who, found in runs.items()}
    rows, table = [], {}
    for who, found in runs.items():
        start = statistics.median(one["wall"] - sum(one["rounds"]) for one in found)
        ratio = paired_ratio(steady[who], steady["fedlp, one worker"])
        most = max(one["bytes"] for one in found)
        table[who] = {
            "round": statistics.median(steady[who]),
            "start": start,
            "wall": statistics.median(one["wall"] for one in found),
            "ratio": ratio,
            "bytes": most,
        }
        rows.append((who, f"{1e3 * table[who]['round']:.0f}", f"{ratio['median']:.2f}", f"{start:.1f}", most >> 20))
    print_table(f"{name}, {clients} clients a round", ("", "ms a round", "over fedlp-1", "start, s", "MB"), rows)
    return {"table": table, "steady": steady}


# ---- a run of one of them, where it is installed
Shards = list[tuple[Tensor, Tensor]]


def run_bare(work: Workload, shards: Shards, num_rounds: int) -> list[float]:
    """No framework: a loop over clients that loads the model by name, trains and adds up."""
    rounds, ends = BareLoop(work, len(shards)), list[float]()
    started = time.perf_counter()
    for _ in range(num_rounds):
        rounds.run_round()
        ends.append(time.perf_counter())
    return _gaps(started, ends)


def run_pfl(work: Workload, shards: Shards, num_rounds: int) -> list[float]:
    """pfl-research: FederatedAveraging on its simulated backend; the model is the sum of weighted differences."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain_net(work)

        def loss(self, inputs: Tensor, targets: Tensor, is_eval: bool = False) -> Tensor:
            self.train(not is_eval)
            return F.cross_entropy(self.net(inputs), targets)

        def metrics(self, inputs: Tensor, targets: Tensor, is_eval: bool = True) -> dict[str, Any]:
            with torch.no_grad():
                return {"loss": Weighted(self.loss(inputs, targets, is_eval).item() * len(targets), len(targets))}

    ends: list[float] = []

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, *args: Any, **kwargs: Any) -> Any:
            from pfl.metrics import Metrics

            ends.append(time.perf_counter())
            return False, Metrics()

    def make(user: int) -> Dataset:
        return Dataset(raw_data=shards[user], user_id=str(user))

    users = list(range(len(shards)))
    train = FederatedDataset(make, get_user_sampler("minimize_reuse", users))
    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    parameters = NNAlgorithmParams(num_rounds, num_rounds + 1, len(shards), 0)
    local = NNTrainHyperParams(
        local_batch_size=work.batch_size, local_num_epochs=1, local_learning_rate=LR, local_num_steps=None
    )
    started = time.perf_counter()
    FederatedAveraging().run(
        algorithm_params=parameters,
        backend=SimulatedBackend(train, train),
        model=model,
        model_train_params=local,
        model_eval_params=NNEvalHyperParams(local_batch_size=work.batch_size),
        callbacks=[Clock()],
    )
    return _gaps(started, ends)


def run_fedlab(work: Workload, shards: Shards, num_rounds: int) -> list[float]:
    """FedLab: its standalone pipeline with the serial trainer."""
    _declare_operators()
    from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
    from fedlab.contrib.algorithm.basic_server import SyncServerHandler
    from fedlab.contrib.dataset.basic_dataset import FedDataset
    from fedlab.core.standalone import StandalonePipeline
    from torch.utils.data import DataLoader, TensorDataset

    class Data(FedDataset):  # type: ignore[misc]
        def get_dataloader(self, client: int, batch_size: int) -> DataLoader[Any]:
            return DataLoader(TensorDataset(*shards[client]), batch_size=batch_size, shuffle=True)

    ends: list[float] = []

    class Pipeline(StandalonePipeline):  # type: ignore[misc]
        def evaluate(self) -> None:
            ends.append(time.perf_counter())

    trainer = SGDSerialClientTrainer(plain_net(work), len(shards))
    trainer.setup_dataset(Data())
    trainer.setup_optim(1, work.batch_size, LR)
    pipeline = Pipeline(SyncServerHandler(plain_net(work), num_rounds, 1.0), trainer)
    started = time.perf_counter()
    pipeline.main()
    return _gaps(started, ends)


def run_fluke(work: Workload, shards: Shards, num_rounds: int) -> list[float]:
    """fluke: FedAVG over its data loaders; the callback sees the end of each round."""
    _declare_operators()
    from fluke import DDict, FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader

    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device("cpu")
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    loaders = [
        FastDataLoader(*shard, num_labels=NUM_CLASSES, batch_size=work.batch_size, shuffle=True) for shard in shards
    ]
    container = DummyDataContainer(loaders, [None] * len(loaders), None, NUM_CLASSES)
    client = {
        "batch_size": work.batch_size,
        "local_epochs": 1,
        "loss": nn.CrossEntropyLoss,
        "optimizer": {"name": torch.optim.SGD, "lr": LR},
        "scheduler": {"name": torch.optim.lr_scheduler.StepLR, "step_size": 1, "gamma": 1},
        "persistency": False,
        "clipping": 0,
    }
    settings = DDict(
        client=DDict(client), server=DDict(weighted=True, lr=1.0, loss=nn.CrossEntropyLoss), model=plain_net(work)
    )
    algorithm = FedAVG(len(shards), DataSplitter(container), settings)
    ends: list[float] = []

    class Clock:
        def end_round(self, round: int) -> None:
            ends.append(time.perf_counter())

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    algorithm.attach(Clock())
    started = time.perf_counter()
    algorithm.run(num_rounds, 1.0)
    return _gaps(started, ends)


def _declare_operators() -> None:
    """Declare the operators of torchvision that its CUDA wheel lacks beside a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _libraries.append(library)
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]


def _gaps(started: float, ends: list[float]) -> list[float]:
    return [end - start for start, end in zip([started, *ends], ends, strict=False)]


_libraries: list[torch.library.Library] = []  # a library that is collected takes its declarations away
PROGRAMS = {"bare": run_bare, "pfl": run_pfl, "fedlab": run_fedlab, "fluke": run_fluke}


def run_one(peer: str, name: str, num_rounds: int, num_clients: int) -> None:
    """Run a peer, as its own documents write it, with one torch thread; print the seconds of every round."""
    torch.set_num_threads(1)
    work = WORKLOADS[name]
    images, targets = make_images(work, num_clients)
    shards = list(zip(normalise(images).split(work.examples), targets.split(work.examples), strict=True))
    seconds = PROGRAMS[peer](work, shards, num_rounds)
    if len(seconds) != num_rounds:
        raise RuntimeError(f"{peer}: {len(seconds)} of {num_rounds} rounds")
    print(json.dumps(seconds))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        peer, name, num_rounds, num_clients = sys.argv[2:]
        run_one(peer, name, int(num_rounds), int(num_clients))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=ROOT / "runs" / "peers-env", help="environment of the peers")
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number there")
    args = parser.parse_args()
    commands = programs(make_environment(args.env))
    results = {
        f"{name}_{clients}": compare(name, clients, commands, 1 if args.quick else 5)
        for name, clients in (QUICK if args.quick else CASES)
    }
    write_report(args.json, args.quick, results)


if __name__ == "__main__":
    main()
