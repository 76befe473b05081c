"""Teach a quantized model which of two answers is preferred, by DPO with trl's DPOTrainer, and merge what it learned.

    python examples/train_by_dpo.py QUANTIZED PAIRS OUTPUT

QUANTIZED is the folder of a model that quadapt has quantized, PAIRS a file of JSON lines with prompt, chosen and
rejected, OUTPUT a folder for the result. `quadapt tune --objective dpo` does the same from the command line.
"""

import sys

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

import quadapt

quantized, pairs_file, output = sys.argv[1:]
cpu = not torch.cuda.is_available()

adapter = quadapt.AdapterConfig("qa-lora", r=8, lora_alpha=16, task_type="CAUSAL_LM")
arguments = DPOConfig(
    f"{output}/runs", max_length=64, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=cpu
)
pairs = load_dataset("json", data_files=pairs_file, split="train")

# No second model is loaded: with the adapter switched off, the model is the one from before training, and that is
# what DPO compares with.
trainer = DPOTrainer(quantized, args=arguments, train_dataset=pairs, peft_config=adapter)
trainer.train()

for entry in trainer.state.log_history:
    if "rewards/margins" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.4f}, margin {entry['rewards/margins']:.4f}")
merged, certificate = quadapt.merge(trainer.model)
print(certificate)
merged.save_pretrained(output)
trainer.processing_class.save_pretrained(output)
