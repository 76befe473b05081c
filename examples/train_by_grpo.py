"""Train a quantized model by a reward for what it writes, by GRPO with trl's GRPOTrainer, and merge what it learned.

    python examples/train_by_grpo.py QUANTIZED PROMPTS OUTPUT

QUANTIZED is the folder of a model that quadapt has quantized, PROMPTS a file of JSON lines with a prompt in each,
OUTPUT a folder for the merged model.
"""

import sys

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

import quadapt

quantized, prompts_file, output = sys.argv[1:]
cpu = not torch.cuda.is_available()


def short_words(completions: list[str], **_: object) -> list[float]:
    """The reward of each answer: the share of its words that are short."""
    words = [completion.split() for completion in completions]
    return [sum(len(word) <= 4 for word in each) / max(1, len(each)) for each in words]


adapter = quadapt.AdapterConfig("qa-lora", r=8, lora_alpha=16, task_type="CAUSAL_LM")
arguments = GRPOConfig(f"{output}/runs", max_completion_length=8, beta=0.04, max_steps=2, report_to="none", use_cpu=cpu)
rows = load_dataset("json", data_files=prompts_file, split="train").select_columns("prompt")
trainer = GRPOTrainer(quantized, short_words, args=arguments, train_dataset=rows, peft_config=adapter)
trainer.train()

merged, certificate = quadapt.merge(trainer.model)
print(certificate)
merged.save_pretrained(output)
trainer.processing_class.save_pretrained(output)
