"""Exported models compute the same where fedlp cannot be imported."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedlp.config import ModelConfig
from fedlp.errors import ConfigError
from fedlp.models import describe_model, forward_logits, state_tensors
from fedlp.models.language import import_transformers
from fedlp.pruning.io.model_files import save_language_model
from fedlp.pruning.tracing.widths import cut_model, trace_widths
from fedlp.types import Keep

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 24, "n_inner": 12, "n_layer": 2, "n_head": 4, "n_positions": 32, "eos_token_id": None}
OPT = {
    "hidden_size": 24,
    "ffn_dim": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", OPT),
    "opt-projected": ("opt", OPT | {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
}
OUTPUTS = {"gpt2": ("attn.c_proj", "mlp.c_proj"), "opt": ("self_attn.out_proj", "fc2")}
TOKENS = torch.arange(24).reshape(2, 12)


@dataclass(frozen=True)
class Cut:
    """Units kept of the hidden size, then of each block's attention and MLP; and whether outputs get a bias."""

    hidden: float
    attention: tuple[int, int]
    mlp: tuple[int, int]
    biases: bool = False
    native: bool = False


CUTS = {
    "whole": Cut(1, (4, 4), (12, 12), native=True),
    "even": Cut(0.5, (2, 2), (7, 7), native=True),
    "uneven": Cut(1, (3, 1), (5, 9), biases=True),
    "biases": Cut(1, (2, 2), (7, 7), biases=True),
    "odd": Cut(0.55, (3, 3), (7, 7)),
}


def cases() -> dict[str, tuple[str, Cut]]:
    """Every model cut evenly and unevenly; the other cuts where they are special."""
    found = {f"{name}-{cut}": (name, CUTS[cut]) for name in MODELS for cut in ("even", "uneven")}
    special = ("llama-whole", "gpt2-whole", "llama-biases", "llama-odd", "gpt2-odd", "opt-odd")
    return found | {f"{name}-{cut}": (name, CUTS[cut]) for name, _, cut in (case.partition("-") for case in special)}


CASES = cases()


def language_model(name: str) -> nn.Module:
    transformers = import_transformers()
    model_type, sizes = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **sizes, vocab_size=50, bos_token_id=None, use_cache=False)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model


def cut_language_model(name: str, cut: Cut) -> nn.Module:
    model = language_model(name)
    spec = trace_widths(model, TOKENS)
    counts = {"hidden": round(cut.hidden * spec.axes["hidden"])}
    attentions = [axis for axis in spec.axes if axis.endswith("attn")]
    mlps = [axis for axis in spec.axes if axis.endswith("mlp")]
    counts |= zip(attentions, cut.attention, strict=True)
    counts |= zip(mlps, cut.mlp, strict=True)
    small = cut_model(model, spec, {axis: Keep.window(1, count, spec.axes[axis]) for axis, count in counts.items()})
    if cut.biases:
        for path, module in small.named_modules():
            outputs = OUTPUTS.get(MODELS[name][0], ("self_attn.o_proj", "mlp.down_proj"))
            if path.endswith(outputs):
                module.bias = nn.Parameter(torch.randn(counts["hidden"]))
    return small


CHECK = """
import sys
sys.modules["fedlp"] = sys.modules["torchvision"] = None  # torchvision's build need not fit torch's
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
root = Path(sys.argv[1])
tokens = load_file(root / "tokens.safetensors")["tokens"]
mask = torch.ones_like(tokens)
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    trust = {"trust_remote_code": True} if (folder / "modeling_pruned.py").exists() else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    found = {"generated": model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)}
    static = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    found["static"] = model.generate(tokens, attention_mask=mask, **static)
    found["logits"] = model(tokens).logits.detach()
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **trust)
    found["again"] = again(tokens).logits.detach()
    again.train()(tokens, labels=tokens).loss.backward()
    found["trained"] = torch.tensor([bool(p.grad.isfinite().all()) for p in again.parameters()])
    fresh = AutoModelForCausalLM.from_config(model.config, **trust)
    found["fresh"] = torch.stack([p.detach().abs().amax() for p in fresh.parameters()])
    if trust:
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except RuntimeError as error:
            found["refused"] = torch.tensor("ignore_mismatched_sizes" in str(error))
    save_file(found, folder.with_suffix(".found"))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    """Return a folder of exported models, on which CHECK has run, and the models."""
    root = tmp_path_factory.mktemp("exported")
    models = {case: cut_language_model(name, cut) for case, (name, cut) in CASES.items()}
    for case, model in models.items():
        save_language_model(model, root / case, None)
    save_file({"tokens": TOKENS}, root / "tokens.safetensors")
    environment = os.environ | {"HF_HOME": str(root / ".home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", CHECK, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, models


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_reloaded_language_model_computes_and_generates_the_same(
    case: str, exported: tuple[Path, dict[str, nn.Module]]
) -> None:
    root, models = exported
    found, model = load_file(root / f"{case}.found"), models[case]
    with torch.no_grad():
        logits = forward_logits(model, TOKENS)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["again"], found["logits"])
    mask = torch.ones_like(TOKENS)
    generated = model.generate(TOKENS, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(found["generated"], generated)
    assert torch.equal(found["static"], generated)
    assert found["trained"].all()
    assert found["fresh"].max() < 10


@pytest.mark.parametrize("case", CASES)
def test_native_files_where_a_config_describes_the_model(
    case: str, exported: tuple[Path, dict[str, nn.Module]]
) -> None:
    root, models = exported
    name, cut = CASES[case]
    native = cut.native
    config = json.loads((root / case / "config.json").read_text())
    assert (root / case / "modeling_pruned.py").exists() is not native
    assert config["use_cache"]
    card = (root / case / "README.md").read_text()
    assert ("trust_remote_code=True" in card) is not native
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert config["architectures"] == [("" if native else "Pruned") + type(models[case]).__name__]
    assert (root / case / "generation_config.json").exists()
    stored = load_file(root / case / "model.safetensors")
    assert list(stored) == sorted(state_tensors(models[case]))
    if native:
        assert not {"auto_map", "pruned_blocks"} & set(config)
    else:
        assert config["auto_map"] == {"AutoModelForCausalLM": f"modeling_pruned.{config['architectures'][0]}"}
        assert [block["intermediate_size"] for block in config["pruned_blocks"]] == list(cut.mlp)
        assert [block["key_value_heads"] for block in config["pruned_blocks"]] == list(cut.attention)
        neurons = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(config["model_type"], "intermediate_size")
        blocks = [config | config["per_layer_config"].get(str(number), {}) for number in range(len(cut.mlp))]
        assert [block[neurons] for block in blocks] == list(cut.mlp)
        assert load_file(root / f"{case}.found")["refused"], "the native class took the weights"
    assert config["model_type"] == MODELS[name][0]


def load_exported(folder: Path) -> nn.Module:
    config = ModelConfig("hf", source="hf", options={"path": str(folder), "pretrained": True})
    return describe_model(config, TOKENS.shape[1:], int(TOKENS.max()) + 1, "language").build(0).eval()


def test_exported_model_is_pruned_and_exported_again(tmp_path: Path) -> None:
    model = cut_language_model("qwen3", CUTS["uneven"])
    save_language_model(model, tmp_path / "first", None)
    again = load_exported(tmp_path / "first")
    spec = trace_widths(again, TOKENS)
    assert [size for axis, size in spec.axes.items() if axis != "hidden"] == [3, 5, 2, 9]  # queries of the one KV head
    smaller = cut_model(again, spec, {"model.layers.0.self_attn": Keep.first(1, 3)})
    save_language_model(smaller, tmp_path / "second", None)
    last = load_exported(tmp_path / "second")
    assert [block["key_value_heads"] for block in last.config.pruned_blocks] == [1, 1]  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(forward_logits(last, TOKENS), forward_logits(smaller, TOKENS))


def test_a_folders_own_code_is_not_run(tmp_path: Path) -> None:
    save_language_model(cut_language_model("qwen3", CUTS["uneven"]), tmp_path, None)
    (tmp_path / "modeling_pruned.py").write_text("raise SystemExit('run')")
    load_exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(ConfigError, match="'Other'"):
        load_exported(tmp_path)


def test_even_cut_that_only_some_configs_can_express(tmp_path: Path) -> None:
    cut = Cut(1, (3, 3), (7, 7))
    for name in ("llama", "mistral"):  # LLaMA's wants query heads to divide the hidden size
        save_language_model(cut_language_model(name, cut), tmp_path / name, None)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert ("pruned_blocks" in config) is (name == "llama")
        assert config["num_attention_heads"] == {"llama": 8, "mistral": 6}[name]


def test_half_precision_and_tokenizer_are_kept(tmp_path: Path) -> None:
    transformers = import_transformers()
    tokenizers = importlib.import_module("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    model = cut_language_model("llama", CUTS["even"]).to(torch.bfloat16)
    save_language_model(model, tmp_path / "model", str(tmp_path / "words"))
    assert load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("b")["input_ids"] == [1]


def test_language_model_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    config = import_transformers().MptConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=9)
    with pytest.raises(ConfigError, match="type mpt cannot be exported, only llama, mistral"):
        save_language_model(import_transformers().MptForCausalLM(config), tmp_path, None)
    model = language_model("llama")
    with pytest.raises(ConfigError, match=r"tokenizer .*nowhere cannot be loaded") as caught:
        save_language_model(model, tmp_path / "model", str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_language_model(model, tmp_path / "file", None)
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.zeros(48))
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be exported"):
        save_language_model(model, tmp_path / "model", None)
