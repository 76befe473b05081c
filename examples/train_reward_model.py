"""Make a reward model of a quantized language model with trl's RewardTrainer: it gives an answer a score.

    python examples/train_reward_model.py QUANTIZED PAIRS OUTPUT

QUANTIZED is the folder of a model that quadapt has quantized, PAIRS a file of JSON lines with prompt, chosen and
rejected, OUTPUT a folder for the merged reward model.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import quadapt

quantized, pairs_file, output = sys.argv[1:]
cpu = not torch.cuda.is_available()

# The head that scores is new; as in PEFT, `SEQ_CLS` makes it train whole, beside the adapter.
adapter = quadapt.AdapterConfig("qa-lora", r=8, lora_alpha=16, task_type="SEQ_CLS")
arguments = RewardConfig(
    f"{output}/runs", max_length=64, learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=cpu
)
pairs = load_dataset("json", data_files=pairs_file, split="train")
trainer = RewardTrainer(quantized, arguments, train_dataset=pairs, peft_config=adapter)
trainer.train()

merged, certificate = quadapt.merge(trainer.model)
print(certificate)
merged.save_pretrained(output)
tokenizer = trainer.processing_class
tokenizer.save_pretrained(output)

scorer = AutoModelForSequenceClassification.from_pretrained(output)
for answer in ("chosen", "rejected"):
    inputs = tokenizer(pairs[0]["prompt"] + pairs[0][answer], return_tensors="pt")
    print(f"{answer}: {scorer(**inputs).logits[0, 0].item():.4f}")
