"""``fedlp-prune``: from a command line to files that load elsewhere, and one line for whatever is wrong."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

import fedlp
from fedlp import cli
from fedlp.apps import prune as oneshot
from fedlp.config import compose, compose_prune
from fedlp.errors import ConfigError
from fedlp.models.language import import_transformers
from fedlp.pruning.io.model_files import round_weights
from tests.integration.running import TINY, Call, Finished, assert_refused

Once = Callable[..., Finished]
KEYS = {
    *("method", "allocator", "params_before", "params_after", "macs_before", "macs_after", "layers"),
    *("metrics_before", "metrics_after", "wall_time_s", "peak_memory_bytes", "config"),
}
SMALL = ("calibration.examples=64", "dataset.max_test_examples=50")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def text_model(folder: Path) -> tuple[str, ...]:
    return ("model=hf", f"model.path={folder}", "dataset=topics", "dataset.sequence_length=64", *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("allocator", ["dp", "flap", "log_depth"])
def test_a_language_model_becomes_a_folder_that_transformers_loads(
    allocator: str, language_model: Path, tmp_path: Path, call: Call
) -> None:
    out = tmp_path / "pruned"
    target = ("sparsity=0.4", f"allocator={allocator}", f"hydra.run.dir={out}")
    code, printed, progress = call(*text_model(language_model), *target, main=cli.prune_main)
    assert code == 0, progress
    assert "perplexity" in printed
    assert progress.count("layer ") == 6  # one line per layer
    report = json.loads((out / "prune.json").read_text())
    assert set(report) == KEYS
    blocks = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    added = 3 * 2 * 32
    assert report["params_before"] - 0.4 * blocks - 3 * 32 < report["params_after"]
    assert report["params_after"] <= report["params_before"] - 0.4 * blocks + 1e-6
    assert report["params_before"] - report["params_after"] > 0.3 * blocks - added
    assert report["macs_after"] < report["macs_before"]
    assert (out / "layers.png").stat().st_size > 1000
    auto = import_transformers().AutoModelForCausalLM
    stored = auto.from_pretrained(out / "model", trust_remote_code=True)
    assert sum(parameter.numel() for parameter in stored.parameters()) == report["params_after"]


@pytest.mark.slow
def test_the_model_of_a_federated_run_is_pruned_to_a_number_of_macs(once: Once, tmp_path: Path, call: Call) -> None:
    run = once(*TINY)
    whole = json.loads((run.path / "manifest.json").read_text())["expected"]["macs_per_example"]
    out = tmp_path / "pruned"
    arguments = (f"run={run.path}", f"target_macs={0.6 * whole}", f"hydra.run.dir={out}", "pruner.damping=0.01", *SMALL)
    code, printed, errors = call(
        *arguments, "onnx=true", "finetune=full", "finetune.max_examples=64", main=cli.prune_main
    )
    assert code == 0, errors
    assert "accuracy" in printed
    report = json.loads((out / "prune.json").read_text())
    assert 0.5 * whole < report["macs_after"] <= 0.6 * whole + 1
    assert (out / "model" / "model.onnx").is_file()
    assert (out / "model" / "widths.json").is_file()
    assert call(*arguments, main=cli.prune_main)[0] == 2  # never over another result


def test_a_plan_from_outside_is_followed(language_model: Path, tmp_path: Path, call: Call) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("model.layers.1.mlp: 0.5\nmodel.layers.2.mlp: 0.75\n")
    arguments = ("allocator=plan", f"allocator.path={plan}", "target_params=32000", f"hydra.run.dir={tmp_path / 'out'}")
    code, _, errors = call(*text_model(language_model), *arguments, main=cli.prune_main)
    assert code == 0, errors
    layers = {layer["name"]: layer for layer in json.loads((tmp_path / "out" / "prune.json").read_text())["layers"]}
    removed = {name: 1 - layer["kept_units"] / layer["num_units"] for name, layer in layers.items()}
    assert removed["model.layers.2.mlp"] - removed["model.layers.1.mlp"] == pytest.approx(0.25, abs=0.05)
    plan.write_text("model.layers.9.mlp: 0.5\n")
    assert_refused(call(*text_model(language_model), *arguments[:3], main=cli.prune_main), "no prunable layer model")


def test_adapters_are_trained_and_merged(language_model: Path, tmp_path: Path, call: Call) -> None:
    pytest.importorskip("peft")
    tuned = ("finetune=lora", "finetune.max_examples=64", "sparsity=0.3", "allocator=uniform")
    code, _, errors = call(
        *text_model(language_model), *tuned, f"hydra.run.dir={tmp_path / 'out'}", main=cli.prune_main
    )
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "prune.json").read_text())
    stored = import_transformers().AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "model", trust_remote_code=True
    )
    assert sum(p.numel() for p in stored.parameters()) == report["params_after"]


# ---- tokens
@pytest.fixture(scope="module")
def words_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fresh weights and a tokenizer of its own, of 300 words."""
    folder = tmp_path_factory.mktemp("words")
    transformers, tokenizers = import_transformers(), importlib.import_module("tokenizers")
    texts = ["the keeper of the light went down to the sea and back"] + [f"word{n}" for n in range(280)]
    words = {word: number for number, word in enumerate(dict.fromkeys(" ".join(["?", *texts]).split()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_of_hugging_face_reads_its_own_tokens(words_model: Path, tmp_path: Path, call: Call) -> None:
    model = ["model=hf", f"model.path={words_model}"]
    assert compose_prune(["sparsity=0.3", *model]).dataset.tokenizer == str(words_model)
    assert compose([*model, "dataset=topics"]).dataset.tokenizer == str(words_model)
    assert compose(["model=llama_tiny", "dataset=topics"]).dataset.tokenizer == "bytes"
    out = tmp_path / "out"
    target = ("sparsity=0.3", "allocator=uniform", f"hydra.run.dir={out}")
    code, _, errors = call(*text_model(words_model), "dataset.sequence_length=16", *target, main=cli.prune_main)
    assert code == 0, errors
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["dataset"]["tokenizer"] == str(words_model)
    assert len(import_transformers().AutoTokenizer.from_pretrained(out / "model")) > 256


def test_a_model_of_bytes_without_a_tokenizer_reads_bytes(language_model: Path) -> None:
    options = ["sparsity=0.3", "model=hf", f"model.path={language_model}"]
    assert compose_prune(options).dataset.tokenizer == "bytes"
    assert compose_prune([*options, "dataset.tokenizer=gpt2"]).dataset.tokenizer == "gpt2"


def test_a_loss_above_that_of_guessing_is_one_line(words_model: Path, tmp_path: Path, call: Call) -> None:
    transformers = import_transformers()
    model = transformers.LlamaForCausalLM.from_pretrained(words_model)
    model.lm_head.weight.data.mul_(200)  # certain of the wrong tokens, as a model that is fed another tokenizer's
    model.save_pretrained(tmp_path / "model")
    options = (*text_model(tmp_path / "model"), "dataset.tokenizer=bytes", "sparsity=0.3")
    result = call(*options, f"hydra.run.dir={tmp_path / 'out'}", main=cli.prune_main)
    assert_refused(result, "above the 5.55 of a uniform guess among 256 tokens: dataset.tokenizer=bytes is not the one")


# ---- formats
def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "option", "written"), [("float16", "auto", "F16"), ("bfloat16", "auto", "BF16")])
def test_weights_keep_their_format(
    stored: str, option: str, written: str, language_model: Path, tmp_path: Path, call: Call
) -> None:
    transformers = import_transformers()
    model = transformers.LlamaForCausalLM.from_pretrained(language_model)
    model.to(getattr(torch, stored)).save_pretrained(tmp_path / "half")
    out, target = tmp_path / "out", ("sparsity=0.4", "allocator=uniform", "evaluate=false", f"dtype={option}")
    code, _, errors = call(*text_model(tmp_path / "half"), *target, f"hydra.run.dir={out}", main=cli.prune_main)
    assert code == 0, errors
    assert size(out / "model") < 0.8 * size(tmp_path / "half")
    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {written}  # noqa: SIM118
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == stored
    again = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto", trust_remote_code=True)
    assert again.dtype == getattr(torch, stored)


@pytest.mark.slow
def test_another_format_can_be_asked_for(language_model: Path, tmp_path: Path, call: Call) -> None:
    out, target = tmp_path / "out", ("sparsity=0.4", "allocator=uniform", "dtype=bfloat16")
    code, _, errors = call(*text_model(language_model), *target, f"hydra.run.dir={out}", main=cli.prune_main)
    assert code == 0, errors
    assert size(out / "model") < 0.4 * size(language_model)
    assert_refused(call(*text_model(language_model), *target[:2], "dtype=int8", main=cli.prune_main), "dtype=int8")


def test_weights_beyond_a_format_are_one_line() -> None:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, 1e5)
    round_weights(model, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"weight has a number beyond the range of float16; set dtype=bfloat16"):
        round_weights(model, torch.float16)


# ---- bad input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one of sparsity, target_params and target_macs, not none"),
        (("sparsity=0.3", "target_params=1000"), "not sparsity and target_params"),
        (("sparsity=1.5",), r"sparsity=1.5 is not allowed: it must be in \(0, 1\)"),
        (("sparsty=0.5",), "there is no option sparsty; did you mean sparsity"),
        (("sparsity=0.5", "pruner=obd"), "obd"),
        (("sparsity=0.5", "model=fedlp_cnn", "dataset=digits"), "model fedlp_cnn has no trained weights"),
        (("sparsity=0.5", "run=/nowhere"), "run=/nowhere: that is not a run directory"),
        (("sparsity=0.5", "pruner.damping=-1"), "pruner.damping=-1.0 is not allowed"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], words: str, call: Call) -> None:
    assert_refused(call(*arguments, main=cli.prune_main), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("sparsity=0.5", "calibration.examples=1", "dataset.sequence_length=16", "pruner.damping=0"),
            r"has rank \d+, from 16 calib",
        ),
        (("target_params=100",), "out of reach: with one unit in each of the 6 prunable layers"),
        (("target_params=1e9",), "parameters already, no more than the target"),
        (("sparsity=0.5", "calibration.examples=1000000"), "calibration.examples=1000000, but the data set has"),
    ],
)
def test_what_the_model_or_data_cannot_give_is_one_line(
    arguments: tuple[str, ...], words: str, language_model: Path, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_refused(call(*text_model(language_model), *arguments, f"hydra.run.dir={out}", main=cli.prune_main), words)
    assert not (out / "prune.json").exists()


def test_an_unknown_architecture_is_one_line(tmp_path: Path, call: Call) -> None:
    transformers = import_transformers()
    config = transformers.MixtralConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    assert_refused(call(*text_model(tmp_path / "model"), "sparsity=0.3", main=cli.prune_main), "type mixtral")


# ---- real models
@pytest.mark.slow
@pytest.mark.shared
def test_a_real_language_model_loses_a_third_and_stays_good(shared: Path) -> None:
    model = shared / "models" / "lm-3.3m"
    config = compose_prune(
        [
            *("model=hf", f"model.path={model}", "dataset=text", f"dataset.root={shared}/text/tinystories.txt"),
            *(f"dataset.tokenizer={model}", "dataset.max_train_examples=200", "dataset.max_test_examples=40"),
            *("calibration.examples=32", "sparsity=0.33"),
        ]
    )
    subject = oneshot.load_subject(config)
    calibration = oneshot.draw_calibration(config, subject)
    pruner = oneshot.Pruner(
        subject.model, subject.widths, subject.layers, calibration, oneshot.make_method(config.pruner)
    )
    pruned = pruner.prune(oneshot.allocate(config, subject, calibration, pruner))
    before = oneshot.evaluate(subject.model, subject, config)["perplexity"]
    after = oneshot.evaluate(pruned.model, subject, config)["perplexity"]
    assert after < 1.15 * before


class Gated(nn.Module):
    """Convolutions with squeeze-and-excitation and a residual stream: nearly all channels have several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide, self.norm = nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48)
        self.squeeze, self.excite = nn.Conv2d(48, 8, 1), nn.Conv2d(8, 48, 1)
        self.narrow, self.head = nn.Conv2d(48, 16, 1), nn.Linear(16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.stem(inputs).relu()
        wide = self.norm(self.wide(stream)).relu()
        gate = self.excite(self.squeeze(wide.mean((2, 3), keepdim=True)).relu()).sigmoid()
        stream = stream + self.narrow(wide * gate)
        return self.head(stream.mean((2, 3)))


def test_half_of_what_is_prunable_is_half_of_a_network_whose_channels_have_several_readers() -> None:
    torch.manual_seed(0)
    net, data = Gated(), (torch.randn(24, 3, 8, 8), torch.randint(0, 4, (24,)))
    whole = sum(parameter.numel() for parameter in net.parameters())

    def share(**pruner: bool) -> float:
        done = fedlp.prune(net, data, sparsity=0.5, score="magnitude", allocator="uniform", pruner=pruner)
        return sum(parameter.numel() for parameter in done.model.parameters()) / whole

    assert share() == pytest.approx(0.5, abs=0.03)
    assert share(shared=False) > 0.75
