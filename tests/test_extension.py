"""Pieces of another package, found by its entry points: those of examples/extension, which CONTRIBUTING shows."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTENSION = ROOT / "examples" / "extension"
ENTRIES = tomllib.loads((EXTENSION / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process for which the package is installed: what an installer would write."""
    about = tmp_path / "quadapt_extension-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: quadapt-extension\nVersion: 1.0\n")
    lines = [
        line
        for group, entries in ENTRIES.items()
        for line in (f"[{group}]", *(f"{name} = {where}" for name, where in entries.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return {"PYTHONPATH": f"{ROOT / 'src'}:{EXTENSION}:{tmp_path}"}


USE = """
import numpy as np
import torch
from dataclasses import replace

from peft import PeftModel
from quadapt_extension import Shift
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quadapt
from quadapt.methods import METHODS, method_named
from quadapt.nn.starts import STARTS
from quadapt.quant.ranges import RANGES
from quadapt.quant.storage import Storage

assert "residual-lora" in METHODS and "residual" in STARTS and "inner" in RANGES
assert Storage(scales="bf16").of("scales").name == "bf16"

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, vocab_size=96, max_position_embeddings=64, initializer_range=0.2)
dense = LlamaForCausalLM(config).eval()
dense.save_pretrained("dense")
ids = torch.arange(3, 35)[None]
want = dense(ids).logits

errors = {}
for start, more in (("zero", {}), ("residual", {}), ("again", {"passes": 4})):
    model = LlamaForCausalLM.from_pretrained("dense")
    method = method_named("residual-lora", start=start.replace("again", "residual"), **more)
    model = quadapt.prepare(model, method=method)
    errors[start] = float((model.eval()(ids).logits - want).norm() / want.norm())
assert 0 < errors["residual"] < errors["zero"] and errors["again"] != errors["residual"], errors

model.train()(ids, labels=ids).loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= 0.05 * parameter.grad
trained = model.eval()(ids).logits
model.save_pretrained("adapter")
model.unload().save_pretrained("base")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
assert torch.allclose(again(ids).logits, trained, atol=1e-5)
layer = again.base_model.model.model.layers[0].mlp.down_proj.base_layer
assert layer.quant_weight.layout.storage.scales == "bf16"

base = AutoModelForCausalLM.from_pretrained("base")
report = quadapt.export(base, None, "model.npz", format="npz")
arrays = np.load("model.npz")
name = "model.layers.0.mlp.down_proj.weight"
codes, scales, offsets = (arrays[f"{name}.{part}"] for part in ("codes", "scales", "offsets"))
groups = np.arange(codes.shape[1]) // 32
found = codes * scales[:, groups] + offsets[:, groups]
assert np.array_equal(found, base.model.layers[0].mlp.down_proj.quant_weight.dequantize().numpy())
assert arrays["model.embed_tokens.weight"].shape == (96, 64)
assert "model.npz" in report.path

method = replace(method_named("residual-lora", start="zero"), adapter=Shift())
model = quadapt.prepare(LlamaForCausalLM.from_pretrained("dense"), method=method)
before = model.eval()(ids).logits
model.train()(ids, labels=ids).loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0
            parameter -= 0.05 * parameter.grad
trained = model.eval()(ids).logits
assert not torch.allclose(trained, before, atol=1e-3)
model.save_pretrained("shifted")
model.unload().save_pretrained("shifted-base")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("shifted-base"), "shifted").eval()
assert torch.equal(again(ids).logits, trained)
merged, certificate = quadapt.merge(again)
assert certificate.verdict == "exact"
assert torch.equal(merged(ids).logits, trained)
print("used")
"""


@pytest.mark.slow
def test_pieces_of_another_package_work_like_our_own(installed: dict[str, str], run_python: Callable[..., str]) -> None:
    """They are chosen by name, train, are saved with the base, and are found again by what loads it."""
    assert run_python(USE, **installed).endswith("used\n")


TUNE = """
import json
import sys

sys.path.insert(0, sys.argv[1])
from commands import SHORT, byte_tokenizer, give, quadapt, write_data
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=1, vocab_size=258, max_position_embeddings=128, bos_token_id=None, eos_token_id=0)
LlamaForCausalLM(config).save_pretrained("dense")
byte_tokenizer().save_pretrained("dense")
write_data(Path())

said = give("tune", "--help", code=0).out
assert all(name in said for name in ("residual-lora", "residual", "inner"))
tune = ("tune", "dense", "--data", "story.txt", "--max-steps", 2, *SHORT)
quadapt(*tune, "--method", "residual-lora", "--output", "tuned")
mixed = ("--levels", "int", "--scales", "bf16", "--start", "residual", "--passes", 3, "--range", "inner")
quadapt(*tune, "--method", "qlora", *mixed, "--output", "mixed")
quadapt("quantize", "dense", "--rounding", "nearest", "--range", "inner", "--output", "quantized")
quadapt("export", "quantized", "--format", "npz", "--output", "model.npz")
assert "npz" in give("export", "quantized", "--format", "?", code=0).out
print("tuned")
"""


@pytest.mark.slow
def test_commands_know_pieces_of_another_package(installed: dict[str, str], run_python: Callable[..., str]) -> None:
    assert run_python(TUNE, str(ROOT / "tests" / "cli"), **installed).endswith("tuned\n")


def test_recipes_show_what_the_tests_run() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    written = (EXTENSION / "quadapt_extension.py").read_text()
    assert len(blocks) >= 4
    for block in blocks:
        assert block.strip() in written
    (entries,) = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert entries.strip() in (EXTENSION / "pyproject.toml").read_text()
