"""An adapter of another package, found by its entry point: it trains, is saved and loaded, and merges."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"

ADAPTER = '''
"""Offsets that train one by one, relative to their scale, beside a factor that is drawn once and never trains."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quadapt.nn.adapters import CodesAdapter, Param
from quadapt.nn.adapters.base import zeros
from quadapt.nn.adapters.codes import quantized
from quadapt.quant.autograd import offset_gradient


def ones(tensor, source):
    tensor.fill_(1.0)


@dataclass(frozen=True, kw_only=True)
class Shifted(CodesAdapter):
    extra: ClassVar = ("move", "unit")
    exactness = "exact"
    merged_form = True
    begins = "offsets"

    strength: float = 1.0

    def params(self, layout, rank, *, started=False):
        return {
            "move": Param(shape=(layout.out, layout.groups), init=zeros, group="grid"),
            "unit": Param(shape=(1, 1), init=ones, trains=False),
        }

    def merge(self, source, params, scaling):
        weight = quantized(source)
        move = self.strength * scaling * params["unit"] * params["move"]
        return weight.with_offsets(weight.offsets + move.float(), "fp32")

    def gradients(self, layout, params, scaling, dy, kept, needed):
        assert needed == {"move"}
        return {"move": self.strength * scaling * offset_gradient(dy, kept)}

    def as_lora(self, source, params):
        return None
'''

USE = """
import json, sys
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quadapt.errors import CheckpointError, ExportError
from quadapt.exporters.lora import export_lora
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import declared_params, lora_config
from quadapt.nn.adapters import ADAPTERS
from quadapt.train.trainer import AdapterTrainer

base, folder = sys.argv[1:]
load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
ids = torch.arange(2, 26).view(2, 12)
def say(model):
    with torch.no_grad():
        return model(input_ids=ids).logits

assert "shifted" in ADAPTERS and ADAPTERS["shifted"].kind == "shifted"
model = get_peft_model(load(), lora_config(ADAPTERS["shifted"](strength=0.5), rank=1, alpha=1))
before = say(model)
assert torch.equal(before, say(load()))
trained = {name for name, p in model.named_parameters() if p.requires_grad}
assert trained and all(name.endswith("lora_move.default") for name in trained), trained
grid = [p for p, declared in declared_params(model) if declared.group == "grid"]
assert {id(p) for p in grid} == {id(p) for p in model.parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(grid, lr=1e-2)
losses = []
for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
assert losses[-1] < losses[0], losses
tuned = say(model)
model.save_pretrained(folder)
held = load_file(f"{folder}/adapter_model.safetensors")
assert {name.rpartition(".")[2] for name in held} == {"lora_move", "lora_unit"}, list(held)
written = json.load(open(f"{folder}/adapter_config.json"))["auto_mapping"]["quadapt"]
assert written["kind"] == "shifted" and written["strength"] == 0.5
again = PeftModel.from_pretrained(load(), folder).eval()
assert torch.equal(say(again), tuned)
with again.disable_adapter():
    assert torch.equal(say(again), before)
plain = load()
plain.load_adapter(folder)
assert torch.equal(say(plain), tuned)
try:
    export_lora(again, f"{folder}-lora")
    raise SystemExit("exported as LoRA, which it is not")
except ExportError as error:
    assert "no LoRA" in str(error), error
merged, certificate = merge(again)
assert certificate.verdict == "exact" and torch.equal(say(merged), tuned)
print("done")
"""


def test_an_adapter_of_another_package_trains_is_kept_and_merges(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "shifting.py").write_text(ADAPTER)
    about = tmp_path / "shifting-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shifting\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[quadapt.adapters]\nshifted = shifting:Shifted\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = run_python(USE, str(FIXTURES / "bases" / "int4"), str(tmp_path / "adapter"), PYTHONPATH=path)
    assert printed.splitlines()[-1] == "done"
