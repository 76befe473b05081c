"""Load a quantized model, measure it, train an adapter over it, put the adapter away, go on with it, and measure again.

    python examples/continue_adapter.py QUANTIZED DATA ADAPTER

QUANTIZED is the folder of a model that quadapt has quantized or merged, DATA a file, ADAPTER a folder to write.
"""

import sys

from peft import PeftModel
from transformers import Trainer, TrainingArguments

import quadapt
from quadapt.data import Collator, encode, pad_token_id, read
from quadapt.evaluate import perplexity

quantized, data_file, adapter = sys.argv[1:]

# The codes stay codes when they are loaded: the model takes as much memory as its files.
model, tokenizer = quadapt.load(quantized)
rows = read(data_file)
print("before:", perplexity(model, tokenizer, rows, context=64).perplexity)

arguments = TrainingArguments(f"{adapter}/runs", num_train_epochs=1, learning_rate=1e-3, report_to="none")
data, collator = encode(rows, tokenizer, seq_len=64, packing=True).data, Collator(pad_token_id(tokenizer))

# Over a model that is quantized already, `prepare` rounds nothing; it puts the adapter on.
tuned = quadapt.prepare(model, method="qa-lora", rank=8)
Trainer(tuned, arguments, collator, data).train()
tuned.save_pretrained(adapter)

# PEFT loads the adapter like any other, to train on; quadapt checks that the base is the one it was trained over.
base, _ = quadapt.load(quantized)
tuned = PeftModel.from_pretrained(base, adapter, is_trainable=True)
Trainer(tuned, arguments, collator, data).train()
tuned.save_pretrained(adapter)
print("after:", perplexity(tuned.eval(), tokenizer, rows, context=64).perplexity)
