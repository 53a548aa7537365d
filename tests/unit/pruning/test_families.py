"""Every architecture with rules: its cut model computes what the whole one does with the removed units silenced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.forward import forward_logits
from fedlp.models.language import import_transformers
from fedlp.pruning.io.model_files import save_language_model
from fedlp.pruning.pruner import Calibration, Method, Pruner
from fedlp.pruning.scores.magnitude import Magnitude
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.tracing.units import find_layers, is_transposed, kept_columns
from fedlp.pruning.tracing.widths import WidthSpec, cut_model, trace_widths
from fedlp.types import Keep

HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
SIZES = HEADS | {"intermediate_size": 12}
GROUPED = SIZES | {"num_key_value_heads": 2}
LARGE_HEADS = GROUPED | {"head_dim": 6}
BERT = HEADS | {"intermediate_size": 12, "max_position_embeddings": 40, "type_vocab_size": 1}
CASES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "ministral", "seed_oss"), LARGE_HEADS),
    **dict.fromkeys(("ministral3", "ernie4_5", "exaone4", "cohere2", "hunyuan_v1_dense"), LARGE_HEADS),
    **dict.fromkeys(("arcee", "nemotron", "apertus", "gemma", "gemma2", "gemma3_text"), LARGE_HEADS),
    **dict.fromkeys(("glm", "glm4", "starcoder2", "phi", "phi3", "cohere", "olmo", "olmo2", "olmo3"), GROUPED),
    "cwm": LARGE_HEADS | {"bos_token_id": 1, "eos_token_id": 2},
    "helium": GROUPED | {"head_dim": 8},
    **dict.fromkeys(("stablelm", "hyperclovax"), GROUPED),
    "phi3-all-keys": SIZES | {"num_key_value_heads": 4},
    "phi3-one-key": SIZES | {"num_key_value_heads": 1},
    "stablelm-normed": GROUPED | {"qk_layernorm": True},
    "gemma-one-key": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
    "starcoder2-one-key": SIZES | {"num_key_value_heads": 1},
    "gpt2": {"n_embd": 24, "n_inner": 12, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 50},
    "gpt_neox": SIZES,
    "bloom": HEADS,
    "falcon": HEADS | {"ffn_hidden_size": 12, "multi_query": False},
    "falcon-one-key": HEADS | {"ffn_hidden_size": 12, "multi_query": True},
    "falcon-new": HEADS | {"ffn_hidden_size": 12, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": HEADS | {"ffn_hidden_size": 12, "multi_query": False, "alibi": True},
    "opt": HEADS | {"ffn_dim": 12, "max_position_embeddings": 32},
    "bert": BERT,
    "bert-SequenceClassification": BERT | {"num_labels": 3},
    "roberta-SequenceClassification": BERT | {"num_labels": 3},
    **dict.fromkeys(("xlm-roberta", "camembert"), BERT),
}
WHOLE = {  # parts that must stay whole, and why
    "olmo2": ("self_attn", "Olmo2RMSNorm"),
    "olmo3": ("self_attn", "Olmo3RMSNorm"),
    "bloom": ("self_attention", "ALiBi"),
    "falcon-alibi": ("self_attention", "ALiBi"),
    "phi3-one-key": ("self_attn", "all of them share"),
    "falcon-one-key": ("self_attention", "all of them share"),
    "stablelm-normed": ("self_attn", "LayerNorm"),
}
FEW = ("smollm3", "phi3", "olmo2", "gemma3_text", "gpt_neox", "bloom", "bert-SequenceClassification")
TOKENS = torch.arange(24).reshape(2, 12) + 2


def build(case: str) -> nn.Module:
    transformers = import_transformers()
    kind, _, variant = case.partition("-") if not case.startswith("xlm") else (case, "", "")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    options = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "use_cache": False} | CASES[case]
    config = transformers.AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    heads = "SequenceClassification" if variant == "SequenceClassification" else "CausalLM"
    model: nn.Module = getattr(transformers, f"AutoModelFor{heads}").from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.3)
        elif "norm" in name.lower():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def uneven(spec: WidthSpec) -> dict[str, Keep]:
    """Random units of every attention and MLP, another number in each."""
    rng, widths = np.random.default_rng(1), {}
    for number, (axis, size) in enumerate(spec.axes.items()):
        if axis != "hidden" and size > 1:
            count = max(1, size - 1 - number % max(size // 2, 1))
            widths[axis] = Keep.from_indices(np.sort(rng.permutation(size)[:count]), size)
    return widths


@torch.no_grad()
def silence(model: nn.Module, spec: WidthSpec, widths: dict[str, Keep]) -> nn.Module:
    """Return a copy in which the layers that read removed units have zero weights for them."""
    silent = cut_model(model, spec, {})
    for layer in find_layers(model, spec):
        if layer.name in widths:
            gone = np.setdiff1d(np.arange(layer.num_units), widths[layer.name].indices())
            columns = kept_columns(torch.from_numpy(gone), layer.unit_size)
            for path in layer.readers:
                module: Any = silent.get_submodule(path)
                (module.weight if is_transposed(module) else module.weight.T)[columns] = 0.0
    return silent


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return forward_logits(model, TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_a_cut_model_equals_the_masked_one(case: str) -> None:
    model = build(case)
    spec = trace_widths(model, TOKENS)
    widths = uneven(spec)
    parts = {axis.partition(".0.")[2] for axis in widths if ".0." in axis}
    assert "mlp" in parts
    assert (len(parts) == 1) == (case in WHOLE)
    cut = cut_model(model, spec, widths)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(logits_of(cut), logits_of(silence(model, spec, widths)), rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(logits_of(cut_model(model, spec, {})), logits_of(model), rtol=0, atol=0)
    cut.train()
    forward_logits(cut, TOKENS).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in cut.parameters())


def with_biases(model: nn.Module, spec: WidthSpec) -> nn.Module:
    """Give the readers biases, as a refit does."""
    for layer in find_layers(model, spec):
        for path in layer.readers:
            module: Any = model.get_submodule(path)
            bias = torch.randn(module.weight.shape[is_transposed(module)])
            module.bias = nn.Parameter(bias)
    return model


@pytest.mark.parametrize("case", FEW)
def test_a_cut_model_is_written_for_transformers(case: str, tmp_path: Path) -> None:
    written_and_read(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in FEW])
def test_every_cut_model_is_written_for_transformers(case: str, tmp_path: Path) -> None:
    written_and_read(case, tmp_path)


def written_and_read(case: str, tmp_path: Path) -> None:
    whole = build(case)
    spec = trace_widths(whole, TOKENS)
    cut = with_biases(cut_model(whole, spec, uneven(spec)), spec)
    save_language_model(cut, tmp_path, None)
    transformers = import_transformers()
    heads = "SequenceClassification" if case.endswith("Classification") else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{heads}")
    again = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    torch.testing.assert_close(logits_of(again), logits_of(cut), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bert-SequenceClassification", "gpt_neox", "phi3", "olmo2", "falcon-new", "bloom"])
def test_a_pruned_model_is_the_best_fit_of_its_layers(case: str) -> None:
    model = build(case)
    spec = trace_widths(model, TOKENS)
    layers = find_layers(model, spec)
    batches = [torch.randint(2, 50, (8, 12), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    labels = [torch.zeros(len(logits_of(model)) * 4, dtype=torch.int64)] * 4
    data = Calibration(batches, labels)
    kept = {layer.name: max(1, layer.num_units // 2) for layer in layers}
    divergence = {}
    for name, method in {
        "obs": Method(OBS(), correction=1.0, fisher=True, damping=0.01),
        "magnitude": Method(Magnitude(), recovery="none"),
    }.items():
        pruned = Pruner(model, spec, layers, data, method).prune(kept)
        assert {axis: keep.count for axis, keep in pruned.widths.items()} == kept
        with torch.no_grad():
            whole, small = (torch.cat([forward_logits(m, b) for b in batches]) for m in (model, pruned.model))
        divergence[name] = float((whole - small).square().mean())
    assert divergence["obs"] < divergence["magnitude"]


@pytest.mark.parametrize("case", WHOLE)
def test_what_stays_whole_is_said_in_one_line(case: str) -> None:
    spec = trace_widths(build(case), TOKENS)
    part, reason = WHOLE[case]
    (line,) = spec.describe_whole()
    assert part in line
    assert reason in line
    assert ", " in line.partition(" stay whole: ")[0]


def test_an_architecture_without_rules_is_one_line() -> None:
    config = import_transformers().MixtralConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8
    )
    with torch.device("meta"):
        model = import_transformers().MixtralForCausalLM(config)
    with pytest.raises(ConfigError, match=r"type mixtral, only for llama, .* trains with strategy=fedavg") as caught:
        trace_widths(model, TOKENS)
    assert "\n" not in str(caught.value)
