"""Stock PEFT over a quantized model, in a script that does nothing of ours but import quadapt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quadapt.quant.format import Format

STOCK = """
import sys
import quadapt
assert not {"transformers", "peft"} & set(sys.modules), "importing quadapt imports no heavy package"
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
load = lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(load(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.arange(2, 42).view(2, 20)
losses = []
for _ in range(12):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
model.eval().save_pretrained(sys.argv[2])
again = PeftModel.from_pretrained(load(), sys.argv[2]).eval()
with torch.no_grad():
    equal = torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
print(losses[0], losses[-1], equal, sorted({type(m).__name__ for m in model.modules() if "Lora" in type(m).__name__}))
"""


def test_stock_lora_trains_with_no_code_of_ours_but_the_import(
    quantized_llama: Callable[..., Any], run_python: Callable[..., str], tmp_path: Path
) -> None:
    quantized_llama(Format(bits=4, group_size=32)).save_pretrained(tmp_path / "base")
    printed = run_python(STOCK, str(tmp_path / "base"), str(tmp_path / "adapter")).splitlines()[-1]
    first, last, equal, layers = printed.split(maxsplit=3)
    assert float(last) < 0.7 * float(first)
    assert equal == "True"
    assert "'QuantLoraLinear'" in layers
