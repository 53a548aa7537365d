"""Composition root of ``fedlp-prune``: one-shot pruning of one model, from config to files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlp.allocation.budget.solve import Cost
from fedlp.allocation.evidence import needs_of
from fedlp.apps.model_allocator import Allocator
from fedlp.apps.peak_memory import peak_memory
from fedlp.apps.prune_progress import show_progress, show_step
from fedlp.apps.prune_state import PruneState, fingerprint
from fedlp.config import PruneConfig, read_run_config, to_plain, to_yaml
from fedlp.data.datasets import DataInfo, FederatedData, make_reader, tokenizer_of
from fedlp.errors import AllocationError, CheckpointError, ConfigError, DataError
from fedlp.models import ModelSpec, describe_model, state_tensors
from fedlp.models.cost import count_macs
from fedlp.pruning.costs.footprint import Footprint, macs_footprint
from fedlp.pruning.io.model_files import export_onnx, round_weights, save_classifier, save_language_model
from fedlp.pruning.kernels.newton import newton_steps
from fedlp.pruning.pruner import Calibration, Method, Pruned, Pruner
from fedlp.pruning.tracing.decoder import is_language_model
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import WidthSpec, trace_widths
from fedlp.rng import Stream, generator, torch_seed
from fedlp.tasks import task_of, with_task
from fedlp.training.calibration_data import batch_calibration, check_tokenizer, make_method, whole_examples
from fedlp.training.evaluation import evaluate_sums, metrics_from_sums
from fedlp.training.finetuning import finetune
from fedlp.training.threads import one_thread
from fedlp.types import Keep, PrunableLayer

log = logging.getLogger("fedlp")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """Pruning subject: a trained model, its data, its widths and the tokenizer of a language model."""

    spec: ModelSpec
    model: nn.Module
    info: DataInfo
    data: FederatedData
    widths: WidthSpec
    layers: tuple[PrunableLayer, ...]
    tokenizer: str = "bytes"


def prune(config: PruneConfig, out: Path) -> dict[str, Any]:
    """Prune a model, write it to ``out/model`` and the report to ``out/prune.json``; return the report.

    A call that was killed goes on in the same ``out`` at the layer where it was, to the same bytes.

    Raises
    ------
    FedLPError
        If the model has no trained weights or no prunable units, the data are too few or not finite, the target is out
        of reach, or ``out`` already holds a pruned model.
    """
    if (out / "prune.json").exists():
        raise ConfigError(f"hydra.run.dir={out} already holds a pruned model; choose another folder")
    started = time.monotonic()
    with one_thread():
        subject = load_subject(config)
        if config.finetune.name == "newton":
            task_of(subject.info).require_softmax("finetune=newton", subject.info)
        before = evaluate(subject.model, subject, config)
        method = make_method(config.pruner)
        calibration = draw_calibration(config, subject, reads_calibration(config, method))
        dense = measure_size(subject.model, subject)
        in_place = is_language_model(subject.model)
        state = PruneState(out / "state", fingerprint(to_yaml(config), subject.model))
        pruner = Pruner(subject.model, subject.widths, subject.layers, calibration, method, in_place, state)
        kept = state.kept or allocate(config, subject, calibration, pruner)
        state.keep(kept)
        pruned = pruner.prune(kept, show_progress(subject.layers))
        recover(pruned.model, config, subject, calibration)
        round_weights(pruned.model, written_dtype(config, subject))
        after = evaluate(pruned.model, subject, config)
        out.mkdir(parents=True, exist_ok=True)
        pruned.model.cpu()
        save_pruned(pruned, subject, config, out / "model")
        report = make_report(config, subject, pruned, before, after, dense) | {
            "wall_time_s": time.monotonic() - started,
            "peak_memory_bytes": peak_memory(),
        }
    from fedlp.report.pruning import draw_layers  # matplotlib takes a second to load: not in every client

    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (out / "layers.png").write_bytes(draw_layers(report["layers"], f"{config.pruner.name}, {config.allocator.name}"))
    (out / "prune.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    state.clear()
    return report


# ---------------------------------------------------------------------------------------------------------------- parts
def load_subject(config: PruneConfig) -> Subject:
    """Return the config's trained model, its data and its prunable widths."""
    model_config, dataset, task = config.model, config.dataset, config.task
    if config.run is not None:
        run = Path(config.run)
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"run={config.run}: that is not a run directory (it has no config.yaml)")
        stored = read_run_config(run / "config.yaml")
        model_config, dataset, task = stored.model, stored.dataset, stored.task
    elif not model_config.options.get("pretrained") and model_config.options.get("path") is None:
        raise ConfigError(
            f"model {model_config.name} has no trained weights; give model=hf model.path=DIR, model.pretrained=true, "
            "or run=RUN_DIR for the model of a federated run"
        )
    reader = make_reader(dataset)
    info = with_task(reader.describe(), task.make())
    spec = describe_model(model_config, info.input_shape, info.num_classes, info.task, info.vocabulary)
    model = spec.build(config.seed).eval().to(config.device)
    if config.run is not None:
        load_run(model, Path(config.run) / "model.safetensors")
    data = replace(reader.load(config.seed), info=info)
    widths = trace_widths(model, spec.example_inputs(1), config.pruner.depth)
    if line := widths.whole_line():
        log.warning("%s", line)
    shared = config.pruner.shared and not spec.reads_tokens
    return Subject(spec, model, info, data, widths, find_layers(model, widths, shared), tokenizer_of(dataset))


def load_run(model: nn.Module, path: Path) -> None:
    """Load the model of a finished run into a model; CheckpointError if it does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the run must have finished") from error
    for name, tensor in state_tensors(model).items():
        if name not in stored or stored[name].shape != tensor.shape:
            raise CheckpointError(f"{path} does not fit the model of the run's config.yaml (tensor {name})")
        tensor.copy_(stored[name])


def draw_calibration(config: PruneConfig, subject: Subject, is_read: bool = True) -> Calibration:
    """Return random prepared training examples; only windows without padding of text.

    The loss of one example tells a wrong tokenizer, unless the model never reads them (``is_read``).
    """
    train = whole_examples(subject.data.train, subject.info)
    wanted = config.calibration.examples
    if wanted > len(train):
        raise DataError(
            f"calibration.examples={wanted}, but the data set has {len(train)} whole training examples; lower it or "
            "give more data"
        )
    chosen = train.select(generator(config.seed, Stream.CALIBRATION).permutation(len(train))[:wanted])
    seed = torch_seed(config.seed, Stream.CALIBRATION, 1)
    data = batch_calibration(chosen, subject.info, config.calibration.batch_size, seed, torch.device(config.device))
    if is_read:
        check_tokenizer(subject.model, data, subject.info, subject.tokenizer)
    return data


def reads_calibration(config: PruneConfig, method: Method) -> bool:
    """Return whether the model runs on the calibration examples: for scores, recovery, allocation or Newton steps."""
    scores = method.needs_inputs or method.fisher or bool(method.score.needs & {"gradients", "model"})
    allocates = bool(needs_of(config.allocator.make()) - {"weights"})
    return scores or allocates or config.finetune.name == "newton"


def allocate(config: PruneConfig, subject: Subject, calibration: Calibration, pruner: Pruner) -> dict[str, int]:
    """Return the units kept of each layer, within the config's target, biases that pruning adds included."""
    cost, limit = _target(config, subject, pruner)
    rule = config.allocator.make()
    needs = needs_of(rule)
    measures = bool(needs & {"error_curves", "model"})
    method = Method(fisher=True, damping=config.pruner.damping, keeps_batch_norm=True) if measures else Method()
    in_place = is_language_model(subject.model) and "model" not in needs  # which tries other widths
    dense = Pruner(subject.model, subject.widths, subject.layers, calibration, method, in_place)
    return Allocator(dense, cost).allocate(rule, limit)


def recover(model: nn.Module, config: PruneConfig, subject: Subject, calibration: Calibration) -> None:
    """Finetune a pruned model in place, or take Newton steps on its calibration data, as the config has it."""
    if config.finetune.name == "newton":
        paths = [path for layer in subject.layers for path in layer.readers]
        newton_steps(model, paths, calibration, config.finetune.steps, show_step)
    else:
        rng = generator(config.seed, Stream.FINETUNE)
        finetune(model, subject.info, subject.data.train, config.finetune, rng)


def _target(config: PruneConfig, subject: Subject, pruner: Pruner) -> tuple[Cost, float]:
    """Return the limited cost, and its limit."""
    inputs = subject.spec.example_inputs(1)
    if config.target_macs is not None:
        footprint, limit, what = macs_footprint(subject.model, subject.widths, inputs), config.target_macs, "MACs"
    else:
        footprint, what = Footprint(subject.model, subject.widths), "parameters"
    whole = footprint.count({})
    prunable = whole - footprint.count({layer.name: 0 for layer in subject.layers})
    if config.target_params is not None:
        limit = config.target_params
    elif config.sparsity is not None:
        limit = whole - config.sparsity * prunable
    if limit >= whole:
        raise AllocationError(f"the model has {whole:,.0f} {what} already, no more than the target of {limit:,.0f}")
    if config.target_macs is None:
        footprint.add(None, pruner.num_added_params())
    return footprint.count, limit


def evaluate(model: nn.Module, subject: Subject, config: PruneConfig) -> dict[str, float]:
    """Return a model's metrics on the test examples; empty if the config turns evaluation off."""
    if not config.evaluate:
        return {}
    sums = evaluate_sums(model, subject.data.test, subject.info, config.eval_batch_size)
    return metrics_from_sums(sums, task_of(subject.info))


def save_pruned(pruned: Pruned, subject: Subject, config: PruneConfig, folder: Path) -> None:
    """Write a pruned model in the config's formats."""
    dtype = written_dtype(config, subject)
    save_model(pruned.model, subject.spec, subject.widths, pruned.widths, subject.tokenizer, folder, config.onnx, dtype)


def written_dtype(config: PruneConfig, subject: Subject) -> torch.dtype:
    """Return the floating-point format of written weights: the config's, or that of the source."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.float32 if config.run is not None else subject.spec.blueprint.stored_dtype()


def save_model(
    model: nn.Module,
    spec: ModelSpec,
    axes: WidthSpec,
    widths: Mapping[str, Keep],
    tokenizer: str,
    folder: Path,
    onnx: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model cut to ``widths`` for its own ecosystem, and as ONNX if requested."""
    if spec.reads_tokens:
        save_language_model(model, folder, None if tokenizer == "bytes" else tokenizer, dtype)
    else:
        save_classifier(model, axes, widths, folder, dtype)
    if onnx:
        export_onnx(model, spec.example_inputs(1), folder / "model.onnx")


def measure_size(model: nn.Module, subject: Subject) -> tuple[int, float]:
    """Return a model's parameters, and its multiply-accumulates per example."""
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, count_macs(model, subject.spec.example_inputs(1)).forward


def make_report(
    config: PruneConfig,
    subject: Subject,
    pruned: Pruned,
    before: dict[str, float],
    after: dict[str, float],
    dense: tuple[int, float] | None = None,
) -> dict[str, Any]:
    """Return the content of ``prune.json`` of a pruned model, without time and memory.

    Parameters
    ----------
    dense : tuple of parameters and MACs, optional
        :func:`measure_size` of the subject's model before it was pruned in place; of the model as it is if absent.
    """
    params_before, macs_before = dense or measure_size(subject.model, subject)
    params_after, macs_after = measure_size(pruned.model, subject)
    return {
        "method": config.pruner.name,
        "allocator": config.allocator.name,
        "params_before": params_before,
        "params_after": params_after,
        "macs_before": macs_before,
        "macs_after": macs_after,
        "layers": [asdict(layer) for layer in pruned.layers],
        "metrics_before": before,
        "metrics_after": after,
        "config": to_plain(config),
    }
