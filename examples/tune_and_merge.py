"""Tune a model over 3-bit weights with transformers' Trainer, merge it, and read what the merge kept.

    python examples/tune_and_merge.py MODEL DATA OUTPUT

MODEL is the folder of a dense model, DATA a file of text or of JSON lines, OUTPUT a folder for the result.
"""

import sys

from transformers import AutoTokenizer, Trainer, TrainingArguments

import quadapt
from quadapt.data import Collator, encode, pad_token_id, read

model_folder, data_file, output = sys.argv[1:]

# Rows become sequences of token ids, in which only what is to be answered bears a loss.
tokenizer = AutoTokenizer.from_pretrained(model_folder)
data = encode(read(data_file), tokenizer, seq_len=64, packing=True).data

# The weights are rounded by GPTQ, which needs text to see what rounding does to outputs; the adapter starts at zero.
model = quadapt.prepare(model_folder, method="qa-lora", bits=3, rank=8, calibration=data_file)
arguments = TrainingArguments(f"{output}/runs", num_train_epochs=1, learning_rate=1e-3, report_to="none")
Trainer(model, arguments, Collator(pad_token_id(tokenizer)), data).train()

# QA-LoRA's adapter moves the offsets of groups of weights. These are stored floats, so the merge keeps all of it.
merged, certificate = quadapt.merge(model)
print(certificate)

# The merged model is an ordinary transformers model; once quadapt is imported, from_pretrained loads it.
merged.save_pretrained(output)
tokenizer.save_pretrained(output)
