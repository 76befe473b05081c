"""Teach a quantized model from answers that are marked as good or bad, by KTO with trl's KTOTrainer.

    python examples/train_by_kto.py QUANTIZED DATA OUTPUT

QUANTIZED is the folder of a model that quadapt has quantized, DATA a file of JSON lines with prompt, completion and
label (true for a good answer), OUTPUT a folder for the merged model.
"""

import sys

import torch
from datasets import load_dataset
from trl import KTOConfig, KTOTrainer

import quadapt

quantized, data_file, output = sys.argv[1:]
cpu = not torch.cuda.is_available()

adapter = quadapt.AdapterConfig("qa-lora", r=8, lora_alpha=16, task_type="CAUSAL_LM")
arguments = KTOConfig(
    f"{output}/runs", max_length=64, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=cpu
)
rows = load_dataset("json", data_files=data_file, split="train")

# What good and bad are measured against is the same model with the adapter switched off.
trainer = KTOTrainer(quantized, args=arguments, train_dataset=rows, peft_config=adapter)
trainer.train()

merged, certificate = quadapt.merge(trainer.model)
print(certificate)
merged.save_pretrained(output)
trainer.processing_class.save_pretrained(output)
