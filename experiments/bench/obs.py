"""Speed of the OBS kernel: ``python experiments/bench/obs.py [--sizes 512,1024,2048,4096] [--json FILE]``.

One layer of n inputs and n / 2 outputs loses half of its inputs, float32, one thread. All in turn, pass by pass:

* ``fedlp``: the inverse once, then downdates; the weights solved for at the end.
* ``reference``: SlimGPT's Algorithm 1 inside the loop of its released code, which factorises and inverts the Hessian
  anew at every step. It runs once, as it takes minutes.
* ``limit``: what no such method can do without: one Cholesky factorisation and inverse, and the matrix products of the
  downdates, 2 n² m and 2 out n m for m removed inputs.

Both follow the same schedule, SlimGPT's Dynamic Group Size with its constants scaled from its 11,008 inputs to n, and
must end at the same loss. ``greedy`` is fedlp removing one input at a time, which needs no schedule.
``peak_memory_bytes`` is the growth of a process that does one pass of fedlp's, beyond its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from timing import alternate, clock, paired_ratio, print_table, write_report
from torch import Tensor

from fedlp.pruning.kernels.hessian import invert_hessian
from fedlp.pruning.kernels.obs import Problem, eliminate, output_error, resolve_weight
from fedlp.pruning.scores.slimgpt import group_schedule

DAMPING = 1e-2
PUBLISHED_INPUTS = 11008  # of LLaMA-7B's FFN layers, which SlimGPT's group sizes are meant for


def make_layer(n: int) -> tuple[Tensor, Tensor]:
    """Return the weight and the Hessian of a layer whose inputs are correlated."""
    rng = torch.Generator().manual_seed(n)
    mixing = torch.randn(n, n, generator=rng) / n**0.5 + torch.eye(n)
    inputs = torch.randn(4 * n, n, generator=rng) @ mixing
    return torch.randn(n // 2, n, generator=rng) / n**0.5, inputs.T @ inputs * (2 / len(inputs))


def run_fedlp(weight: Tensor, hessian: Tensor, schedule: list[int]) -> Tensor:
    """Return the pruned weight, zero where inputs are gone."""
    inverse = invert_hessian(hessian, DAMPING, "bench", len(hessian))
    order = torch.tensor(eliminate([Problem(weight, inverse, 1)], schedule).order)
    everything = torch.arange(len(hessian))
    kept = everything[~torch.isin(everything, order)]
    pruned = torch.zeros_like(weight)
    pruned[:, kept] = resolve_weight(weight, inverse, kept, order)
    return pruned


def run_reference(weight: Tensor, hessian: Tensor, schedule: list[int]) -> Tensor:
    """Return the same, in the form of the released code."""
    w, h = weight.clone(), hessian.clone()
    h.diagonal().add_(DAMPING * hessian.diagonal().mean())
    pruned = torch.zeros(len(h), dtype=torch.bool)
    for count in schedule:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        errors = (w.square() / inverse.diagonal()).sum(dim=0)
        errors[pruned] = torch.inf
        order = torch.argsort(errors)
        w, inverse = w[:, order], inverse[order][:, order]
        upper = torch.linalg.cholesky(inverse, upper=True)
        active = w.shape[1] - int(pruned.sum())
        scaled = torch.zeros(len(w), count)
        for i in range(count):
            scaled[:, i] = w[:, i] / upper[i, i]
            w[:, i:count] -= torch.outer(scaled[:, i], upper[i, i:count])
        w[:, count:active] -= scaled @ upper[:count, count:active]
        w[:, :count] = 0.0
        w = w[:, torch.argsort(order)]
        gone = order[:count]
        pruned[gone] = True
        h[gone], h[:, gone] = 0.0, 0.0
        h[gone, gone] = 1.0
    return w


def run_limit(weight: Tensor, hessian: Tensor, total: int) -> None:
    """Do the work that remains if choosing is free."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    w, rows, scaled = weight.clone(), inverse[:total].clone(), weight[:, :total].clone()
    for start in range(0, total, 64):
        inverse.addmm_(rows[start : start + 64].T, rows[start : start + 64], alpha=-1e-6)
        w.addmm_(scaled[:, start : start + 64], rows[start : start + 64], alpha=-1e-6)


def measure(n: int, repeats: int) -> dict[str, Any]:
    """Return one row of the report."""
    weight, hessian = make_layer(n)
    schedule = group_schedule(n // 2, n / PUBLISHED_INPUTS)
    times = alternate(
        {
            "fedlp": lambda: run_fedlp(weight, hessian, schedule),
            "greedy": lambda: run_fedlp(weight, hessian, [1] * (n // 2)),
            "limit": lambda: run_limit(weight, hessian, n // 2),
        },
        repeats,
    )
    results: list[Tensor] = []
    reference_s = clock(lambda: results.append(run_reference(weight, hessian, schedule)))
    error = lambda pruned: output_error(weight.double(), pruned.double(), hessian.double())  # noqa: E731
    dense = output_error(weight.double(), torch.zeros_like(weight).double(), hessian.double())
    return {
        "n": n,
        "steps": len(schedule),
        "speedup": reference_s / statistics.median(times["fedlp"]),
        "loss": error(run_fedlp(weight, hessian, schedule)) / dense,
        "loss_reference": error(results[0]) / dense,
        "loss_greedy": error(run_fedlp(weight, hessian, [1] * (n // 2))) / dense,
        "limit_ratio": paired_ratio(times["fedlp"], times["limit"])["median"],
        "greedy_limit_ratio": paired_ratio(times["greedy"], times["limit"])["median"],
        "peak_memory_bytes": peak_memory(n),
        "seconds": {**times, "reference": [reference_s]},
    }


def peak_memory(n: int) -> int:
    """Return by how much a fresh process grows beyond the layer while it is pruned."""
    code = (
        "import resource, torch, obs; torch.set_num_threads(1); "
        f"obs.run_fedlp(*obs.make_layer(64), [8, 8]); layer = obs.make_layer({n}); "
        "status = lambda: int(next(x for x in open('/proc/self/status') if x.startswith('VmRSS')).split()[1]); "
        "before = status(); open('/proc/self/clear_refs', 'w').write('5'); "
        f"obs.run_fedlp(*layer, obs.group_schedule({n // 2}, {n / PUBLISHED_INPUTS})); "
        "peak = int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]); "
        "print((peak - before) * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="512,1024,2048,4096", help="inputs of the layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for n in (int(size) for size in args.sizes.split(",")):
        rows.append(measure(n, args.repeats))
        row = rows[-1]
        print_table(
            f"n = {n}, {row['steps']} steps",
            ("", "s"),
            [(name, f"{statistics.median(seconds):.3f}") for name, seconds in row["seconds"].items()],
        )
        print(
            f"  speedup {row['speedup']:.1f}, over the limit {row['limit_ratio']:.2f} (greedy "
            f"{row['greedy_limit_ratio']:.2f}), loss {row['loss']:.5f} (reference {row['loss_reference']:.5f}, greedy "
            f"{row['loss_greedy']:.5f}), memory {row['peak_memory_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
    write_report(args.json, False, {"rows": rows})


if __name__ == "__main__":
    main()
