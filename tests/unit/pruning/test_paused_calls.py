"""Batches that wait within a block run no part of it twice, and see what changed while they waited."""

from __future__ import annotations

from threading import active_count

import pytest
import torch
from torch import Tensor

from fedlp.models.spec import state_tensors
from fedlp.pruning.kernels.hessian import DiagonalMoments, Moments
from fedlp.pruning.layer_statistics import Collector
from fedlp.pruning.paused_calls import PausedCall
from fedlp.pruning.pruner import Calibration, Method, Pruner
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.staged_forward import StagedRun
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import trace_widths
from tests.unit.pruning.test_pruner import half, language_model, make_pruner, tokens


def test_a_call_goes_on_where_it_waited_and_raises_to_who_resumes_it() -> None:
    seen: list[int] = []

    def call(wait: object) -> str:
        seen.append(1)
        wait()  # type: ignore[operator]
        seen.append(2)
        raise ValueError("late")

    paused = PausedCall(call)
    assert not paused.resume()
    assert seen == [1]
    with pytest.raises(ValueError, match="late"):
        paused.resume()
    assert seen == [1, 2]


def test_a_call_that_is_given_up_ends_its_thread() -> None:
    before = active_count()
    paused = PausedCall(lambda wait: wait())
    paused.resume()
    assert active_count() == before + 1
    paused.close()
    assert active_count() == before


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_waiting_batches_give_the_statistics_of_batches_that_begin_anew(model_type: str) -> None:
    found = []
    for pauses in (False, True):
        model, batches = language_model(model_type), tokens(2)
        layers = find_layers(model, trace_widths(model, batches[0]))
        collector = Collector(model, model, layers, batches, {}, pauses=pauses)
        grams: list[Tensor] = []
        for layer in layers:
            for reader in collector.collect(layer):
                assert reader.moments.cross is not None
                grams += [reader.moments.gram.tril(), reader.moments.cross]
                state_tensors(model)[f"{reader.path}.weight"].mul_(0.5)  # what comes later sees this
        collector.close()
        found.append(grams)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_no_module_of_a_block_runs_twice() -> None:
    model, batches = language_model(), tokens(2)
    layers, calls = find_layers(model, trace_widths(model, batches[0])), [0]
    query = model.get_submodule("model.layers.1.self_attn.q_proj")
    query.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    collector = Collector(model, None, layers, batches, {}, pauses=True)
    for layer in layers:
        collector.collect(layer)
    collector.close()
    assert calls == [len(batches)]


def test_a_module_that_a_batch_has_passed_is_entered_again() -> None:
    model, batches = language_model(), tokens(1)
    run = StagedRun(model, batches, pauses=True)
    mlp, attention = (model.get_submodule(f"model.layers.0.{name}") for name in ("mlp.down_proj", "self_attn.o_proj"))
    late = run.enter(0, [mlp])[0][0].clone()
    run.enter(0, [attention])
    assert torch.equal(run.enter(0, [mlp])[0][0], late)
    run.close()


def test_pruning_in_place_gives_the_bytes_of_a_copy() -> None:
    method = Method(OBS(), correction=1.0, fisher=True)
    copied = make_pruner(language_model(), method).prune(half(make_pruner(language_model(), method)))
    model, batches = language_model(), tokens(3)
    spec = trace_widths(model, batches[0])
    pruner = Pruner(model, spec, find_layers(model, spec), Calibration(batches, [], 0), method, in_place=True)
    pruned = pruner.prune(half(pruner)).model
    assert pruned is model
    expected = state_tensors(copied.model)
    for name, tensor in state_tensors(pruned).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_products_in_float32_keep_the_digits_of_what_varies(offset: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(600, 20, generator=rng) @ torch.randn(20, 20, generator=rng) + offset
    t = torch.randn(600, 3, generator=rng) + offset
    fast, exact, diagonal = Moments.empty(20, 3), Moments.empty(20, 3), DiagonalMoments.empty(20)
    fast.add(x, t)
    exact.add(x.double(), t.double())
    diagonal.add(x)
    for centred in (False, True):
        for one, other in (
            (fast.hessian(centred), exact.hessian(centred)),
            (fast.target_hessian(centred), exact.target_hessian(centred)),
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().mean()))
    torch.testing.assert_close(diagonal.variance, exact.variance, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(fast.mean, exact.mean, rtol=1e-7, atol=1e-6)
