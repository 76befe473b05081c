"""Every command takes a folder that others have quantized, and methods over codes tune it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.gptq_pack_numpy import quantized, read, write
from test_read_gptq import about, packer
from tests.cli.commands import SHORT, byte_tokenizer, give, quadapt, write_data
from torch import nn

import quadapt as library
from quadapt.model.quantize import quantized_layers

CASE: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "version": 2}

METHODS = {
    "qlora": (),
    "qa-lora": (),
    "peqa": (),
    "e2e-qp": (),
    "lota-qaf": ("--omega", "0.5"),
    "lota-qaf without shifts": ("--omega", "0.5", "--no-shift-offsets"),
    "code-lora": (),
    "code-lora and norms": ("--train-also", "norms"),
}
FLOATS = ("qa-lora", "lota-qaf")
"""Methods after whose merge zero-points are no longer whole."""

REFUSED = ("l4q", "lr-qat", "recover", "qat-lora", "loftq", "lq-lora")


@pytest.fixture
def gptq(tmp_path: Path, foreign: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The dense model that `gptq`, a folder in the working folder, means; there are data, too."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return foreign(tmp_path / "gptq", packer(**CASE), about(**CASE))


def test_convert_writes_the_same_model_in_our_own_form(gptq: nn.Module) -> None:
    said = quadapt("convert", "gptq", "--output", "ours")
    shapes = [layer.weight.shape for name, layer in gptq.named_modules() if name.endswith("_proj")]
    stored = [out * (columns * 4 + columns // 32 * 24) + 32 * columns for out, columns in shapes]  # g_idx once a layer
    assert said["bits_per_weight"] == pytest.approx(sum(stored) / sum(out * columns for out, columns in shapes))
    mine, theirs = (library.load(name, dtype="float32")[0] for name in ("ours", "gptq"))
    for name, layer in quantized_layers(mine).items():
        assert layer.quant_weight.digest() == theirs.get_submodule(name).quant_weight.digest(), name
        assert torch.equal(layer.quant_weight.dequantize(), gptq.get_submodule(name).weight), name
    assert quadapt("inspect", "ours", "--verify")["verified"]
    assert quadapt("inspect", "gptq")["layers"] == quadapt("inspect", "ours")["layers"]
    for name, words in (("ours", "in quadapt's own form already"), ("missing", "neither a folder")):
        assert words in give("convert", name, "--output", "again", code=2).error
    assert "keep no digests" in give("inspect", "gptq", "--verify", code=2).error
    measured = [quadapt("eval", name, "--data", "story.txt", "--samples", "0") for name in ("ours", "gptq")]
    assert measured[0]["perplexity"] == measured[1]["perplexity"]


def test_the_three_lines_of_the_readme(gptq: nn.Module) -> None:
    """As they stand there, but for names and a shorter run: a GPTQ model in, a GPTQ model out, and all of it kept."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = next(each for each in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "A_GPTQ_MODEL" in each)
    words = {"A_GPTQ_MODEL": "gptq", "FILE": "story.txt"}
    for line in block.splitlines():
        _, *arguments = (words.get(word, word) for word in line.split())
        more = ("--max-steps", "20", "--dtype", "float32", *SHORT) if arguments[0] == "tune" else ()
        give(*arguments, *more, code=0)
    ids = torch.arange(40).view(2, 20)
    before, merged, out = (
        library.load(each, dtype="float32")[0](ids).logits for each in ("gptq", "merged", "tuned-gptq")
    )
    assert torch.equal(out, merged)
    assert not torch.allclose(out, before, atol=1e-2)
    assert torch.allclose(before, gptq(ids).logits, atol=1e-4)
    about = json.loads(Path("tuned-gptq", "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "gptq"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("gptq")
def test_methods_tune_it_and_merge_exactly(method: str) -> None:
    name, *_ = method.split()
    data = ("--data", "story.txt", "--max-steps", "6", "--dtype", "float32")
    quadapt("tune", "gptq", "--method", name, *data, *SHORT, *METHODS[method], "--output", "tuned")
    ids = torch.arange(40).view(2, 20)
    tuned = library.load("tuned", dtype="float32")[0](ids).logits
    assert not torch.allclose(tuned, library.load("gptq", dtype="float32")[0](ids).logits, atol=1e-4)
    if name == "qlora":
        assert "--format lora" in give("merge", "tuned", "--output", "merged", code=2).error
        return
    said = quadapt("merge", "tuned", "--output", "merged", "--dtype", "float32")
    assert said["certificate"]["verdict"] == "exact"
    merged, base = (library.load(each, dtype="float32")[0] for each in ("merged", "gptq"))
    assert torch.equal(merged(ids).logits, tuned)
    for layer, module in quantized_layers(merged).items():
        before, after = base.get_submodule(layer).layout, module.layout
        assert after.permuted == before.permuted
        assert (after.format == before.format) == (method not in FLOATS)


@pytest.mark.usefixtures("gptq")
def test_what_code_lora_has_tuned_goes_out_as_gptq_again() -> None:
    data = ("--data", "story.txt", "--max-steps", "6", "--dtype", "float32")
    quadapt("tune", "gptq", "--method", "code-lora", *data, *SHORT, "--output", "tuned")
    quadapt("merge", "tuned", "--output", "merged", "--dtype", "float32")
    quadapt("export", "merged", "--format", "gptq", "--output", "again")
    quadapt("export", "tuned", "--format", "gptq", "--output", "at-once")
    ids = torch.arange(40).view(2, 20)
    merged, again, once = (library.load(each, dtype="float32")[0] for each in ("merged", "again", "at-once"))
    assert torch.equal(again(ids).logits, merged(ids).logits)
    assert not torch.equal(again(ids).logits, library.load("gptq", dtype="float32")[0](ids).logits)
    for name, layer in quantized_layers(merged).items():
        for other in (again, once):
            assert other.get_submodule(name).quant_weight.digest() == layer.quant_weight.digest(), name


@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.usefixtures("gptq")
def test_methods_that_need_the_dense_model_say_so(method: str) -> None:
    said = give("tune", "gptq", "--method", method, "--data", "story.txt", *SHORT, "--output", "tuned", code=2)
    assert "dense" in said.error


@pytest.mark.parametrize("method", ["code-lora", "e2e-qp", "peqa", "lota-qaf"])
def test_zero_points_beyond_the_codes_and_scales_of_zero_train(
    method: str, tmp_path: Path, foreign: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of version 1 may hold a zero-point of 16, and a group of zeros a scale of zero."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    case = {**CASE, "version": 1}

    def pack(name: str, W: Any) -> Any:
        if name == "lm_head":
            return None
        found = quantized(W, 4, 32, symmetric=False, act_order=False)
        found["zeros"][0], found["scales"][1] = 16, 0
        parts = write(found, 4, 1)
        return parts, read(parts, 4, 1)

    foreign(tmp_path / "gptq", pack, about(**case))
    base = library.load("gptq", dtype="float32")[0]
    data = ("--data", "story.txt", "--dtype", "float32", "--max-steps", "1", *SHORT)
    quadapt("tune", "gptq", "--method", method, *data, "--lr", "1e-12", "--output", "still")
    ids = torch.arange(40).view(2, 20)
    still = library.load("still", dtype="float32")[0](ids).logits
    if method != "lota-qaf":  # whose marks no learning rate makes small
        assert torch.allclose(still, base(ids).logits, atol=1e-4)
    assert torch.isfinite(still).all()
    quadapt("tune", "gptq", "--method", method, *data, "--max-steps", "6", "--output", "tuned")
    said = quadapt("merge", "tuned", "--output", "merged", "--dtype", "float32")
    assert said["certificate"]["verdict"] == "exact"


@pytest.mark.parametrize(("zero", "method"), [("float", "qa-lora"), ("none", "code-lora")])
def test_a_gguf_file_is_tuned_and_goes_out_as_one(
    zero: str, method: str, tmp_path: Path, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 4 bits with offsets take QA-LoRA by default; those without, whose scales may be negative, code-lora."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    tiny_llama(vocab_size=258, max_position_embeddings=128, bos_token_id=None, eos_token_id=0).save_pretrained("dense")
    byte_tokenizer().save_pretrained("dense")
    quadapt("quantize", "dense", "--rounding", "nearest", "--zero", zero, "--output", "q4")
    quadapt("export", "q4", "--output", "given.gguf")
    data = ("--data", "story.txt", "--max-steps", "6", "--train-scales", *SHORT)
    said = quadapt("tune", "given.gguf", *(data if method == "code-lora" else (*data[:4], *SHORT)), "--output", "tuned")
    assert said["method"] == method
    assert quadapt("merge", "tuned", "--output", "merged")["certificate"]["verdict"] == "exact"
    quadapt("export", "merged", "--output", "out.gguf")
    ids = torch.arange(40).view(2, 20)
    given, merged, out = (library.load(each)[0](ids).logits for each in ("given.gguf", "merged", "out.gguf"))
    assert torch.allclose(out, merged, atol=1e-4)
    assert not torch.allclose(out, given, atol=1e-2)
