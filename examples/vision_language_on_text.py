"""Tune the language model inside a model that sees (Qwen2-VL, LLaVA, ..) on text; the vision tower stays as it is.

    python examples/vision_language_on_text.py MODEL DATA OUTPUT

MODEL is the folder of the model, DATA a file of text or of JSON lines, OUTPUT a folder for the result.
"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Trainer, TrainingArguments

import quadapt
from quadapt.data import Collator, encode, pad_token_id, read

model_folder, data_file, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_folder)
data = encode(read(data_file), tokenizer, seq_len=64, packing=False).data
dense = AutoModelForImageTextToText.from_pretrained(model_folder)
tower = {name: weight.clone() for name, weight in dense.state_dict().items() if "visual" in name or "vision" in name}

# `part` says which towers are quantized and adapted: text, vision or all; by default the language model alone.
model = quadapt.prepare(dense, part="text", rounding="nearest", bits=4, rank=8)
arguments = TrainingArguments(f"{output}/runs", max_steps=8, learning_rate=1e-3, report_to="none")
Trainer(model, arguments, Collator(pad_token_id(tokenizer)), data).train()
merged, certificate = quadapt.merge(model)
print(certificate)
print("the vision tower is as it was:", all(torch.equal(merged.state_dict()[n], w) for n, w in tower.items()))
merged.save_pretrained(output)
tokenizer.save_pretrained(output)
