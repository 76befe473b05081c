"""Train QA-LoRA over a quantized model with trl's SFTTrainer, merge it, and read what the merge kept.

    python examples/train_by_sft.py QUANTIZED DATA OUTPUT

QUANTIZED is the folder of a model that quadapt has quantized, DATA a file of JSON lines with prompt and completion,
OUTPUT a folder for the result.
"""

import sys

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import quadapt

quantized, data_file, output = sys.argv[1:]
cpu = not torch.cuda.is_available()

# The trainer loads the model by its name: once quadapt is imported, transformers knows quantized folders.
adapter = quadapt.AdapterConfig("qa-lora", r=8, lora_alpha=16, task_type="CAUSAL_LM")
arguments = SFTConfig(f"{output}/runs", max_length=64, learning_rate=1e-3, report_to="none", use_cpu=cpu)
rows = load_dataset("json", data_files=data_file, split="train")
trainer = SFTTrainer(quantized, arguments, train_dataset=rows, peft_config=adapter)
trainer.train()

# A trainer may have wrapped the model for its precision or for several processes; merging takes that off.
merged, certificate = quadapt.merge(trainer.model)
print(certificate)
merged.save_pretrained(output)
trainer.processing_class.save_pretrained(output)
