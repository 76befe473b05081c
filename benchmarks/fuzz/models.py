"""Tiny folders, whole, of every kind; copies of them are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

STORY = "The fox saw the sea. The owl said: swim, fox, swim! And she swam for 47 days, and came home.\n"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
JOB = """\
output: out
tune:
  model: dense
  data: rows.jsonl
  method: qa-lora
  rank: 4
  learning_rate: 1e-3
  max_steps: 4
  skip: [down_proj]
  packing: false
merge: {}
eval: {data: story.txt, limit: 3}
export: {format: gguf}
"""


def make(folder: Path) -> None:
    """Fill a folder: dense, quantized and merged models, an adapter, a GGUF file, a plan, data, a job."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 258, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0)).save_pretrained(folder / "dense")
    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    known.chat_template = TEMPLATE
    known.save_pretrained(folder / "dense")
    (folder / "story.txt").write_text(STORY * 6)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} + {n} =", "completion": f" {2 * n}"}) + "\n" for n in range(6))
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (folder / "turns.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns * 2}))
    (folder / "list.json").write_text(json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}] * 3))
    (folder / "table.csv").write_text('prompt,completion\n"1 + 1, then =",2\n2 + 2 =,"4 ""four"""\n')
    (folder / "job.yaml").write_text(JOB)
    before = Path.cwd()
    os.chdir(folder)
    try:
        _commands()
    finally:
        os.chdir(before)


def _commands() -> None:
    short = {"seq_len": 16, "batch_size": 2, "gradient_accumulation": 1, "rank": 2, "max_steps": 2}
    _do("quantize", model="dense", output="q4", rounding="nearest")
    _do("tune", model="dense", data="rows.jsonl", output="adapter", **short)
    _do("merge", adapter="adapter", output="merged")
    _do("export", model="merged", output="m.gguf")
    _do("plan", model="dense", budget=3.5, output="plan.json", rank=2)


def _do(command: str, **settings: Any) -> None:
    from benchmarks.fuzz.cases import command as give

    code, said = give(command, settings)
    if code:
        raise RuntimeError(f"{command}: {said}")
