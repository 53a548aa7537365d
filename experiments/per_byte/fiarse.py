"""FIARSE as a rival in the mixed fleet: ``python experiments/per_byte/fiarse.py --data ROOT``; minutes a seed.

To decide: does an unstructured sub-model of a client's largest weights end above FedLP-Plan's at equal bytes?

Wu et al., FIARSE, NeurIPS 2024. A client of capacity p trains the share p of the weights that are largest in
magnitude: threshold t, mask M = 1[|x| >= t], gradient of x M, times M (1 + 2 t |x| / (|x| + t)^2) for the gradient of
the mask; t is that of the received model, over all weights and biases. Batch norms are whole. The server averages each
entry over the clients in whose masks it is. No unstructured mask shrinks a dense model, so this is a loop of its own,
with fedlp's data, clients, cohorts, local training and evaluation: all MACs of the dense model count, and memory is
the whole model's. Bytes are counted in FIARSE's favour: down float32 for each kept entry and a bit for each entry; up
one byte for each kept entry (as the 8 bits of its neighbours in the table) though the differences are averaged
unrounded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.per_byte.run import DIRICHLET, TIERS, WIDTHS  # noqa: E402
from experiments.per_byte.tables import regenerate  # noqa: E402
from experiments.runs import collect, is_finished  # noqa: E402
from fedlp.apps.federate import Federation  # noqa: E402
from fedlp.config import compose, to_plain, to_yaml  # noqa: E402
from fedlp.federation.client.runtime import load_tensors  # noqa: E402
from fedlp.federation.fleet import fleet_kinds  # noqa: E402
from fedlp.federation.sampling import sample_cohort  # noqa: E402
from fedlp.federation.server.checkpoint import ServerState  # noqa: E402
from fedlp.federation.server.run_directory import RunDirectory  # noqa: E402
from fedlp.models.spec import state_tensors  # noqa: E402
from fedlp.pruning.batch_norms import reestimate_batch_norms  # noqa: E402
from fedlp.rng import Stream, generator  # noqa: E402
from fedlp.training.calibration_data import batch_calibration  # noqa: E402
from fedlp.training.evaluation import evaluate_sums, metrics_from_sums  # noqa: E402
from fedlp.training.loop import train_locally  # noqa: E402
from fedlp.types import RoundRecord, SubModel  # noqa: E402

GROUPS = {"mixed-iid": TIERS, "mixed-dirichlet": [*TIERS, *DIRICHLET]}
_STATISTICS_CLIENTS = 10  # whose examples measure the batch norms of the global model, as in the other rows


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold)
        return torch.where(x.abs() >= threshold, x, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, threshold = ctx.saved_tensors
        size = x.abs()
        rise = 1 + 2 * threshold * size / (size + threshold).square().clamp_min(torch.finfo(x.dtype).tiny)
        return torch.where(size >= threshold, gradients[0] * rise, 0.0), None


class Mask(nn.Module):
    """Mask of the entries of magnitude >= ``threshold``."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Return the masked entries."""
        masked: Tensor = _Threshold.apply(x, self.threshold)  # type: ignore[no-untyped-call]
        return masked


def masked_names(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Return module, parameter and full name of each tensor under the mask: weights and biases but for batch norms."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            found += [(module, name, f"{path}.{name}") for name, _ in module.named_parameters(recurse=False)]
    return found


def threshold_of(params: Mapping[str, Tensor], names: list[str], share: float) -> Tensor:
    """Return the magnitude of the smallest of the ``share`` largest entries; 0 for a share of 1."""
    sizes = torch.cat([params[name].abs().flatten() for name in names])
    kept = int(share * sizes.numel())
    return torch.tensor(0.0) if kept >= sizes.numel() else sizes.kthvalue(sizes.numel() - kept + 1).values


class Rounds:
    """Rounds of FIARSE over the clients of a federation."""

    def __init__(self, plan: Federation, folder: Path) -> None:
        self.plan, self.config = plan, plan.config
        self.params = {name: tensor.clone() for name, tensor in plan.initial_params().items()}
        self.client = plan.runtime(str(folder))
        self.model = plan.costs.model(SubModel())
        self.names = [name for _, _, name in masked_names(self.model)]
        kinds = fleet_kinds(plan.config.fleet, plan.config.num_clients, plan.config.seed)
        assert kinds is not None
        self.shares = [plan.config.fleet.fractions[kind] for kind in kinds.tolist()]

    def run_round(self, server_round: int) -> RoundRecord:
        """Train one round; return its record."""
        started, config = time.perf_counter(), self.config
        clients = range(config.num_clients)
        cohort = sample_cohort(config.seed, server_round, clients, config.clients_per_round)
        sums = {name: torch.zeros_like(tensor) for name, tensor in self.params.items() if tensor.is_floating_point()}
        weights = {name: torch.zeros_like(tensor) for name, tensor in sums.items()}
        kept, bits, losses, examples = 0, 0, 0.0, 0
        for client_id in cohort:
            count = self.client.shards.size(client_id)
            threshold = threshold_of(self.params, self.names, self.shares[client_id])
            trained, loss = self._train(server_round, client_id, threshold)
            for name, total in sums.items():
                masked = name in self.names
                held = (self.params[name].abs() >= threshold) if masked else torch.ones_like(total, dtype=torch.bool)
                total += torch.where(held, count * (trained[name] - self.params[name]), 0.0)
                weights[name] += count * held
                kept += int(held.sum())
                bits += held.numel() if masked else 0
            losses, examples = losses + count * loss, examples + count
        for name, total in sums.items():
            self.params[name] = self.params[name] + total / weights[name].clamp_min(1)
        macs = self.plan.costs.macs(SubModel()).training * examples * config.local.epochs
        metrics = {"train_loss": losses / examples}
        if server_round % config.eval_every == 0 or server_round == config.num_rounds:
            metrics = {**self._evaluate(server_round), **metrics}
        return RoundRecord(
            *(server_round, cohort, kept, 4 * kept + bits // 8, kept, kept, macs),
            coverage={name: float((weights[name] > 0).float().mean()) for name in self.names},
            failures=(),
            clients=(),
            metrics=metrics,
            wall_time_s=time.perf_counter() - started,
        )

    def _train(self, server_round: int, client_id: int, threshold: Tensor) -> tuple[dict[str, Tensor], float]:
        load_tensors(state_tensors(self.model), self.params)
        under_mask = masked_names(self.model)
        for module, name, _ in under_mask:
            parametrize.register_parametrization(module, name, Mask(threshold), unsafe=True)
        config, info = self.config, self.plan.info
        rng = generator(config.seed, Stream.LOCAL_TRAINING, server_round, client_id)
        loss = train_locally(self.model, self.client.shards.of(client_id), info, config.local, rng).train_loss
        for module, name, _ in under_mask:
            original = module.parametrizations[name].original  # type: ignore[index, union-attr]
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            assert getattr(module, name).data_ptr() == original.data_ptr(), "entries outside the mask stay"
        return {name: tensor.clone() for name, tensor in state_tensors(self.model).items()}, loss

    def _evaluate(self, server_round: int) -> dict[str, float]:
        """Return the metrics of the global model, whose batch norms are measured on ten clients' examples."""
        load_tensors(state_tensors(self.model), self.params)
        config, info = self.config, self.plan.info
        order = generator(config.seed, Stream.STATISTICS, server_round).permutation(config.num_clients)
        examples, _ = self.client.shards.joined(order[:_STATISTICS_CLIENTS].tolist())
        batches = batch_calibration(examples, info, 64, 0, torch.device("cpu")).batches
        reestimate_batch_norms(self.model.eval(), batches)
        sums = evaluate_sums(self.model, self.client.test, info, self.client.settings.eval_batch_size)
        return metrics_from_sums(sums, info.task)


def run(out: Path, overrides: list[str]) -> None:
    """Run one seed, from its start."""
    plan = Federation(compose(overrides))
    directory = RunDirectory(out)
    directory.begin(to_yaml(plan.config))
    rounds = Rounds(plan, directory.clients)
    for server_round in range(1, plan.config.num_rounds + 1):
        record = rounds.run_round(server_round)
        directory.append_round(record)
        print(server_round, record.metrics, f"{record.bytes_up / 1e6:.2f} MB up", flush=True)
    directory.finish(ServerState(server_round, rounds.params), to_plain(plan.config), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, default=HERE / "runs")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for group in arguments.groups:
            out = arguments.out / f"{group}/fiarse/seed-{seed}"
            common = ["experiment=per_byte", f"dataset.root={arguments.data}", f"seed={seed}", "label=fiarse"]
            if not is_finished(out):
                run(out, [*common, *GROUPS[group], "strategy=heterofl", *WIDTHS, f"num_rounds={arguments.rounds}"])
    collect(arguments.out, HERE / "results")
    regenerate(HERE / "results", HERE / "results")


if __name__ == "__main__":
    main()
