"""Tune a GPTQ model without requantizing it, merge, and write a GPTQ model that computes exactly what was trained.

    python examples/gptq_in_gptq_out.py GPTQ DATA OUTPUT

GPTQ is the folder of a GPTQ model, DATA a file of text or of JSON lines, OUTPUT a folder for the result.
"""

import sys

from transformers import Trainer, TrainingArguments

import quadapt
from quadapt.data import Collator, encode, pad_token_id, read
from quadapt.evaluate import perplexity

gptq, data_file, output = sys.argv[1:]

# Codes, scales and zero-points are those of the file: nothing is rounded anew.
model, tokenizer = quadapt.load(gptq)
rows = read(data_file)
print("before:", perplexity(model, tokenizer, rows, context=64).perplexity)

# code-lora moves codes, here scales too, and leaves whole zero-points whole, as GPTQ's format wants them. No code moves
# until the product of its factors passes half a step, so that it takes a large learning rate.
tuned = quadapt.prepare(model, method="code-lora", rank=8, train_scales=True)
arguments = TrainingArguments(f"{output}-runs", num_train_epochs=1, learning_rate=1e-2, report_to="none")
data = encode(rows, tokenizer, seq_len=64, packing=True).data
Trainer(tuned, arguments, Collator(pad_token_id(tokenizer)), data).train()

# The merge keeps all of it, and the format holds it as it is; what it could not hold would be refused by name.
merged, certificate = quadapt.merge(tuned)
print(certificate)
print(quadapt.export(merged, tokenizer, output, format="gptq"))

again, _ = quadapt.load(output)
print("after:", perplexity(again, tokenizer, rows, context=64).perplexity)
