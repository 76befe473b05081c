"""Teach a quantized model preferences and answers at once, by ORPO with trl's ORPOTrainer: it needs no reference.

    python examples/train_by_orpo.py QUANTIZED PAIRS OUTPUT

QUANTIZED is the folder of a model that quadapt has quantized, PAIRS a file of JSON lines with prompt, chosen and
rejected, OUTPUT a folder for the merged model.
"""

import sys

import torch
from datasets import load_dataset
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import quadapt

quantized, pairs_file, output = sys.argv[1:]
cpu = not torch.cuda.is_available()

# This trainer takes a model in memory.
model, tokenizer = quadapt.load(quantized, dtype="float32")
adapter = quadapt.AdapterConfig("qa-lora", r=8, lora_alpha=16, task_type="CAUSAL_LM")
settings = {"max_length": 64, "learning_rate": 1e-3, "remove_unused_columns": False, "report_to": "none"}
arguments = ORPOConfig(f"{output}/runs", logging_steps=1, use_cpu=cpu, **settings)
pairs = load_dataset("json", data_files=pairs_file, split="train")
trainer = ORPOTrainer(model, arguments, train_dataset=pairs, processing_class=tokenizer, peft_config=adapter)
trainer.train()

merged, certificate = quadapt.merge(trainer.model)
print(certificate)
merged.save_pretrained(output)
tokenizer.save_pretrained(output)
